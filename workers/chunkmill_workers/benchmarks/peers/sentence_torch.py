"""sentence-transformers on torch. fp32 in batches of 32, which is what ``encode`` does by itself, is the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from chunkmill_workers.benchmarks.peers.model import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class SentenceTorch:
    def __init__(self, model: SentenceTransformer, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(self._model.encode(list(texts), show_progress_bar=False, batch_size=self._batch_size))


def load(
    model: Model, *, options: Mapping[str, Any], setting: Mapping[str, Any], threads: int, device: str
) -> SentenceTorch:
    torch.set_num_threads(threads)
    loaded = SentenceTransformer(
        model.folder, device=device, local_files_only=True, model_kwargs={"dtype": DTYPES[options["dtype"]]}
    )
    return SentenceTorch(loaded, setting["batch_size"])
