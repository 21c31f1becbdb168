"""What to do after a ProviderBatch, or one of its requests, ended badly; and when to ask again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from chunkmill.domain.retries import BASE_DELAY_S, MAX_DELAY_S
from chunkmill.openai.wire.status import BatchError

# Only the operator can help, for every batch alike.
_QUOTA: Final = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"}
)
_KEY: Final = frozenset({"invalid_api_key", "invalid_authentication", "invalid_organization", "permission_denied"})
# A limit of what may be queued or sent now: room comes by itself.
_LIMITS: Final = frozenset({"token_limit_exceeded", "request_limit_exceeded", "rate_limit_exceeded"})
# Every content of the batch would end the same: the model or the address is wrong.
_FOR_ALL: Final = frozenset({"model_not_found", "model_mismatch", "url_mismatch", "invalid_endpoint"})
# Our files have none of these, so this one was damaged on its way.
_DAMAGED: Final = frozenset({"empty_file", "duplicate_custom_id", "file_not_found", "invalid_file"})
# The provider never ran these requests, or stopped.
_NOT_RUN: Final = frozenset({"batch_expired", "batch_cancelled", "batch_canceled", "cancelled", "canceled"})
_TOO_LONG_WAIT_S: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class Resend:
    """The same contents again, in a new batch from a new file. Charged."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reupload:
    """As `Resend`: the file was the trouble, not what is in it. Charged."""

    reason: str


@dataclass(frozen=True, slots=True)
class Split:
    """The same contents in new batches of at most ``inputs`` inputs each. It ends by itself: each is smaller."""

    inputs: int
    reason: str


@dataclass(frozen=True, slots=True)
class Isolate:
    """The contents of ``requests`` (request numbers) each in a request of its own, the rest as before. A content that
    was alone in such a request is dead, with ``code`` and ``reason``."""

    requests: tuple[int, ...]
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """The same contents later, uncharged: a limit is no failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """All contents of the batch are dead."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopLane:
    """Nothing can be sent before the operator has done something; the contents wait, uncharged."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class RetryUncharged:
    reason: str


@dataclass(frozen=True, slots=True)
class RetryCharged:
    reason: str


@dataclass(frozen=True, slots=True)
class Alone:
    """Each content of the request in a request of its own: one of them is at fault, or all together. Charged."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dead:
    """The request's one content is dead."""

    code: str
    reason: str


AfterValidation = Resend | Reupload | Split | Isolate | Wait | GiveUp | StopLane
AfterLine = RetryUncharged | RetryCharged | Alone | Dead | StopLane


def after_validation_failure(
    errors: Sequence[BatchError], *, attempts: int, n_inputs: int, n_requests: int, max_attempts: int = 5
) -> AfterValidation:
    """After a batch that `failed` before any request ran: nothing was billed.

    ``attempts`` counts the charged attempts of these contents, this one included. Of several errors the one that
    concerns the most decides: the account, then the limits, then the batch, then lines of it. What nothing explains
    is sent up to ``max_attempts`` times as it is, and then in halves, down to the content that is at fault.
    """
    by_code = {error.code.lower(): error for error in reversed(errors)}

    def of(codes: frozenset[str]) -> BatchError | None:
        return next((error for code, error in by_code.items() if code in codes), None)

    if error := of(_QUOTA | _KEY):
        return StopLane(error.code, _say(error))
    if (error := of(_LIMITS)) or (error := next(filter(_names_a_limit, errors), None)):
        return Wait(_say(error))
    if error := of(_FOR_ALL):
        return GiveUp(error.code, f"{_say(error)} (check the model and OPENAI_BASE_URL, then `chunkmill retry`)")
    if error := by_code.get("too_many_tasks"):
        return _halves(error, n_inputs)
    if (error := of(_DAMAGED)) or (error := next(filter(_lost_a_file, errors), None)):
        return Reupload(_say(error)) if attempts < max_attempts else GiveUp(error.code, _say(error))
    first = errors[0] if errors else BatchError("unknown_error", "it failed without saying why")
    if attempts < max_attempts:
        if named := _named_requests(errors, n_requests):
            told = next(error for error in errors if error.line is not None)
            return Isolate(named, told.code, _say(told))
        return Resend(_say(first))
    return _halves(first, n_inputs)


def _halves(error: BatchError, n_inputs: int) -> Split | GiveUp:
    return Split(-(-n_inputs // 2), _say(error)) if n_inputs > 1 else GiveUp(error.code, _say(error))


def _say(error: BatchError) -> str:
    return f"the provider refused the batch: {error.code}: {error.message or 'no message'}"


def _names_a_limit(error: BatchError) -> bool:
    """The text "Enqueued token limit reached for …" comes under several codes."""
    message = error.message.lower()
    return "enqueued" in message and "limit" in message


def _lost_a_file(error: BatchError) -> bool:
    """An incident of OpenAI's: files it could read were reported as not there."""
    message = error.message.lower()
    return "cannot find file" in message or ("file" in message and "does not have access" in message)


def _named_requests(errors: Sequence[BatchError], n_requests: int) -> tuple[int, ...]:
    """Request numbers of the lines that errors name. Lines count from 1, unless one is called 0."""
    lines = {error.line for error in errors if error.line is not None}
    first = 0 if 0 in lines else 1
    return tuple(sorted(line - first for line in lines if 0 <= line - first < n_requests))


def after_line_error(status: int | None, code: str, message: str, *, n_inputs_in_request: int) -> AfterLine:
    """After one request of a batch that ran. ``n_inputs_in_request`` counts contents: windows of one are one."""
    reason = f"the provider refused the request: {code}: {message}" + (f" (HTTP {status})" if status else "")
    word = code.lower()
    if word in _QUOTA | _KEY or status in (401, 402, 403) or "exceeded your current quota" in message.lower():
        return StopLane(code, reason)
    if word in _NOT_RUN or word in _LIMITS or status == 429:
        return RetryUncharged(reason)
    if status is None or status in (408, 409, 425) or status >= 500 or status < 400:
        return RetryCharged(reason)
    return Alone(reason) if n_inputs_in_request > 1 else Dead(code, reason)


def poll_pause(age_s: float, *, longest_s: float) -> float:
    """Seconds to the next poll of a batch created ``age_s`` ago: a sixth of its age, within a sixth of ``longest_s``
    and ``longest_s``. Small batches are often done in a minute, and most of the others take hours."""
    return min(longest_s, max(longest_s, age_s) / 6)


def backoff(failures: int, retry_after_s: float | None = None) -> float:
    """Seconds to wait after ``failures`` in a row, at least one: what the provider's Retry-After says (an hour at
    most), else 2 s, 4 s … 300 s."""
    if retry_after_s is not None and retry_after_s >= 0:
        return min(retry_after_s, _TOO_LONG_WAIT_S)
    return min(MAX_DELAY_S, BASE_DELAY_S * 2.0 ** min(max(failures, 1) - 1, 16))
