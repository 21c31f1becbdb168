"""The processes that `demo` starts, each with a log file, and stops by their own pids."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from chunkmill.errors import ChunkmillError

STOP_SECONDS = 20.0
"""A process that has not ended this many seconds after SIGTERM is killed. In that time a worker finishes its TokenBatch
and gives back its leases."""
TAIL_LINES = 15


class ProcessEnded(ChunkmillError):
    """A process that has to run has ended."""

    code: ClassVar[str] = "process_ended"


class Child:
    """One process. It has a session of its own, so that only :meth:`stop` ends it, and not a Ctrl-C."""

    def __init__(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(argv),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def require_alive(self) -> None:
        if (code := self._process.poll()) is not None:
            raise ProcessEnded(f"the {self.name} ended with exit code {code}; the end of its log is above.")

    def ask_to_stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        self.ask_to_stop()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tail(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
