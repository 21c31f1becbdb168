"""How the rows of one TokenBatch lie in memory: padded to the longest, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine.windows import Ids


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
    owners: torch.Tensor | None
    """(slots,) int64: which text a packed slot belongs to; None where the padded grid says it."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def inside(self) -> torch.Tensor:
        """(n, longest) bool: which places hold a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

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
    if packed:
        return _pack(rows, lengths, device)
    longest = int(lengths.max())
    ids = np.concatenate(rows)
    full = int(lengths.min()) == longest
    grid = np.arange(len(rows) * longest)
    inside = grid % longest < np.repeat(lengths, longest)
    if not full:
        padded = np.full(len(grid), pad_id, np.int32)
        padded[inside] = ids
        ids = padded
    # All of it is made here and not on the device, where a choice by a mask would wait for the device.
    return Layout(
        ids=to_device(ids, device),
        lengths=to_device(lengths, device),
        longest=longest,
        packed=False,
        full=full,
        offsets=to_device(_offsets(lengths), device),
        at=to_device(grid % longest, device),
        padding=to_device(grid[~inside], device),
        owners=None,
    )


def _pack(rows: Sequence[Ids], lengths: NDArray[np.int64], device: torch.device) -> Layout:
    """Ids and offsets in one copy; all else is made of them on the device, in kernels whose sizes the host knows."""
    n, slots = len(rows), int(lengths.sum())
    both = to_device(np.concatenate((_offsets(lengths), *rows)), device)
    offsets, ids = both[: n + 1], both[n + 1 :]
    starts = offsets[:-1].long()
    sizes = offsets[1:].long() - starts
    owners = torch.repeat_interleave(sizes, output_size=slots)
    return Layout(
        ids=ids,
        lengths=sizes,
        longest=int(lengths.max()),
        packed=True,
        full=True,
        offsets=offsets,
        at=torch.arange(slots, device=device) - starts[owners],
        padding=owners[:0],
        owners=owners,
    )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """(n + 1,) int32 from (n,): where each text begins, and the end."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """From pinned memory the copy does not stop the CPU, which goes on to the next TokenBatch.

    The pinned tensor may be dropped at once: torch's host allocator gives its block to nobody before the copy's
    stream has passed it.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
