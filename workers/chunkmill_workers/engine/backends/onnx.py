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
from chunkmill_workers.engine.backends import Hidden, pick
from chunkmill_workers.engine.backends.exported import INPUTS, OUTPUT, find, pad, unreadable
from chunkmill_workers.engine.windows import Ids

# ONNX Runtime's log levels: warnings are about graph optimisations that no operator can act on.
_ERRORS_ONLY = 3


def library() -> Any:
    """The onnxruntime module, silent: as it comes, importing it sends events to its makers over the network."""
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
        """Raises ModelLoadError. ``threads`` None: one for each core."""
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = _ERRORS_ONLY
        # It would keep a plan of memory for every shape it sees, and nearly every TokenBatch has its own.
        options.enable_mem_pattern = False
        try:
            self._session: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise unreadable(graph, error) from error
        self._pad_id = pad_id
        self.embedding_rows = embedding_rows

    @classmethod
    def load(cls, folder: ModelFolder, *, dtype: torch.dtype, threads: int | None, pad_id: int) -> Self:
        """The export of ``folder``. Raises ModelLoadError where there is none, InvalidSetting for half precision."""
        if dtype != torch.float32:
            word = str(dtype).removeprefix("torch.")
            raise InvalidSetting(
                f"backend onnx runs in fp32, and {word} was asked for: set EMBEDDING_DTYPE=fp32 or take another backend"
            )
        export = find(folder, "onnx")
        return cls(export.graph, embedding_rows=export.statement.embedding_rows, threads=threads, pad_id=pad_id)

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> Hidden:
        ids, mask, lengths = pad(rows, self._pad_id)
        (vectors,) = self._session.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))
        return pick(Hidden(torch.from_numpy(vectors), torch.from_numpy(lengths)), only)
