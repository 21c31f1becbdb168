"""Our own forward pass: packed and without padding on a GPU, with weights laid out for oneDNN on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine.backends import TokenVectors
from chunkmill_workers.engine.encoder.architectures import Build, build_encoder
from chunkmill_workers.engine.encoder.attention import Varlen, find_varlen
from chunkmill_workers.engine.encoder.encoder import Encoder
from chunkmill_workers.engine.encoder.layout import Layout, lay_out, to_device
from chunkmill_workers.engine.windows import Ids


class NativeBackend:
    """See :class:`chunkmill_workers.engine.backends.Backend`."""

    name = "native"

    def __init__(self, encoder: Encoder, *, device: torch.device, pad_id: int, varlen: Varlen | None = None) -> None:
        self._encoder = replace(encoder, rounds=True) if device.type == "cpu" else encoder
        self._pad_id = pad_id
        self._varlen = varlen
        self.careful = False
        """Use only attention that holds scores of any size. It is set once a vector was not finite."""
        self.packed = varlen is not None
        self.concurrent = device.type == "cpu"
        self.device = device
        self.dtype = encoder.dtype
        self.embedding_rows = len(encoder.words)

    @classmethod
    def build(cls, model: Any, build: Build, *, pad_id: int) -> NativeBackend | None:
        """The backend of a model that transformers loaded; None if our forward pass does not know its architecture."""
        encoder = build_encoder(model, build)
        if encoder is None:
            return None
        varlen = find_varlen(encoder.heads, encoder.dtype, build.device) if encoder.bias is None else None
        return cls(encoder, device=build.device, pad_id=pad_id, varlen=varlen)

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        layout = lay_out(rows, packed=self.packed, pad_id=self._pad_id, device=self.device)
        with torch.inference_mode():
            if only is None:
                vectors = self._run(layout, None)
                if layout.owners is None:
                    vectors = vectors.view(len(layout), layout.longest, -1)
                return TokenVectors(vectors, layout.lengths, layout.owners)
            keep = layout.slots(to_device(only, self.device))
            return TokenVectors(self._run(layout, keep)[:, None], torch.ones_like(layout.lengths))

    def _run(self, layout: Layout, keep: torch.Tensor | None) -> torch.Tensor:
        return self._encoder(layout, varlen=self._varlen, careful=self.careful, keep=keep)
