"""OpenVINO: the graph that ONNX Runtime reads too, as it is or made int8 by NNCF, fed by token budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from chunkmill_workers.benchmarks.peers.batching import Batches, padded
from chunkmill_workers.benchmarks.peers.model import Model

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class OpenVino:
    def __init__(self, compiled: openvino.CompiledModel, streams: int, batches: Batches, dimensions: int) -> None:
        self._queue = openvino.AsyncInferQueue(compiled, streams)
        self._batches = batches
        self._dimensions = dimensions

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.empty((len(texts), self._dimensions), np.float32)

        def take(request: openvino.InferRequest, rows: NDArray[np.int64]) -> None:
            vectors[rows] = request.get_output_tensor(0).data

        self._queue.set_callback(take)
        for rows, ids in self._batches(texts):
            matrix, mask = padded(ids)
            self._queue.start_async({"input_ids": matrix, "attention_mask": mask}, rows)
        self._queue.wait_all()
        return vectors


def load(
    model: Model, *, options: Mapping[str, Any], setting: Mapping[str, Any], threads: int, device: str
) -> OpenVino:
    core = openvino.Core()
    int8 = options["precision"] == "int8"
    compiled = core.compile_model(
        core.read_model(model.made("openvino int8") / "int8.xml" if int8 else model.made("pooled") / "plain.onnx"),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": HINTS[options["hint"]],  # of what is not int8
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": setting["streams"],
        },
    )
    return OpenVino(compiled, setting["streams"], Batches(model, setting["budget"]), model.dimensions)
