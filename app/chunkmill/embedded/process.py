"""What the two servers share: their status, starting programs, and recognising a process.

A server is recognised by its user, its program and its arguments, which name its data folder, and never by a pid alone:
after a kill or a reboot, the pid in a pid file may belong to any other program. Any user may give a process any title.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chunkmill.embedded.paths import Account, server_owners
from chunkmill.errors import EmbeddedStackError

START_SECONDS = 60.0
STOP_SECONDS = 120.0  # at a clean stop, Postgres writes a checkpoint of up to max_wal_size

Marker = tuple[str, ...]
"""What the command line of a server begins with: the end of the program's path, and the first arguments."""

_PROC = Path("/proc/self/cmdline").exists()


@dataclass(frozen=True)
class ServerStatus:
    """The status of one server of the stack, when it was asked."""

    name: str
    """`postgres` or `redis`."""
    running: bool
    """Whether it answered a query."""
    pid: int | None
    """The pid of its process. It is also set while the server runs but does not answer yet."""
    url: str
    """Where it answers, or where it will answer when it is started."""
    version: str | None
    """Its version, such as `18.4`; None if it does not answer."""
    started: bool
    """Whether this call started it."""
    log: Path
    """Its log file, which may not exist yet."""


def run(argv: Sequence[str | Path], account: Account, *, detach: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command as `account`, and wait for its end. `detach` gives it a session of its own, without Ctrl-C.

    The servers outlive this process, so they get only what they need of its environment, and no secrets.

    Raises EmbeddedStackError if the program cannot be started.
    """
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    switch = os.geteuid() != account.uid
    try:
        return subprocess.run(
            list(argv),
            env={name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"},
            cwd="/",  # `account` may have no access to the current folder
            user=account.uid if switch else None,
            group=account.gid if switch else None,
            extra_groups=[] if switch else None,
            start_new_session=detach,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise EmbeddedStackError(
            f"{argv[0]} could not be run: {error}. If it was installed under a umask that hides it from "
            "other users, install it again with umask 022, or run Chunkmill as an ordinary user."
        ) from error


def start_detached(argv: Sequence[str | Path], log: Path, account: Account) -> int:
    """Start a program in the background, append its output to `log`, and return its pid.

    A shell starts it and exits, so it is not a child of this process and cannot become a zombie.
    """
    shell = "/bin/sh -c "
    script = 'log=$1; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!'
    pid = int(run([*shell.split(), script, "sh", log, *argv], account, detach=True).stdout)
    deadline = time.monotonic() + START_SECONDS
    # For a moment the process is still a shell, and then it has no arguments yet. Nobody would take it for the program.
    while (line := command_line(pid)).startswith(shell) or (not line.strip() and _runs(pid)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    return pid


def _runs(pid: int) -> bool:
    """Whether there is such a process, and it is not a zombie. Linux only; elsewhere this is False."""
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except OSError:
        return False


def command_line(pid: int) -> str:
    """The program and its arguments, with a space after each; empty if there is no such process, or it is a zombie."""
    if not _PROC:
        ps = ["/bin/ps", "-ww", "-o", "command=", "-p", str(pid)]
        return subprocess.run(ps, capture_output=True, text=True, check=False).stdout.strip() + " "
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).replace("\0", " ")
    except OSError:
        return ""


def is_ours(pid: int, marker: Marker) -> bool:
    """Whether `pid` is a live process of the servers' user that runs the program and the arguments of `marker`."""
    if not _PROC:
        ps = ["/bin/ps", "-ww", "-o", "uid=,command=", "-p", str(pid)]
        said = subprocess.run(ps, capture_output=True, text=True, check=False).stdout.strip()
        uid, _, command = said.partition(" ")
        return uid.isdigit() and int(uid) in server_owners() and f"{' '.join(marker)} " in f"{command} "
    try:
        argv = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
        if not argv[0].endswith(marker[0]) or tuple(argv[1 : len(marker)]) != marker[1:]:
            return False
        status = Path(f"/proc/{pid}/status").read_text()
        if int(status.partition("\nUid:")[2].split(maxsplit=1)[0]) not in server_owners():
            return False
        program = str(Path(f"/proc/{pid}/exe").readlink()).removesuffix(" (deleted)")
    except PermissionError:
        return True  # a container may not let root look at what runs as another user, which is the servers' own
    except (OSError, ValueError, IndexError):
        return False
    return program == os.path.realpath(argv[0])


def read_pid(pid_file: Path) -> int | None:
    """The number on the first line of a pid file; None if there is no file, or no number in it."""
    try:
        return int(pid_file.read_text().split("\n", 1)[0])
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def refuse_lost_server(marker: Marker, folder: Path) -> None:
    """Raise EmbeddedStackError if a server of `folder` runs whose pid file is gone (Linux only).

    This happens if the folder is deleted while its server runs. When that server ends, it would delete the socket of
    the new one, and it is not ours to stop. A server that is just ending has no pid file either, so we wait a moment.
    """
    if not _PROC:
        return
    deadline = time.monotonic() + 2
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        while is_ours(pid, marker):
            if time.monotonic() > deadline:
                raise EmbeddedStackError(
                    f"process {pid} is a server of {folder} whose pid file is gone: the folder was probably "
                    f"deleted while it ran. Stop it (kill {pid}), then try again."
                )
            time.sleep(0.05)


def refuse_foreign_socket(path: Path) -> None:
    """Raise EmbeddedStackError if something answers at the socket `path`. If nothing does, it is a leftover."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(os.fsencode(path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK):
                return
    raise EmbeddedStackError(
        f"the socket {path} is in use by a server that is not part of this stack. Stop that server, "
        "or set CHUNKMILL_HOME to another folder."
    )


def refuse_taken_port(port: int, server: str, setting: str) -> None:
    """Raise EmbeddedStackError if `port` cannot be bound on 127.0.0.1. `setting` is the option that set it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not count
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise EmbeddedStackError(
                f"{server} cannot use 127.0.0.1:{port}, given with {setting} now or at its last start: {error}. "
                f"Choose another one, or {setting} 0 to use a Unix socket alone."
            ) from error


def other_port(server: str, pid: int, used: int | None, asked: int, setting: str) -> str:
    """What is wrong with a running server that listens elsewhere than was asked for, and what to do."""
    where = f"at port {used}" if used else f"without port {asked}"
    return (
        f"{server} is already running (pid {pid}) {where}. Stop the stack first (chunkmill down), then start it with "
        f"{setting} {asked} again."
    )


def open_to_all(server: str, pid: int, port: int, setting: str) -> str:
    """What is wrong with a server that an earlier release started, and what to do."""
    return (
        f"{server} (pid {pid}) was started by an earlier release: every user of this machine gets in at port {port} "
        f"without a password. Stop the stack first (chunkmill down), then start it with {setting} {port} again: it "
        "then asks for a password."
    )


def stop(pid: int, marker: Marker, how: signal.Signals, log: Path) -> None:
    """Send the server a signal, and wait until its process has ended.

    Raises EmbeddedStackError if it is still running after STOP_SECONDS.
    """
    with suppress(ProcessLookupError):
        os.kill(pid, how)
    deadline = time.monotonic() + STOP_SECONDS
    while is_ours(pid, marker):
        if time.monotonic() > deadline:
            raise EmbeddedStackError(
                f"process {pid} did not stop within {STOP_SECONDS:.0f} s. Try again. "
                f"Its log ends with:\n{log_tail(log)}"
            )
        time.sleep(0.02)


def log_size(log: Path) -> int:
    """The present size of the log in bytes, for `log_tail(since=...)`."""
    return log.stat().st_size if log.exists() else 0


def log_tail(log: Path, since: int = 0, lines: int = 15) -> str:
    """The last lines of what was logged after the first `since` bytes."""
    if not log.exists():
        return f"({log} does not exist)"
    with log.open("rb") as file:
        file.seek(max(since, log_size(log) - 20_000))
        text = file.read().decode(errors="replace").strip()
    return "\n".join(text.splitlines()[-lines:]) or f"({log} is empty)"
