"""A backup, and its return on another server, in another database, in place of another installation."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.cli.__main__ import cli
from chunkmill.client.outbox import Deliverer
from chunkmill.db.connect import create_db, migrate, migration_level
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.embedded import Stack, StackStatus
from chunkmill.ledger.work import chunk_batches
from chunkmill.poller.indexer import Indexer
from chunkmill.poller.reembedding import Reembedder
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store import indexing
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.process.lease import LeaseKeeper
from chunkmill_workers.provider.flow import StepDelayed
from chunkmill_workers.provider.steps import _STEPS
from tests.conftest import TEMPLATE, admin, url_of
from tests.integration.conftest import Runner
from tests.integration.test_downgrades import SPEC, differences, schema_of
from tests.openai_server import OpenAIServer
from tests.support.corridor import MODEL, corridor
from tests.support.corridor_scene import Scene
from tests.support.embedded_homes import folder_for_homes
from tests.support.installations import install_as_before


def command(*words: str | Path, url: str, redis_url: str = "redis://127.0.0.1:1/0", **env: str) -> Result:
    variables = {"DATABASE_URL": url, "REDIS_URL": redis_url, **env}
    return CliRunner().invoke(cli, [str(word) for word in words], env=variables)


def document(*words: str | Path, url: str, **env: str) -> dict[str, Any]:
    result = command(*words, "--json", url=url, **env)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def refusal(*words: str | Path, url: str, **env: str) -> str:
    result = command(*words, url=url, **env)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def url(settings: Settings) -> str:
    return settings.require_database_url()


@pytest.fixture
def copy(stack: StackStatus) -> Iterator[str]:
    """The URL of a second database, as ``chunkmill migrate`` makes it."""
    admin(stack, f"CREATE DATABASE restored TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
    yield url_of(stack, "restored")
    admin(stack, "DROP DATABASE restored WITH (FORCE)")


@contextmanager
def opened(url: str) -> Iterator[sa.Engine]:
    db = create_db(url, role="test", pool_size=1)
    yield db
    db.dispose()


def ask(url: str, query: str) -> Any:
    with opened(url) as db, db.begin() as conn:
        return conn.execute(sa.text(query)).scalar_one()


def rows_of(url: str) -> dict[str, int]:
    """Table → its number of rows, of all tables that a backup holds."""
    left_out = "'serving_indexes', 'serving_tail', 'segments', 'schema_compatibility'"
    with opened(url) as db, db.begin() as conn:
        tables = conn.execute(
            sa.text(
                f"""
                SELECT relname FROM pg_class
                WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' AND relpersistence = 'p'
                  AND relname NOT IN ({left_out}) AND relname !~ '^segment_'
                """
            )
        ).scalars()
        return {table: conn.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one() for table in tables.all()}


def test_a_backup_comes_back_on_another_server_and_its_work_goes_on(
    runner: Runner, settings: Settings, engines: Engines, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two collections, two spaces, keywords, a serving index, and a job that a worker holds."""
    monkeypatch.setattr(indexing, "MIN_ROWS", 20)
    client, file = runner.client, tmp_path / "all.dump"
    done = client.enqueue([(f"c{i}", f"text {i}", {"n": i}) for i in range(30)], collection="docs")
    runner.finish(done)
    client.keywords("docs", language="english")
    with runner.context.db.begin() as conn:
        half = registry.register(conn, SPEC, storage="halfvec")
        conn.execute(sa.text(f"INSERT INTO {half.table_name} VALUES ('\\x00', 1, false, '[1,2,3,4,5,6,7,8]')"))
    Indexer(runner.context.db, settings).round()
    other = client.enqueue([("x", "another"), ("y", "and one more")], collection="other", priority="high")
    runner.finish(other)
    open_job = client.enqueue([(f"o{i}", f"open {i}") for i in range(5)], collection="docs")
    with runner.context.db.begin() as conn:
        [held] = conn.execute(sa.text("SELECT id FROM chunk_batches WHERE state = 'available'")).scalars()
        assert chunk_batches.claim_if_due(conn, held, owner="a worker of then", lease_seconds=3600)
    vector = client.vectors("docs", ["c7"])["c7"]
    best = [hit.chunk_id for hit in client.search(vector, collection="docs", k=5)]
    assert ask(url, "SELECT count(*) FROM segments") > 0

    made = document("backup", file, url=url)
    assert (made["collections"], made["chunks"], made["open_jobs"]) == (2, 37, 1)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]

    with folder_for_homes("cm-") as folder:
        there = Stack(folder / "home", fsync=False).up()
        assert ask(there.database_url, "SELECT to_regnamespace('chunkmill') IS NULL")
        back = document("restore", file, url=there.database_url)
        assert (back["collections"], back["chunks"], back["open_jobs"]) == (2, 37, 1)
        assert back["stopped_lanes"] == []
        assert back["taken_at"][:10] == made["taken_at"][:10]
        assert rows_of(there.database_url) == rows_of(url)
        own = Settings.from_env(
            database_url=there.database_url, redis_url=there.redis_url, lease_seconds=3.0, chunk_batch_size=4
        )
        with opened(url) as source, opened(there.database_url) as restored:
            assert _without_segments(differences(schema_of(restored), schema_of(source))) == {}
        with working(own, there.database_url, engines) as beside:
            again = beside.client
            assert [hit.chunk_id for hit in again.search(vector, collection="docs", k=5)] == best
            assert beside.finish(again.job(open_job.id)).state == "completed"
            [attempts] = [[entry.outcome for entry in again.attempts(open_job.id)]]
            assert attempts == ["completed"], "the worker of then did not die, and its attempt is not charged"
            assert ask(there.database_url, "SELECT sum(deaths) FROM chunk_batches") == 0
            assert again.audit("docs").complete
            new = again.enqueue([("new", "a new text")], collection="docs")
            assert new.id > open_job.id + 1000, "an id that was given after the backup is not given again"
            beside.finish(new)
            assert Indexer(beside.context.db, own).round() == 1
            assert ask(there.database_url, "SELECT count(*) FROM serving_indexes WHERE is_ready") == 1
            assert [hit.chunk_id for hit in again.search(vector, collection="docs", k=5)] == best
            assert ask(there.database_url, "SELECT count(*) FROM chunkmill_collections.docs") == 36


