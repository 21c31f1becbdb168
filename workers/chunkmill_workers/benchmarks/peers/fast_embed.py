"""fastembed on a model of one's own. It pads each batch to its longest text and does not sort, so a caller may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from numpy.typing import NDArray

from chunkmill_workers.benchmarks.peers.model import Model

NAME = "benchmark/model"
FILES = {"fp32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}


class FastEmbed:
    def __init__(self, embedding: TextEmbedding, batch_size: int, *, sort: bool) -> None:
        self._embedding = embedding
        self._batch_size = batch_size
        self._sort = sort

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at])) if self._sort else list(range(len(texts)))
        embedded = np.stack(list(self._embedding.embed([texts[at] for at in order], batch_size=self._batch_size)))
        vectors = np.empty_like(embedded, np.float32)
        vectors[order] = embedded
        return vectors


def load(
    model: Model, *, options: Mapping[str, Any], setting: Mapping[str, Any], threads: int, device: str
) -> FastEmbed:
    if NAME not in {model["model"] for model in TextEmbedding.list_supported_models()}:  # once in a process
        TextEmbedding.add_custom_model(
            NAME,
            pooling=PoolingType.CLS if model.pooling == "cls" else PoolingType.MEAN,
            normalization=True,
            sources=ModelSource(hf=NAME),  # it wants one, and reads the folder below instead
            dim=model.dimensions,
            model_file=FILES[options["precision"]],
        )
    embedding = TextEmbedding(
        NAME, specific_model_path=str(model.made("folder")), threads=threads, cuda=False,
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    return FastEmbed(embedding, setting["batch_size"], sort=setting["sort"])
