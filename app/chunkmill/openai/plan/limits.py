"""How much one request and one ProviderBatch may hold. Pure.

The defaults are what OpenAI documents (platform documentation of Batch and Embeddings, help-centre FAQ; see
``reference/openai-batch.md``); compatible servers differ, so each is a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from chunkmill.errors import InvalidSetting

MAX_INPUTS: Final = 50_000
"""Embedding inputs over all lines of one batch (Batch guide)."""
MAX_REQUESTS: Final = 50_000
"""Lines of one batch (Batch guide)."""
MAX_BYTES: Final = 200_000_000
"""Of one input file (Batch guide: 200 MB; the smaller reading of MB)."""
MAX_INPUTS_PER_REQUEST: Final = 2_048
"""The ``input`` array of one request (Embeddings reference)."""
MAX_TOKENS_PER_REQUEST: Final = 300_000
"""Summed over one request's inputs (Embeddings reference)."""
MAX_TOKENS_PER_INPUT: Final = 8_192
"""Of text-embedding-3-small, -3-large and ada-002 (Embeddings reference)."""

LEAST_BYTES: Final = 10_000
"""A file smaller than this could not hold what surrounds a text in its line (`OVERHEAD_BYTES`)."""
OVERHEAD_BYTES: Final = 2_000

_LEAST_TOKENS_PER_INPUT: Final = 16  # so that a cut text is never empty: one character has a handful of tokens at most


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What the provider takes. ``inputs_per_request`` is far under the documented 2,048 on purpose: one input that
    the provider refuses fails its whole line."""

    inputs: int = MAX_INPUTS
    bytes: int = MAX_BYTES
    requests: int = MAX_REQUESTS
    inputs_per_request: int = 128
    tokens_per_request: int = MAX_TOKENS_PER_REQUEST
    tokens_per_input: int = MAX_TOKENS_PER_INPUT

    def __post_init__(self) -> None:
        for name in ("inputs", "requests", "inputs_per_request", "tokens_per_request"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"a batch's limit of {name} is {getattr(self, name)}; it must be at least 1.")
        if self.bytes < LEAST_BYTES:
            raise InvalidSetting(f"a batch's limit of bytes is {self.bytes}; it must be at least {LEAST_BYTES}.")
        if self.inputs_per_request > MAX_INPUTS_PER_REQUEST:
            raise InvalidSetting(
                f"inputs per request is {self.inputs_per_request}; the API takes {MAX_INPUTS_PER_REQUEST} at most."
            )
        if not _LEAST_TOKENS_PER_INPUT <= self.tokens_per_input <= self.tokens_per_request:
            raise InvalidSetting(
                f"tokens per input is {self.tokens_per_input}; it must be from {_LEAST_TOKENS_PER_INPUT} to the "
                f"tokens per request, {self.tokens_per_request}."
            )


@dataclass(frozen=True, slots=True)
class BatchBudget:
    """What the organisation's enqueued budgets leave for one more ProviderBatch; None: no such budget."""

    tokens: int | None = None
    requests: int | None = None