def _without_segments(shown: dict[str, Any]) -> dict[str, Any]:
    """The differences that are not about the table of a segment."""
    left = {}
    for kind, sides in shown.items():
        kept = {side: [row for row in rows if "segment_" not in repr(row)] for side, rows in sides.items()}
        if any(kept.values()):
            left[kind] = kept
    return left


# What was sent to a provider after the backup


@pytest.mark.parametrize("state", [State.GATHERED, pytest.param(State.UPLOADED, marks=pytest.mark.slow)])
def test_what_was_sent_after_the_backup_is_taken_up_and_not_paid_again(
    stage: Scene,
    server: OpenAIServer,
    url: str,
    copy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
) -> None:
    server.control(in_progress_seconds=3600.0)
    texts = stage.texts(6)
    job = stage.enqueue(texts)
    with monkeypatch.context() as patch:
        patch.setitem(_STEPS, state, _not_yet)
        stage.run_until(lambda: [batch["state"] for batch in stage.corridor.batches()] == [state])
    document("backup", tmp_path / "b.dump", url=url)
    stage.run_until(lambda: stage.corridor.batches()[0]["state"] == State.SUBMITTED)
    assert len(stage.batches()) == 1

    # The disaster is now. Where it is restored, nothing is sent before somebody says so.
    back = document("restore", tmp_path / "b.dump", url=copy)
    assert back["stopped_lanes"] == ["openai"]
    server.control(in_progress_seconds=0.0)
    own = {name: getattr(stage.corridor.settings, name) for name in stage.corridor.settings.model_fields_set}
    with corridor(Settings.from_env(**{**own, "database_url": copy}), server, openai_request_inputs=4) as again:
        restored = Scene(again, stage.name)
        for _ in range(3):
            again.turn()
        assert len(stage.batches()) == 1
        (lane,) = [lane for lane in again.client.lanes() if lane.is_stopped]
        assert (lane.route, lane.stop_code) == (Route.OPENAI, "restored")
        assert "would be paid for again" in str(lane.stop_reason)
        again.client.resume_lane(Route.OPENAI)
        [ended] = restored.finish(again.client.job(job.id))
        assert ended.state == "completed"
        again.check_vectors(texts)
    assert len(stage.batches()) == 1
    assert stage.bill(texts) == dict.fromkeys(texts, 1)


