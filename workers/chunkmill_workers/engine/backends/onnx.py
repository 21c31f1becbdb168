"""ONNX Runtime on the CPU, in fp32."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill.errors import InvalidSetting
from chunkmill.models import ModelFolder
from chunkmill_workers.engine.backends import TokenVectors, pick
from chunkmill_workers.engine.backends.exported import INPUTS, OUTPUT, find, pad, unreadable
from chunkmill_workers.engine.windows import Ids

# A log level of ONNX Runtime. Its warnings are about optimisations of the graph, which an operator cannot change.
_ERRORS_ONLY = 3


def library() -> Any:
    """The onnxruntime module, without telemetry: by default it sends events to its makers when it is imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


class OnnxBackend:
    """See :class:`chunkmill_workers.engine.backends.Backend`."""

    name = "onnx"
    device = torch.device("cpu")
    dtype = torch.float32
    packed = False
    concurrent = False

    def __init__(self, graph: Path, *, embedding_rows: int, threads: int | None, pad_id: int) -> None:
        """``threads`` None means one for each core. Raises ModelLoadError."""
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = _ERRORS_ONLY
        # With patterns it would keep a memory plan for every shape, and nearly every TokenBatch has another shape.
        options.enable_mem_pattern = False
        try:
            self._session: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise unreadable(graph, error) from error
        self._pad_id = pad_id
        self.embedding_rows = embedding_rows

    @classmethod
    def load(cls, folder: ModelFolder, *, dtype: torch.dtype, threads: int | None, pad_id: int) -> Self:
        """The backend for the export of ``folder``.

        Raises ModelLoadError if there is no export, and InvalidSetting if ``dtype`` is half precision.
        """
        if dtype != torch.float32:
            word = str(dtype).removeprefix("torch.")
            raise InvalidSetting(
                f"backend onnx runs only in fp32, not in {word}: set EMBEDDING_DTYPE=fp32 or choose another backend"
            )
        export = find(folder, "onnx")
        return cls(export.graph, embedding_rows=export.statement.embedding_rows, threads=threads, pad_id=pad_id)

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        ids, mask, lengths = pad(rows, self._pad_id)
        (vectors,) = self._session.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))
        return pick(TokenVectors(torch.from_numpy(vectors), torch.from_numpy(lengths)), only)
