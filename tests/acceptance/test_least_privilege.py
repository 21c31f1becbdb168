"""The whole flow with the users of ``deploy/redis-acl.conf`` and the roles of ``deploy/postgres-role.sql``, and what
these may not do."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import openai
import psycopg
import pytest
import redis
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.cli.__main__ import cli
from chunkmill.client.outbox import Deliverer
from chunkmill.db.connect import create_db, migrate
from chunkmill.domain.keys import KeyLimits, Scope
from chunkmill.domain.spaces import Pooling, SpaceSpec
from chunkmill.embedded import StackStatus
from chunkmill.embedded.redis import find_program
from chunkmill.errors import InvalidInput, StoreUnavailable
from chunkmill.gateway.batches import recovery
from chunkmill.gateway.keys import StoredKeys
from chunkmill.ledger import dropping
from chunkmill.ledger.access import keys, spends
from chunkmill.ledger.reembedding import fill
from chunkmill.monitor.servers import read_database
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.acceptance.conftest import Processes
from tests.conftest import admin, url_of
from tests.integration.hands import Hands
from tests.support import reembeddings
from tests.support.gateways import running_gateway
from tests.support.installations import install_as_before
from tests.support.roles import as_role, run_file
from tests.support.served import bulk_worker, ended, jsonl, line, openai_client, start
from tests.support.waiting import PATIENCE, until

DEPLOY = Path(__file__).parents[2] / "deploy"


@functools.cache
def redis_version() -> tuple[int, ...]:
    """The version of the Redis that the tests run. Redis 7 has rights to read alone, and several sets of rights."""
    said = subprocess.run([find_program(), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"v=(\d+)\.(\d+)", said)
    assert match, said
    return int(match[1]), int(match[2])


def acl_file() -> Path:
    return DEPLOY / ("redis-acl.conf" if redis_version() >= (7,) else "redis-acl-6.2.conf")


ALWAYS = {"auth", "hello", "quit", "reset"}
"""What Redis lets everybody do, with or without a right: log in, and leave."""
BOTH = {"ping", "select", "multi", "exec", "discard", "brpop", "del", "publish", "psubscribe", "punsubscribe"}
RIGHTS = {
    "chunkmill": BOTH | {"lpush", "rpush", "llen", "expire", "type", "info", "time"},
    "flower": BOTH | ({"llen"} if redis_version() >= (7,) else set()),
}
"""The commands that each user may run at all, of all that the server knows."""
READS_QUEUES = redis_version() >= (7,)
TABLE: list[tuple[str, set[str]]] = [
    # Doorbells, and what is in the way of one.
    ("LPUSH gpu x", {"chunkmill"}),
    ("RPUSH gpu\x06\x163 x", {"chunkmill"}),
    ("BRPOP gpu 1", {"chunkmill"}),
    ("BRPOP openai gpu\x06\x163 1", {"chunkmill"}),
    ("DEL gpu", {"chunkmill"}),
    ("TYPE gpu", {"chunkmill"}),
    ("EXPIRE gpu 60", {"chunkmill"}),
    ("LLEN gpu", {"chunkmill", *(["flower"] if READS_QUEUES else [])}),
    ("LLEN openai\x06\x169", {"chunkmill", *(["flower"] if READS_QUEUES else [])}),
    # Questions to workers, and their replies.
    ("PUBLISH /0.celery.pidbox x", {"chunkmill", "flower"}),
    ("BRPOP a.reply.celery.pidbox a.reply.celery.pidbox\x06\x163 1", {"chunkmill", "flower"}),
    ("DEL a.reply.celery.pidbox", {"chunkmill", "flower"}),
    ("LPUSH a.reply.celery.pidbox x", {"chunkmill"}),
    # Events.
    ("PSUBSCRIBE /0.celeryev/*", {"chunkmill", "flower"}),
    ("PSUBSCRIBE /0.celery.pidbox", {"chunkmill", *([] if READS_QUEUES else ["flower"])}),
    ("PUBLISH /0.celeryev/worker.heartbeat x", {"chunkmill", *([] if READS_QUEUES else ["flower"])}),
    # Nobody.
    *((command, set()) for command in (
        "PSUBSCRIBE *", "SUBSCRIBE other", "PUBLISH other x", "PUBLISH /1.celery.pidbox x", "LPUSH other x",
        "DEL unacked", "DEL _kombu.binding.gpu", "SET gpu x", "GET anything", "LRANGE gpu 0 -1", "LPOP gpu",
        "RENAME gpu gpu2", "DUMP gpu", "RESTORE gpu 0 x", "MIGRATE h 1 gpu 0 1", "SORT gpu", "COPY gpu gpu2",
        "OBJECT ENCODING gpu", "MEMORY USAGE gpu", "SCAN 0", "KEYS *", "RANDOMKEY", "DBSIZE", "FLUSHALL",
        "FLUSHDB", "SWAPDB 0 1", "EVAL 1 0", "EVALSHA x 0", "SCRIPT LOAD x", "SCRIPT KILL",
        "CLIENT KILL TYPE normal", "CLIENT PAUSE 1000", "CLIENT LIST", "CLIENT UNBLOCK 1", "CONFIG GET *",
        "CONFIG SET dir /tmp", "ACL LIST", "ACL SETUSER flower +@all", "SAVE", "BGSAVE", "BGREWRITEAOF",
        "SHUTDOWN", "DEBUG SLEEP 0", "MONITOR", "REPLICAOF NO ONE", "SLOWLOG GET", "LATENCY RESET", "MODULE LIST",
        "CLUSTER INFO", "WAIT 1 1", "SYNC", "PSYNC x 0",
    )),
]  # fmt: skip
"""Commands, and the users that may run them. docs/security.md says the same in words."""


class GuardedRedis:
    """A Redis for this test alone that starts with the users of the file."""

    def __init__(self, folder: Path) -> None:
        text = acl_file().read_text()
        text = re.sub(r"SET-(\w+)-PASSWORD", lambda match: f"{match[1].lower()}-secret", text)
        self.socket = folder / "redis.sock"
        self._folder = folder
        self._log = folder / "redis.log"
        own = f'port 0\nunixsocket {self.socket}\ndir {folder}\nsave ""\nappendonly yes\nappendfsync always\n'
        (folder / "redis.conf").write_text(own + text)
        self.popen = self._start()
        self.admin = self.client("admin")

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen([str(find_program()), str(self._folder / "redis.conf")], stdout=log, stderr=log)

    def restart(self) -> None:
        self.stop()
        self.popen = self._start()
        self.wait()

    def stop(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(PATIENCE)
        finally:
            self.popen.kill()

    def wait(self) -> None:
        until(self._answers, self._log.read_text)

    def url(self, user: str) -> str:
        return f"unix://{user}:{user}-secret@{self.socket}?db=0"

    def client(self, user: str) -> redis.Redis:
        return redis.Redis.from_url(self.url(user))

    def _answers(self) -> bool:
        assert self.popen.poll() is None, self._log.read_text()
        try:
            return bool(self.admin.ping())
        except redis.ConnectionError:
            return False

    def denied(self) -> set[tuple[str, str]]:
        """Return the user and the command of each refusal since the start."""
        return {(entry["username"], entry["object"]) for entry in self.admin.acl_log()}


@pytest.fixture
def guarded() -> Iterator[GuardedRedis]:
    folder = Path(tempfile.mkdtemp(prefix="cm-acl-"))
    server = GuardedRedis(folder)
    try:
        server.wait()
        yield server
    finally:
        server.admin.close()
        server.stop()
        shutil.rmtree(folder)


PURPOSES = ("producer", "worker", "poller", "reader")


@pytest.fixture
def roles(stack: StackStatus) -> Iterator[dict[str, str]]:
    """Return the URL of a login for each purpose, in a database that was set up as the file says."""
    admin(stack, "CREATE DATABASE least_privilege")
    superuser = url_of(stack, "least_privilege")
    urls = {"superuser": superuser, "migrator": as_role(superuser, "chunkmill_migrator")}
    run_file(superuser)
    for purpose in PURPOSES:
        admin(stack, f"DROP ROLE IF EXISTS machine_{purpose}")
        admin(stack, f"CREATE ROLE machine_{purpose} LOGIN IN ROLE chunkmill_{purpose}s")
        urls[purpose] = as_role(superuser, f"machine_{purpose}")
    migrate(urls["migrator"])
    run_file(superuser)
    yield urls
    admin(stack, "DROP DATABASE least_privilege WITH (FORCE)")
    for purpose in PURPOSES:
        admin(stack, f"DROP ROLE machine_{purpose}")


def may(url: str, statement: str) -> bool:
    with psycopg.connect(url.replace("+psycopg", ""), options="-csearch_path=chunkmill,public") as conn:
        try:
            conn.execute(statement)
        except psycopg.errors.InsufficientPrivilege:
            return False
        except psycopg.errors.DuplicateTable:
            pass  # it got that far
        finally:
            conn.rollback()
    return True


@pytest.fixture
def settings(roles: dict[str, str], guarded: GuardedRedis) -> Settings:
    return Settings.from_env(
        database_url=roles["producer"],
        redis_url=guarded.url("chunkmill"),
        poll_interval=0.1,
        lease_seconds=3.0,
        doorbell_repair_seconds=1.0,
    )


def left_behind(db: sa.Engine) -> list[int]:
    with db.begin() as conn:
        return dropping.left_behind(conn)


def test_everything_runs_with_no_more_than_it_needs(
    settings: Settings,
    processes: Processes,
    roles: dict[str, str],
    guarded: GuardedRedis,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    worker = processes.worker("-E", ready=False, DATABASE_URL=roles["worker"])
    poller = processes.start("chunkmill.cli", "poller", DATABASE_URL=roles["poller"])
    db = create_db(settings.require_database_url(), role="client")
    with Client(db, Broker.connect(settings), settings) as client:
        chunks = [(f"c{i}", f"text number {i}", {"n": i}) for i in range(100)]
        job = client.enqueue(chunks, collection="docs")
        until(
            lambda: client.job(job.id).state == "completed",
            lambda: f"{guarded.denied()}\n{worker.output()}\n{poller.output()}",
        )
        asked = processes.start(
            "celery", "-A", "chunkmill_workers", "inspect", "ping", "--timeout=5", REDIS_URL=guarded.url("flower")
        )
        assert asked.popen.wait(PATIENCE) == 0, asked.output()
        with guarded.client("flower") as client_of_flower, client_of_flower.pubsub() as events:
            events.psubscribe("/0.celeryev/*")
            until(lambda: (events.get_message(timeout=1) or {}).get("type") == "pmessage")
        assert client.audit("docs").complete
        read_db = create_db(roles["reader"], role="client")
        with Client(read_db, Broker.connect(settings), settings) as reader:
            assert reader.search("text number 7", collection="docs", k=1, timeout=PATIENCE)[0].chunk_id == "c7"
            assert reader.job(job.id).embedded == 100
            assert reader.audit("docs").complete
            assert reader.count("docs", filter={"n": 7}) == 1
            assert reader.get("docs", ["c7"])["c7"].text == "text number 7"
            assert [chunk.id for chunk in reader.chunks("docs", limit=2)] == ["c0", "c1"]
            assert sum(len(ids) for ids, _ in reader.iter_vectors("docs")) == 100
            assert reader.export("docs", tmp_path / "docs.jsonl").chunks == 100
            for refused in (
                lambda: reader.update_metadata("docs", {"a": 1}, ids=["c7"]),
                lambda: reader.delete("docs", filter={"n": 7}),
            ):
                with pytest.raises(StoreUnavailable, match="permission denied"):
                    refused()
            assert [(info.name, info.chunks) for info in reader.collections()] == [("docs", 100)]
        client.enqueue([("c1", "a text")], collection="short-lived", on_long="split")
        client.set_alias("live", "short-lived")
        client.rename_collection("short-lived", "old")
        client.remove_alias("live")
        client.drop_collection("old", wait=False)
        until(lambda: not left_behind(db), poller.output)
        client.enqueue([("c0", "another text")], collection="docs")
        with db.begin() as conn:
            conn.execute(sa.text("UPDATE jobs SET finished_at = now() - interval '2 days' WHERE id = 1"))
        gone = client.prune(0).amounts
        assert (gone["jobs"].rows, gone["contents"].rows) == (1, 1)
        with pytest.raises(InvalidInput, match="is in it"):
            client.drop_space(client.audit("docs").space)
        assert client.delete("docs", ["c1"]) == 1
        assert client.delete("docs", filter={"n": {"$gte": 98}}) == 2
    monkeypatch.setattr("chunkmill.store.indexing.MIN_ROWS", 10)
    monkeypatch.setattr("chunkmill.domain.serving.GRAPH_ROWS", 10)
    index = {"REDIS_URL": guarded.url("chunkmill"), "DATABASE_URL": roles["producer"]}
    said = CliRunner().invoke(cli, ["index", "docs"], env=index)
    assert (said.exit_code, "docs is served by 1 segment " in said.output) == (0, True), said.output
    with Client(create_db(roles["reader"], role="client"), Broker.connect(settings), settings) as reader:
        for metadata, exact in ((None, False), ({"n": {"$lt": 50}}, True)):  # half of the chunks pass, and are listed
            hits = reader.search(like="c7", collection="docs", k=1, metadata=metadata, explain=True)
            assert hits.explanation
            assert (len(hits), hits[0].chunk_id == "c7", hits.explanation.is_exact) == (1, False, exact)
            assert (hits.explanation.graphs == 0) == exact
    with Client(db, Broker.connect(settings), settings) as client:
        more = client.enqueue([(f"more{i}", f"text number {i}") for i in range(20)], collection="docs")
        until(lambda: client.job(more.id).state == "completed", worker.output)
        assert client.index("docs").tail == 0
        assert client.update_metadata("docs", {"new": True}, ids=["c7"]) == 1
        assert client.index("docs").tail == 0
        assert client.search(client.vectors("docs", ["c7"])["c7"], collection="docs", k=1)[0].chunk_id == "c7"
        made = client.keywords("docs", language="english")
        assert made is not None
        assert made.is_ready
        client.enqueue([("long", "A title of some words\n\n" + "and text below it " * 5)], collection="docs")
        assert client.golden("docs").from_titles() == 1
    read_db = create_db(roles["reader"], role="client")
    with Client(read_db, Broker.connect(settings), settings) as reader:
        hit = reader.search("number 7", collection="docs", k=1, hybrid=0.2, timeout=PATIENCE)[0]
        assert (hit.chunk_id, hit.mixed) == ("c7", pytest.approx(1.0, abs=0.3))
        assert len(reader.golden("docs").list()) == 1
    # redis-py tells the server its own name, and it does no harm that this is refused.
    assert {what for _, what in guarded.denied()} <= {"client", "client|setinfo"}, guarded.admin.acl_log()
    for purpose in PURPOSES:
        seen = CliRunner().invoke(cli, ["doctor"], env=index | {"DATABASE_URL": roles[purpose]})
        assert "No check failed" in seen.output, (purpose, seen.output)
    assert may(roles["producer"], "DELETE FROM dead_chunks")
    with psycopg.connect(roles["superuser"].replace("+psycopg", "")) as conn:
        conn.execute("CREATE SCHEMA others")
        conn.execute("CREATE TABLE others.secrets (a text)")
    assert may(roles["superuser"], "SELECT * FROM others.secrets")
    for purpose in PURPOSES:
        assert not may(roles[purpose], "SELECT * FROM others.secrets")
        for statement in NEVER:
            assert not may(roles[purpose], statement), (purpose, statement)
    assert may(roles["migrator"], "ALTER TABLE vectors_1 ADD COLUMN mine int")
    for statement, allowed in MAY.items():
        assert {purpose for purpose in PURPOSES if may(roles[purpose], statement)} == set(allowed.split()), statement


NEVER = (
    "DROP TABLE contents",
    "DROP TABLE vectors_1",
    "TRUNCATE chunks",
    "CREATE TABLE public.mine (a int)",
    "CREATE TABLE chunkmill.mine (a int)",
    "CREATE SCHEMA mine",
    "ALTER TABLE jobs ADD COLUMN mine int",
    "UPDATE chunkmill_alembic_version SET version_num = '0001'",
    "DELETE FROM schema_compatibility",
    "CREATE ROLE mine",
    "SELECT pg_read_file('postgresql.conf')",
    "COPY chunks TO PROGRAM 'cat'",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'a full disk')",
    "SET ROLE chunkmill_migrator",
    "ALTER ROLE chunkmill_workers SET search_path = 'evil'",
    "ALTER ROLE chunkmill_producers PASSWORD 'new'",
    "ALTER ROLE chunkmill_migrator SET statement_timeout = 1",
)
"""What no process of ours may do."""
SERVED = {
    "SELECT data FROM served_file_pieces": "producer",
    "INSERT INTO served_files (name, tenant, kind) VALUES ('f', 't', 'input')": "producer",
    "DELETE FROM served_files": "producer poller",
    "UPDATE served_batches SET state = state": "producer",
    "SELECT state FROM served_batches": "producer worker poller reader",
    "SELECT custom_id FROM served_batch_lines": "producer reader",
}
MAY = {
    "SELECT text FROM contents": "producer worker reader",
    "SELECT metadata FROM chunks": "producer worker reader",
    "SELECT texts FROM embed_requests": "producer worker reader",
    "SELECT embedding FROM vectors_1": "producer worker reader",
    "SELECT content_hash FROM vectors_1": "producer worker poller reader",
    "INSERT INTO vectors_1 SELECT * FROM vectors_1 LIMIT 0": "worker",
    "UPDATE vectors_1 SET n_tokens = 0": "",
    "DELETE FROM vectors_1": "producer",
    "UPDATE contents SET created_at = now()": "producer",
    "DELETE FROM chunks": "producer worker poller",
    "UPDATE chunks SET metadata = metadata": "producer",
    "INSERT INTO collections (name, space_id) VALUES ('mine', 1)": "producer",
    "DELETE FROM jobs WHERE false": "producer",
    "UPDATE jobs SET state = state": "producer worker poller",
    "UPDATE charges SET usd = 0": "worker",
    "DELETE FROM charges": "producer",
    "SELECT tokens FROM provider_questions": "producer worker poller reader",
    "INSERT INTO provider_questions (key, space_id, tokens, until) VALUES ('', 1, 1, now())": "worker",
    "DELETE FROM provider_questions": "worker",
    "INSERT INTO embed_requests (space_id, kind, texts) VALUES (1, 'query', '{a}')": "producer worker poller reader",
    "DELETE FROM worker_reports": "producer worker poller",
    "SELECT token FROM worker_sockets": "producer worker reader",
    "SELECT seen_at FROM worker_sockets": "producer worker poller reader",
    "UPDATE worker_sockets SET seen_at = seen_at": "worker",
    "DELETE FROM worker_sockets": "producer worker poller",
    "DELETE FROM dead_chunks": "producer worker poller",
    "SELECT create_vector_table(1)": "producer worker",
    "UPDATE spaces SET model = model": "producer",
    "SELECT terms FROM keywords_1": "producer worker reader",
    "DELETE FROM keywords_1": "",
    "UPDATE keyword_indexes SET state = state": "",
    "SELECT fill_keywords(1, 10)": "producer worker poller",
    "SELECT text FROM outdated_chunks": "producer worker reader",
    "SELECT chunk_id FROM outdated_chunks": "producer worker poller reader",
    "DELETE FROM outdated_chunks": "",
    "INSERT INTO outdated_collections VALUES (1)": "",
    "SELECT tidy_outdated_chunks(10)": "producer worker poller",
    "SELECT serve_outdated_chunks(1, false)": "producer",
    "SELECT text FROM golden_queries": "producer worker reader",
    "SELECT query_id FROM golden_queries": "producer worker poller reader",
    "DELETE FROM golden_queries WHERE false": "producer",
    "UPDATE search_tunings SET alpha = alpha": "producer",
    "UPDATE search_counts SET n = n": "producer poller reader",
    "DELETE FROM search_counts": "poller",
    "INSERT INTO search_feedback VALUES ('', '', 1, 1)": "producer reader",
    "UPDATE search_feedback SET chunk_id = chunk_id": "",
    "DELETE FROM search_feedback": "poller",
    "INSERT INTO engine_minutes VALUES (now(), 1, 1, 1, 1)": "poller",
    "DELETE FROM engine_minutes": "poller",
    "SELECT minute FROM engine_minutes": "producer worker poller reader",
    "SELECT drop_unread_segments_of_space(1, 1, 'flush', 0)": "producer worker poller",
    "SELECT show_moved(1)": "producer worker poller",
    "SELECT arrays FROM bridges": "producer worker reader",
    "SELECT name, report FROM bridges": "producer worker poller reader",
    "DELETE FROM bridges WHERE false": "producer",
    "INSERT INTO collection_aliases (name, collection_id) VALUES ('mine', 1)": "producer",
    "SELECT drop_unused_space(1, now(), false)": "producer",
    "SELECT refresh_collection_views(1)": "producer worker poller",
    "SELECT hide_collection_views(1)": "",
    "SELECT chunk_id FROM chunkmill_collections.docs": "reader",
    "SELECT chunks FROM outbox_pages": "producer",
    "INSERT INTO outbox_pages (job_id, number, chunks) SELECT 1, 1, '[]' WHERE false": "producer",
    "SELECT collection FROM outbox_jobs": "producer worker poller reader",
    "DELETE FROM outbox_jobs": "producer",
    **SERVED,
}
"""Which purposes may run a statement."""


def test_a_gateway_is_a_producer_and_a_poller_deletes_what_it_may_not_read(
    settings: Settings, roles: dict[str, str]
) -> None:
    worker_db, poller_db = (create_db(roles[purpose], role=purpose) for purpose in ("worker", "poller"))
    given = jsonl(line("a", "a text"), line("b", ""))
    with (
        running_gateway(settings) as gateway,
        bulk_worker(worker_db),
        openai_client(gateway, gateway.key) as api,
    ):
        batch = ended(api, start(api, given).id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 1)
        assert api.files.content(batch.output_file_id).content
        assert start(api, given).status == "validating"
        for statement, allowed in SERVED.items():
            assert {purpose for purpose in PURPOSES if may(roles[purpose], statement)} == set(allowed.split()), (
                statement
            )
        with psycopg.connect(roles["superuser"].replace("+psycopg", ""), autocommit=True) as conn:
            conn.execute("UPDATE chunkmill.served_files SET expires_at = now() WHERE kind = 'output'")
        poller = Poller(poller_db, Broker.connect(settings), settings)
        for _ in range(2):
            poller._files_at = poller._dropped_at = -1.0
            poller.round()
        with pytest.raises(openai.NotFoundError):
            api.files.content(batch.output_file_id)
        assert left_behind(worker_db) == []
    worker_db.dispose()
    poller_db.dispose()


def test_a_producers_rights_are_enough_for_a_gateway_that_stands_in_for_a_poller(
    settings: Settings, roles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "LOOK_SECONDS", 0.05)
    worker_db = create_db(roles["worker"], role="worker")
    hands = Hands(worker_db)
    with running_gateway(settings) as gateway, openai_client(gateway, gateway.key) as api:
        made = start(api, *(line(f"line {n}", f"text {n}") for n in range(4))).id
        until(lambda: hands.due() and api.batches.retrieve(made).status == "in_progress")
        (first,) = hands.due()
        query = "SELECT 1 FROM chunk_batches WHERE id = :id AND deaths = :deaths AND state <> 'running'"
        for death in (1, 2):  # after the second it is split
            hands.claim(first)
            with worker_db.begin() as conn:
                conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() WHERE state = 'running'"))
            until(lambda death=death: hands.rows(query, id=first, deaths=death))  # type: ignore[misc]
        assert len(hands.due()) > 1
        monkeypatch.setattr(hands, "finish", lambda _: None)
        hands.work()
        batch = ended(api, made)
        assert (batch.status, batch.request_counts.completed) == ("completed", 4)
    worker_db.dispose()


MAY_WHILE_FILLING = {
    "SELECT * FROM content_bytes('{}')": "producer worker poller",
    "INSERT INTO jobs (collection_id, space_id, state, route, priority, on_long) SELECT 1, 1, '', '', 1, '' "
    "WHERE false": "producer",
    "UPDATE reembedding_fills SET added = added": "producer poller",
    "DELETE FROM collection_spaces": "producer poller",
    "UPDATE reembeddings SET problem = problem": "producer poller",
}
"""Which purposes may run a statement about the spaces of collections."""


def test_a_producer_enqueues_within_its_transaction_and_a_poller_of_both_groups_delivers(
    settings: Settings, roles: dict[str, str], stack: StackStatus, caplog: pytest.LogCaptureFixture
) -> None:
    """A poller's own rights are not enough, which it says."""
    urls = {role: sa.make_url(roles[role]).set(drivername="postgresql") for role in ("producer", "worker")}
    dbs = {role: create_db(roles[role], role=role) for role in ("producer", "poller")}
    with Client(dbs["producer"], Broker.connect(settings), settings) as client:
        with psycopg.connect(urls["worker"].render_as_string(False)) as own:
            with pytest.raises(StoreUnavailable, match="GRANT chunkmill_producers"):
                client.enqueue([("a", "text a")], collection="docs", within=own)
            own.execute("SELECT 1")  # the transaction goes on
        with psycopg.connect(urls["producer"].render_as_string(False)) as own:
            job = client.enqueue([("a", "text a")], collection="docs", within=own)
        deliverer = Deliverer(dbs["poller"], settings, client._ring)
        assert not deliverer._can_deliver()
        assert "GRANT chunkmill_producers" in caplog.text
        admin(stack, "GRANT chunkmill_producers TO machine_poller")
        try:
            assert deliverer._can_deliver()
            assert deliverer.round() == 1
        finally:
            admin(stack, "REVOKE chunkmill_producers FROM machine_poller")
        assert client.job(job.id).new == 1
    dbs["poller"].dispose()


