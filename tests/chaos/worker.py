"""`celery -A chunkmill_workers worker -Q gpu` with an engine that is slow on purpose and writes down what it embeds.

Run as ``python -m tests.chaos.worker``, which takes Celery's options. Everything but the engine is the product's own.
The vectors are a function of the text alone, so the harness knows every one of them to the bit; and what a kill makes
others do again is counted from the log, text by text.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkmill_workers.engine.steps import StepClock

if TYPE_CHECKING:
    from chunkmill.models import ModelFolder
    from chunkmill_workers.engine.results import TokenBatchResult

FOLDER, PAUSE = "CHAOS_FOLDER", "CHAOS_PAUSE"
HURRY = "hurry"
"""A file in the folder; once it is there, no TokenBatch takes time any more."""
TEXTS_PER_PASS = 4


def vector_of(text: str, dimensions: int) -> NDArray[np.float32]:
    """(dimensions,) float32 of length 1: the bits of the text's hash as signs, so equal on every machine."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(text.encode()).digest(-(-dimensions // 8)), np.uint8))
    return np.where(bits[:dimensions] == 1, np.float32(1), np.float32(-1)) * np.float32(dimensions**-0.5)


class SlowEngine:
    """What the pipeline and the canary in ``chunkmill_workers.local`` use of the engine's ``Engine``."""

    device, dtype, backend = "cpu", "float32", "slow"
    has_own_queries = False

    def __init__(self, folder: ModelFolder) -> None:
        self.spec = folder.spec
        self.dimensions = folder.spec.dimensions
        self.max_tokens = folder.spec.max_tokens
        self.batch_tokens = TEXTS_PER_PASS * self.max_tokens
        self._folder = Path(os.environ[FOLDER])
        self._pause = float(os.environ[PAUSE])
        self._log = os.open(
            self._folder / f"{os.getpid()}.executions", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        )
        self._one_at_a_time = threading.Lock()
        self._passes = StepClock()
        self.steps = {"a forward pass": self._passes}
        self._streams = itertools.count()

    def stream(
        self,
        texts: Sequence[str],
        kind: str = "document",
        *,
        on_long: object = None,
        stop: Callable[[], bool] | None = None,
        urgent: bool = False,
    ) -> Iterator[TokenBatchResult]:
        from chunkmill_workers.engine.results import TokenBatchResult

        stream = next(self._streams)
        for first in range(0, len(texts), TEXTS_PER_PASS):
            if stop is not None and stop():
                return
            part = texts[first : first + TEXTS_PER_PASS]
            started = time.perf_counter()
            if not urgent:  # the canary's golden texts are nobody's work
                with self._one_at_a_time:
                    self._run(stream, part)
            vectors = np.stack([vector_of(text, self.dimensions) for text in part])
            n_tokens = np.array([len(text.split()) + 2 for text in part], np.int32)
            yield TokenBatchResult(
                indices=np.arange(first, first + len(part), dtype=np.int32),
                vectors=vectors,
                n_tokens=n_tokens,
                truncated=np.zeros(len(part), np.bool_),
                failures=(),
                seconds=time.perf_counter() - started,
                tokens=int(n_tokens.sum()),
                padded_tokens=int(n_tokens.max()) * len(part),
                # The next pass begins as soon as this one is taken.
                under_way=len(texts[first + TEXTS_PER_PASS : first + 2 * TEXTS_PER_PASS]),
            )

    def _run(self, stream: int, part: Sequence[str]) -> None:
        with self._passes.step():
            self._write("begin", stream, part)
            if not (self._folder / HURRY).exists():
                time.sleep(self._pause)
            self._write("end", stream, part)

    def _write(self, event: str, stream: int, texts: Sequence[str]) -> None:
        """One write for one line: a kill leaves whole lines."""
        hashes = ",".join(hashlib.sha256(text.encode()).hexdigest() for text in texts)
        os.write(self._log, f"{event} {time.time():.6f} {stream} {hashes}\n".encode())


def load_slow_engine(settings: object, folder: ModelFolder, device: str, machine: object) -> Any:
    return SlowEngine(folder)


def main() -> None:
    import celery.__main__

    import chunkmill_workers.local.engines

    chunkmill_workers.local.engines.load_engine = load_slow_engine
    sys.argv[:1] = ["celery", "-A", "chunkmill_workers", "worker", "-Q", "gpu"]
    celery.__main__.main()


if __name__ == "__main__":
    main()
