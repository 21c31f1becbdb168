"""CTranslate2: int8 weights, no work on padding; pooled and normalised here, which it does not do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from chunkmill_workers.benchmarks.peers.batching import Batch, Batches, padded
from chunkmill_workers.benchmarks.peers.model import Model


class CTranslate2:
    def __init__(self, encoder: ctranslate2.Encoder, workers: int, batches: Batches, model: Model) -> None:
        self._encoder = encoder
        self._batches = batches
        self._model = model
        self._threads = ThreadPoolExecutor(workers)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.empty((len(texts), self._model.dimensions), np.float32)

        def run(batch: Batch) -> None:
            rows, ids = batch
            hidden = np.asarray(self._encoder.forward_batch(ids).last_hidden_state)
            if self._model.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weights = padded(ids)[1].astype(np.float32)
                pooled = np.einsum("rld,rl->rd", hidden, weights) / weights.sum(1, keepdims=True)
            vectors[rows] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

        list(self._threads.map(run, self._batches(texts)))
        return vectors


def load(
    model: Model, *, options: Mapping[str, Any], setting: Mapping[str, Any], threads: int, device: str
) -> CTranslate2:
    encoder = ctranslate2.Encoder(
        str(model.made("ct2")), device="cpu", compute_type=setting["compute_type"], inter_threads=setting["workers"],
        intra_threads=max(1, threads // setting["workers"]),
    )  # fmt: skip
    return CTranslate2(encoder, setting["workers"], Batches(model, setting["budget"]), model)
