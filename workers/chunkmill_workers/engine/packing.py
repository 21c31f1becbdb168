"""The queue of waiting rows, and which of them share a forward pass. Pure: NumPy only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# The cost of starting a pass, in tokens: about 1 ms of Python and of starting kernels, while a token takes 70 us
# (all-MiniLM-L6-v2, two Zen 4 cores). It only decides between two choices that are nearly equal.
PASS_TOKENS = 16


@dataclass(slots=True)
class RowQueue:
    """Waiting rows, longest first, as three arrays of one length."""

    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """(m,) int32: tokens of each row."""
    owners: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """(m,) int64: the number of the stream that added each row."""
    at: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """(m,) int32: the position of each row among those of its stream."""

    def add(self, lengths: NDArray[np.int32], owner: int, first: int) -> None:
        """Add rows of ``lengths``, (n,) int32. ``first`` is the position of the first one in its stream."""
        joined = np.concatenate((self.lengths, lengths))
        order = np.argsort(-joined, kind="stable")
        self.lengths = joined[order]
        self.owners = np.concatenate((self.owners, np.full(len(lengths), owner)))[order]
        self.at = np.concatenate((self.at, np.arange(first, first + len(lengths), dtype=np.int32)))[order]

    def keep(self, which: NDArray[np.bool_]) -> None:
        """Remove all rows but those of the (m,) bool mask ``which``."""
        self.lengths, self.owners, self.at = self.lengths[which], self.owners[which], self.at[which]


def choose(lengths: NDArray[np.int32], anchor: int, most_tokens: int, *, packed: bool) -> slice:
    """The rows of the next TokenBatch, as a slice of the queue.

    ``lengths`` is (m,) int32 in tokens, longest first. The slice holds the row ``anchor``, and at most ``most_tokens``
    tokens if the backend is ``packed``, else padded tokens (rows x longest row). A longer row is alone in its pass.

    Neighbours in the queue have similar lengths, so there is little padding. Of the slices that begin at the anchor,
    the one is chosen whose cost holds the greatest share of tokens. If only a few rows are left below the anchor,
    longer rows join them.
    """
    if packed:
        return _fill(lengths, anchor, most_tokens)
    longest = max(int(lengths[anchor]), 1)
    most = min(max(most_tokens // longest, 1), len(lengths) - anchor)
    useful = np.cumsum(lengths[anchor : anchor + most], dtype=np.int64)
    share = useful / (PASS_TOKENS + longest * np.arange(1, most + 1))
    rows = int(share.argmax()) + 1
    if anchor + rows < len(lengths) or rows * longest > most_tokens // 2:
        return slice(anchor, anchor + rows)
    # At the end of the queue, longer rows may join, if they save more than the padding that they bring costs.
    starts = np.arange(anchor + 1)
    cost = (len(lengths) - starts) * np.maximum(lengths[: anchor + 1], 1).astype(np.int64)
    above = int(lengths[anchor:].sum()) + np.concatenate((np.cumsum(lengths[:anchor][::-1])[::-1], [0]))
    share = np.where((cost <= most_tokens) | (starts == anchor), above / (PASS_TOKENS + cost), 0.0)
    return slice(int(share.argmax()), len(lengths))


def _fill(lengths: NDArray[np.int32], anchor: int, most_tokens: int) -> slice:
    """As many rows as fit: first from the anchor to shorter ones, then to longer ones."""
    below = int(np.searchsorted(np.cumsum(lengths[anchor:], dtype=np.int64), most_tokens, side="right"))
    end = anchor + max(below, 1)
    left = most_tokens - int(lengths[anchor:end].sum())
    above = int(np.searchsorted(np.cumsum(lengths[:anchor][::-1], dtype=np.int64), left, side="right"))
    return slice(anchor - above, end)
