"""For libraries that take token ids: all texts tokenized at once, sorted by true length, cut by a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from chunkmill_workers.benchmarks.peers.model import Model

Batch = tuple[NDArray[np.int64], list[list[int]]]
"""``(rows,)`` places of the texts, and their ids, longest first."""


class Batches:
    """Cuts texts into batches of at most ``budget`` padded tokens."""

    def __init__(self, model: Model, budget: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(Path(model.transformer) / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(model.max_tokens)
        self._budget = budget

    def __call__(self, texts: Sequence[str]) -> Iterator[Batch]:
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        order = np.argsort([-len(text_ids) for text_ids in ids], kind="stable")
        first = 0
        while first < len(order):
            rows = max(1, self._budget // len(ids[order[first]]))
            chosen = order[first : first + rows]
            yield chosen, [ids[row] for row in chosen]
            first += rows


def padded(ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(rows, longest)`` ids and attention mask. The mask hides the padding, so its id does not matter."""
    matrix = np.zeros((len(ids), max(map(len, ids))), np.int64)
    mask = np.zeros_like(matrix)
    for row, text_ids in enumerate(ids):
        matrix[row, : len(text_ids)] = text_ids
        mask[row, : len(text_ids)] = 1
    return matrix, mask
