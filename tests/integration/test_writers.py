"""Two who write the same rows: in one order, so that neither waits for the other while the other waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.chunks import prepare
from chunkmill.domain.spaces import OnLong, Pooling, SpaceSpec
from chunkmill.errors import EngineError
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.store import staging
from chunkmill.store.write import relax_durability, write_vectors
from tests.conftest import FIRST_IDS
from tests.support.waiting import PATIENCE, until

SPEC = SpaceSpec("local", "m", "sha256:00", 8, 256, Pooling.MEAN, normalize=True)
GATE = 7
"""Key of an advisory lock that only these tests know."""

Write = Callable[[sa.Connection, Sequence[str]], object]


def register(db: sa.Engine, **more: str) -> Space:
    with db.begin() as conn:
        return registry.register(conn, SPEC, **more)


def write(conn: sa.Connection, space: Space, texts: Sequence[str], value: float = 1.0) -> int:
    n = len(texts)
    hashes = [prepare((text, text), 0).content_hash for text in texts]
    vectors = np.full((n, 8), value, np.float32)
    made_by = space.spec.fingerprint
    return write_vectors(conn, space, made_by, hashes, np.ones(n, np.int32), np.zeros(n, np.bool_), vectors)


def hold_before_the_second_row(db: sa.Engine, table: str) -> None:
    """Each transaction that inserts into the table stops before its second row until the gate is open."""
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE "
                "n int := coalesce(nullif(current_setting('test.rows', true), ''), '0')::int + 1; BEGIN "
                "PERFORM set_config('test.rows', n::text, true); "
                f"IF n = 2 THEN PERFORM pg_advisory_xact_lock_shared({GATE}); END IF; RETURN NEW; END $$"
            )
        )
        conn.execute(sa.text(f"CREATE TRIGGER hold BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION hold()"))


def waiting(db: sa.Engine) -> int:
    """How many transactions of this database wait for a lock: the gate, or another transaction's row."""
    with db.begin() as conn:
        return conn.execute(
            sa.text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        ).scalar_one()


def meet(db: sa.Engine, table: str, write: Write, texts: Sequence[str]) -> list[object]:
    """Two transactions write the texts, each from its own end; both have begun before either writes its second row."""
    hold_before_the_second_row(db, table)

    def run(given: Sequence[str]) -> object:
        with db.begin() as conn:
            return write(conn, given)

    with ThreadPoolExecutor(2) as threads:
        with db.begin() as gate:
            gate.execute(sa.text(f"SELECT pg_advisory_xact_lock({GATE})"))
            both = [threads.submit(run, given) for given in (texts, texts[::-1])]
            until(lambda: waiting(db) == 2 or any(one.done() for one in both))
        return [one.result(PATIENCE) for one in both]


def test_two_workers_that_share_contents_do_not_deadlock(db: sa.Engine) -> None:
    space = register(db)
    texts = [f"text {i}" for i in range(4)]
    new = meet(db, space.table_name, lambda conn, given: write(conn, space, given), texts)
    assert sorted(map(str, new)) == ["0", "4"]  # the other finds all of them there


def test_two_producers_that_share_texts_do_not_deadlock(db: sa.Engine) -> None:
    """A deadlock of theirs would be tried again, and cost each a second."""

    def add(conn: sa.Connection, texts: Sequence[str]) -> None:
        prepared = [prepare((text, text), 0) for text in texts]
        staging.add_contents(conn, {chunk.content_hash: chunk.text for chunk in prepared})

    meet(db, "contents", add, [f"text {i}" for i in range(4)])
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT count(*) FROM contents")).scalar_one() == 4


def test_two_producers_of_one_collection_do_not_deadlock(client: Client, db: sa.Engine) -> None:
    client.enqueue([("z", "registers the collection")], collection="docs")

    def merge(conn: sa.Connection, ids: Sequence[str]) -> None:
        staging.stage(conn, [prepare((name, f"a text of {name}"), 0) for name in ids])
        staging.merge_chunks(
            conn, collection_id=FIRST_IDS["collections"], job_id=FIRST_IDS["jobs"], on_long=OnLong.TRUNCATE
        )

    meet(db, "chunks", merge, ["a", "b", "c", "d"])
    assert client.audit("docs").chunks == 5


@pytest.mark.parametrize(("storage", "value"), [("halfvec", 70_000.0), ("halfvec", np.nan), ("vector", np.inf)])
def test_what_the_column_cannot_hold_is_refused_at_the_door(db: sa.Engine, storage: str, value: float) -> None:
    """70,000 is a number in float32 and infinite in half precision."""
    space = register(db, storage=storage)
    with pytest.raises(EngineError, match="not finite"), db.begin() as conn:
        write(conn, space, ["a text"], value)


def test_only_the_transaction_that_asks_for_it_does_not_wait_for_the_disk(db: sa.Engine) -> None:
    """The connection goes back into the pool, and what is written on it next must be safe."""

    def durability(conn: sa.Connection) -> str:
        return str(conn.execute(sa.text("SHOW synchronous_commit")).scalar_one())

    with db.begin() as conn:
        usual = durability(conn)
    assert usual != "off"
    with db.connect() as conn:
        with conn.begin():
            relax_durability(conn)
            assert durability(conn) == "off"
        with conn.begin():
            assert durability(conn) == usual


def test_two_producers_that_meet_a_new_model_get_one_space(db: sa.Engine) -> None:
    def register_once() -> Space:
        with db.begin() as conn:
            return registry.register(conn, SPEC)

    with ThreadPoolExecutor(1) as threads:
        with db.begin() as conn:
            mine = registry.register(conn, SPEC)
            other = threads.submit(register_once)
            until(lambda: other.done() or waiting(db) == 1)
            assert not other.done()
        assert other.result(PATIENCE) == mine
