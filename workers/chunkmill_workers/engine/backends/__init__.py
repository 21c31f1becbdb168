"""Who runs a model's forward pass. `native` is our own; the others serve where they are faster, or it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine.encoder.layout import to_device
from chunkmill_workers.engine.windows import Ids


@dataclass(frozen=True, slots=True)
class Hidden:
    """Token vectors of one TokenBatch, padded on the right, or one text after the other."""

    vectors: torch.Tensor
    """(n, longest, hidden), on the backend's device, fp32 or what the model ends in; padding may hold anything.
    With ``owners`` (tokens, hidden)."""
    lengths: torch.Tensor
    """(n,) int64, on the same device."""
    owners: torch.Tensor | None = None
    """(tokens,) int64: the text that each token belongs to; None where the vectors are padded."""


class Backend(Protocol):
    """One model on one device."""

    name: str
    """``native``, ``transformers``, ``onnx`` or ``openvino``."""
    device: torch.device
    """Where its vectors are."""
    dtype: torch.dtype
    """What its matrix products run in; below fp32, a vector that is not finite is computed again in fp32."""
    packed: bool
    """A TokenBatch costs its tokens; otherwise its rows times the longest of them."""
    concurrent: bool
    """Several threads may call it at a time, and it computes in the caller's threads of torch; else one at a time."""
    embedding_rows: int
    """Tokens that the model knows."""

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> Hidden:
        """Run ``rows``, each (length,) int32, special tokens included. Raises what the model raises.

        ``only`` is (n,) int64: the one position per row that is pooled, where the model pools one. Then the
        vectors are (n, 1, hidden) of that position and the lengths are 1. On a GPU nothing here may wait for
        the device.
        """
        ...


def pick(hidden: Hidden, only: NDArray[np.int64] | None) -> Hidden:
    """``only`` for a backend that has computed every token's vector."""
    if only is None:
        return hidden
    device = hidden.vectors.device
    vectors = hidden.vectors[torch.arange(len(only), device=device), to_device(only, device)]
    return Hidden(vectors[:, None], torch.ones_like(hidden.lengths))
