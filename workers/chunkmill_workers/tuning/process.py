"""Our side of a candidate's process: starts it, asks it, and turns its failures into reasons."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from numpy.typing import NDArray

from chunkmill.system.python import module_command
from chunkmill.tuning.choose import Setup
from chunkmill_workers.tuning.tuned import thread_variables

ANSWER_SECONDS = 900.0
"""How long a candidate may be silent before it counts as hung. At fp32's speed a pass takes some seconds."""
_STOP_SECONDS = 60.0


def private_stdout() -> TextIO:
    """Take the real stdout. What libraries print goes to stderr from now on."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


class CandidateFailed(Exception):
    """Why a setup has no numbers. The reason goes into its row, and the tuning continues."""


@dataclass(frozen=True, slots=True)
class Task:
    """What all candidates of a tuning have in common."""

    model: str
    precision: str
    device: str
    texts: Sequence[str]
    """The texts of one pass."""
    chunk_batch: int
    """Texts per call, as in a ChunkBatch."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The measurements of one pass over the texts."""

    tokens: int
    seconds: float
    latency_ms: float
    peak_mib: float
    memory_mib: float
    """The memory of the device."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Vectors:
    vectors: NDArray[np.float32]
    """(n, dimensions)."""
    n_tokens: list[int]
    """The tokens of each text, before it is cut."""
    tokens: int
    seconds: float


class CandidateProcess:
    """A setup loaded in its own process, as a context manager. Every method raises CandidateFailed."""

    def __init__(self, task: Task, setup: Setup, *, backend: str | None = None) -> None:
        """``backend``, such as ``auto``, replaces the setup's."""
        self._process = subprocess.Popen(
            module_command("chunkmill_workers.tuning.candidate"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | thread_variables(setup.threads, task.device),
        )
        try:
            order = {**asdict(task), "texts": list(task.texts), "setup": asdict(setup)}
            if backend is not None:
                order["setup"]["backend"] = backend
            self.description = self._ask(order)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def vectors(self, texts: Sequence[str]) -> Vectors:
        answer = self._ask({"do": "vectors", "texts": list(texts)})
        flat = np.frombuffer(base64.b64decode(answer["vectors"]), "<f4")
        return Vectors(flat.reshape(len(texts), -1), answer["n_tokens"], answer["tokens"], answer["seconds"])

    def turn(self) -> Turn:
        return Turn(**self._ask({"do": "turn"}))

    def stop(self) -> None:
        """Kill the process. It writes nothing, so a kill costs nothing."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.kill()
        process.wait(_STOP_SECONDS)

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None  # noqa: S101 - both are pipes, see __init__
        assert self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
                raise CandidateFailed(f"no answer in {ANSWER_SECONDS:.0f} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CandidateFailed(_end(self._process.wait(_STOP_SECONDS)))
        answer: dict[str, Any] = json.loads(line)
        if "problem" in answer:
            raise CandidateFailed(answer["problem"])
        return answer


def _end(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"its process ended with exit code {code}; its last words are above"
    name = signal.Signals(-code).name
    killed = ": out of memory, most likely" if -code == signal.SIGKILL else ""
    return f"its process was ended by {name}{killed}"
