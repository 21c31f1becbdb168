"""How the rows of one TokenBatch lie in memory: padded to the longest row, or one after the other."""

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
    """The tokens of one TokenBatch in slots. Every array of the forward pass has one row for each slot.

    In a padded layout, slot ``row * longest + position`` holds that token, or padding. In a packed layout, the rows
    follow each other without gaps, and ``offsets`` says where each begins. All tensors are on the model's device.
    """

    ids: torch.Tensor
    """(slots,) int32."""
    lengths: torch.Tensor
    """(n,) int64: tokens of each row."""
    longest: int
    """Tokens of the longest row."""
    packed: bool
    full: bool
    """No slot is padding."""
    offsets: torch.Tensor
    """(n + 1,) int32: cumulative lengths, as ``varlen_attn`` reads them."""
    at: torch.Tensor
    """(slots,) int64: each slot's position in its own row, from 0."""
    padding: torch.Tensor
    """(p,) int64: the slots that hold no token."""
    owners: torch.Tensor | None
    """(slots,) int64: the row that each slot belongs to; None in a padded layout."""

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    @property
    def inside(self) -> torch.Tensor:
        """(n, longest) bool: the places that hold a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """The slot of one token of every row, (n,) int64, from its position in the row, (n,) int64."""
        starts = (
            self.offsets[:-1].long()
            if self.packed
            else torch.arange(0, len(self) * self.longest, self.longest, device=positions.device)
        )
        return starts + positions


def lay_out(rows: Sequence[Ids], *, packed: bool, pad_id: int, device: torch.device) -> Layout:
    """The layout of ``rows``, each (length,) int32 with special tokens.

    Padding is on the right, so positions count from a row's first token whatever its neighbours are, and a causal model
    never sees padding.
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
    # All of it is made on the host, because on the device a selection by a mask would wait for the device.
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
    """The packed layout. Ids and offsets go to the device in one copy, and the rest is made of them there.

    The host knows the sizes of all these kernels, so it does not have to wait for the device.
    """
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
    """Where each row begins, and the end: (n + 1,) int32 from (n,) int64 lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``.

    A copy from pinned memory does not stop the CPU, which goes on to the next TokenBatch. The pinned tensor needs not
    be kept until the copy is finished, because torch's host allocator does not give its block away before that.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
