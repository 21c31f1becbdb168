"""Vectors into Postgres: our own function beside pgvector-python's COPY row by row, and beside executemany INSERT."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from pgvector.psycopg import register_vector

from chunkmill.db.connect import raw
from chunkmill.models import DEFAULT_SPEC
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.store.write import relax_durability, write_vectors
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import temporary_stack
from chunkmill_workers.benchmarks.stats import Measurement, Target, add_ratios, interleave

TRANSACTION_ROWS = 4096
COLUMNS = ("content_hash", "n_tokens", "truncated", "embedding")
OURS = "chunkmill write_vectors"
STAGED = "pgvector-python COPY, row by row, the same staging"
COPY = "pgvector-python COPY, row by row, no staging"
INSERT = "SQLAlchemy executemany INSERT"
GROUP = f"{DEFAULT_SPEC.dimensions} dimensions, one connection"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one transaction: n digests, and arrays of ``(n,)`` and ``(n, dimensions)``."""

    hashes: list[bytes]
    n_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    vectors: NDArray[np.float32]


def run(*, rounds: int, quick: bool, say: Say) -> dict[str, Any]:
    """The result. All contenders write new rows into tables with the same columns and key."""
    transactions = {OURS: 2 if quick else 20, STAGED: 1 if quick else 5, COPY: 1 if quick else 5, INSERT: 1}
    say("starting Postgres")
    with temporary_stack() as servers, servers.db() as db:
        with db.begin() as conn:
            space = registry.register(conn, DEFAULT_SPEC)
            conn.execute(sa.text(f"CREATE TABLE peer_vectors (LIKE {space.table_name} INCLUDING ALL)"))
        peer_table = sa.table("peer_vectors", *map(sa.column, COLUMNS))
        with db.connect() as conn, db.connect() as peer:
            register_vector(raw(peer))
            peer.rollback()

            def ours(rows: Rows) -> None:
                relax_durability(conn)
                fields = (rows.hashes, rows.n_tokens, rows.truncated, rows.vectors)
                assert write_vectors(conn, space, space.spec.fingerprint, *fields) == len(rows.hashes)
                conn.commit()

            def copy(rows: Rows) -> None:
                relax_durability(peer)
                _copy_rows(peer, "peer_vectors", rows)
                peer.commit()

            def staged(rows: Rows) -> None:
                relax_durability(peer)
                create = "CREATE TEMP TABLE IF NOT EXISTS staged (LIKE peer_vectors INCLUDING STORAGE)"
                peer.execute(sa.text(f"{create} ON COMMIT DELETE ROWS"))
                _copy_rows(peer, "staged", rows)
                peer.execute(sa.text("INSERT INTO peer_vectors SELECT * FROM staged ON CONFLICT DO NOTHING"))
                peer.commit()

            def insert(rows: Rows) -> None:
                relax_durability(peer)
                given = zip(rows.hashes, rows.n_tokens.tolist(), rows.truncated.tolist(), rows.vectors, strict=True)
                peer.execute(sa.insert(peer_table), [dict(zip(COLUMNS, row, strict=True)) for row in given])
                peer.commit()

            seconds = _measure(
                db, space, {OURS: ours, STAGED: staged, COPY: copy, INSERT: insert}, transactions, rounds, say
            )
        versions = servers.versions
    measurements = [
        Measurement(
            GROUP,
            name,
            "rows/s",
            [transactions[name] * TRANSACTION_ROWS / taken for taken in seconds[name]],
            target=Target(60_000) if name == OURS else None,
            details={"rows_per_round": transactions[name] * TRANSACTION_ROWS},
        )
        for name in transactions
    ]
    for peer_name in (STAGED, COPY, INSERT):
        add_ratios(measurements, peer_name, only=OURS)
    settings = {
        "rows_per_transaction": TRANSACTION_ROWS,
        "fsync": "on",
        "synchronous_commit": "off, as the worker writes",
        "staging": "a temporary table, then INSERT ON CONFLICT DO NOTHING; without it one existing row fails all",
    }
    return document("write", measurements, settings=settings, versions=versions)


def _measure(
    db: sa.Engine,
    space: Space,
    writers: dict[str, Callable[[Rows], None]],
    transactions: dict[str, int],
    rounds: int,
    say: Say,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after a warm-up. Before each, both tables are emptied and flushed."""
    vectors = np.random.default_rng(0).standard_normal((TRANSACTION_ROWS, space.spec.dimensions), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    prepared: dict[str, list[Rows]] = {}

    def prepare(name: str) -> None:
        prepared[name] = [_rows(vectors) for _ in range(transactions[name])]
        with db.begin() as conn:
            conn.execute(sa.text(f"TRUNCATE peer_vectors, {space.table_name}"))
        with db.begin() as conn:
            conn.execute(sa.text("CHECKPOINT"))

    def contend(name: str) -> Callable[[], None]:
        def write_all() -> None:
            for rows in prepared[name]:
                writers[name](rows)

        return write_all

    contenders = {name: contend(name) for name in writers}
    for name, contender in contenders.items():
        prepare(name)
        contender()
    return interleave(contenders, rounds, say, before=prepare)


def _rows(vectors: NDArray[np.float32]) -> Rows:
    """Rows with new hashes. The vectors are always the same, which makes no difference to COPY or the key."""
    n = len(vectors)
    hashes = [os.urandom(32) for _ in range(n)]
    return Rows(hashes, np.full(n, 64, np.int32), np.zeros(n, np.bool_), vectors)


def _copy_rows(conn: sa.Connection, table: str, rows: Rows) -> None:
    """Write rows as the documentation of pgvector-python shows it."""
    target = f"COPY {table} (content_hash, n_tokens, truncated, embedding) FROM STDIN WITH (FORMAT BINARY)"
    with raw(conn).cursor() as cursor, cursor.copy(target) as copy:
        copy.set_types(["bytea", "int4", "bool", "vector"])
        for row in zip(rows.hashes, rows.n_tokens.tolist(), rows.truncated.tolist(), rows.vectors, strict=True):
            copy.write_row(row)
