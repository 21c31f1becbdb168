"""Token ids to token vectors: transformers' own model, one padded TokenBatch at a time.

Half precision here means: matrix products and attention in bf16 or fp16; embeddings, layer norms and the
residual stream in fp32. all-MiniLM-L6-v2, lowest cosine to fp32 over 600 stdlib docstrings and over 16 odd
texts (emoji, one repeated letter): everything in bf16 0.99992 and 0.99988, fp32 embeddings 0.99993 and
0.99988, this way 0.99997 and 0.99995, at the same speed. The gate is 0.9999; over 4,000 docstrings this way
reaches 0.99993, on a text of one letter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.errors import ModelLoadError
from workers.engine.windows import Ids


@dataclass(frozen=True, slots=True)
class Hidden:
    """Token vectors of one TokenBatch, padded on the right."""

    vectors: torch.Tensor
    """(n, longest, hidden), on the model's device; fp32 but for architectures that end in half precision."""
    lengths: torch.Tensor
    """(n,) int64, on the same device."""


class Backbone:
    """The transformer of one model folder, on one device. One caller at a time."""

    def __init__(self, model: Any, *, dtype: torch.dtype, pad_id: int) -> None:
        self._model = model.eval()
        self._autocast = dtype != torch.float32
        self._pad_id = pad_id
        # A causal model would otherwise build a cache of keys and values that nobody reads.
        self._options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        self.device: torch.device = model.device
        self.dtype = dtype
        self.embedding_rows: int = model.get_input_embeddings().weight.shape[0]

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype, pad_id: int) -> Backbone:
        """Load safetensors weights, to multiply in ``dtype``; code in the folder is never run."""
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # a worker's log is no terminal
        try:
            model, info = AutoModel.from_pretrained(
                str(folder),
                # "auto" keeps the checkpoint's own: a bf16 checkpoint is not blown up to fp32 in between.
                dtype=dtype if dtype == torch.float32 else "auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            _set_dtypes(model, dtype)
            model = model.to(device)
        except Exception as error:
            raise ModelLoadError(
                f"the model in {folder} cannot be loaded onto {device} ({type(error).__name__}: {error}): "
                "check that the folder is whole, the architecture known to transformers, and the device's memory"
            ) from error
        # transformers fills what a file lacks with random numbers. BERT's pooler is the one part that is
        # often missing and that no vector passes through.
        if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
            raise ModelLoadError(
                f"the weights in {folder} lack {len(missing)} tensors that its config.json asks for, "
                f"{missing[0]} first: copy the folder again"
            )
        return cls(model, dtype=dtype, pad_id=pad_id)

    def __call__(self, rows: Sequence[Ids]) -> Hidden:
        """Run ``rows``, each (length,) int32, special tokens included. Raises what the model raises.

        Padding is on the right: positions then count from the first token, so a text's vector does not
        depend on its neighbours in models with absolute positions, and a causal model never sees padding.
        """
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.full((len(rows), longest), self._pad_id)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.from_numpy(row)
        mask = None
        if int(lengths.min()) < longest:  # without padding there is nothing to mask, and kernels are faster
            mask = (torch.arange(longest) < lengths[:, None]).long().to(self.device)
        # Autocast settles what meets in mixed precision (rotary positions, MPNet's position bias). Its cache
        # is for parameters that it has to cast itself; the products' are cast already.
        half = torch.autocast(self.device.type, self.dtype, enabled=self._autocast, cache_enabled=False)
        with torch.inference_mode(), half:
            output = self._model(input_ids=ids.to(self.device), attention_mask=mask, **self._options)
            return Hidden(output.last_hidden_state, lengths.to(self.device))

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Run the block in fp32 and restore the half-precision weights; half → fp32 → half is exact."""
        halves = [(each, each.data) for each in self._model.parameters() if each.dtype != torch.float32]
        before = self._autocast
        try:
            self._autocast = False
            for parameter, data in halves:
                parameter.data = data.float()
            yield
        finally:
            self._autocast = before
            for parameter, data in halves:
                parameter.data = data


def _set_dtypes(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Linear layers in ``dtype``, every other parameter in fp32."""
    for module in model.modules():
        wanted = dtype if isinstance(module, torch.nn.Linear) else torch.float32
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(wanted)
