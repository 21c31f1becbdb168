"""How the rows of one TokenBatch lie in memory: padded to the longest, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.windows import Ids


@dataclass(frozen=True, slots=True)
class Layout:
    """Token-major: every array of the forward pass has one row per slot, ``(slots, ...)``.

    Padded, slot ``row * longest + position`` belongs to that token or is padding; packed, texts follow
    each other without gaps and ``offsets`` says where each begins. All tensors are on the model's device.
    """

    ids: torch.Tensor
    """(slots,) int32."""
    lengths: torch.Tensor
    """(n,) int64."""
    longest: int
    packed: bool
    full: bool
    """No slot is padding."""
    offsets: torch.Tensor
    """(n + 1,) int32: cumulative lengths, as ``varlen_attn`` reads them."""
    at: torch.Tensor
    """(slots,) int64: each slot's position in its own text, from 0."""
    padding: torch.Tensor
    """(p,) int64: the slots that hold no token."""
    places: torch.Tensor | None
    """(slots,) int64: where a packed slot lies in the padded grid; None where slots are the grid."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def inside(self) -> torch.Tensor:
        """(n, longest) bool: which places hold a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """(n, longest, ...) from (slots, ...); padding holds zeros or what the model made of it."""
        if self.places is not None:
            grid = values.new_zeros(len(self) * self.longest, *values.shape[1:])
            values = grid.index_copy_(0, self.places, values)
        return values.view(len(self), self.longest, *values.shape[1:])

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """(n,) int64 slots of one position of every text, from (n,) int64 positions."""
        starts = (
            self.offsets[:-1].long()
            if self.packed
            else torch.arange(0, len(self) * self.longest, self.longest, device=positions.device)
        )
        return starts + positions


def lay_out(rows: Sequence[Ids], *, packed: bool, pad_id: int, device: torch.device) -> Layout:
    """``rows`` are (length,) int32 each, special tokens included.

    Padding is on the right, so that positions count from a text's first token whoever its neighbours are,
    and a causal model never sees padding.
    """
    lengths = np.array([len(row) for row in rows], np.int64)
    longest = int(lengths.max())
    ids = np.concatenate(rows)
    full = int(lengths.min()) == longest
    grid = np.arange(len(rows) * longest)
    inside = grid % longest < np.repeat(lengths, longest)
    padding = np.empty(0, np.int64) if packed else grid[~inside]
    places = None
    if not full:
        if packed:
            places = grid[inside]
        else:
            padded = np.full(len(grid), pad_id, np.int32)
            padded[inside] = ids
            ids = padded
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    # All of it is made here and not on the device, where a choice by a mask would wait for the device.
    return Layout(
        ids=to_device(ids, device),
        lengths=to_device(lengths, device),
        longest=longest,
        packed=packed,
        full=full,
        offsets=to_device(offsets, device),
        at=to_device((grid if places is None else places) % longest, device),
        padding=to_device(padding, device),
        places=None if places is None else to_device(places, device),
    )


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """From pinned memory the copy does not stop the CPU, which goes on to the next TokenBatch."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