def test_what_waited_at_the_backup_is_not_sent_again_until_somebody_says_so(
    stage: Scene, server: OpenAIServer, url: str, copy: str, tmp_path: Path
) -> None:
    """Both paid routes: the backup knows nothing of what was sent later, so nobody but a person can decide."""
    texts, plain = stage.texts(6), stage.texts(4, first=10)
    job, sync = stage.enqueue(texts), stage.enqueue(plain, route="openai-sync", collection="plain")
    document("backup", tmp_path / "b.dump", url=url)
    stage.finish(job, sync)
    charged = len(server.charges())

    back = document("restore", tmp_path / "b.dump", url=copy)

    assert back["stopped_lanes"] == ["openai", "openai-sync"]
    own = {name: getattr(stage.corridor.settings, name) for name in stage.corridor.settings.model_fields_set}
    with corridor(Settings.from_env(**{**own, "database_url": copy}), server, openai_request_inputs=4) as again:
        for _ in range(5):
            again.turn()
        assert len(server.charges()) == charged
        for route in (Route.OPENAI, Route.OPENAI_SYNC):
            again.client.resume_lane(route)
        Scene(again, stage.name).finish(again.client.job(job.id), again.client.job(sync.id))
        assert again.client.audit("docs").complete
        assert again.client.audit("plain").complete
    assert set(stage.bill(texts | plain).values()) == {2}, "a person has said that it may be paid again"


@pytest.mark.parametrize("was_in", ["auto", "outbox", "reembedding", "served"])
def test_a_poller_brings_no_paid_work_from_anywhere_before_somebody_says_so(
    stage: Scene, server: OpenAIServer, url: str, copy: str, tmp_path: Path, was_in: str
) -> None:
    """Two lanes, and work that is in neither of them at the backup, or that a poller moves from one to the other."""
    client, texts = stage.corridor.client, stage.texts(6)
    if was_in == "auto":
        stage.enqueue(texts, route="auto")
        [lane] = stage.corridor.rows("SELECT DISTINCT route FROM chunk_batches")
        assert lane == {"route": "openai"}, "the other lane has no work"
    elif was_in == "outbox":
        with stage.corridor.db.begin() as conn:
            stage.enqueue(texts, route="auto", within=conn)
        assert stage.corridor.one("SELECT count(*) FROM chunk_batches") == 0
    elif was_in == "reembedding":
        stage.finish(stage.enqueue(texts))
        client.reembed("docs", to=MODEL, dimensions=4)
        assert stage.corridor.one("SELECT count(*) FROM jobs WHERE state IN ('enqueueing', 'running')") == 0
    else:
        with stage.corridor.db.begin() as conn:
            conn.execute(
                sa.text("""
                    INSERT INTO served_batches (name, tenant, asked, state, input_file, expires_at)
                    SELECT 'batch_' || state, 't', '{"route": "auto"}', state, 'f', now() + interval '1 day'
                    FROM (VALUES ('validating'), ('completed')) AS s (state)
                """)
            )
    document("backup", tmp_path / "b.dump", url=url)
    charged = len(server.charges())

    back = document("restore", tmp_path / "b.dump", url=copy)

    assert back["stopped_lanes"] == ["openai", "openai-sync"]
    own = {name: getattr(stage.corridor.settings, name) for name in stage.corridor.settings.model_fields_set}
    with corridor(Settings.from_env(**{**own, "database_url": copy}), server, openai_request_inputs=4) as again:
        reembedder, deliverer = Reembedder(again.db, again.settings), Deliverer(again.db, again.settings, _no_bell)
        for _ in range(5):
            deliverer.round()
            reembedder.round()
            again.turn()
        assert len(server.charges()) == charged


