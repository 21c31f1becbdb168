"""From token ids to the rows that the model reads, under a policy for long texts. Pure: NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkmill.domain.spaces import OnLong
from chunkmill.domain.windows import window_bounds
from chunkmill_workers.engine.results import TextFailure

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Frame:
    """The tokens around a text's own tokens in every row.

    ``prefix`` and ``suffix`` are the special tokens that the tokenizer's template adds, (k,) int32 each. ``prompt`` is
    the number of tokens of the prompt, which follows the prefix.
    """

    prefix: Ids
    suffix: Ids
    prompt: int = 0
    cut_left: bool = False
    """Truncation removes tokens at the start of a text and not at its end (``truncation_side`` is left)."""

    @property
    def skip(self) -> int:
        """How many leading tokens of a row are not the text's own: those of prefix and prompt."""
        return len(self.prefix) + self.prompt


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to be packed and run. In the shapes below, a row is a text or a window of one."""

    ids: list[Ids]
    """One (length,) int32 array per row."""
    owner: NDArray[np.int32]
    """(rows,) int32: the text that each row belongs to."""
    weight: NDArray[np.int32]
    """(rows,) int32: the weight of a window in its text's mean, see `split`; 1 for a text of one row."""
    windows: NDArray[np.int32]
    """(texts,) int32: how many rows each text has; 0 for a failure."""
    n_tokens: NDArray[np.int32]
    """(texts,) int32: tokens before truncation, or ``limit + 1`` for a long text that was not read to its end; 0 if
    tokenizing failed."""
    truncated: NDArray[np.bool_]
    """(texts,) bool: the text was truncated to the limit."""
    failures: tuple[TextFailure, ...]


def truncate(ids: Ids, limit: int, frame: Frame) -> Ids:
    """The row of ``limit`` tokens, (limit,) int32, that Hugging Face's truncation leaves. Special tokens stay."""
    body_end = len(ids) - len(frame.suffix)
    keep = limit - len(frame.prefix) - len(frame.suffix)
    start = body_end - keep if frame.cut_left else len(frame.prefix)
    return np.concatenate((frame.prefix, ids[start : start + keep], frame.suffix))


def split(ids: Ids, limit: int, frame: Frame) -> tuple[list[Ids], list[int]]:
    """Overlapping windows of at most ``limit`` tokens, and the weight of each in the text's mean.

    Every window has the special tokens and the prompt, and as much text as still fits. `window_bounds` decides where
    the windows begin and end, and their weights.
    """
    head, body, tail = ids[: frame.skip], ids[frame.skip : len(ids) - len(frame.suffix)], frame.suffix
    bounds = window_bounds(len(body), limit - len(head) - len(tail))
    return [np.concatenate((head, body[w.start : w.end], tail)) for w in bounds], [w.weight for w in bounds]


def make_rows(tokenized: Sequence[Ids | TextFailure], limit: int, frame: Frame, on_long: OnLong) -> Rows:
    """The rows of all texts, after the policy for long texts.

    ``tokenized`` has, for each text in input order, its token ids with special tokens, or its failure. ``limit`` is the
    most tokens that the model reads.
    """
    count = len(tokenized)
    rows: list[Ids] = []
    owner: list[int] = []
    weight: list[int] = []
    failures: list[TextFailure] = []
    n_tokens = np.zeros(count, np.int32)
    windows = np.zeros(count, np.int32)
    truncated = np.zeros(count, np.bool_)
    for index, ids in enumerate(tokenized):
        if isinstance(ids, TextFailure):
            failures.append(ids)
            continue
        n_tokens[index] = len(ids)
        own, shares = [ids], [1]
        if len(ids) > limit:
            if on_long is OnLong.REJECT:
                reason = f"the text has at least {len(ids)} tokens and the model reads {limit}"
                failures.append(TextFailure(index, "too_long", reason))
                continue
            if on_long is OnLong.SPLIT:
                own, shares = split(ids, limit, frame)
            else:
                own = [truncate(ids, limit, frame)]
                truncated[index] = True
        rows += own
        owner += [index] * len(own)
        weight += shares
        windows[index] = len(own)
    return Rows(
        rows,
        np.array(owner, np.int32),
        np.array(weight, np.int32),
        windows,
        n_tokens,
        truncated,
        tuple(failures),
    )
