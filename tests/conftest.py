"""Real servers for every test above unit level: one stack per pytest process, one database per test.

Databases are cloned from a migrated template, which takes about 30 ms; each test has a Redis database of
its own number, emptied before it starts.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Iterator
from dataclasses import replace

import psycopg
import pytest
import redis
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db, migrate
from chunkmill.embedded import Stack, StackStatus
from chunkmill.settings import Settings
from tests.support import forks
from tests.support.compiled import compile_once
from tests.support.embedded_homes import folder_for_homes
from tests.support.waiting import PATIENCE

# The machine's own settings must not reach a test.
for name in {name.upper() for name in Settings.model_fields} & os.environ.keys():
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
# Several processes share the processors here. A thread of OpenMP that waits for another one would keep a core busy, and
# threads that take turns on one core only cost time: a sixth of that of the engine's tests. Those of threads set them.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of the tokenizers
os.environ.setdefault("PYTEST_TIMEOUT", str(4 * PATIENCE))  # for pytest-timeout: a test that hangs fails
os.environ["EMBEDDING_PROFILE"] = "off"  # nor may what somebody tuned here; tests of profiles say otherwise
os.environ["CHUNKMILL_OUTPUT"] = "table"  # what people see; tests of pipes say otherwise
os.environ["PREEMPTION_NOTICE"] = "off"  # nor the cloud this machine may be in

with contextlib.suppress(ImportError):  # where only the GPU's tests are to run, it is not installed
    from hypothesis import HealthCheck
    from hypothesis import settings as hypothesis_settings

    # A busy machine makes examples slowly, which says nothing about the code.
    hypothesis_settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    hypothesis_settings.load_profile("patient")

TEMPLATE = "template_for_tests"
FIRST_IDS = {"collections": 201, "jobs": 301, "provider_batches": 401, "dead_chunks": 501, "embed_requests": 601}
"""The first id of each table in a test's database.

They differ, so that a query that takes the id of one thing for that of another finds nothing, and a test fails. Spaces
and ChunkBatches begin with 1.
"""
_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """SIGTERM is as Ctrl-C: the servers of this run are stopped, not left. Several processes share what is compiled."""
    if not hasattr(config, "workerinput"):
        if config.getoption("numprocesses", None):
            compile_once(config)
        os.environ |= forks.prepared(config)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_sessionstart() -> None:
    """A test of JSON that is nested too deeply is not blamed for a finalizer that finds no room on its stack.

    Python may collect garbage, whoever made it, while such a test is as deep as Python allows.
    """
    hook = sys.unraisablehook

    def pass_on(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not RecursionError:
            hook(unraisable)

    sys.unraisablehook = pass_on


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays, so that to look through it for garbage meanwhile finds nothing.

    It took a third of the time of a core in which each pytest process collects the tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end, so that the garbage collector need not look at it again and again.

    Tests import and keep more. Looked through as often as Python does by itself, that takes a fortieth of all time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """What a failed test left open is closed before the next one starts, which would be blamed for it.

    The variables of a failed test live on in its traceback, connections among them. Nobody closes these, and each
    says so as it is collected: a ResourceWarning, which is an error here.
    """
    failed = item.session.testsfailed
    handled = yield
    if item.session.testsfailed > failed:
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            if hasattr(sys, name):
                delattr(sys, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    return handled


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A test that starts what a process logs does not decide what the next test sees in `caplog`."""
    root, hooks = logging.getLogger(), (sys.excepthook, threading.excepthook)
    loggers = [root, *(one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger))]
    handlers, levels = root.handlers[:], [one.level for one in loggers]
    yield
    root.handlers[:] = handlers
    for one, level in zip(loggers, levels, strict=True):
        if one.level != level:  # to set it empties a cache of every logger
            one.setLevel(level)
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logged may hold lone surrogates, which pytest-xdist cannot send: its process would end."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def stack() -> Iterator[StackStatus]:
    """Postgres and Redis for this pytest process, in a short path of their own (socket names are limited).

    With TEST_DATABASE_URL, which a superuser's URL must be, Postgres is that server instead (`make servers`).
    """
    with folder_for_homes("cm-") as home:
        status = Stack(home, fsync=False).up()
        if url := os.environ.get("TEST_DATABASE_URL"):
            given = Settings.from_env(database_url=url).require_database_url()
            status = replace(status, postgres=replace(status.postgres, url=given))
        admin(status, f"DROP DATABASE IF EXISTS {TEMPLATE}")
        admin(status, f"CREATE DATABASE {TEMPLATE}")
        migrate(url_of(status, TEMPLATE))
        keep_ids_apart(url_of(status, TEMPLATE))
        try:
            yield status
        finally:
            while _admins:
                _admins.popitem()[1].close()


@pytest.fixture
def settings(stack: StackStatus) -> Iterator[Settings]:
    with fresh_settings(stack) as made:
        yield made


@contextlib.contextmanager
def fresh_settings(stack: StackStatus, template: str = TEMPLATE) -> Iterator[Settings]:
    """Settings of a database that is a copy of ``template``, by default a migrated one, and an empty Redis database."""
    number = next(_numbers)
    name = f"test_{number}"
    if "TEST_DATABASE_URL" in os.environ:
        admin(stack, f"DROP DATABASE IF EXISTS {name}")  # a broken run may have left it
    # Copying files takes a tenth of the time of the other strategy, which writes every block to the log.
    admin(stack, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    redis_url = stack.redis_url.replace("db=0", f"db={number % 16}")
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    try:
        yield Settings.from_env(
            database_url=url_of(stack, name),
            redis_url=redis_url,
            poll_interval=0.1,
            lease_seconds=3.0,
            doorbell_repair_seconds=1.0,
        )
    finally:
        admin(stack, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def db(settings: Settings) -> Iterator[sa.Engine]:
    engine = create_db(settings.require_database_url(), role="test")
    yield engine
    engine.dispose()


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    connected = Broker.connect(settings)
    yield connected
    connected.close()


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with client_for(settings) as made:
        yield made


def client_for(settings: Settings) -> Client:
    return Client(create_db(settings.require_database_url(), role="client"), Broker.connect(settings), settings)


def keep_ids_apart(url: str, first_ids: dict[str, int] = FIRST_IDS) -> None:
    """Let the ids of each table begin as in ``first_ids``."""
    engine = create_db(url, role="test", pool_size=1)
    with engine.begin() as conn:
        for table, first in first_ids.items():
            conn.execute(sa.text(f"ALTER TABLE {table} ALTER COLUMN id RESTART WITH {first}"))
    engine.dispose()


def url_of(stack: StackStatus, name: str) -> str:
    return sa.make_url(stack.database_url).set(database=name).render_as_string(hide_password=False)


def admin(stack: StackStatus, statement: str) -> None:
    """Run a statement in the database ``postgres``, through one connection for the whole run: each test needs two."""
    url = url_of(stack, "postgres").replace("+psycopg", "")
    connection = _admins.get(url)
    if connection is None or connection.closed:
        connection = _admins[url] = psycopg.connect(url, autocommit=True)
        if connection.info.server_version >= 180000:
            connection.execute("SET file_copy_method = 'clone'")  # the kernel copies, which takes three quarters
    connection.execute(statement.encode(), prepare=False)


_admins: dict[str, psycopg.Connection] = {}
