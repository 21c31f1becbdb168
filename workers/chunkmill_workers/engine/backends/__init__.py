"""What runs a model's forward pass. `native` is our own. The others know more models, or are faster."""

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
class TokenVectors:
    """The token vectors of one TokenBatch: padded on the right, or packed, which is one text after the other."""

    vectors: torch.Tensor
    """(n, longest, hidden) if padded, (tokens, hidden) if packed; on the backend's device, in the number format in
    which the model ends. At padding it may hold anything."""
    lengths: torch.Tensor
    """(n,) int64: tokens of each row; on the same device."""
    owners: torch.Tensor | None = None
    """(tokens,) int64: the row that each token belongs to; None if the vectors are padded."""


class Backend(Protocol):
    """One model on one device."""

    name: str
    """``native``, ``transformers``, ``onnx``, ``openvino`` or ``static``."""
    device: torch.device
    """The device that its vectors are on."""
    dtype: torch.dtype
    """The number format of its matrix products. A vector that is not finite is computed again in fp32."""
    packed: bool
    """True: the cost of a TokenBatch is its number of tokens. False: it is the number of rows times the longest row."""
    concurrent: bool
    """True: several threads may call it at a time, each with its own threads of torch. False: only one thread at a time
    may call it."""
    embedding_rows: int
    """The size of the model's vocabulary."""

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        """The token vectors of ``rows``, each (length,) int32 with special tokens. Raises what the model raises.

        ``only`` is (n,) int64: the position of the one token that is pooled in each row; None if all are. With ``only``
        the vectors are (n, 1, hidden), of that position, and the lengths are 1. On a GPU nothing here may wait for the
        device.
        """
        ...


def pick(hidden: TokenVectors, only: NDArray[np.int64] | None) -> TokenVectors:
    """The vectors that ``only`` names, for a backend that has computed those of every token."""
    if only is None:
        return hidden
    device = hidden.vectors.device
    vectors = hidden.vectors[torch.arange(len(only), device=device), to_device(only, device)]
    return TokenVectors(vectors[:, None], torch.ones_like(hidden.lengths))
