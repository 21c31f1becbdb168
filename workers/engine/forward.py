"""Token ids to token vectors: transformers' own model, one padded TokenBatch at a time."""

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
    """(n, longest, hidden), in the model's dtype, on its device."""
    lengths: torch.Tensor
    """(n,) int64, on the same device."""


class Backbone:
    """The transformer of one model folder, on one device. One caller at a time."""

    def __init__(self, model: Any, *, pad_id: int) -> None:
        self._model = model.eval()
        self._pad_id = pad_id
        # A causal model would otherwise build a cache of keys and values that nobody reads.
        self._options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.embedding_rows: int = model.get_input_embeddings().weight.shape[0]

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype, pad_id: int) -> Backbone:
        """Load weights (safetensors only) into ``dtype``; code in the folder is never run."""
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # a worker's log is no terminal
        try:
            model, info = AutoModel.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
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
        return cls(model, pad_id=pad_id)

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
        with torch.inference_mode():
            output = self._model(input_ids=ids.to(self.device), attention_mask=mask, **self._options)
            return Hidden(output.last_hidden_state, lengths.to(self.device))

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Run the block with parameters in fp32 and restore them; half → fp32 → half is exact.

        Parameters only: ``model.to(half)`` would also round buffers that transformers keeps in fp32 on
        purpose, such as the frequencies of rotary positions.
        """
        before = [(parameter, parameter.data) for parameter in self._model.parameters()]
        try:
            for parameter, data in before:
                parameter.data = data.float()
            yield
        finally:
            for parameter, data in before:
                parameter.data = data
