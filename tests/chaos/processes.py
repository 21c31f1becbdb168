"""Workers and pollers as processes, each in a slot that starts the next one when it ends, as a supervisor does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.metadata_servers import GcpServer
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
CELERY_WORKER = ["celery", "-A", "chunkmill_workers", "worker", "-Q", "gpu"]
SLOW_WORKER = ["tests.chaos.worker"]
SUPERVISOR = ["chunkmill.cli", "worker"]
POLLER = ["chunkmill.cli", "poller"]

AT_ONCE = (0, 128 + signal.SIGTERM)
"""Exit codes after a second SIGTERM: the drain was faster, or the worker left what it had."""
AGAIN = frozenset({70, 75})
"""Exit codes with which a process asks to be started again: its watchdog's, and that of a server that is away."""
QUICK_SECONDS, PAUSE_SECONDS = 3.0, 1.0
"""What ends this soon is started again after a pause, as every supervisor does it."""
STOP_SECONDS = float(os.environ.get("CHAOS_STOP_SECONDS", "15"))
"""The shortest grace that a platform leaves between its notice and the end. More where the machine may be busy."""


class Child:
    """One process that we started. ``supervised``: the worker is its child."""

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path, *, supervised: bool) -> None:
        self.name = name
        self.log = log
        self.supervised = supervised
        self.started = time.monotonic()
        self.asked = False
        """A fault of ours is what ends it."""
        self.struck = False
        """A fault has it; no second one may."""
        self._ready: set[int] = set()
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", *argv], cwd=ROOT, env=dict(env), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        self.pid = self._popen.pid

    def code(self) -> int | None:
        """Its exit code; negative for a signal, None while it runs."""
        return self._popen.poll()

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout: float) -> int | None:
        """Its exit code, or None if it still runs then."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def worker_pid(self) -> int | None:
        """The process that embeds: this one, or its child under the supervisor."""
        if self.code() is not None:
            return None
        if not self.supervised:
            return self.pid
        return next((pid for pid in children_of(self.pid) if "-m chunkmill_workers worker" in command_line(pid)), None)

    def ready_pid(self) -> int | None:
        """The worker's pid once it takes doorbells: Celery says so in its log, under the worker's name."""
        pid = self.worker_pid()
        if pid is None or pid in self._ready:
            return pid
        if re.search(rf"cpu-{pid}@\S+ ready\.", self.log.read_text(errors="replace")):
            self._ready.add(pid)
            return pid
        return None


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process of a slot ended."""

    name: str
    pid: int
    code: int
    asked: bool
    log: Path


class Crew:
    """All slots. What ends is started again until ``stop``."""

    def __init__(self, folder: Path, env: Mapping[str, str], *, workers: int, pollers: int, worker: Sequence[str]):
        self.exits: list[Exit] = []
        self.starts = 0
        self._folder = folder
        self._env = env
        self._supervised = worker is SUPERVISOR
        self._commands = {f"worker-{n}": worker for n in range(workers)}
        self._commands |= {f"poller-{n}": POLLER for n in range(pollers)}
        self.machines = {name: GcpServer() for name in self._commands if name.startswith("worker")}
        """The metadata service of each worker's own machine."""
        self._children: dict[str, Child] = {}
        self._machines_up = contextlib.ExitStack()
        self._mutex = threading.Lock()
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def start(self) -> None:
        for machine in self.machines.values():
            self._machines_up.enter_context(machine)
        for name in self._commands:
            self._start(name)
        self._keeper.start()

    @property
    def workers(self) -> list[Child]:
        return self._named("worker")

    @property
    def pollers(self) -> list[Child]:
        return self._named("poller")

    def unasked(self) -> list[Exit]:
        """Processes that ended by themselves, supervised workers too."""
        return [exit_ for exit_ in self.exits if not exit_.asked] + self._workers_exits()

    def _workers_exits(self) -> list[Exit]:
        """Supervised workers that failed by themselves, as their supervisors say; signals and drains are ours."""
        pids = []
        for log in sorted(self._folder.glob("*-worker-*.log")):
            for pid, code in re.findall(r"pid (\d+): exit code (\d+)", log.read_text(errors="replace")):
                if int(code) not in AT_ONCE:
                    pids.append(Exit("worker", int(pid), int(code), asked=False, log=log))
        return pids

    def stop(self) -> list[str]:
        """End everything with SIGTERM; returns what was wrong with that."""
        self._stopping.set()
        if self._keeper.is_alive():
            self._keeper.join(PATIENCE)
        problems = []
        running = [child for child in self._children.values() if child.code() is None]
        # What is still starting holds nothing, and may not have come to its signal handlers yet.
        fine = {child: (0,) if child.ready_pid() or child.supervised else (0, -signal.SIGTERM) for child in running}
        for child in running:
            child.send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for child in running:
            code = child.wait(max(0.1, deadline - time.monotonic()))
            if code is None:
                problems.append(f"{child.name} (pid {child.pid}) still ran {STOP_SECONDS:g} s after SIGTERM")
                child.send(signal.SIGKILL)
                child.wait(PATIENCE)
            elif code not in fine[child]:
                problems.append(f"{child.name} (pid {child.pid}) ended its drain with {code}, not 0")
        self._machines_up.close()
        return problems

    def _named(self, kind: str) -> list[Child]:
        with self._mutex:
            return [child for name, child in self._children.items() if name.startswith(kind)]

    def _start(self, name: str) -> None:
        self.starts += 1
        log = self._folder / f"{self.starts:03}-{name}.log"
        supervised = self._supervised and name.startswith("worker")
        env = dict(self._env)
        if machine := self.machines.get(name):
            env |= {"PREEMPTION_NOTICE": machine.cloud, "PREEMPTION_METADATA_URL": machine.url}
        child = Child(name, self._commands[name], env, log, supervised=supervised)
        with self._mutex:
            self._children[name] = child

    def _keep(self) -> None:
        due: dict[str, float] = {}
        while not self._stopping.wait(0.05):
            for name, child in list(self._children.items()):
                code = child.code()
                if code is None:
                    continue
                if name not in due:
                    self.exits.append(Exit(name, child.pid, code, child.asked, child.log))
                    quick = time.monotonic() - child.started < QUICK_SECONDS
                    due[name] = time.monotonic() + (PAUSE_SECONDS if quick else 0)
                if time.monotonic() >= due[name]:
                    del due[name]
                    self._start(name)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def children_of(pid: int) -> list[int]:
    """Its child processes, zombies left out."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # it ended just now
            if int(parent) == pid and state != "Z":
                pids.append(int(entry.name))
    return pids


def left_of(mark: str) -> list[str]:
    """Processes with ``mark`` in their environment: what a run has started, however far removed."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in environment:
                pids.append(f"{entry.name}: {command_line(int(entry.name)).strip()}")
    return pids
