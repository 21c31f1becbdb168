"""From rows back to texts: the windows of a split text are averaged when the last of them is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine.results import TextFailure
from chunkmill_workers.engine.run import PassResult
from chunkmill_workers.engine.windows import Rows


@dataclass(slots=True)
class _SplitText:
    """A split text, some of whose windows are finished."""

    total: NDArray[np.float64]
    """(dimensions,) float64: the sum of weight times window vector."""
    weight: int = 0
    windows: int = 0
    failure: tuple[str, str] | None = None


class Collector:
    """Turns rows of one stream into texts. ``finish`` is the last step of the head, on (n, dimensions) fp32."""

    def __init__(self, rows: Rows, finish: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._rows = rows
        self._finish = finish
        self._split_texts: dict[int, _SplitText] = {}

    def add(
        self, rows: NDArray[np.int32], result: PassResult
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], tuple[TextFailure, ...]]:
        """The texts that ``rows``, (n,) int32 numbers of finished rows, complete.

        They are (m,) int32 positions of texts, their (m, dimensions) float32 vectors, and the texts that failed.
        """
        owners = self._rows.owner[rows]
        split = self._rows.windows[owners] > 1
        failed = np.zeros(len(rows), np.bool_)
        failed[list(result.failures)] = True
        good = ~split & ~failed
        texts, vectors = [owners[good]], [result.vectors[good]]
        failures = [
            TextFailure(int(owners[at]), *result.failures[at]) for at in sorted(result.failures) if not split[at]
        ]
        for at in np.flatnonzero(split):
            text = int(owners[at])
            whole = self._add_window(text, int(rows[at]), result.vectors[at], result.failures.get(int(at)))
            if whole is None:
                continue
            if whole.failure is not None:
                failures.append(TextFailure(text, *whole.failure))
                continue
            mean = torch.from_numpy((whole.total / whole.weight).astype(np.float32)[None])
            texts.append(owners[at : at + 1])
            vectors.append(self._finish(mean).numpy())
        return np.concatenate(texts), np.concatenate(vectors), tuple(failures)

    def _add_window(
        self, text: int, row: int, vector: NDArray[np.float32], failure: tuple[str, str] | None
    ) -> _SplitText | None:
        """Add a finished window to its text. Returns the text once all its windows are finished, else None."""
        entry = self._split_texts.setdefault(text, _SplitText(np.zeros(len(vector), np.float64)))
        weight = int(self._rows.weight[row])
        if failure is None:
            entry.total += weight * vector.astype(np.float64)
        entry.failure = entry.failure or failure
        entry.weight += weight
        entry.windows += 1
        return self._split_texts.pop(text) if entry.windows == self._rows.windows[text] else None
