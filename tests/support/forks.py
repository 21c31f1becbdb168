"""Starts our programs as forks of a process that has imported what they import.

A worker that starts needs 3 s of a core, 2.7 of them to import torch, Celery and the rest; a poller or a command needs
1.3. The tests start about a hundred. `start` and `run` have a process of that kind forked by a server of its kind, of
which a run of pytest has one (all its processes share it), and the rest is as ever: the program is a process of its
own, begins at its ``__main__`` with its own arguments, environment, folder and files, and ends with its own exit code.

What a fork cannot have is decided before the first import: a Python with other options, or variables that a library
reads as it is loaded (`READ_AT_IMPORT`). If these differ, the program is started from the beginning. Wherever the
start itself is what a test is about, such as where modules are found, the test asks for that (``fresh``).
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from tests.support.checkout import CHECKOUT, PYTHONPATH
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    import pytest

FOLDER = "CHUNKMILL_TESTS_FORKS"
"""The variable that names the folder of the servers of this run of pytest."""
OF = f"{FOLDER}_OF"
"""The variable that holds the process id of this run of pytest."""
READ_AT_IMPORT = ("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "OTEL_", "CELERY", "FLOWER_", "COVERAGE")
"""The beginnings of variables that Python or a library may read once, as it is loaded."""
READ_BY_THE_ENGINE = (
    "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "CUDA", "TORCH", "HF_", "TRANSFORMERS_",
    "TOKENIZERS_", "ORT_",
)  # fmt: skip
_OURS: dict[str, dict[str, str]] = {"workers": {"OMP_NUM_THREADS": "1"}, "paid workers": {}, "commands": {}}
COMMANDS = (
    "celery.app.amqp", "celery.app.control", "celery.app.events", "celery.app.log", "celery.backends.redis",
    "celery.worker.worker",
    "chunkmill.cli.processes.processes", "chunkmill.cli.stack",
    "chunkmill.client", "kombu.transport.redis", "psycopg", "rich.progress", "rich.table",
    "sqlalchemy.dialects.postgresql.psycopg",
)  # fmt: skip
"""What a poller and most commands import. It must not bring torch or OpenTelemetry's SDK: programs look for these."""
PAID_WORKERS = (
    *COMMANDS, "celery.apps.worker", "celery.bin.celery", "celery.concurrency.thread", "celery.worker.components",
    "celery.worker.strategy", "chunkmill_workers.process.consumer", "chunkmill_workers.process.worker",
    "chunkmill_workers.provider.context", "chunkmill_workers.provider.plain", "chunkmill_workers.provider.steps",
    "chunkmill_workers.tasks", "openai",
)  # fmt: skip
"""What a worker of the paid routes imports, which has no torch."""
WORKERS = (
    *COMMANDS, "torch", "celery.apps.worker", "celery.bin.celery", "celery.concurrency.thread",
    "celery.worker.components",
    "celery.worker.strategy", "chunkmill_workers.engine", "chunkmill_workers.local.context",
    "chunkmill_workers.local.pipeline", "chunkmill_workers.process.consumer", "chunkmill_workers.process.worker",
    "chunkmill_workers.tasks",
)  # fmt: skip
"""What a worker with a model imports."""
KINDS = {"commands": COMMANDS, "paid workers": PAID_WORKERS, "workers": WORKERS}


def prepared(config: pytest.Config) -> dict[str, str]:
    """The variables that let all processes of this run of pytest share its servers, which end when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="cm-forks-")
    config.add_cleanup(folder.cleanup)
    return {FOLDER: folder.name, OF: str(os.getpid())}


class Fork:
    """A process that a server has forked, with the methods of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(_line(connection, PATIENCE))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = int(_line(self._connection, timeout))
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        self._connection.close()


Process = Fork | subprocess.Popen[bytes]


def start(
    arguments: list[str],
    *,
    env: Mapping[str, str],
    stdout: int | IO[Any],
    stderr: int | IO[Any],
    stdin: int | IO[Any] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    safe_path: bool = False,
    new_session: bool = False,
    fresh: bool = False,
) -> Process:
    """Start ``python -m`` with ``arguments``: as a fork if that is the same, else from the beginning.

    ``safe_path`` is Python's option ``-P``. Without ``stdin`` there is nothing to read. ``fresh`` is for tests of the
    start itself: from the beginning.
    """
    kind = kind_of(arguments)
    if fresh or kind is None or differing(env, kind):
        options = ["-P"] if safe_path else []
        return subprocess.Popen(
            [sys.executable, *options, "-m", *arguments], env=env, cwd=cwd, stdin=stdin or subprocess.DEVNULL,
            stdout=stdout, stderr=stderr, start_new_session=new_session,
        )  # fmt: skip
    folder = os.fspath(cwd or Path.cwd())
    request = {"arguments": arguments, "env": dict(env), "cwd": folder, "safe_path": safe_path, "session": new_session}
    body = json.dumps(request).encode()
    with Path(os.devnull).open("rb") as nothing:
        files = [stdin or nothing, stdout, stdout if stderr == subprocess.STDOUT else stderr]
        numbers = [file if isinstance(file, int) else file.fileno() for file in files]
        connection = _connect(kind)
        try:
            socket.send_fds(connection, [len(body).to_bytes(4)], numbers)
            connection.sendall(body)
            return Fork(connection)
        except BaseException:
            connection.close()
            raise


