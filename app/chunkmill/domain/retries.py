"""When a failed ChunkBatch is tried again. Pure."""

from __future__ import annotations

BASE_DELAY_S = 2.0
MAX_DELAY_S = 300.0


def retry_delay(attempt: int, max_attempts: int, *, retryable: bool) -> float | None:
    """Seconds until the next attempt: 2, 4, 8 and so on up to 300. None if there is none, because it is discarded.

    That is so after the last permitted attempt, and after an error that another attempt would meet again.
    """
    if not retryable or attempt >= max_attempts:
        return None
    delay: float = min(MAX_DELAY_S, BASE_DELAY_S * 2 ** (attempt - 1))
    return delay