def test_a_poller_fills_a_space_from_texts_that_it_may_not_read(
    settings: Settings, roles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "SECONDS", PATIENCE)  # on a busy machine one call would leave the rest to the next
    producer_db, worker_db, poller_db = (create_db(roles[role], role=role) for role in ("producer", "worker", "poller"))
    hands = Hands(worker_db)
    with Client(producer_db, Broker.connect(settings), settings) as client:
        client.enqueue([(f"c{i}", f"text number {i}") for i in range(10)], collection="docs")
        hands.work()
        reembedding = reembeddings.begin(producer_db, "docs", reembeddings.second_space(producer_db, "docs"))
        assert not fill.fill_some(poller_db, settings, reembedding)
        client.enqueue([("new", "a new text")], collection="docs")
        hands.work()
        hands.rows("SELECT 1")
        with poller_db.begin() as conn:
            conn.execute(sa.text("UPDATE reembedding_fills SET passed_at = passed_at - interval '1 h'"))
        assert fill.fill_some(poller_db, settings, reembedding)
        for statement, allowed in MAY_WHILE_FILLING.items():
            assert {purpose for purpose in PURPOSES if may(roles[purpose], statement)} == set(allowed.split()), (
                statement
            )
        with (
            pytest.raises(sa.exc.DBAPIError, match="is not open, or does not concern space"),
            poller_db.begin() as conn,
        ):
            conn.execute(
                sa.text("SELECT open_fill_job(:id, 3, 'local', 1::smallint, 'truncate', 'k', '[]')"), {"id": 1}
            )
        client.drop_collection("docs")
        assert left_behind(poller_db) == []
    for db in (producer_db, worker_db, poller_db):
        db.dispose()


