"""A worker whose engine takes no time, to measure everything except the model.

``python -m chunkmill_workers.benchmarks.instant_worker`` starts it, with the options of ``celery worker``. The signs of
a vector's numbers are the bits of its text's hash.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import shake_256
from typing import Any

import numpy as np

from chunkmill.models import ModelFolder
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.engine.steps import StepClock
from chunkmill_workers.local import engines

TEXTS_PER_PASS = 512


class InstantEngine:
    """The part of ``chunkmill_workers.engine.engine.Engine`` that the worker uses."""

    device, dtype, backend = "cpu", "float32", "instant"
    has_own_queries = False

    def __init__(self, folder: ModelFolder) -> None:
        self.spec = folder.spec
        self.dimensions, self.max_tokens = folder.spec.dimensions, folder.spec.max_tokens
        self.batch_tokens = TEXTS_PER_PASS * self.max_tokens
        self.steps: dict[str, StepClock] = {}
        """Nothing in here may hang."""

    def stream(
        self, texts: Sequence[str], *_: object, stop: Callable[[], bool] | None = None, **__: object
    ) -> Iterator[TokenBatchResult]:
        for first in range(0, len(texts), TEXTS_PER_PASS):
            if stop is not None and stop():
                return
            part = texts[first : first + TEXTS_PER_PASS]
            size = -(-self.dimensions // 8)
            digests = b"".join(shake_256(text.encode()).digest(size) for text in part)
            bits = np.unpackbits(np.frombuffer(digests, np.uint8).reshape(len(part), size), axis=1)
            signs = bits[:, : self.dimensions].astype(np.float32) * 2 - 1
            n_tokens = np.array([1 + len(text) // 4 for text in part], np.int32)
            yield TokenBatchResult(
                indices=np.arange(first, first + len(part), dtype=np.int32),
                vectors=signs * np.float32(self.dimensions**-0.5),
                n_tokens=n_tokens,
                truncated=np.zeros(len(part), np.bool_),
                failures=(),
                seconds=0.0,
                tokens=int(n_tokens.sum()),
            )

    def embed(self, texts: Sequence[str], *_: object, **__: object) -> Any:
        """The result of one pass, for the canary, whose texts all fit into it."""
        (result,) = self.stream(texts)
        return result


if __name__ == "__main__":
    from celery.__main__ import main

    engines.load_engine = lambda settings, folder, *_: InstantEngine(folder)  # type: ignore[assignment, return-value]
    sys.argv[:1] = ["celery", "-A", "chunkmill_workers", "worker", "-Q", "gpu"]
    main()
