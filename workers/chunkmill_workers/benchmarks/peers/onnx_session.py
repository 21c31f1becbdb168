"""ONNX Runtime on its own: a graph that pools and normalises, fed by token budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from chunkmill_workers.benchmarks.peers.batching import Batches, padded
from chunkmill_workers.benchmarks.peers.model import Model


class OnnxSession:
    def __init__(self, session: onnxruntime.InferenceSession, batches: Batches, dimensions: int) -> None:
        self._session = session
        self._batches = batches
        self._dimensions = dimensions

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.empty((len(texts), self._dimensions), np.float32)
        for rows, ids in self._batches(texts):
            matrix, mask = padded(ids)
            (vectors[rows],) = self._session.run(None, {"input_ids": matrix, "attention_mask": mask})
        return vectors


def load(
    model: Model, *, options: Mapping[str, Any], setting: Mapping[str, Any], threads: int, device: str
) -> OnnxSession:
    path = model.made("pooled" if options["precision"] == "fp32" else "pooled int8") / f"{setting['graph']}.onnx"
    session = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    return OnnxSession(session, Batches(model, setting["budget"]), model.dimensions)


def session_options(threads: int) -> onnxruntime.SessionOptions:
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3
    return chosen