MAY_WITH_KEYS = {
    "SELECT sha256 FROM api_keys": "gateway",
    "SELECT name, revoked_at FROM api_keys": "gateway key_maker",
    "INSERT INTO api_keys (prefix, name, tenant) SELECT '', '', '' WHERE false": "key_maker",
    "UPDATE api_keys SET revoked_at = now()": "key_maker",
    "UPDATE api_keys SET last_used_at = now()": "gateway",
    "UPDATE api_keys SET scopes = '{admin}'": "",
    "UPDATE api_keys SET sha256 = sha256": "",
    "DELETE FROM api_keys": "",
    "SELECT tokens FROM api_key_usage": "gateway key_maker",
    "INSERT INTO api_key_usage (key_id, month) SELECT 1, now() WHERE false": "gateway",
    "UPDATE api_key_usage SET tokens = tokens": "gateway",
    "DELETE FROM api_key_usage": "",
    "SELECT estimated FROM api_key_spends": "gateway key_maker",
    "UPDATE api_key_spends SET estimated = estimated": "gateway",
    "DELETE FROM api_key_spends": "",
    "INSERT INTO api_key_spend_jobs (job_id, spend_id) SELECT 1, 1 WHERE false": "gateway",
    "DELETE FROM api_key_spend_jobs": "",
    "SELECT reserved FROM api_key_spend_months": "gateway key_maker",
    "DELETE FROM api_key_spend_months": "",
    "SELECT settle_api_key_spend(0)": "producer worker poller gateway",
    "SELECT due_api_key_spends(true)": "producer worker poller gateway",
    "SELECT text FROM contents": "producer worker reader gateway",
    "INSERT INTO collections (name, space_id) SELECT 'mine', 1 WHERE false": "producer gateway",
}
"""Which purposes may run a statement about keys."""


