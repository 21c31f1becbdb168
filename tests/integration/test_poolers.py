"""A pooler that lends sessions for a transaction at a time is noticed, with a real PgBouncer where it is installed."""

from __future__ import annotations

import getpass
import itertools
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.client import chunks as reading
from chunkmill.client import ends
from chunkmill.db.connect import create_db
from chunkmill.errors import StoreUnavailable
from chunkmill.monitor.servers import shares_sessions
from chunkmill.settings import Settings
from chunkmill.store import chunks as store
from tests.integration.hands import Hands
from tests.integration.test_chunks import fill
from tests.support.askers import answering
from tests.support.waiting import Call, until

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


def test_postgres_itself_shares_no_session(settings: Settings) -> None:
    assert not shares_sessions(settings)


@pytest.fixture(params=["transaction", "session"])
def pooled(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Iterator[tuple[str, Settings]]:
    """The mode of a PgBouncer before this test's database, and settings that lead through it."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed")
    direct = sa.make_url(settings.require_database_url())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n{direct.database} = host={direct.query['host']} port={direct.query['port']} "
        f"dbname={direct.database} user={direct.username}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = {request.param}\nlogfile = {tmp_path}/log\nignore_startup_parameters = extra_float_digits\n"
    )
    user = ["-u", Path(str(direct.query["host"])).owner()] if os.geteuid() == 0 else []
    if user:
        for path in (tmp_path, *tmp_path.parents[:3]):
            path.chmod(path.stat().st_mode | 0o055)
        (tmp_path / "log").touch()
        (tmp_path / "log").chmod(0o666)
    process = subprocess.Popen([PGBOUNCER, *user, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"postgresql+psycopg://{direct.username or getpass.getuser()}@127.0.0.1:{port}/{direct.database}"
    through = settings.model_copy(update={"database_url": url})

    def answers() -> bool:
        try:
            shares_sessions(through)
        except StoreUnavailable:
            return False
        return True

    try:
        until(answers, lambda: (tmp_path / "log").read_text() if (tmp_path / "log").exists() else "no log")
        yield request.param, through
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_pooler_in_transaction_mode_is_noticed(pooled: tuple[str, Settings]) -> None:
    mode, through = pooled
    assert shares_sessions(through) is (mode == "transaction")


def test_chunks_and_vectors_are_read_through_a_pooler_in_any_mode(
    pooled: tuple[str, Settings], client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page is a transaction of its own, so it does not matter who has the session in between."""
    monkeypatch.setattr(reading, "PAGE", 3)
    monkeypatch.setattr(store, "MAX_WINDOW", 7)
    fill(client, db, 60)
    _, through = pooled
    # PgBouncer keeps no prepared statements before release 1.21.
    pool = create_db(through.require_database_url(), role="client")
    sa.event.listen(pool, "connect", lambda connection, _: setattr(connection, "prepare_threshold", None))
    with Client(pool, Broker.connect(through), through) as behind:
        listed, batches = behind.chunks("docs"), behind.iter_vectors("docs", batch_size=7)
        ids: list[str] = []
        others: list[str] = []
        for chunk in listed:
            ids.append(chunk.id)
            for part, _ in itertools.islice(batches, 1):
                others += part
        assert ids == others == [chunk.id for chunk in client.chunks("docs")]
        assert behind.count("docs", filter={"half": 1}) == 30


def test_a_wait_ends_through_a_pooler_in_any_mode(
    pooled: tuple[str, Settings], client: Client, db: sa.Engine, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In transaction mode no notification arrives, which is noticed, and the call looks by itself."""
    mode, through = pooled
    monkeypatch.setattr(ends, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(ends, "FIRST_REST_S", 10_000.0)
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(sa.text(f"ALTER DATABASE {db.url.database} SET search_path = chunkmill, public"))
    job = client.enqueue([("a", "text a")], collection="docs")
    pool = create_db(through.require_database_url(), role="client")
    sa.event.listen(pool, "connect", lambda connection, _: setattr(connection, "prepare_threshold", None))
    with Client(pool, Broker.connect(through), through) as behind:
        waiting = Call(lambda: behind.wait(job.id))
        hears = ends.ends_of(pool)
        if mode == "session":
            until(lambda: any(watch._rest == ends.LONGEST_REST_S for watch in hears._watches))
        else:
            until(lambda: hears._said is not None)
        assert hears.are_heard is (mode == "session")
        hands.work()
        assert waiting.result().embedded == 1


def test_answers_arrive_through_a_pooler_in_any_mode(
    pooled: tuple[str, Settings], client: Client, db: sa.Engine
) -> None:
    """In transaction mode it gives the session that listens to others, and notifications go astray."""
    _, through = pooled
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        # The search path of a session is lost between two transactions.
        conn.execute(sa.text(f"ALTER DATABASE {db.url.database} SET search_path = chunkmill, public"))
    pool = create_db(through.require_database_url(), role="client")
    sa.event.listen(pool, "connect", lambda connection, _: setattr(connection, "prepare_threshold", None))
    with Client(pool, Broker.connect(through), through) as behind, answering(db) as worker:
        calls = [
            Call(lambda n=n, by=by: by.embed([f"text {n + i}" for i in range(40)]))  # type: ignore[misc]
            for n, by in enumerate((behind, client) * 6)
        ]
        for n, call in enumerate(calls):
            assert call.result().argmax(axis=1).tolist() == list(range(n, n + 40))
        assert [behind.embed([f"text {n}"]).argmax() for n in range(5)] == list(range(5))
    assert worker.answered
