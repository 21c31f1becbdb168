"""Postgres breaks off, refuses or is full in the middle of a worker's work: nothing is lost, doubled or charged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.db.connect import create_db, raw
from chunkmill.db.retry import is_transient, transact
from chunkmill.domain.states import JobState
from chunkmill.errors import StoreLimit, StoreUnavailable
from chunkmill.ledger.work import chunk_batches
from chunkmill.settings import Settings
from chunkmill_workers.local import pipeline
from chunkmill_workers.local.attempt import LocalAttempt
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.process.lease import LeaseKeeper
from tests.support.cutting_proxy import Cut, CuttingProxy, cutting_proxy
from tests.support.waiting import PATIENCE, Call, together, until

CHUNKS = [(f"id-{i}", f"a text about subject {i}") for i in range(40)]


@pytest.fixture
def proxy(settings: Settings) -> Iterator[CuttingProxy]:
    with cutting_proxy(settings.require_database_url()) as started:
        yield started


@pytest.fixture
def behind(settings: Settings, engines: Engines, proxy: CuttingProxy) -> Iterator[WorkerContext]:
    """A worker's context whose connections go through the proxy."""
    db = create_db(proxy.url, role="worker")
    yield WorkerContext(settings, db, engines, LeaseKeeper(db, 60), name="behind-the-proxy")
    db.dispose()


def ledger(db: sa.Engine) -> tuple[Any, ...]:
    """(state, charged attempts, deaths, contents booked, contents computed again, rows in the space)."""
    with db.begin() as conn:
        space = conn.execute(sa.text("SELECT 'vectors_' || id FROM spaces")).scalar_one()
        batch = "SELECT state, attempt - (max_attempts - 5), deaths FROM chunk_batches"
        booked = "SELECT sum(contents), sum(recomputed) FROM usage"
        return (
            *conn.execute(sa.text(batch)).one(),
            *conn.execute(sa.text(booked)).one(),
            conn.execute(sa.text(f"SELECT count(*) FROM {space}")).scalar_one(),
        )


@pytest.mark.parametrize("answer_lost", [False, True], ids=["before", "answer lost"])
@pytest.mark.parametrize(
    "words", [b"COPY vectors_", b"SET state = $1, n_embedded", b"INSERT INTO usage", b"SELECT c.content_hash, c.text"]
)
def test_a_connection_cut_anywhere_is_made_again_and_the_transaction_run_again(
    words: bytes, answer_lost: bool, behind: WorkerContext, proxy: CuttingProxy, client: Client, db: sa.Engine
) -> None:
    job = client.enqueue(CHUNKS, collection="docs")
    proxy.cut = Cut(words, answer_lost)
    assert run_chunk_batch(behind, 1) is TaskResult.COMPLETED
    assert proxy.cut.struck == 1
    assert ledger(db) == ("completed", 1, 0, 40, 0, 40)
    assert client.job(job.id).state is JobState.COMPLETED
    assert client.audit("docs").complete


