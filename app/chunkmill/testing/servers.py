"""A Postgres and a Redis for tests, and a database of its own for each."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import sqlalchemy as sa
from psycopg import sql

from chunkmill.db.connect import create_db, migrate
from chunkmill.embedded import Stack, temporary_folder
from chunkmill.errors import InvalidInput
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.testing.embedding import MODEL, MODELS

_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it gets a name of its own
_MEMORY_NEEDED = 2 * 1024**3
"""Bytes. With less, the folder is where temporary files belong."""


class Servers:
    """A Postgres and a Redis in a temporary folder, from wheels (the extra ``testing``), until the end of the block.

    ``database_url`` is that of a server that runs already, and of a role that may create databases there; pgvector must
    be installed on it. ``redis_url`` must come with it. Databases that were made there are dropped again.
    """

    def __init__(self, database_url: str | None = None, redis_url: str | None = None) -> None:
        if (database_url is None) != (redis_url is None):
            raise InvalidInput("give both database_url and redis_url, or neither, for servers of the tests' own.")
        self._given = (database_url, redis_url)
        self._numbers = itertools.count()
        self._template = f"chunkmill_test_{secrets.token_hex(4)}"
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            database_url, self.redis_url = self._given
            if database_url is None:
                has_room = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
                has_room = has_room and shutil.disk_usage(_MEMORY).free >= _MEMORY_NEEDED
                self._folder = temporary_folder("chunkmill-test-", _MEMORY if has_room else None)
                stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
                servers = Stack(self._folder, fsync=False)
                stack.callback(servers.down)
                status = servers.up()
                database_url, self.redis_url = status.database_url, status.redis_url
            # The address is checked and brought into its final form.
            checked = Settings.from_env(database_url=database_url, redis_url=self.redis_url)
            self._url = sa.make_url(checked.require_database_url())
            self._run("CREATE DATABASE {}", self._template)
            stack.callback(self._run, "DROP DATABASE IF EXISTS {} WITH (FORCE)", self._template)
            template = self._url_of(self._template)
            migrate(template)
            _register(template)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def database(self, **settings: Any) -> Iterator[Settings]:
        """Settings of an empty database that is migrated, which is dropped at the end of the block.

        ``settings`` are further ones, by their names in lower case. The model is ``chunkmill-testing``.
        """
        name = f"{self._template}_{next(self._numbers)}"
        # Copying files takes a third of the time of the other strategy, which writes every block to the log.
        self._run("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY", name, self._template)
        try:
            chosen = {"embedding_model": MODEL, "poll_interval": 0.2, **settings}
            yield Settings.from_env(database_url=self._url_of(name), redis_url=self.redis_url, **chosen)
        finally:
            self._run("DROP DATABASE {} WITH (FORCE)", name)

    def _url_of(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str, *names: str) -> None:
        address = self._url.set(drivername="postgresql").difference_update_query(["schema"])
        address = address.set(database="postgres")
        with psycopg.connect(address.render_as_string(hide_password=False), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _register(url: str) -> None:
    """Let the models be known, as those of workers are whose files a producer does not have."""
    db = create_db(url, role="test", pool_size=1)
    try:
        with db.begin() as conn:
            for spec in MODELS.values():
                registry.register(conn, spec)
    finally:
        db.dispose()
