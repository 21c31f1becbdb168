"""The forward pass of transformers, for every architecture that our own does not know.

In half precision, matrix products and attention run in bf16 or fp16, and embeddings, layer norms and the residual
stream in fp32 (docs/decisions/0007).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine.backends import Hidden, pick
from chunkmill_workers.engine.encoder.layout import lay_out
from chunkmill_workers.engine.windows import Ids


class TransformersBackend:
    """See :class:`chunkmill_workers.engine.backends.Backend`."""

    name = "transformers"
    packed = False
    concurrent = False  # a model may keep caches, for example of rotary positions

    def __init__(self, model: Any, *, dtype: torch.dtype, device: torch.device, pad_id: int) -> None:
        _set_dtypes(model, dtype)
        self._model = model.to(device)
        self._pad_id = pad_id
        # Without the option, a causal model builds a cache of keys and values that nobody reads.
        self._options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        self.device = device
        self.dtype = dtype
        self.embedding_rows: int = model.get_input_embeddings().weight.shape[0]

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> Hidden:
        layout = lay_out(rows, packed=False, pad_id=self._pad_id, device=self.device)
        ids = layout.ids.view(len(layout), layout.longest).long()
        mask = None if layout.full else layout.inside.long()  # kernels are faster without a mask
        # Autocast converts operands of different formats (rotary positions, MPNet's position bias). Its cache is for
        # parameters that it casts; those of the products already have their format.
        half = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)
        with torch.inference_mode(), half:
            output = self._model(input_ids=ids, attention_mask=mask, **self._options)
            return pick(Hidden(output.last_hidden_state, layout.lengths), only)


def _set_dtypes(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the linear layers to ``dtype`` and every other parameter to fp32."""
    for module in model.modules():
        wanted = dtype if isinstance(module, torch.nn.Linear) else torch.float32
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(wanted)
