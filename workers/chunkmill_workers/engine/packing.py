"""Which rows share a forward pass. Pure: lengths in, a choice out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# What starting a pass costs, in tokens: about 1 ms of Python and of kernels' starts where a token takes 70 us
# (all-MiniLM-L6-v2, two Zen 4 cores). It only decides between two nearly equal choices.
PASS_TOKENS = 16


def choose(lengths: NDArray[np.int32], anchor: int, budget: int, *, packed: bool) -> slice:
    """The next TokenBatch from the rows that wait.

    ``lengths`` is (m,) int32 in tokens, longest first; the choice holds ``anchor``, and at most ``budget``
    tokens (``packed``) or padded tokens (rows x longest row). A row longer than the budget is alone.
    Neighbours have like lengths, so there is little padding: of the choices that begin at the anchor, the one
    with the greatest share of tokens in its cost; where few rows are left below it, longer ones join.
    """
    if packed:
        return _fill(lengths, anchor, budget)
    longest = max(int(lengths[anchor]), 1)
    most = min(max(budget // longest, 1), len(lengths) - anchor)
    useful = np.cumsum(lengths[anchor : anchor + most], dtype=np.int64)
    share = useful / (PASS_TOKENS + longest * np.arange(1, most + 1))
    rows = int(share.argmax()) + 1
    if anchor + rows < len(lengths) or rows * longest > budget // 2:
        return slice(anchor, anchor + rows)
    # The end of the queue: would longer rows pay for the padding they bring?
    starts = np.arange(anchor + 1)
    cost = (len(lengths) - starts) * np.maximum(lengths[: anchor + 1], 1).astype(np.int64)
    above = int(lengths[anchor:].sum()) + np.concatenate((np.cumsum(lengths[:anchor][::-1])[::-1], [0]))
    share = np.where((cost <= budget) | (starts == anchor), above / (PASS_TOKENS + cost), 0.0)
    return slice(int(share.argmax()), len(lengths))


def _fill(lengths: NDArray[np.int32], anchor: int, budget: int) -> slice:
    """As many rows as fit: from the anchor down, then up."""
    below = int(np.searchsorted(np.cumsum(lengths[anchor:], dtype=np.int64), budget, side="right"))
    end = anchor + max(below, 1)
    room = budget - int(lengths[anchor:end].sum())
    above = int(np.searchsorted(np.cumsum(lengths[:anchor][::-1], dtype=np.int64), room, side="right"))
    return slice(anchor - above, end)
