"""Postgres and Redis for one benchmark, in a temporary folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db, migrate
from chunkmill.embedded import Stack, temporary_folder
from chunkmill.settings import Settings


@dataclass(frozen=True, slots=True)
class Servers:
    """A running stack with its schema. ``folder`` is for logs."""

    settings: Settings
    folder: Path
    versions: dict[str, str]

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which a child process finds them."""
        return {
            "DATABASE_URL": self.settings.require_database_url(),
            "REDIS_URL": self.settings.require_redis_url(),
            "HF_HUB_OFFLINE": "1",
        }

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        db = create_db(self.settings.require_database_url(), role="client")
        with Client(db, Broker.connect(self.settings), self.settings) as client:
            yield client

    @contextlib.contextmanager
    def db(self) -> Iterator[sa.Engine]:
        db = create_db(self.settings.require_database_url(), role="client")
        yield db
        db.dispose()

    def redis_memory(self) -> dict[str, Any]:
        """``used_memory`` and ``used_memory_peak``, in bytes."""
        with redis.Redis.from_url(self.settings.require_redis_url()) as client:
            info = client.info("memory")
        return {name: info[name] for name in ("used_memory", "used_memory_peak")}


@contextlib.contextmanager
def temporary_stack() -> Iterator[Servers]:
    """A stack that is deleted at the end. fsync is on, as for users.

    The folder's name is short, because the length of a socket's path is limited.
    """
    folder = temporary_folder("cm-bench-")
    stack = Stack(folder / "stack", fsync=True)
    try:
        status = stack.up()
        migrate(status.database_url)
        settings = Settings.from_env(database_url=status.database_url, redis_url=status.redis_url)
        yield Servers(
            settings,
            folder,
            {"postgres": str(status.postgres.version), "redis-server": str(status.redis.version)},
        )
    finally:
        stack.destroy()
        shutil.rmtree(folder)
