"""The fixtures: ``pytest_plugins = ["chunkmill.testing.plugin"]`` in your ``conftest.py``.

They start nothing before a test asks for one. Servers are started once for each pytest process, and each test has a
database of its own, so that tests may run side by side (pytest-xdist).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from chunkmill.client import Client
from chunkmill.settings import Settings
from chunkmill.testing.running import RunningStack, running
from chunkmill.testing.servers import Servers
from chunkmill.testing.worker import Worker


@pytest.fixture(scope="session")
def chunkmill_servers() -> Iterator[Servers]:
    """A Postgres and a Redis for this pytest process.

    With ``CHUNKMILL_TEST_DATABASE_URL`` and ``CHUNKMILL_TEST_REDIS_URL`` they are those; the role of the first must be
    allowed to create databases.
    """
    given = (os.environ.get(f"CHUNKMILL_TEST_{name}_URL") for name in ("DATABASE", "REDIS"))
    with Servers(*given) as servers:
        yield servers


@pytest.fixture
def chunkmill_settings(chunkmill_servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The settings of an empty database. ``Client.from_env()`` and the command ``chunkmill`` use it during the test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)  # the settings of the machine must not reach a test
    with chunkmill_servers.database() as settings:
        monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
        monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
        monkeypatch.setenv("EMBEDDING_MODEL", settings.embedding_model)
        yield settings


@pytest.fixture
def chunkmill_running(chunkmill_settings: Settings) -> Iterator[RunningStack]:
    """A worker and a poller at work in that database, and a client."""
    with running(chunkmill_settings) as made:
        yield made


@pytest.fixture
def chunkmill_client(chunkmill_running: RunningStack) -> Client:
    """A client whose jobs are embedded and whose searches are answered."""
    return chunkmill_running.client


@pytest.fixture
def chunkmill_worker(chunkmill_running: RunningStack) -> Worker:
    """The worker: ``refuse("a text")`` puts a text on the dead list, ``with paused():`` keeps jobs open."""
    return chunkmill_running.worker
