"""From the answer that is an error to the error of ``chunkmill.errors``, and to whether the request may be repeated."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from chunkmill import errors
from chunkmill.errors import (
    AccessDenied,
    BudgetExceeded,
    ChunkmillError,
    GatewayUnavailable,
    InvalidChunk,
    InvalidInput,
    JobCancelled,
    JobFailed,
    NotFound,
    ProviderError,
    ProviderRefused,
    ProviderStopped,
    UnknownModel,
    WaitTimeout,
)
from chunkmill.openai.wire.redaction import clean
from chunkmill.remote.steps import Answer, Unanswered

LONGEST_MESSAGE = 2_000
LONGEST_PAUSE_S = 24 * 3600.0
_REPEATABLE = frozenset({408, 429, 502, 503, 504})
_UNDONE = frozenset({429, 503})
"""With these, the gateway says that it has not begun."""
TIME_IS_OVER = "timeout"
"""The gateway waited for a worker or a moment that did not come, and has changed nothing."""
_SMALLER = frozenset({"too_many_inputs", "max_tokens_per_request", "body_too_large"})
"""Codes that say that several smaller requests succeed."""


@dataclass(frozen=True, slots=True)
class Failure:
    """``may_repeat`` says that the same request may succeed later. ``is_undone`` says that it had no effect.
    ``is_too_large`` says that its parts may succeed, and ``is_too_slow`` that it would if its body came without
    pauses. ``retry_after`` is in seconds."""

    error: ChunkmillError
    may_repeat: bool
    is_undone: bool
    is_too_large: bool = False
    is_too_slow: bool = False
    retry_after: float | None = None


def failure_of(answer: Answer, server: str, secrets: Sequence[str]) -> Failure:
    """What an answer of 300 and above means."""
    said = _error_in(answer)
    code = said.get("code")
    code = code if isinstance(code, str) else ""
    words = _words(said.get("message"), secrets)
    told = answer.headers.get("x-should-retry")
    may_repeat = answer.status in _REPEATABLE if told not in ("true", "false") else told == "true"
    return Failure(
        _error(answer.status, code, words, said, server),
        may_repeat=may_repeat,
        is_undone=answer.status in _UNDONE or code == TIME_IS_OVER,
        is_too_large=code in _SMALLER or answer.status == 413,
        is_too_slow=answer.status == 408,
        retry_after=retry_after(answer.headers),
    )


def late_failure(answer: Answer, server: str, secrets: Sequence[str]) -> Failure | None:
    """The error in an answer that began before it was known how it ends; None if there is none."""
    said = _error_in(answer)
    if not said:
        return None
    status = said.get("status")
    known = Answer(status if isinstance(status, int) else 500, {}, answer.body)
    return replace(failure_of(known, server, secrets), may_repeat=False, is_undone=False)


def failure_of_silence(silence: Unanswered, server: str) -> Failure:
    """What it means that there was no answer."""
    kind: type[ChunkmillError] = WaitTimeout if silence.timed_out and silence.was_sent else GatewayUnavailable
    return Failure(
        kind(f"{server} {silence.why}"),
        may_repeat=not silence.for_good,
        is_undone=not silence.was_sent,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from ``retry-after-ms`` or ``retry-after``; None if there is neither, or a date or nonsense."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            seconds = float(headers[name]) * scale
            if 0 <= seconds <= LONGEST_PAUSE_S:
                return seconds
    return None


def _error_in(answer: Answer) -> dict[str, Any]:
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    said = body.get("error") if isinstance(body, dict) else None
    return said if isinstance(said, dict) else {}


def _words(message: object, secrets: Sequence[str]) -> str:
    text = clean(message) if isinstance(message, str) else ""
    for secret in secrets:
        text = text.replace(secret, "[redacted]")
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "…"


def _error(status: int, code: str, words: str, said: Mapping[str, Any], server: str) -> ChunkmillError:
    message = words or f"{server} answered {status} and did not say why."
    if code in _MADE:
        return _MADE[code](message, said)
    if code in _KINDS:
        return _KINDS[code](message)
    if status in (401, 403):
        return AccessDenied(message)
    if 300 <= status < 400:
        return GatewayUnavailable(
            f"{server} answered {status}, a redirect, which is not followed, because texts and the key would go to an "
            "address that nobody has named. Use the address that answers itself."
        )
    if status == 404:
        return NotFound(message)
    if 400 <= status < 500 and status not in (408, 429):
        return InvalidInput(message)
    return GatewayUnavailable(f"{server} answered {status}: {words}" if words else f"{server} answered {status}.")


def _all(kind: type[ChunkmillError]) -> Iterator[type[ChunkmillError]]:
    yield kind
    for more in kind.__subclasses__():
        yield from _all(more)


_OURS = [kind for kind in _all(ChunkmillError) if kind.__module__ == errors.__name__ and kind is not ChunkmillError]
_KINDS: Mapping[str, Callable[[str], ChunkmillError]] = {
    **{kind.code: kind for kind in _OURS},
    "insufficient_quota": BudgetExceeded,
    "model_not_found": UnknownModel,
    "no_worker": WaitTimeout,
    TIME_IS_OVER: WaitTimeout,
    # What these need is not in an answer.
    ProviderRefused.code: ProviderError,
    ProviderStopped.code: ProviderError,
}


def _invalid_chunk(message: str, said: Mapping[str, Any]) -> ChunkmillError:
    chunk_id, position, reason = said.get("chunk_id"), said.get("position"), said.get("reason")
    if not isinstance(chunk_id, str) or not isinstance(position, int) or not isinstance(reason, str):
        return InvalidInput(message)
    error = InvalidChunk(message, chunk_id=chunk_id, position=position, reason=reason)
    error.args = (message,)  # the server's message is whole already
    return error


def _job_failed(kind: type[JobFailed], message: str, said: Mapping[str, Any]) -> ChunkmillError:
    job_id = said.get("job_id")
    return kind(message, job_id=job_id) if isinstance(job_id, int) else ChunkmillError(message)


_MADE: dict[str, Callable[[str, Mapping[str, Any]], ChunkmillError]] = {
    InvalidChunk.code: _invalid_chunk,
    JobFailed.code: partial(_job_failed, JobFailed),
    JobCancelled.code: partial(_job_failed, JobCancelled),
}