def test_who_makes_keys_reads_no_digest_and_who_checks_them_makes_none(
    stack: StackStatus, roles: dict[str, str], guarded: GuardedRedis
) -> None:
    urls = dict(roles)
    for purpose in ("gateway", "key_maker"):
        admin(stack, f"DROP ROLE IF EXISTS machine_{purpose}")
        admin(stack, f"CREATE ROLE machine_{purpose} LOGIN IN ROLE chunkmill_{purpose}s")
        urls[purpose] = as_role(roles["superuser"], f"machine_{purpose}")
    try:
        purposes = {*PURPOSES, "gateway", "key_maker"}
        for statement, allowed in MAY_WITH_KEYS.items():
            assert {purpose for purpose in purposes if may(urls[purpose], statement)} == set(allowed.split()), statement
        for purpose in ("gateway", "key_maker"):
            for statement in NEVER:
                if "vectors_1" not in statement:  # which this database does not have
                    assert not may(urls[purpose], statement), (purpose, statement)
        env = {"DATABASE_URL": urls["key_maker"], "REDIS_URL": guarded.url("chunkmill")}
        made = CliRunner().invoke(cli, ["keys", "create", "mine", "--json"], env=env)
        assert made.exit_code == 0, made.output
        key = json.loads(made.stdout)
        settings = Settings.from_env(database_url=urls["gateway"], redis_url=guarded.url("chunkmill"))
        stored = StoredKeys(create_db(urls["gateway"], role="gateway"))
        with running_gateway(settings, keys=stored) as gateway, gateway.client(key["key"]) as http:
            until(lambda: stored._listening is not None and stored._listening.is_up.is_set())
            assert http.get("/v1/models").status_code == 200
            for command in (["list"], ["revoke", str(key["id"])]):
                done = CliRunner().invoke(cli, ["keys", *command], env=env)
                assert done.exit_code == 0, done.output
            until(lambda: http.get("/v1/models").status_code == 401)
        stored._db.dispose()
        with psycopg.connect(urls["superuser"].replace("+psycopg", "")) as conn:
            query = (
                "SELECT last_used_at IS NOT NULL, u.requests > 0 FROM chunkmill.api_keys k, chunkmill.api_key_usage u"
            )
            assert conn.execute(query).fetchone() == (True, True), "a gateway may note what it has to"
    finally:
        for purpose in ("gateway", "key_maker"):
            admin(stack, f"DROP OWNED BY machine_{purpose}")
            admin(stack, f"DROP ROLE machine_{purpose}")


