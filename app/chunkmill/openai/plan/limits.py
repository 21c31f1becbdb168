"""How much one request and one ProviderBatch may hold. Pure.

The defaults are what OpenAI documents: the Batch and Embeddings guides, the API reference, and the help centre's FAQ.
Compatible servers differ, so each limit is a setting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from chunkmill.errors import InvalidSetting

MAX_INPUTS: Final = 50_000
"""Embedding inputs over all lines of one batch (Batch guide)."""
MAX_REQUESTS: Final = 50_000
"""Lines of one batch (Batch guide)."""
MAX_BYTES: Final = 200_000_000
"""Bytes of one input file (Batch guide: 200 MB; this is the smaller meaning of MB)."""
MAX_INPUTS_PER_REQUEST: Final = 2_048
"""Inputs in the ``input`` array of one request (Embeddings reference)."""
MAX_TOKENS_PER_REQUEST: Final = 300_000
"""Tokens of all inputs of one request (Embeddings reference)."""
MAX_TOKENS_PER_INPUT: Final = 8_192
"""Tokens of one input of text-embedding-3-small, -3-large and ada-002 (Embeddings reference)."""

LEAST_BYTES: Final = 10_000
"""The smallest limit on a file. A smaller file could not hold what surrounds a text in its line."""
OVERHEAD_BYTES: Final = 2_000
"""Bytes that are kept free for what surrounds a text in its line."""

_LEAST_TOKENS_PER_INPUT: Final = 16  # so that a truncated text is never empty: one character has only a few tokens


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What the provider takes.

    ``inputs_per_request`` is far below the documented 2,048 on purpose, because one input that the provider refuses
    makes its whole line fail.
    """

    inputs: int = MAX_INPUTS
    bytes: int = MAX_BYTES
    requests: int = MAX_REQUESTS
    inputs_per_request: int = 128
    tokens_per_request: int = MAX_TOKENS_PER_REQUEST
    tokens_per_input: int = MAX_TOKENS_PER_INPUT
    bytes_per_request: int = MAX_BYTES

    def __post_init__(self) -> None:
        for name in ("inputs", "requests", "inputs_per_request", "tokens_per_request"):
            if getattr(self, name) < 1:
                raise InvalidSetting(
                    f"the limit on {name} of a ProviderBatch is {getattr(self, name)}; it must be at least 1."
                )
        if min(self.bytes, self.bytes_per_request) < LEAST_BYTES:
            raise InvalidSetting(
                f"the limit on bytes of a ProviderBatch is {self.bytes}, and on those of a request "
                f"{self.bytes_per_request}; both must be at least {LEAST_BYTES}."
            )
        if self.inputs_per_request > MAX_INPUTS_PER_REQUEST:
            raise InvalidSetting(
                f"the limit on inputs per request is {self.inputs_per_request}; the API takes at most "
                f"{MAX_INPUTS_PER_REQUEST}."
            )
        if not _LEAST_TOKENS_PER_INPUT <= self.tokens_per_input <= self.tokens_per_request:
            raise InvalidSetting(
                f"the limit on tokens per input is {self.tokens_per_input}; it must be from "
                f"{_LEAST_TOKENS_PER_INPUT} to the limit on tokens per request, {self.tokens_per_request}."
            )


_LIMIT = re.compile(r"\blimit\b(?: (?:is|of))? ?[:=]? ?([0-9][0-9,._ ]*)", re.IGNORECASE | re.ASCII)

_REQUESTS = re.compile(r"\s*(?:enqueued )?requests\b", re.IGNORECASE)


def limit_in(message: str) -> int | None:
    """The number of tokens that a refusal calls the limit, as in "Limit: 3,000,000 enqueued tokens".

    None if there is none, or if it is a number of requests.
    """
    limiting = [match for match in _LIMIT.finditer(message) if not _REQUESTS.match(message, match.end())]
    numbers = [re.sub("[^0-9]", "", match[1]) for match in limiting]
    limits = [int(number) for number in numbers if 0 < len(number) <= 15]
    return limits[-1] if limits and limits[-1] > 0 else None


@dataclass(frozen=True, slots=True)
class Headroom:
    """What the account's limits and the budget leave for one more ProviderBatch; None if there is no such limit."""

    tokens: int | None = None
    requests: int | None = None
