"""Forward rows back to texts: windows of a split text are averaged when the last of them is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine.results import TextFailure
from chunkmill_workers.engine.run import Outcome
from chunkmill_workers.engine.windows import Rows


@dataclass(slots=True)
class _Open:
    """A split text under way. ``total`` is (dimensions,) float64: the sum of weight times window vector."""

    total: NDArray[np.float64]
    weight: int = 0
    windows: int = 0
    failure: tuple[str, str] | None = None


class Collector:
    """Of one stream. ``finish`` is the head's last step, on (n, dimensions) fp32."""

    def __init__(self, rows: Rows, finish: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._rows = rows
        self._finish = finish
        self._open: dict[int, _Open] = {}

    def add(
        self, batch: NDArray[np.int32], outcome: Outcome
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], tuple[TextFailure, ...]]:
        """Take one TokenBatch's rows; give back (m,) int32 texts, their (m, d) float32 vectors, failures."""
        owners = self._rows.owner[batch]
        split = self._rows.windows[owners] > 1
        failed = np.zeros(len(batch), np.bool_)
        failed[list(outcome.failures)] = True
        good = ~split & ~failed
        texts, vectors = [owners[good]], [outcome.vectors[good]]
        failures = [
            TextFailure(int(owners[at]), *outcome.failures[at]) for at in sorted(outcome.failures) if not split[at]
        ]
        for at in np.flatnonzero(split):
            text = int(owners[at])
            done = self._add_window(text, int(batch[at]), outcome.vectors[at], outcome.failures.get(int(at)))
            if done is None:
                continue
            if done.failure is not None:
                failures.append(TextFailure(text, *done.failure))
                continue
            mean = torch.from_numpy((done.total / done.weight).astype(np.float32)[None])
            texts.append(owners[at : at + 1])
            vectors.append(self._finish(mean).numpy())
        return np.concatenate(texts), np.concatenate(vectors), tuple(failures)

    def _add_window(
        self, text: int, row: int, vector: NDArray[np.float32], failure: tuple[str, str] | None
    ) -> _Open | None:
        """The text, once all its windows are in."""
        entry = self._open.setdefault(text, _Open(np.zeros(len(vector), np.float64)))
        weight = int(self._rows.weight[row])
        if failure is None:
            entry.total += weight * vector.astype(np.float64)
        entry.failure = entry.failure or failure
        entry.weight += weight
        entry.windows += 1
        return self._open.pop(text) if entry.windows == self._rows.windows[text] else None