def test_a_commit_whose_answer_is_lost_is_neither_lost_nor_doubled(
    behind: WorkerContext, proxy: CuttingProxy, client: Client, db: sa.Engine
) -> None:
    """The last transaction committed, and the worker cannot know: run again, it finds its own completion."""
    job = client.enqueue(CHUNKS, collection="docs")
    behind.engines.load_default(behind.db)
    armed: list[Cut] = []

    def arm(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "SET state = %(completed)s" in statement and not armed:
            armed.append(Cut(b"COMMIT", answer_lost=True))
            proxy.cut = armed[0]

    sa.event.listen(behind.db, "after_cursor_execute", arm)
    assert run_chunk_batch(behind, 1) is TaskResult.COMPLETED
    assert armed[0].struck == 1
    state, charged, deaths, contents, again, rows = ledger(db)
    assert (state, charged, deaths, rows) == ("completed", 1, 0, 40)
    assert contents + again == 40
    assert client.job(job.id).state is JobState.COMPLETED


@pytest.mark.parametrize(("sqlstate", "what"), [("53100", "disk full"), ("40P01", "deadlock"), ("57P03", "starting")])
def test_a_refusal_that_passes_is_waited_out(
    sqlstate: str, what: str, context: WorkerContext, client: Client, db: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """As Postgres words it, from inside the write itself; it goes on for three tries."""
    client.enqueue(CHUNKS, collection="docs")
    with db.begin() as conn:
        space = conn.execute(sa.text("SELECT 'vectors_' || id FROM spaces")).scalar_one()
        conn.execute(sa.text("CREATE SEQUENCE refusals"))
        conn.execute(
            sa.text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                f"IF nextval('refusals') <= 3 THEN RAISE EXCEPTION '{what}' USING ERRCODE = '{sqlstate}'; END IF; "
                "RETURN NULL; END $$"
            )
        )
        conn.execute(
            sa.text(f"CREATE TRIGGER refuse BEFORE INSERT ON {space} FOR EACH STATEMENT EXECUTE FUNCTION refuse()")
        )
    with caplog.at_level(logging.INFO):
        assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    assert ledger(db) == ("completed", 1, 0, 40, 0, 40)
    said = [record.message for record in caplog.records if record.name == "chunkmill.db.retry"]
    assert len(said) == 2  # once when it begins, once when it is over
    assert what in said[0]
    assert "after 4 tries" in said[1]


def test_what_does_not_pass_is_charged_and_said(context: WorkerContext, client: Client, db: sa.Engine) -> None:
    client.enqueue(CHUNKS, collection="docs")
    with db.begin() as conn:
        space = conn.execute(sa.text("SELECT 'vectors_' || id FROM spaces")).scalar_one()
        conn.execute(sa.text(f"ALTER TABLE {space} ADD CONSTRAINT never CHECK (false) NOT VALID"))
    assert run_chunk_batch(context, 1) is TaskResult.FAILED
    with db.begin() as conn:
        state, attempt, most, error = conn.execute(
            sa.text("SELECT state, attempt, max_attempts, error FROM chunk_batches")
        ).one()
    assert (state, attempt, most) == ("available", 1, 5)
    assert "CheckViolation" in error
    assert "subject" not in error  # no text, not even in the database's words


def test_a_lost_network_is_noticed_before_a_lease_is_over(db: sa.Engine) -> None:
    """What libpq was told: the probes of an idle connection in seconds, the wait for an answer in milliseconds."""
    with db.connect() as conn:
        told = {name: int(value) for name, value in raw(conn).info.get_parameters().items() if value.isdigit()}
    probed = told["keepalives_idle"] + told["keepalives_interval"] * told["keepalives_count"]
    assert probed == told["tcp_user_timeout"] / 1000 < Settings.model_fields["lease_seconds"].default
    assert probed > 5  # a network may hiccup


def test_a_worker_that_leaves_does_not_wait_for_postgres(settings: Settings, engines: Engines) -> None:
    db = create_db("postgresql+psycopg://nobody@127.0.0.1:1/nothing", role="worker")
    context = WorkerContext(settings, db, engines, LeaseKeeper(db, 60), name="w")
    threading.Timer(0.5, context.stopping.set).start()
    assert run_chunk_batch(context, 1) is TaskResult.NOT_OURS


def test_a_real_deadlock_of_two_transactions_ends_in_both_done(db: sa.Engine, client: Client) -> None:
    client.enqueue([("a", "one"), ("b", "two")], collection="docs")
    met = threading.Barrier(2, timeout=PATIENCE)

    def crosswise(first: str, second: str) -> int:
        tries = 0

        def work(conn: sa.Connection) -> None:
            nonlocal tries
            tries += 1
            update = sa.text("UPDATE chunks SET job_id = job_id WHERE chunk_id = :id")
            conn.execute(update, {"id": first})
            if tries == 1:
                met.wait()
            conn.execute(update, {"id": second})

        transact(db, work, what="crosswise")
        return tries

    assert sorted(together(lambda: crosswise("a", "b"), lambda: crosswise("b", "a"))) == [1, 2]


def test_two_enqueues_in_a_deadlock_both_commit(client: Client, db: sa.Engine) -> None:
    """Another session holds a row that this enqueue wants, and wants one that it has; Postgres undoes the enqueue."""
    client.enqueue([("a", "first a"), ("z", "first z")], collection="docs")
    with db.connect() as other, db.connect() as watcher:
        other.execute(sa.text("SET deadlock_timeout = '10min'"))  # so that the enqueue is the victim
        other.execute(sa.text("UPDATE chunks SET metadata = '{}' WHERE chunk_id = 'z'"))
        enqueue = Call(lambda: client.enqueue([("a", "second a"), ("z", "second z")], collection="docs"))
        waiting = "wait_event_type = 'Lock' AND datname = current_database()"
        waits = f"SELECT EXISTS (SELECT FROM pg_stat_activity WHERE {waiting})"
        until(lambda: (watcher.rollback(), watcher.execute(sa.text(waits)).scalar_one())[1])
        other.execute(sa.text("UPDATE chunks SET metadata = '{}' WHERE chunk_id = 'a'"))
        other.commit()
        enqueue.result()
    with db.begin() as conn:
        contents = conn.execute(sa.text("SELECT count(*) FROM contents WHERE text LIKE 'second%'")).scalar_one()
    assert contents == 2
    assert client.jobs()[0].chunks == 2


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (psycopg.errors.DeadlockDetected(), True),
        (psycopg.errors.DiskFull(), True),
        (psycopg.errors.AdminShutdown(), True),
        (psycopg.errors.TooManyConnections(), True),
        (psycopg.errors.ReadOnlySqlTransaction(), True),
        (psycopg.OperationalError("connection refused"), True),
        (sa.exc.TimeoutError("QueuePool limit"), True),
        (psycopg.errors.QueryCanceled(), False),
        (psycopg.errors.LockNotAvailable(), False),
        (psycopg.errors.ConfigurationLimitExceeded(), False),
        (psycopg.errors.UndefinedTable(), False),
        (psycopg.errors.InsufficientPrivilege(), False),
        (psycopg.errors.InvalidPassword(), False),
        (psycopg.errors.UniqueViolation(), False),
        (psycopg.DataError("bad value"), False),
        (ValueError("not of Postgres"), False),
    ],
)
def test_what_passes_by_itself(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient
    if isinstance(error, psycopg.Error):
        assert is_transient(sa.exc.DBAPIError("SELECT", {}, error)) is transient


def test_vectors_that_a_crash_took_back_are_embedded_again_uncharged(
    context: WorkerContext, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits do not wait for the disk, so a crash may undo a write that this process counts on."""
    monkeypatch.setattr(pipeline, "FLUSH_ROWS", 8)
    many = [(f"id-{i}", f"a text about subject {i} " + "with many words " * 30) for i in range(40)]
    job = client.enqueue(many, collection="docs")
    flush, lost = LocalAttempt.flush, []

    def crashes_after(self: LocalAttempt) -> None:
        flush(self)
        if not lost:
            with db.begin() as conn:
                space = conn.execute(sa.text("SELECT 'vectors_' || id FROM spaces")).scalar_one()
                lost.append(conn.execute(sa.text(f"DELETE FROM {space}")).rowcount)

    monkeypatch.setattr(LocalAttempt, "flush", crashes_after)
    assert run_chunk_batch(context, 1) is TaskResult.RELEASED
    assert lost[0] > 0
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    state, charged, deaths, _, _, rows = ledger(db)
    assert (state, charged, deaths, rows) == ("completed", 1, 0, 40)
    assert client.job(job.id).state is JobState.COMPLETED


def limited(db: sa.Engine, *settings: str) -> None:
    """Connections that are made from now on have these settings."""
    with db.begin() as conn:
        name = conn.execute(sa.text("SELECT current_database()")).scalar_one()
        for setting in settings:
            conn.execute(sa.text(f"ALTER DATABASE {name} SET {setting}"))


def slow(db: sa.Engine, statement: str) -> None:
    """What the trigger of ``statement`` is about takes longer than any limit."""
    wait = """
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_sleep(600);
            RETURN NULL;
        END $$
    """
    with db.begin() as conn:
        conn.execute(sa.text(wait))
        conn.execute(sa.text(f"CREATE TRIGGER wait {statement} FOR EACH STATEMENT EXECUTE FUNCTION wait()"))


def attempts(db: sa.Engine) -> list[tuple[Any, ...]]:
    with db.begin() as conn:
        columns = "state, attempt, deaths, error_code, error"
        return [tuple(row) for row in conn.execute(sa.text(f"SELECT {columns} FROM chunk_batches ORDER BY id"))]


def vectors_table(db: sa.Engine) -> str:
    with db.begin() as conn:
        return str(conn.execute(sa.text("SELECT 'vectors_' || id FROM spaces")).scalar_one())


@pytest.mark.parametrize("what", ["read texts", "complete"])
def test_what_cannot_keep_a_statement_timeout_is_charged_with_the_name_of_the_setting(
    what: str, context: WorkerContext, client: Client, db: sa.Engine
) -> None:
    client.enqueue(CHUNKS, collection="docs")
    client.enqueue([("other", "another text")], collection="other")
    context.engine_for(context.engines.load_default(context.db))
    locked = {"read texts": "contents", "complete": vectors_table(db)}[what]
    with db.begin() as other:
        limited(db, "statement_timeout = '100ms'")
        context.db.dispose()
        other.execute(sa.text(f"LOCK TABLE {locked} IN {'ACCESS EXCLUSIVE' if locked == 'contents' else 'SHARE'} MODE"))
        assert run_chunk_batch(context, 1) is TaskResult.FAILED
    charged, untouched = attempts(db)
    assert charged[:4] == ("available", 1, 0, "store_limit")
    words = (what, "write vectors") if what == "complete" else (what,)  # a slow machine writes before it completes
    limit = "Postgres ended it: canceling statement due to statement timeout."
    assert any(f"{word}: {limit}" in charged[4] for word in words), charged[4]
    assert "ALTER ROLE ... SET statement_timeout" in charged[4]
    assert untouched[:2] == ("available", 0)


def test_a_claim_that_waits_for_a_lock_too_long_ends_and_is_said(
    context: WorkerContext, client: Client, db: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    client.enqueue(CHUNKS, collection="docs")
    limited(db, "lock_timeout = '50ms'")
    context.db.dispose()
    with db.begin() as other:
        other.execute(sa.text("SELECT FROM chunk_batches WHERE id = 1 FOR UPDATE"))
        assert run_chunk_batch(context, 1) is TaskResult.NOT_OURS
    assert "ChunkBatch 1 was not claimed" in caplog.text
    assert "lock_timeout of this role or database is too low" in caplog.text
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED


def test_a_session_that_a_limit_ends_is_no_outage(db: sa.Engine) -> None:
    """transaction_timeout closes the connection as a restart does; run again, it would be closed again for ever."""
    tries = []

    def work(conn: sa.Connection) -> None:
        tries.append(conn)
        # In one statement: between two, the session would be idle when it ends, which is told as an outage is.
        sleep = """
            WITH set AS MATERIALIZED (SELECT set_config('transaction_timeout', '50ms', true) AS limited)
            SELECT pg_sleep(600) FROM set WHERE limited <> ''
        """
        conn.execute(sa.text(sleep))

    with pytest.raises(StoreLimit, match=r"sleeper: Postgres ended it: .*transaction_timeout of this role"):
        transact(db, work, what="sleeper")
    assert len(tries) == 5


def test_the_watchdog_sees_tries_that_a_limit_ends(context: WorkerContext, client: Client) -> None:
    """Waiting for Postgres is no hang while it is away; a Postgres that answers each time is not away."""
    client.enqueue(CHUNKS, collection="docs")
    with context.db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, 1, owner="w", lease_seconds=60)
    assert lease is not None
    seen = []

    def work(conn: sa.Connection) -> None:
        seen.append(context.leases.stillest())
        if len(seen) < 3:
            conn.execute(sa.text("SET LOCAL statement_timeout = '20ms'"))
            conn.execute(sa.text("SELECT pg_sleep(600)"))

    with context.leases.holding(lease):
        context.transact(work, "sleep")
        after, _ = context.leases.stillest()
    assert seen[0] == (0.0, 0)
    assert 0 < seen[1][0] < seen[2][0]
    assert seen[2][1] == lease.chunk_batch_id
    assert after < seen[2][0]


def test_a_producer_whose_jobs_end_takes_too_long_leaves_it_to_the_poller(
    settings: Settings, db: sa.Engine, client: Client
) -> None:
    slow(db, "AFTER UPDATE OF finished_at ON jobs")
    limited(db, "statement_timeout = '200ms'")
    client._db.dispose()
    job = client.enqueue([], collection="docs")
    assert job.state is JobState.RUNNING


def refuses_copies(db: sa.Engine, sqlstate: str, times: int) -> None:
    """The first COPYs into ``chunk_batches`` fail, inside the COPY itself."""
    refuse = f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('refusals') <= {times} THEN
                RAISE EXCEPTION 'as told' USING ERRCODE = '{sqlstate}';
            END IF;
            RETURN NULL;
        END $$
    """
    with db.begin() as conn:
        conn.execute(sa.text("CREATE SEQUENCE refusals"))
        conn.execute(sa.text(refuse))
        trigger = "BEFORE INSERT ON chunk_batches FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
        conn.execute(sa.text(f"CREATE TRIGGER refuse {trigger}"))


def test_a_deadlock_inside_a_copy_is_run_again(db: sa.Engine, client: Client) -> None:
    refuses_copies(db, "40P01", 2)
    assert client.enqueue(CHUNKS, collection="docs").chunks == 40
    assert len(attempts(db)) == 1


@pytest.mark.parametrize(
    ("sqlstate", "error", "words"),
    [
        ("53100", StoreUnavailable, r"Postgres refused \(53100\): as told"),
        ("57014", StoreLimit, "statement_timeout of this role or database is too low"),
        ("XX000", StoreUnavailable, r"Postgres refused \(XX000\): as told"),
        ("25006", StoreUnavailable, "is read-only"),
    ],
)
def test_an_error_inside_a_copy_is_one_of_ours(
    sqlstate: str, error: type[StoreUnavailable], words: str, db: sa.Engine, client: Client
) -> None:
    refuses_copies(db, sqlstate, 1)
    with pytest.raises(error, match=words):
        client.enqueue(CHUNKS, collection="docs")
    assert client.enqueue(CHUNKS, collection="docs").chunks == 40


def test_the_command_says_an_error_inside_a_copy_in_one_line(
    db: sa.Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses_copies(db, "53100", 1)
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    file = tmp_path / "chunks.jsonl"
    file.write_text('{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
    result = CliRunner().invoke(cli, ["enqueue", str(file), "--collection", "docs"])
    assert result.exit_code == 1
    assert "Postgres refused (53100): as told" in result.output
    assert "Traceback" not in result.output
