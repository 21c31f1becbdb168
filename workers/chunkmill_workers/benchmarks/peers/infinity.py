"""Infinity's engine in this process, without its HTTP server: what its users get at best."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from infinity_emb import AsyncEmbeddingEngine, EngineArgs
from numpy.typing import NDArray

from chunkmill_workers.benchmarks.peers.model import Model

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Infinity:
    def __init__(self, engine: AsyncEmbeddingEngine) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine = engine
        self._loop.run_until_complete(engine.astart())

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors, _ = self._loop.run_until_complete(self._engine.embed(list(texts)))
        return np.asarray(vectors, np.float32)

    def __del__(self) -> None:
        self._loop.run_until_complete(self._engine.astop())
        self._loop.close()


def load(
    model: Model, *, options: Mapping[str, Any], setting: Mapping[str, Any], threads: int, device: str
) -> Infinity:
    torch.set_num_threads(threads)
    torch_engine = options["engine"] == "torch"
    if not torch_engine:
        os.chdir(model.made("flat"))  # it finds a local folder's graph only by a path relative to it
    chosen = EngineArgs(
        model_name_or_path=model.folder if torch_engine else ".",
        engine=options["engine"],
        device="cpu",
        dtype=DTYPES[options["dtype"]] if torch_engine else "auto",
        pooling_method="cls" if model.pooling == "cls" else "mean",
        batch_size=setting["batch_size"],
        bettertransformer=False,  # it needs an optimum that is gone
        trust_remote_code=False,
        model_warmup=False,
        onnx_disable_optimize=True,  # it would keep what it makes of "." for every model of that name
    )
    return Infinity(AsyncEmbeddingEngine.from_args(chosen))
