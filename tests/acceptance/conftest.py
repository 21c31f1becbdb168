"""Real Celery workers and pollers as processes, stopped by their own process ids."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkmill.settings import Settings
from tests.support import forks
from tests.support.waiting import PATIENCE, until


class Process:
    """A child process whose output goes to a file."""

    def __init__(
        self, arguments: list[str], env: dict[str, str], log: Path, cwd: Path | None = None, *, fresh: bool = False
    ) -> None:
        self.log = log
        with log.open("wb") as output:
            self.popen = forks.start(arguments, env=env, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, fresh=fresh)

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.output() or self.popen.poll() is not None, self.output)
        assert text in self.output(), self.output()

    def output(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(PATIENCE)

    def terminate(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(PATIENCE)


class Processes:
    """Starts workers and pollers against one test's database and Redis."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.env = os.environ | {
            "DATABASE_URL": settings.require_database_url(),
            "REDIS_URL": settings.require_redis_url(),
            "LEASE_SECONDS": "10",  # a lease has three renewals, of which a stalled machine may miss two
            "POLL_INTERVAL": "0.1",
            "DOORBELL_REPAIR_SECONDS": "1",
            "CHUNK_BATCH_SIZE": "64",
            "OMP_NUM_THREADS": "1",
        }
        self._folder = folder
        self._started: list[Process] = []

    def start(self, *arguments: str, cwd: Path | None = None, fresh: bool = False, **env: str) -> Process:
        """Start a program as a fork (`tests.support.forks`), or if it is to be ``fresh``, by its own command line."""
        log = self._folder / f"{len(self._started)}.log"
        process = Process(list(arguments), self.env | env, log, cwd, fresh=fresh)
        self._started.append(process)
        return process

    def worker(self, *arguments: str, ready: bool = True, fresh: bool = False, **env: str) -> Process:
        command = ("celery", "-A", "chunkmill_workers", "worker", "-Q", "gpu", *arguments)
        process = self.start(*command, fresh=fresh, **env)
        if ready:
            process.wait_for("ready.")
        return process

    def poller(self, *, fresh: bool = False) -> Process:
        return self.start("chunkmill.cli", "poller", fresh=fresh)

    def stop_all(self) -> None:
        for process in self._started:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(15)
                continue
            process.kill()


@pytest.fixture
def processes(settings: Settings, tmp_path: Path) -> Iterator[Processes]:
    started = Processes(settings, tmp_path)
    yield started
    started.stop_all()
