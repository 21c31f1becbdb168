"""The real model with faults, for tests of what a fault costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends import Backend, TokenVectors
from chunkmill_workers.engine.windows import Ids

Load = Callable[..., tuple[Engine, "FaultyBackend"]]


class FaultyBackend:
    """The real model, with faults: told by a predicate over a row's ids."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.name, self.device, self.dtype = inner.name, inner.device, inner.dtype
        self.packed, self.embedding_rows, self.concurrent = inner.packed, inner.embedding_rows, inner.concurrent
        self.raises: Callable[[Ids], bool] = lambda ids: False
        self.spoils: Callable[[Ids], bool] = lambda ids: False
        self.most_tokens = 1 << 30
        self.error: Exception = RuntimeError("the kernel did not like these shapes")
        self.passes: list[int] = []

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        self.passes.append(sum(len(row) for row in rows))
        if any(self.raises(row) for row in rows):
            raise self.error
        if self.passes[-1] > self.most_tokens:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        hidden = self._inner(rows, only=only)
        for at, row in enumerate(rows):
            if self.spoils(row):
                with torch.inference_mode():
                    hidden.vectors[at, 0, 0] = float("inf")
        return hidden


def has_word(engine: Engine, word: str) -> Callable[[Ids], bool]:
    """Is the row that of a text which is this one word?"""
    (ids,) = engine._tokenizer.encode([word])
    return lambda row: row.tolist() == ids.tolist()


def run(engine: Engine, texts: list[str]) -> tuple[dict[int, np.ndarray], dict[int, tuple[str, str]]]:
    vectors: dict[int, np.ndarray] = {}
    failures: dict[int, tuple[str, str]] = {}
    for result in engine.stream(texts):
        vectors |= dict(zip(result.indices.tolist(), result.vectors, strict=True))
        failures |= {failure.index: (failure.code, failure.reason) for failure in result.failures}
    return vectors, failures
