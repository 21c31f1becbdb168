"""When a failed ChunkBatch is tried again. Pure."""

from __future__ import annotations

from dataclasses import dataclass

BASE_DELAY_S = 2.0
MAX_DELAY_S = 300.0


@dataclass(frozen=True, slots=True)
class Later:
    delay_s: float


@dataclass(frozen=True, slots=True)
class Discard:
    pass


def decide(attempt: int, max_attempts: int, *, retryable: bool) -> Later | Discard:
    """Exponential backoff: 2 s, 4 s, 8 s … 300 s; ``Discard`` after the last attempt or a final error."""
    if not retryable or attempt >= max_attempts:
        return Discard()
    return Later(min(MAX_DELAY_S, BASE_DELAY_S * 2 ** (attempt - 1)))