def test_a_poller_settles_what_a_key_has_spent_without_a_right_to_read_it(
    stack: StackStatus, settings: Settings, roles: dict[str, str]
) -> None:
    admin(stack, "DROP ROLE IF EXISTS machine_gateway")
    admin(stack, "CREATE ROLE machine_gateway LOGIN IN ROLE chunkmill_gateways")
    gateway_db = create_db(as_role(roles["superuser"], "machine_gateway"), role="gateway")
    poller_db, owner_db = (create_db(roles[role], role=role) for role in ("poller", "superuser"))
    try:
        with owner_db.begin() as conn:
            key = keys.create(
                conn, name="k", tenant="t", scopes={Scope.JOBS}, limits=KeyLimits(usd_per_month=Decimal(1))
            )[0]
        with spends.paid_by(key), gateway_db.begin() as conn:
            spends.begin(conn, job_id=10**9, usd=Decimal("0.5"))
        poller = Poller(poller_db, Broker.connect(settings), settings)
        with owner_db.begin() as conn:
            assert keys.list_all(conn)[0][1].reserved_usd == Decimal("0.5")
        assert not may(roles["poller"], "SELECT usd FROM api_key_usage")
        poller._settle_spends()  # there is no such job, and so nothing is expected any more
        with owner_db.begin() as conn:
            used = keys.list_all(conn)[0][1]
        assert (used.usd, used.reserved_usd) == (0, 0)
    finally:
        for db in (gateway_db, poller_db, owner_db):
            db.dispose()
        admin(stack, "DROP OWNED BY machine_gateway")
        admin(stack, "DROP ROLE machine_gateway")


