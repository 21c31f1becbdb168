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

from chunkmill_workers.engine.backends import TokenVectors, pick
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
        # T5's encoder has switched its own off, and does not know the option.
        self._options = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
        self.device = device
        self.dtype = dtype
        self.embedding_rows: int = model.get_input_embeddings().weight.shape[0]

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        layout = lay_out(rows, packed=False, pad_id=self._pad_id, device=self.device)
        ids = layout.ids.view(len(layout), layout.longest).long()
        mask = None if layout.full else layout.inside.long()  # kernels are faster without a mask
        # Autocast converts operands of different formats (rotary positions, MPNet's position bias). Its cache is for
        # parameters that it casts; those of the products already have their format.
        half = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)
        with torch.inference_mode(), half:
            output = self._model(input_ids=ids, attention_mask=mask, **self._options)
            return pick(TokenVectors(output.last_hidden_state, layout.lengths), only)


# Biases of products that a module keeps beside its linear layers, as DeBERTa does. In fp32 they would turn the queries
# into fp32, and DeBERTa then masks scores of half precision with the smallest number of fp32, which torch refuses.
_BIASES = ("q_bias", "v_bias")


def _set_dtypes(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the linear layers to ``dtype`` and every other parameter to fp32."""
    for module in model.modules():
        linear = isinstance(module, torch.nn.Linear)
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = parameter.data.to(dtype if linear or name in _BIASES else torch.float32)