def test_a_restore_stops_no_paid_lane_of_work_that_stays_local_or_has_ended(
    stage: Scene, runner: Runner, url: str, copy: str, tmp_path: Path
) -> None:
    stage.finish(stage.enqueue(stage.texts(3)), stage.enqueue(stage.texts(3, first=5), route="openai-sync"))
    runner.client.enqueue(
        [("a", "one"), ("b", "two")], collection="local", model=runner.context.settings.embedding_model
    )
    document("backup", tmp_path / "b.dump", url=url)
    back = document("restore", tmp_path / "b.dump", url=copy)
    assert (back["open_jobs"], back["stopped_lanes"]) == (1, [])


def _no_bell(_: sa.Connection) -> None:
    """A poller rings too."""


def _not_yet(*_: object) -> None:
    raise StepDelayed(0.0)


# What a restore refuses, and what it leaves alone


def test_a_damaged_file_changes_nothing(runner: Runner, url: str, copy: str, tmp_path: Path) -> None:
    runner.finish(runner.client.enqueue([(f"c{i}", f"text {i}" * 50) for i in range(40)], collection="docs"))
    whole, cut, none = tmp_path / "whole.dump", tmp_path / "cut.dump", tmp_path / "none.dump"
    document("backup", whole, url=url)
    cut.write_bytes(whole.read_bytes()[: -(whole.stat().st_size // 3)])
    none.write_text("SELECT 1")
    before = rows_of(copy)

    assert "the backup is damaged, and nothing was restored" in refusal("restore", cut, url=copy)
    assert "cannot be read as a backup" in refusal("restore", none, url=copy)

    assert rows_of(copy) == before
    with opened(copy) as db, db.begin() as conn:
        current, head = migration_level(conn)
        assert current == head
    document("restore", whole, url=copy)
    assert rows_of(copy) == rows_of(url)


def test_a_restore_deletes_no_installation_that_is_not_named_for_it(
    runner: Runner, url: str, copy: str, tmp_path: Path, settings: Settings
) -> None:
    file = tmp_path / "b.dump"
    runner.finish(runner.client.enqueue([("a", "one"), ("b", "two")], collection="docs"))
    document("backup", file, url=url)
    assert "is there already" in refusal("backup", file, url=url)
    assert "does not exist" in refusal("backup", tmp_path / "nowhere" / "b.dump", url=url)
    document("restore", file, url=copy)
    with opened(copy) as db, db.begin() as conn:
        conn.execute(sa.text("INSERT INTO collections (name, space_id) SELECT 'mine', min(id) FROM spaces"))
        conn.execute(sa.text("CREATE TABLE vectors_77 (content_hash bytea)"))  # of a space that the backup lacks
    assert "holds an installation with data" in refusal("restore", file, url=copy)
    assert "pass --yes" in refusal("restore", file, "--replace", url=copy)
    worker = create_db(copy, role="worker", pool_size=1)
    with worker.connect():
        said = refusal("restore", file, "--replace", "--yes", url=copy)
    worker.dispose()
    assert "processes of Chunkmill are connected" in said
    assert "1 connection as worker" in said
    assert ask(copy, "SELECT count(*) FROM collections") == 2

    document("restore", file, "--replace", "--yes", url=copy)

    assert rows_of(copy) == rows_of(url)
    assert ask(copy, "SELECT to_regclass('vectors_77') IS NULL")


@pytest.mark.parametrize("kind", ["table", "view", "sequence", "function"])
def test_a_restore_deletes_nothing_of_another_program_that_has_the_same_schema(
    runner: Runner, stack: StackStatus, url: str, tmp_path: Path, kind: str
) -> None:
    """There is no installation in the database, so nothing of Chunkmill's could be deleted by mistake."""
    file = tmp_path / "b.dump"
    runner.finish(runner.client.enqueue([("a", "one"), ("b", "two")], collection="docs"))
    document("backup", file, url=url)
    made = {
        "table": "TABLE chunkmill.notes AS SELECT 1 AS n",
        "view": "VIEW chunkmill.notes AS SELECT 1 AS n",
        "sequence": "SEQUENCE chunkmill.notes",
        "function": "FUNCTION chunkmill.notes() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    }[kind]
    there = "to_regproc('chunkmill.notes')" if kind == "function" else "to_regclass('chunkmill.notes')"
    admin(stack, "CREATE DATABASE shared")
    try:
        target = url_of(stack, "shared")
        with opened(target) as db, db.begin() as conn:
            conn.execute(sa.text("CREATE SCHEMA chunkmill"))
            conn.execute(sa.text(f"CREATE {made}"))
        for options in ((), ("--replace", "--yes")):
            said = refusal("restore", file, *options, url=target)
            assert "not Chunkmill's in the schema 'chunkmill'" in said
            assert "notes" in said
            assert "run CREATE DATABASE shared_restored; and name it in DATABASE_URL" in said
        assert ask(target, f"SELECT {there} IS NOT NULL")
        assert ask(target, "SELECT count(*) FROM pg_class WHERE relnamespace = CAST('chunkmill' AS regnamespace)") <= 1
        with opened(target) as db, db.begin() as conn:
            conn.execute(sa.text("DROP SCHEMA chunkmill CASCADE"))
        document("restore", file, url=target)
        assert rows_of(target) == rows_of(url)
    finally:
        admin(stack, "DROP DATABASE shared WITH (FORCE)")


def test_what_others_have_beside_an_installation_or_made_of_its_tables_is_not_replaced(
    runner: Runner, url: str, copy: str, tmp_path: Path
) -> None:
    file = tmp_path / "b.dump"
    runner.finish(runner.client.enqueue([("a", "one"), ("b", "two")], collection="docs"))
    document("backup", file, url=url)
    document("restore", file, url=copy)
    theirs = {
        "chunkmill.notes": ("CREATE TABLE chunkmill.notes (n int)", "DROP TABLE chunkmill.notes"),
        "chunkmill.alembic_version": (
            "CREATE TABLE chunkmill.alembic_version (version_num text)", "DROP TABLE chunkmill.alembic_version",
        ),
        "public.mine": (
            "CREATE VIEW public.mine AS SELECT chunk_id FROM chunkmill_collections.docs", "DROP VIEW public.mine",
        ),
        "public.listed": (
            "CREATE TABLE public.listed (job bigint CONSTRAINT of_a_job REFERENCES chunkmill.jobs (id))",
            "DROP TABLE public.listed",
        ),
    }  # fmt: skip
    for name, (make, drop) in theirs.items():
        with opened(copy) as db, db.begin() as conn:
            conn.execute(sa.text(make))
        said = refusal("restore", file, "--replace", "--yes", url=copy)
        assert ("of_a_job" if "listed" in name else name.removeprefix("chunkmill.")) in said, said
        assert ask(copy, f"SELECT to_regclass('{name}') IS NOT NULL")
        with opened(copy) as db, db.begin() as conn:
            conn.execute(sa.text(drop))
    assert rows_of(copy) == rows_of(url)
    document("restore", file, "--replace", "--yes", url=copy)


@pytest.mark.parametrize("revision", ["0001", "ffff"])
def test_the_migration_of_a_backup_is_chunkmills_own(
    runner: Runner, url: str, copy: str, tmp_path: Path, revision: str
) -> None:
    """Another program that uses Alembic has the same schema, and its version is lower or higher than ours."""
    file = tmp_path / "b.dump"
    runner.finish(runner.client.enqueue([("a", "one"), ("b", "two")], collection="docs"))
    with opened(url) as db, db.begin() as conn:
        conn.execute(sa.text("CREATE TABLE chunkmill.alembic_version (version_num varchar(32) PRIMARY KEY)"))
        conn.execute(sa.text(f"INSERT INTO chunkmill.alembic_version VALUES ('{revision}')"))
        _, head = migration_level(conn)
    assert document("backup", file, url=url)["migration"] == head
    assert document("restore", file, url=copy)["migration"] == head
    assert rows_of(copy) == rows_of(url)


def test_a_backup_of_another_schema_or_of_a_newer_release_is_refused(
    runner: Runner, stack: StackStatus, url: str, copy: str, tmp_path: Path
) -> None:
    file, newer = tmp_path / "b.dump", tmp_path / "newer.dump"
    document("backup", file, url=url)
    said = refusal("restore", file, url=copy, DATABASE_SCHEMA="elsewhere")
    assert "DATABASE_SCHEMA=chunkmill chunkmill restore" in said
    with opened(url) as db, db.begin() as conn:
        conn.execute(sa.text("UPDATE chunkmill_alembic_version SET version_num = '9001'"))
        conn.execute(sa.text("UPDATE schema_compatibility SET oldest_code = '9000'"))
    document("backup", newer, url=url)
    assert "made by a newer release" in refusal("restore", newer, url=copy)
    admin(stack, "CREATE DATABASE nothing_here")
    try:
        assert "the database is empty" in refusal("backup", tmp_path / "x.dump", url=url_of(stack, "nothing_here"))
    finally:
        admin(stack, "DROP DATABASE nothing_here WITH (FORCE)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.dump", "newer.dump"]


@pytest.mark.parametrize("revision", ["0008", pytest.param("0020", marks=pytest.mark.slow)])
def test_a_backup_of_an_earlier_release_is_migrated_when_it_comes_back(
    stack: StackStatus, settings: Settings, engines: Engines, tmp_path: Path, revision: str
) -> None:
    """0008 is as releases made it that had no schema of their own: in ``public``, beside nothing else."""
    for name in ("earlier", "later"):
        admin(stack, f"CREATE DATABASE {name}")
    old, new, file = url_of(stack, "earlier"), url_of(stack, "later"), tmp_path / "old.dump"
    try:
        (install_as_before if revision == "0008" else migrate)(old, revision)
        with working(settings, old, engines) as before:
            before.finish(before.client.enqueue([(f"c{i}", f"text {i}") for i in range(6)], collection="docs"))
            before.client.enqueue([("x", "it waits")], collection="other")
            vector = before.client.vectors("docs", ["c3"])["c3"]
        assert document("backup", file, url=old)["migration"] == revision

        back = document("restore", file, url=new)

        assert (back["migration"], back["collections"], back["open_jobs"]) == (revision, 2, 1)
        with opened(new) as db, db.begin() as conn:
            current, head = migration_level(conn)
            assert current == head
        with working(settings, new, engines) as after:
            assert after.client.audit("docs").complete
            assert after.client.search(vector, collection="docs", k=1)[0].chunk_id == "c3"
            [waiting] = [job for job in after.client.jobs() if not job.state.is_final]
            assert after.finish(waiting).state == "completed"
    finally:
        for name in ("earlier", "later"):
            admin(stack, f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def working(settings: Settings, url: str, engines: Engines) -> Iterator[Runner]:
    """A producer and a worker on a database."""
    own = settings.model_copy(update={"database_url": url})
    db = create_db(url, role="worker")
    with Client(create_db(url, role="client"), Broker.connect(own), own) as client:
        yield Runner(WorkerContext(own, db, engines, LeaseKeeper(db, 30), name="a-worker"), client)
    db.dispose()