def run(
    arguments: list[str],
    *,
    env: Mapping[str, str],
    text: str = "",
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m`` with ``arguments``, as `subprocess.run` does with ``capture_output`` and ``text``."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(text.encode())
        given.seek(0)
        process = start(arguments, env=env, stdin=given, stdout=out, stderr=err, cwd=cwd)
        try:
            process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait(PATIENCE)
            raise
        out.seek(0)
        err.seek(0)
        assert process.returncode is not None
        return subprocess.CompletedProcess(arguments, process.returncode, out.read().decode(), err.read().decode())


def kind_of(arguments: list[str]) -> str | None:
    """The kind of server that forks this program; None if it is rather started from the beginning."""
    module, *options = arguments
    if module == "celery":
        if "worker" not in options:
            return None
        *_, queues = ["gpu", *(after for name, after in pairwise(options) if name == "-Q")]
        return "workers" if "gpu" in queues.split(",") else "paid workers"
    if module == "tests.acceptance.odd_worker":
        return "workers"
    # `worker` and `flower` replace themselves by other programs.
    return "commands" if module == "chunkmill.cli" and not {"worker", "flower"} & set(options[:1]) else None


def differing(env: Mapping[str, str], kind: str) -> set[str]:
    """The names of variables that are read at import and that differ from those of the server of ``kind``."""
    ours = _environment(kind)
    prefixes = READ_AT_IMPORT + (READ_BY_THE_ENGINE if kind == "workers" else ())
    theirs = {"PYTHONPATH": PYTHONPATH, **env}  # without it, the checkout is found as it is installed
    return {name for name in {*theirs, *ours} if name.startswith(prefixes) and theirs.get(name) != ours.get(name)}


def _environment(kind: str) -> dict[str, str]:
    return {**os.environ, **_OURS[kind], "PYTHONPATH": PYTHONPATH}


def _line(connection: socket.socket, timeout: float | None) -> bytes:
    """What comes up to the end of a line. One that has begun is there at once."""
    if not select.select([connection], [], [], timeout)[0]:
        raise subprocess.TimeoutExpired("a fork", timeout or 0)
    said = bytearray()
    while not said.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            raise RuntimeError("the server of forks has ended; what it said is in the folder of " + FOLDER)
        said += part
    return bytes(said)


def _connect(kind: str) -> socket.socket:
    """A connection with the server of ``kind``, which is started if it is not there yet."""
    folder = Path(os.environ[FOLDER])
    address = folder / kind
    with (folder / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            with (folder / f"{kind}.log").open("wb") as log:
                # -P: a fork's own folder, or none, is the first place where it looks for modules.
                server = subprocess.Popen(
                    [sys.executable, "-P", "-m", "tests.support.forks", kind, os.environ[OF]],
                    cwd=CHECKOUT, env=_environment(kind), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            deadline = time.monotonic() + PATIENCE
            while not address.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / f"{kind}.log").read_text() or f"{kind}: no server of forks")
                time.sleep(0.05)
            server.returncode = 0  # it ends by itself, with this run of pytest
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(address))
    return connection


# The server


@dataclass
class Request:
    arguments: list[str]
    env: dict[str, str]
    cwd: str
    safe_path: bool
    session: bool
    files: list[int]


def _serve(kind: str, folder: Path, pytest_pid: int) -> Request:
    """Fork for all who ask, until the run of pytest ends. Returns in each fork, with what it is to be."""
    before = dict(os.environ)
    for module in KINDS[kind]:
        importlib.import_module(module)
    added = {name: value for name, value in os.environ.items() if name not in before}
    gc.collect()
    gc.freeze()
    asked: dict[int, socket.socket] = {}
    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    run_of_pytest = os.pidfd_open(pytest_pid)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / f"{kind}.new"))
    listener.listen(64)
    (folder / f"{kind}.new").rename(folder / kind)
    with selectors.DefaultSelector() as waiting:
        for source in (woken, listener, run_of_pytest):
            waiting.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj == run_of_pytest:
                    _end(asked)
                elif key.fileobj is woken:
                    with contextlib.suppress(BlockingIOError):
                        woken.recv(4096)
                    _report(asked)
                else:
                    connection, _ = listener.accept()
                    request = _read(connection)
                    pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        signal.signal(signal.SIGINT, signal.default_int_handler)
                        waiting.close()
                        os.close(run_of_pytest)
                        for ours in (listener, woken, wakes, connection, *asked.values()):
                            ours.close()
                        request.env = {**added, **request.env}
                        return request
                    for number in request.files:
                        os.close(number)
                    asked[pid] = connection
                    _say(connection, pid)


def _read(connection: socket.socket) -> Request:
    first, files, _, _ = socket.recv_fds(connection, 4, 3)
    missing = int.from_bytes(first)
    body = bytearray()
    while len(body) < missing:
        body += connection.recv(missing - len(body))
    return Request(files=list(files), **json.loads(body))


def _report(asked: dict[int, socket.socket]) -> None:
    """Tell those whose forks have ended how."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with contextlib.closing(asked.pop(pid)) as connection:
                _say(connection, os.waitstatus_to_exitcode(status))


def _say(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # whoever asked may have ended
        connection.sendall(b"%d\n" % number)


def _end(asked: dict[int, socket.socket]) -> NoReturn:
    for pid in asked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _become(request: Request) -> None:
    """Be the program that was asked for, in a process that is a fork by now."""
    if request.session:
        os.setsid()
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    # Whether it is a terminal decides how a file is written, so they are opened again.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request.env)
    os.chdir(request.cwd)
    if not request.safe_path:
        sys.path.insert(0, request.cwd)
    # What `celery -A` does to the search path is undone as this package is imported.
    sys.modules.pop("chunkmill_workers", None)
    module, *options = request.arguments
    sys.argv = [module, *options]  # runpy replaces the first by the module's file
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _become(_serve(sys.argv[1], Path(os.environ[FOLDER]), int(sys.argv[2])))