def test_a_login_can_be_taken_away_and_only_its_own_settings_and_password_are_its_own(roles: dict[str, str]) -> None:
    """Postgres lets every role change itself. Nothing of that reaches another machine, and doctor names it."""
    with psycopg.connect(roles["worker"].replace("+psycopg", ""), autocommit=True) as thief:
        thief.execute("ALTER ROLE machine_worker SET search_path = 'evil'")
        thief.execute("ALTER ROLE machine_worker PASSWORD 'new'")
        for others in ("machine_producer", "chunkmill_workers"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                thief.execute(f"ALTER ROLE {others} SET statement_timeout = 1")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            thief.execute("ALTER DATABASE least_privilege SET statement_timeout = 1")
    for purpose in ("producer", "reader"):
        altered = read_database(Settings.from_env(database_url=roles[purpose])).altered_roles
        assert altered == ("machine_worker: search_path=evil",)
    with psycopg.connect(roles["superuser"].replace("+psycopg", ""), autocommit=True) as conn:
        conn.execute("ALTER ROLE machine_worker RESET ALL")
    assert read_database(Settings.from_env(database_url=roles["producer"])).altered_roles == ()


RIGHTS_OF_ALL = """
    SELECT c.relname, c.relowner::regrole::text, ARRAY(SELECT a::text FROM unnest(c.relacl) a ORDER BY 1) AS rights,
           ARRAY(SELECT attname || coalesce(attacl::text, '') FROM pg_attribute WHERE attrelid = c.oid ORDER BY attname)
    FROM pg_class c
    WHERE c.relnamespace IN ('chunkmill'::regnamespace, 'chunkmill_collections'::regnamespace)
      AND c.relkind IN ('r', 'v', 'S')
    UNION ALL
    SELECT p.oid::regprocedure::text, p.proowner::regrole::text,
           ARRAY(SELECT a::text FROM unnest(p.proacl) a ORDER BY 1), NULL
    FROM pg_proc p
    WHERE p.pronamespace = 'chunkmill'::regnamespace
    ORDER BY 1
"""


def test_the_migrator_backs_up_and_restores_and_the_file_of_roles_gives_the_rights_again(
    stack: StackStatus, roles: dict[str, str], tmp_path: Path
) -> None:
    """The migrator is no superuser and may create no schema: it owns what is in one."""
    there = Settings.from_env(database_url=roles["producer"], redis_url=stack.redis_url)
    with Client(create_db(roles["producer"], role="client"), Broker.connect(there), there) as client:
        client.enqueue([("a", "one"), ("b", "two")], collection="docs")
    run_file(roles["superuser"])

    def rights() -> list[tuple[object, ...]]:
        with psycopg.connect(roles["superuser"].replace("+psycopg", "")) as conn:
            return conn.execute(RIGHTS_OF_ALL).fetchall()

    def call(*words: str) -> dict[str, object]:
        env = {"DATABASE_URL": roles["migrator"], "REDIS_URL": stack.redis_url}
        done = CliRunner().invoke(cli, [*words, "--json"], env=env)
        assert done.exit_code == 0, done.output
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    before, file = rights(), str(tmp_path / "all.dump")
    assert len(before) > 100
    call("backup", file)
    restored = call("restore", file, "--replace", "--yes")
    assert (restored["chunks"], restored["needs_rights"]) == (2, True)
    assert not may(roles["reader"], "SELECT text FROM contents"), "a backup holds no rights"
    run_file(roles["superuser"])
    assert rights() == before


def test_the_one_role_of_earlier_versions_goes_on_working(stack: StackStatus, roles: dict[str, str]) -> None:
    with psycopg.connect(roles["superuser"].replace("+psycopg", ""), autocommit=True) as conn:
        exists = conn.execute("SELECT FROM pg_roles WHERE rolname = 'chunkmill_runtime'").fetchone()
        if not exists:
            conn.execute("CREATE ROLE chunkmill_runtime LOGIN")
    try:
        run_file(roles["superuser"])
        before = as_role(roles["superuser"], "chunkmill_runtime")
        for statement in ("SELECT text FROM contents", "INSERT INTO provider_lanes (route) VALUES ('openai-sync')"):
            assert may(before, statement)
        assert not may(before, "TRUNCATE chunks")
    finally:
        if not exists:
            admin(stack, "DROP ROLE chunkmill_runtime")


def test_the_roles_of_an_installation_in_public_work_there(stack: StackStatus) -> None:
    """Releases before the schema `chunkmill` created their tables there, and they stay."""
    admin(stack, "CREATE DATABASE least_privilege_before")
    superuser = url_of(stack, "least_privilege_before")
    migrator, producer = as_role(superuser, "chunkmill_migrator"), as_role(superuser, "machine_of_before")
    install_as_before(superuser, "0007")
    run_file(superuser)
    admin(stack, "CREATE ROLE machine_of_before LOGIN IN ROLE chunkmill_producers")
    migrate(migrator)
    run_file(superuser)
    db = create_db(producer, role="test", pool_size=1)
    with db.begin() as conn:
        space = registry.register(conn, SpaceSpec("local", "m", "a", 8, 256, Pooling.MEAN, normalize=True))
        assert conn.execute(sa.text(f"SELECT count(*) FROM public.{space.table_name}")).scalar_one() == 0
    db.dispose()
    assert not may(producer, "UPDATE public.chunkmill_alembic_version SET version_num = '0001'")
    assert may(migrator, "ALTER TABLE public.jobs ADD COLUMN mine int")
    admin(stack, "DROP DATABASE least_privilege_before WITH (FORCE)")
    admin(stack, "DROP ROLE machine_of_before")


def is_permitted(server: GuardedRedis, user: str, command: list[str]) -> bool:
    """Whether Redis runs the command for the user, or would, if its arguments were right."""
    with redis.Redis.from_url(server.url(user), protocol=2) as client:
        connection = client.connection_pool.get_connection()
        try:
            connection.send_command(*command)
            answer = connection.read_response()
        except (redis.ResponseError, redis.AuthenticationError) as error:
            return not re.search("NOPERM|no permissions", f"{type(error).__name__.upper()} {error}")
        else:
            return not isinstance(answer, redis.exceptions.NoPermissionError)
        finally:
            connection.disconnect()


@pytest.mark.parametrize("user", ["chunkmill", "flower"])
def test_each_user_may_do_what_docs_security_says_and_nothing_else(guarded: GuardedRedis, user: str) -> None:
    """Each command on a connection of its own, because some change it."""
    wrong = [
        command for command, users in TABLE if is_permitted(guarded, user, command.split(" ")) is not (user in users)
    ]
    assert wrong == []


@pytest.mark.parametrize("user", ["chunkmill", "flower"])
def test_no_other_command_of_the_server_is_open_to_a_user(guarded: GuardedRedis, user: str) -> None:
    """A newer server has more commands. Their keys are replies, because each user may do something with these."""
    known = guarded.admin.execute_command("COMMAND")
    arities = {str(name): int(described["arity"]) for name, described in known.items()}
    assert len(arities) > 200
    permitted = {
        name
        for name, arity in arities.items()
        if is_permitted(guarded, user, [name, *["a.reply.celery.pidbox"] * (abs(arity) - 1)])
    }
    reply = {"llen", "psubscribe", "publish"}  # these have keys and channels of their own, which the table has
    assert permitted - ALWAYS - reply == RIGHTS[user] - reply


def test_both_files_of_users_differ_in_flower_alone() -> None:
    files = [(DEPLOY / name).read_text() for name in ("redis-acl.conf", "redis-acl-6.2.conf")]
    users = [dict(re.findall(r"^user (\w+) (.*)$", text, re.MULTILINE)) for text in files]
    assert users[0].keys() == users[1].keys() == {"default", "admin", "chunkmill", "flower"}
    assert {name for name in users[0] if users[0][name] != users[1][name]} == {"flower"}


def test_nobody_gets_in_without_a_user(guarded: GuardedRedis) -> None:
    with redis.Redis(unix_socket_path=str(guarded.socket)) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_a_guarded_redis_has_every_transaction_again_after_a_restart(guarded: GuardedRedis) -> None:
    """Redis replays its append-only file as the user `default`, and drops silently what that user may not do."""
    kept = {"gpu": ["a", "b"], "openai": ["c"]}
    with guarded.client("chunkmill") as client:
        for queue, doorbells in kept.items():
            with client.pipeline(transaction=True) as transaction:
                for doorbell in doorbells:
                    transaction.rpush(queue, doorbell)
                transaction.expire(queue, 3600)
                transaction.execute()
        client.rpush("gpu", "d")

    guarded.restart()

    with guarded.client("chunkmill") as client:
        assert [client.llen(queue) for queue in kept] == [3, 1]
    assert guarded.admin.lrange("gpu", 0, -1) == [b"a", b"b", b"d"]
    assert guarded.admin.lrange("openai", 0, -1) == [b"c"]
    assert guarded.admin.ttl("gpu") > 0
    assert guarded.admin.ttl("openai") > 0
    assert {user for user, _ in guarded.denied()} <= {"chunkmill"}, guarded.admin.acl_log()  # the replay is `default`
    with redis.Redis(unix_socket_path=str(guarded.socket)) as anybody:
        for command in ("PING", "AUTH default anything", "AUTH anything", "LRANGE gpu 0 -1"):
            with pytest.raises(redis.AuthenticationError):
                anybody.execute_command(*command.split())


@pytest.mark.parametrize(
    ("dimensions", "storage"),
    [(384, "vector"), (768, "vector"), (1024, "vector"), (1024, "halfvec"), (3072, "halfvec")],
)
def test_the_functions_vector_tables_are_those_of_the_code(
    roles: dict[str, str], dimensions: int, storage: str
) -> None:
    columns = (
        "SELECT attname, format_type(atttypid, atttypmod), attstorage::text, attnotnull FROM pg_attribute "
        "WHERE attrelid = to_regclass(:table) AND attnum > 0 ORDER BY attnum"
    )
    made = []
    for revision, role in (("a", "producer"), ("b", "migrator")):
        spec = SpaceSpec("local", "m", revision, dimensions, 256, Pooling.MEAN, normalize=True)
        db = create_db(roles[role], role="test", pool_size=1)
        with db.begin() as conn:
            space = registry.register(conn, spec, storage=storage)
            made.append(conn.execute(sa.text(columns), {"table": space.table_name}).all())
        db.dispose()
    assert made[0] == made[1] != []
