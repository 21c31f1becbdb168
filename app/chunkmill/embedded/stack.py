"""The stack: one Postgres and one Redis in one folder, in whatever state a kill left them."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from chunkmill.embedded.kept import KEPT_FILE
from chunkmill.embedded.paths import (
    LOCK_FILE,
    Account,
    default_home,
    open_home,
    server_account,
    user_name,
    write_private,
)
from chunkmill.embedded.process import START_SECONDS, STOP_SECONDS, ServerStatus
from chunkmill.errors import EmbeddedStackError

ADDRESSES_FILE = "addresses.env"
_TUNING = "tuning"  # of chunkmill.tuning.profiles, which may be older than the first `up`
_ENTRIES = {LOCK_FILE, KEPT_FILE, ADDRESSES_FILE, "postgres", "redis", "programs", _TUNING}
_LOCK_SECONDS = START_SECONDS + STOP_SECONDS  # longer than any call holds the lock


@dataclass(frozen=True)
class StackStatus:
    """The status of both servers, when they were asked."""

    home: Path
    postgres: ServerStatus
    redis: ServerStatus

    @property
    def running(self) -> bool:
        """Whether both answered."""
        return self.postgres.running and self.redis.running

    @property
    def database_url(self) -> str:
        """A SQLAlchemy URL for psycopg: `postgresql+psycopg://postgres@/chunkmill?host=...&port=...`, or, if it has a
        port, `postgresql+psycopg://chunkmill:...@127.0.0.1:<port>/chunkmill`, whose role is not a superuser."""
        return self.postgres.url

    @property
    def redis_url(self) -> str:
        """A redis-py URL: `unix://<socket>?db=0`, or `redis://chunkmill:...@127.0.0.1:<port>/0` if it has a port."""
        return self.redis.url

    @property
    def addresses(self) -> Path | None:
        """The file with the addresses of those servers that have a port, passwords included; None without ports."""
        file = self.home / ADDRESSES_FILE
        return file if self.running and _with_ports(self) and file.exists() else None


class Stack:
    """The embedded servers of one home folder. Creating this object starts and writes nothing.

    home: the data folder; None means `default_home()`. Two homes are two independent stacks.
    port, redis_port: TCP ports on 127.0.0.1 at which the servers also listen, for tools without Unix sockets. Each user
        of this machine can reach them, so they ask for a password, which is made once and kept in the home (mode 0600).
        None means the port of the last start, and 0 none: then only the user who started the stack can connect.
    fsync: False is for tests: the data survives a killed server, but not a power failure.

    Every method raises EmbeddedStackError if it fails; the message says what to do next.
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        fsync: bool = True,
        port: int | None = None,
        redis_port: int | None = None,
    ) -> None:
        # The first one imports psycopg, which a command that only looks for a folder does not need.
        from chunkmill.embedded.postgres import Postgres
        from chunkmill.embedded.redis import Redis

        self.home = (home or default_home()).expanduser().resolve()
        self._postgres = Postgres(self.home, port=port, fsync=fsync)
        self._redis = Redis(self.home, port=redis_port, fsync=fsync)

    def up(self) -> StackStatus:
        """Start the servers that do not run, and return when both answer. If one fails, the other is stopped again.

        Processes that call this at the same time take turns, and the later ones find the servers running.
        """
        try:
            with self._locked(create=True):
                redis_started = self._redis.start()
                try:
                    postgres_started = self._postgres.start()
                except BaseException:
                    if redis_started:
                        self._redis.stop()
                    raise
                status = self._status(postgres_started, redis_started)
                self._write_addresses(status)
                return status
        except OSError as error:
            raise EmbeddedStackError(
                f"the folder {self.home} cannot be used for the embedded stack: {error}. Make it writable, "
                "or set CHUNKMILL_HOME to another folder."
            ) from error

    def status(self) -> StackStatus:
        """The present status. It starts and writes nothing. If the home does not exist, the stack is down."""
        self._check_owner()
        return self._status(postgres_started=False, redis_started=False)

    def down(self) -> StackStatus:
        """Stop both servers cleanly, and keep the data. Does nothing if the stack is already down."""
        self._check_owner()
        if (self.home / LOCK_FILE).exists():
            with self._locked() as there:
                if there:
                    self._stop()
        return self.status()

    def destroy(self) -> None:
        """Stop both servers, and delete the home with all data. Does nothing if the home does not exist.

        It refuses to delete a folder that contains anything that this class did not make.
        """
        self._check_owner()
        if not self.home.exists():
            return
        entries = {entry.name for entry in self.home.iterdir()}
        strangers = sorted(entries - _ENTRIES)
        if strangers or LOCK_FILE not in entries:
            reason = f"it also contains {', '.join(strangers[:3])}" if strangers else f"it has no {LOCK_FILE}"
            raise EmbeddedStackError(
                f"{self.home} does not look like a home of the embedded stack ({reason}), so it was not "
                "deleted. Check its contents, and delete it by hand."
            )
        with self._locked() as there:
            if there:
                self._stop()
                shutil.rmtree(self.home)

    def _status(self, postgres_started: bool, redis_started: bool) -> StackStatus:
        return StackStatus(
            self.home,
            self._postgres.status(started=postgres_started),
            self._redis.status(started=redis_started),
        )

    def _write_addresses(self, status: StackStatus) -> None:
        lines = [f"{name}={url.replace('+psycopg', '')}\n" for name, url in _with_ports(status).items()]
        file = self.home / ADDRESSES_FILE
        if lines:
            write_private(file, "".join(lines), Account(os.geteuid(), os.getegid()))
        else:
            file.unlink(missing_ok=True)

    def _stop(self) -> None:
        self._postgres.stop()
        self._redis.stop()

    def _check_owner(self) -> None:
        try:
            owner = self.home.stat().st_uid
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise EmbeddedStackError(
                f"{self.home} cannot be read: {error}. Set CHUNKMILL_HOME to a folder of your own."
            ) from error
        if owner != os.geteuid():
            raise EmbeddedStackError(
                f"{self.home} belongs to {user_name(owner)}, but you are {user_name(os.geteuid())}. Run this as "
                f"{user_name(owner)}, or set CHUNKMILL_HOME to a folder of your own."
            )

    @contextmanager
    def _locked(self, *, create: bool = False) -> Iterator[bool]:
        """Hold the home's lock, which ends with the process that holds it. `create` makes the home first.

        It yields False, without a lock, if another process destroyed the home meanwhile.
        """
        lock_file = self.home / LOCK_FILE
        while True:
            if create:
                self._make_home()
            try:
                file = os.fdopen(os.open(lock_file, os.O_RDWR | os.O_CREAT * create | os.O_NOFOLLOW, 0o600), "a")
            except FileNotFoundError:
                if create:
                    raise
                yield False
                return
            with file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    # An earlier release made it, so another user may hold it, for ever. Nobody else can hold a new one.
                    write_private(lock_file, "", Account(os.geteuid(), os.getegid()))
                    continue
                self._wait_for(file)
                # `destroy` may have held it before. Then this is the lock of a deleted folder.
                if lock_file.exists() and lock_file.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    yield True
                    return

    def _wait_for(self, file: IO[str]) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EmbeddedStackError(
                        f"another process has held the lock {self.home / LOCK_FILE} for {_LOCK_SECONDS:.0f} s "
                        f"(fuser {self.home / LOCK_FILE} names it). End it, then try again."
                    ) from None
                time.sleep(0.02)
            else:
                return

    def _make_home(self) -> None:
        self._check_owner()
        missing = [folder for folder in self.home.parents if not folder.exists()]
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.home / LOCK_FILE).exists() and any(entry.name != _TUNING for entry in self.home.iterdir()):
            raise EmbeddedStackError(
                f"{self.home} is not empty, and it is not a home of the embedded stack. Set CHUNKMILL_HOME to a "
                "new or empty folder."
            )
        if os.geteuid() == 0:
            for folder in missing:  # whatever the umask is
                folder.chmod(0o755)
            open_home(self.home, server_account())


def _with_ports(status: StackStatus) -> dict[str, str]:
    urls = {"DATABASE_URL": status.database_url, "REDIS_URL": status.redis_url}
    return {name: url for name, url in urls.items() if "@127.0.0.1:" in url}
