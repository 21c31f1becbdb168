"""Pack contents into the requests of one ProviderBatch, under every limit at once. Pure.

`Packer` keeps no texts. It keeps a row for each content, by which the vectors are found in the answer.
"""

from __future__ import annotations

from typing import NamedTuple

from chunkmill.openai.plan.inputs import ProviderInput
from chunkmill.openai.plan.limits import BatchLimits, Headroom
from chunkmill.openai.wire.jsonl import RequestForm, custom_id, encode_request, text_bytes

_UNLIMITED = Headroom()


class PackedInput(NamedTuple):
    """Where a content is: inputs ``position`` to ``position + windows - 1`` of request ``request_no``."""

    content_hash: bytes
    request_no: int
    """Counts from 0; it is also the number of the line in the file."""
    position: int
    """Counts from 0 within the request."""
    windows: int
    n_tokens: int
    """Tokens of the whole text."""
    sent_tokens: int
    truncated: bool
    weights: tuple[int, ...]
    """The weights of the windows, for `pool`; empty if there is one window."""


class Packer:
    """Fills one ProviderBatch, request after request, in the order given. The same inputs make the same file.

    ``batch_id`` is the id of the ProviderBatch, because the length of its custom ids is a part of the file's length.
    """

    def __init__(self, batch_id: int, form: RequestForm, limits: BatchLimits, headroom: Headroom = _UNLIMITED) -> None:
        self._limits = limits
        self._max_requests = limits.requests if headroom.requests is None else min(limits.requests, headroom.requests)
        self._max_tokens = headroom.tokens
        self._empty_line = len(encode_request(custom_id(batch_id, 0), form, ())) - 1  # without the request's number
        self._inputs_of: list[int] = []
        self._open = False  # whether the last request takes more
        self._open_tokens = 0
        self._open_bytes = 0
        self.rows: list[PackedInput] = []
        """In the order in which they were added, and so by request and position."""
        self.inputs = 0
        """How many windows it holds, which is what the provider counts."""
        self.tokens = 0
        """How many tokens are sent."""
        self.bytes = 0
        """The exact size of the file."""

    @property
    def requests(self) -> int:
        return len(self._inputs_of)

    def add(self, item: ProviderInput, *, alone: bool = False) -> bool:
        """Take one content, in a request of its own if it goes ``alone``. Returns False if the ProviderBatch is full.

        An empty ProviderBatch refuses only what exceeds the headroom, because `prepare` has checked the limits.
        """
        limits, count, tokens = self._limits, len(item.windows), item.sent_tokens
        if count > min(limits.inputs, limits.inputs_per_request) or tokens > limits.tokens_per_request:
            raise ValueError(
                "a content fits into no request, because it was prepared under other limits than the packer's"
            )
        if self.inputs + count > limits.inputs:
            return False
        if self._max_tokens is not None and self.tokens + tokens > self._max_tokens:
            return False
        size = sum(text_bytes(window.text) for window in item.windows) + count - 1
        joins = (
            self._open
            and not alone
            and self._inputs_of[-1] + count <= limits.inputs_per_request
            and self._open_tokens + tokens <= limits.tokens_per_request
            and self._open_bytes + size + 1 <= limits.bytes_per_request
        )
        if joins:
            size += 1  # the comma
        else:
            if self.requests == self._max_requests:
                return False
            size += self._empty_line + len(str(self.requests))
        if self.bytes + size > limits.bytes:
            return False
        self._put(item, size, joins=joins)
        self._open = not alone
        return True

    def _put(self, item: ProviderInput, size: int, *, joins: bool) -> None:
        if not joins:
            self._inputs_of.append(0)
            self._open_tokens = self._open_bytes = 0
        count, tokens = len(item.windows), item.sent_tokens
        row = PackedInput(
            item.content_hash,
            request_no=self.requests - 1,
            position=self._inputs_of[-1],
            windows=count,
            n_tokens=item.n_tokens,
            sent_tokens=tokens,
            truncated=item.truncated,
            weights=tuple(window.weight for window in item.windows) if count > 1 else (),
        )
        self.rows.append(row)
        self._inputs_of[-1] += count
        self._open_tokens += tokens
        self._open_bytes += size
        self.inputs += count
        self.tokens += tokens
        self.bytes += size
