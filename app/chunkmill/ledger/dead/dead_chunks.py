"""The dead list: chunks of a job that got no vector, each with its reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa

from chunkmill.db.schema import DeadChunkRow
from chunkmill.domain.planning import DeadChunk, too_long_reason
from chunkmill.domain.results import DeadDetails, DeadEntry, Standing
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import JobState
from chunkmill.errors import NotFound
from chunkmill.ledger.work import attempts
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.spaces import registry

KILLS_WORKERS = "kills_workers"


@dataclass(frozen=True, slots=True)
class DeadContent:
    """A content that the engine could not embed, or that the policy refuses."""

    content_hash: bytes
    code: str
    reason: str


def refused_contents(on_long: OnLong, truncated: Iterable[tuple[bytes, int]]) -> list[DeadContent]:
    """The contents that a job refuses, although another job had them cut and embedded.

    ``truncated`` are the ``(content_hash, n_tokens)`` of cut texts. Only the policy ``reject`` refuses them.
    """
    if on_long is not OnLong.REJECT:
        return []
    return [DeadContent(content_hash, "too_long", too_long_reason(n_tokens)) for content_hash, n_tokens in truncated]


def add_refused(conn: sa.Connection, job_id: int, dead: Sequence[DeadChunk]) -> None:
    """Chunks refused at the door, which were never stored."""
    if dead:
        conn.execute(
            sa.insert(DeadChunkRow),
            [{"job_id": job_id, "chunk_id": d.chunk_id, "code": d.code, "reason": d.reason} for d in dead],
        )


def add_contents(conn: sa.Connection, lease: Lease, dead: Sequence[DeadContent]) -> None:
    """Name the chunks of every dead content, in the transaction that completes its ChunkBatch.

    A chunk that is too long under the ``reject`` policy leaves the collection again, as if it had been
    refused at the door. Any other keeps its place, shows as missing in the audit and fails the job.
    """
    if not dead:
        return
    facts = {
        "job": lease.job_id,
        "collection": lease.collection_id,
        "hashes": [d.content_hash for d in dead],
        "codes": [d.code for d in dead],
        "reasons": [d.reason for d in dead],
    }
    conn.execute(
        sa.text(
            "INSERT INTO dead_chunks (job_id, chunk_id, content_hash, code, reason) "
            "SELECT :job, c.chunk_id, c.content_hash, d.code, d.reason "
            "FROM unnest(CAST(:hashes AS bytea[]), CAST(:codes AS text[]), CAST(:reasons AS text[])) "
            "     AS d(content_hash, code, reason) "
            "JOIN chunks c ON c.content_hash = d.content_hash AND c.collection_id = :collection "
            "ON CONFLICT DO NOTHING"
        ),
        facts,
    )
    conn.execute(
        sa.text(
            "DELETE FROM chunks c USING unnest(CAST(:hashes AS bytea[]), CAST(:codes AS text[])) "
            "AS d(content_hash, code) WHERE d.code = 'too_long' AND c.content_hash = d.content_hash "
            "AND c.collection_id = :collection AND c.job_id = :job"
        ),
        facts,
    )


@dataclass(frozen=True, slots=True)
class Which:
    """Entries of the dead list: those to which all that is given applies."""

    ids: tuple[int, ...] | None = None
    job_id: int | None = None
    collection: str | None = None
    code: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if name == "ids" else value for name, value in given.items() if value is not None}

    @property
    def sql(self) -> str:
        return " AND ".join(_WHICH[name] for name in self.facts) or "true"


_WHICH = {
    "ids": "d.id = ANY(CAST(:ids AS bigint[]))",
    "job_id": "d.job_id = :job_id",
    "collection": "k.name = :collection",
    "code": "d.code = :code",
}
LISTED = "dead_chunks d JOIN jobs j ON j.id = d.job_id JOIN collections k ON k.id = j.collection_id"


def count_codes(conn: sa.Connection, which: Which) -> dict[str, int]:
    """How many entries have each code, the most frequent first."""
    rows = conn.execute(
        sa.text(f"SELECT d.code, count(*) AS n FROM {LISTED} WHERE {which.sql} GROUP BY d.code ORDER BY 2 DESC, 1"),
        which.facts,
    )
    return {row.code: row.n for row in rows}


def entries(conn: sa.Connection, which: Which, *, limit: int | None = None) -> list[DeadEntry]:
    """Newest first."""
    rows = conn.execute(
        sa.text(
            "SELECT d.*, j.state AS job_state, j.sealed_at IS NOT NULL AS sealed, j.space_id, k.name AS collection, "
            f"c.content_hash AS hash_now FROM {LISTED} "
            "LEFT JOIN chunks c ON c.collection_id = j.collection_id AND c.chunk_id = d.chunk_id "
            f"WHERE {which.sql} ORDER BY d.id DESC LIMIT :limit"
        ),
        {**which.facts, "limit": limit},
    ).all()
    asked = defaultdict(list)
    for row in rows:
        if row.content_hash is not None:
            asked[row.space_id].append(row.content_hash)
    embedded = {(space_id, h) for space_id, hashes in asked.items() for h in _embedded(conn, space_id, hashes)}
    return [_entry(row, embedded=(row.space_id, row.content_hash) in embedded) for row in rows]


def details(conn: sa.Connection, dead_id: int, *, with_text: bool) -> DeadDetails:
    """All that is known of one entry. Raises :class:`NotFound`."""
    found = entries(conn, Which(ids=(dead_id,)))
    if not found:
        raise NotFound(f"there is no dead chunk {dead_id}; `chunkmill dead list` shows those there are.")
    (entry,) = found
    content_hash = bytes.fromhex(entry.content_hash or "")
    metadata = conn.execute(
        sa.text(
            "SELECT c.metadata FROM chunks c JOIN collections k ON k.id = c.collection_id "
            "WHERE k.name = :collection AND c.chunk_id = :chunk AND c.content_hash = :hash"
        ),
        {"collection": entry.collection, "chunk": entry.chunk_id, "hash": content_hash},
    ).scalar_one_or_none()
    stored = conn.execute(
        sa.text(
            "SELECT length(text) AS characters, octet_length(text) AS bytes, CASE WHEN :wanted THEN text END AS text "
            "FROM contents WHERE content_hash = :hash"
        ),
        {"hash": content_hash, "wanted": with_text},
    ).one_or_none()
    died = attempts.died_with(conn, entry.job_id, content_hash) if content_hash and entry.code == KILLS_WORKERS else ()
    if stored is None:
        return DeadDetails(entry, metadata, None, None, tuple(died))
    return DeadDetails(entry, metadata, stored.characters, stored.bytes, tuple(died), stored.text)


def _embedded(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> Iterable[bytes]:
    table = registry.get(conn, space_id).table_name
    return conn.execute(
        sa.text(f"SELECT content_hash FROM {table} WHERE content_hash = ANY(:hashes)"), {"hashes": list(hashes)}
    ).scalars()


def _entry(row: sa.Row[Any], *, embedded: bool) -> DeadEntry:
    if row.content_hash is None or row.code == "too_long":
        standing = Standing.REFUSED
    elif row.hash_now is None:
        standing = Standing.DELETED
    elif row.hash_now != row.content_hash:
        standing = Standing.REPLACED
    else:
        standing = Standing.EMBEDDED if embedded else Standing.MISSING
    return DeadEntry(
        id=row.id,
        job_id=row.job_id,
        job_state=JobState(row.job_state),
        sealed=row.sealed,
        collection=row.collection,
        chunk_id=row.chunk_id,
        content_hash=row.content_hash.hex() if row.content_hash is not None else None,
        code=row.code,
        reason=row.reason,
        standing=standing,
        created_at=row.created_at,
    )
