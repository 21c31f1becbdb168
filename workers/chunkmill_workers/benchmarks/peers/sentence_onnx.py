"""sentence-transformers on its ONNX backend, with the int8 graph that its own helper would make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sentence_transformers import SentenceTransformer

from chunkmill_workers.benchmarks.peers.model import Model
from chunkmill_workers.benchmarks.peers.onnx_session import session_options
from chunkmill_workers.benchmarks.peers.sentence_torch import SentenceTorch


def load(
    model: Model, *, options: Mapping[str, Any], setting: Mapping[str, Any], threads: int, device: str
) -> SentenceTorch:
    loaded = SentenceTransformer(
        str(model.made("folder")),
        backend="onnx",
        device="cpu",
        local_files_only=True,
        model_kwargs={
            "file_name": "onnx/model_quantized.onnx",
            "provider": "CPUExecutionProvider",
            "session_options": session_options(threads),
            "export": False,
        },
    )
    return SentenceTorch(loaded, setting["batch_size"])
