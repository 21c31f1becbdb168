"""OpenVINO on the CPU, in fp32, or in bf16 if the processor has it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill.errors import InvalidSetting, ModelLoadError
from chunkmill.models import ModelFolder
from chunkmill_workers.engine.backends import TokenVectors, pick
from chunkmill_workers.engine.backends.exported import INPUTS, OUTPUT, find, pad, unreadable
from chunkmill_workers.engine.precision import cpu_has_bf16
from chunkmill_workers.engine.windows import Ids

_PRECISIONS: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}


def library() -> Any:
    """The openvino module, without telemetry: by default it sends an event to its makers when it is imported.

    The package that sends the event is hidden from the import as if it were not installed; openvino works without it.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


class OpenVinoBackend:
    """See :class:`chunkmill_workers.engine.backends.Backend`."""

    name = "openvino"
    device = torch.device("cpu")
    packed = False
    concurrent = False

    def __init__(
        self, graph: Path, *, embedding_rows: int, dtype: torch.dtype, threads: int | None, pad_id: int
    ) -> None:
        """``threads`` None lets OpenVINO choose for one pass at a time. Raises ModelLoadError."""
        self._openvino = library()
        asked = getattr(self._openvino.Type, _PRECISIONS[dtype])
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": asked}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = self._openvino.Core().compile_model(graph, "CPU", options)
        except Exception as error:
            raise unreadable(graph, error) from error
        # OpenVINO itself accepts bf16 on some processors that do not have it, and emulates it (AVX-512 without BF16).
        if compiled.get_property("INFERENCE_PRECISION_HINT") != asked or (
            dtype is torch.bfloat16 and not cpu_has_bf16()
        ):
            raise ModelLoadError("backend openvino: this CPU does not multiply bf16; set EMBEDDING_DTYPE=fp32")
        self._request = compiled.create_infer_request()
        self._hidden = compiled.output(OUTPUT).partial_shape[2].get_length()
        self._pad_id = pad_id
        self.dtype = dtype
        self.embedding_rows = embedding_rows

    @classmethod
    def load(cls, folder: ModelFolder, *, dtype: torch.dtype, threads: int | None, pad_id: int) -> Self:
        """The backend for the export of ``folder``.

        Raises ModelLoadError if there is no export, and InvalidSetting if ``dtype`` is fp16.
        """
        if dtype not in _PRECISIONS:
            word = str(dtype).removeprefix("torch.")
            raise InvalidSetting(
                f"backend openvino runs in fp32 or bf16, not in {word}: set EMBEDDING_DTYPE to one of them"
            )
        export = find(folder, "openvino")
        rows = export.statement.embedding_rows
        return cls(export.graph, embedding_rows=rows, dtype=dtype, threads=threads, pad_id=pad_id)

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        ids, mask, lengths = pad(rows, self._pad_id)
        # OpenVINO writes into memory of this pass. The request's own memory would be overwritten by the next pass.
        vectors = np.empty((*ids.shape, self._hidden), np.float32)
        for name, values in zip((*INPUTS, OUTPUT), (ids, mask, vectors), strict=True):
            self._request.set_tensor(name, self._openvino.Tensor(values, shared_memory=True))
        self._request.infer()
        return pick(TokenVectors(torch.from_numpy(vectors), torch.from_numpy(lengths)), only)
