"""Cuts contents into plain requests, and remembers how large a request a server takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from chunkmill.openai.plan.inputs import ProviderInput
from chunkmill.openai.plan.limits import OVERHEAD_BYTES, BatchLimits
from chunkmill.openai.plan.packing import PackedInput
from chunkmill.openai.wire.jsonl import text_bytes

GROW_AFTER = 64
"""After this many full requests that were accepted, a limit that was learnt is doubled: what it was learnt from may
have been a moment of trouble, or a few very long texts."""


class PlainRequest(NamedTuple):
    """The contents of one request, with their places in it, and its inputs: a split content has several."""

    items: list[ProviderInput]

    @property
    def rows(self) -> list[PackedInput]:
        rows, position = [], 0
        for item in self.items:
            count = len(item.windows)
            weights = tuple(window.weight for window in item.windows) if count > 1 else ()
            place = PackedInput(
                item.content_hash, 0, position, count, item.n_tokens, item.sent_tokens, item.truncated, weights
            )
            rows.append(place)
            position += count
        return rows

    @property
    def texts(self) -> list[str]:
        return [window.text for item in self.items for window in item.windows]

    @property
    def inputs(self) -> int:
        return sum(len(item.windows) for item in self.items)

    @property
    def tokens(self) -> int:
        return sum(item.sent_tokens for item in self.items)

    def halves(self) -> tuple[list[ProviderInput], list[ProviderInput]]:
        middle = len(self.items) // 2
        return self.items[:middle], self.items[middle:]


def first_request(items: Sequence[ProviderInput], limits: BatchLimits, *, inputs: int) -> PlainRequest:
    """The first contents that fit one request under ``limits`` with at most ``inputs`` inputs; at least one content."""
    taken: list[ProviderInput] = []
    tokens, size = limits.tokens_per_request, limits.bytes_per_request - OVERHEAD_BYTES
    for item in items:
        inputs -= len(item.windows)
        tokens -= item.sent_tokens
        size -= sum(text_bytes(window.text) + 1 for window in item.windows)
        if taken and min(inputs, tokens, size) < 0:
            break
        taken.append(item)
    return PlainRequest(taken)


class RequestSize:
    """How many inputs a request may have, as far as it was learnt. None means that no limit is known."""

    def __init__(self) -> None:
        self.most: int | None = None
        self._full = 0

    def refused(self, inputs: int) -> None:
        """A request of ``inputs`` inputs was too large. One of a single input says nothing about the number."""
        if inputs > 1:
            self.most = inputs // 2 if self.most is None else min(self.most, inputs // 2)
            self._full = 0

    def accepted(self, inputs: int) -> None:
        """A request of ``inputs`` inputs was answered."""
        if self.most is not None and inputs >= self.most:
            self._full += 1
            if self._full == GROW_AFTER:
                self.most, self._full = 2 * self.most, 0
