"""What to do after a ProviderBatch, or one of its requests, failed; and when to ask the provider again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from chunkmill.domain.retries import BASE_DELAY_S, MAX_DELAY_S
from chunkmill.openai.plan.refusals import Meaning, Refusal, refusal
from chunkmill.openai.wire.status import BatchError

# Our files have none of these faults, so this one was damaged on its way.
_DAMAGED: Final = frozenset({"empty_file", "duplicate_custom_id", "file_not_found", "invalid_file"})
_TOO_LONG_WAIT_S: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class Resend:
    """Send the same contents again, in a new batch from a new file. It counts as an attempt."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reupload:
    """As `Resend`, because the file was at fault and not what is in it. It counts as an attempt."""

    reason: str


@dataclass(frozen=True, slots=True)
class Split:
    """Send the same contents in new batches of at most ``inputs`` inputs. This ends, because each is smaller."""

    inputs: int
    reason: str


@dataclass(frozen=True, slots=True)
class Isolate:
    """Send each content of ``requests`` (request numbers) in a request of its own, and the rest as before.

    A content that was alone in such a request is dead, with ``code`` and ``reason``.
    """

    requests: tuple[int, ...]
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Send the same contents later. It does not count as an attempt, because a limit is not a failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Put all contents of the batch on the dead list."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopLane:
    """Stop the lane until the operator has done something. The contents wait, and this counts as no attempt."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class RetryUncharged:
    """Send the request's contents again. It does not count as an attempt.

    ``limited`` says that a limit is the reason: the lane should pause first.
    """

    reason: str
    limited: bool = False


@dataclass(frozen=True, slots=True)
class RetryCharged:
    """Send the request's contents again. It counts as an attempt."""

    reason: str


@dataclass(frozen=True, slots=True)
class SendAlone:
    """Send each content in a request of its own: one of them is at fault, or all together. Counts as an attempt.

    ``too_large`` says that the request was too large, so that smaller ones are enough.
    """

    reason: str
    too_large: bool = False


@dataclass(frozen=True, slots=True)
class BuryContent:
    """Put the one content of the request on the dead list."""

    code: str
    reason: str


AfterValidation = Resend | Reupload | Split | Isolate | Wait | GiveUp | StopLane
AfterLine = RetryUncharged | RetryCharged | SendAlone | BuryContent | StopLane


def after_validation_failure(
    errors: Sequence[BatchError], *, attempts: int, n_inputs: int, n_requests: int, max_attempts: int = 5
) -> AfterValidation:
    """What to do after a batch that `failed` before any request ran. Nothing was billed.

    ``attempts`` is how many attempts of these contents count, including this one. If there are several errors, the
    one that concerns most decides: first the account, then the limits, then the batch, then its lines. A batch whose
    failure nothing explains is sent ``max_attempts`` times as it is, and then in halves, down to the content at fault.
    """
    by_code = {error.code.lower(): error for error in reversed(errors)}
    meant = [(error, refusal(None, error.code, error.message)) for error in errors]
    if told := _first(meant, Meaning.STOP):
        return StopLane(told[0].code, f"{_say(told[0])} {told[1].advice}")
    if told := _first(meant, Meaning.WAIT):
        return Wait(_say(told[0]))
    if error := by_code.get("too_many_tasks"):
        return _halves(error, n_inputs)
    damaged = next((error for code, error in by_code.items() if code in _DAMAGED), None)
    if (error := damaged) or (error := next(filter(_lost_a_file, errors), None)):
        return Reupload(_say(error)) if attempts < max_attempts else GiveUp(error.code, _say(error))
    first = errors[0] if errors else BatchError("unknown_error", "it failed without saying why")
    if attempts < max_attempts:
        if named := _named_requests(errors, n_requests):
            line = next(error for error in errors if error.line is not None)
            return Isolate(named, line.code, _say(line))
        return Resend(_say(first))
    return _halves(first, n_inputs)


def _halves(error: BatchError, n_inputs: int) -> Split | GiveUp:
    return Split(-(-n_inputs // 2), _say(error)) if n_inputs > 1 else GiveUp(error.code, _say(error))


def _say(error: BatchError) -> str:
    return f"the provider refused the batch: {error.code}: {error.message or 'no message'}"


def _first(meant: Sequence[tuple[BatchError, Refusal]], meaning: Meaning) -> tuple[BatchError, Refusal] | None:
    return next((told for told in meant if told[1].meaning is meaning), None)


def _lost_a_file(error: BatchError) -> bool:
    """Whether it says that the file is not there. OpenAI once said so of files that it had."""
    message = error.message.lower()
    return "cannot find file" in message or ("file" in message and "does not have access" in message)


def _named_requests(errors: Sequence[BatchError], n_requests: int) -> tuple[int, ...]:
    """The numbers of the requests whose lines the errors name. Lines count from 1, unless one of them is line 0."""
    lines = {error.line for error in errors if error.line is not None}
    first = 0 if 0 in lines else 1
    return tuple(sorted(line - first for line in lines if 0 <= line - first < n_requests))


def after_line_error(status: int | None, code: str, message: str, *, n_inputs_in_request: int) -> AfterLine:
    """What to do after a request failed in a batch that ran. The windows of one content count as one input."""
    reason = f"the provider refused the request: {code}: {message}" + (f" (HTTP {status})" if status else "")
    refused = refusal(status, code, message)
    match refused.meaning:
        case Meaning.STOP:
            return StopLane(code, f"{reason} {refused.advice}")
        case Meaning.WAIT:
            return RetryUncharged(reason, limited=True)
        case Meaning.NOT_RUN:
            return RetryUncharged(reason)
        case Meaning.OUTAGE:
            return RetryCharged(reason)
        case Meaning.SIZE | Meaning.TEXT:
            if n_inputs_in_request == 1:
                return BuryContent(code, reason)
            return SendAlone(reason, too_large=refused.meaning is Meaning.SIZE)


def poll_pause(age_s: float, *, longest_s: float) -> float:
    """Seconds until the next poll of a batch that was created ``age_s`` seconds ago.

    It is a sixth of its age, but at least a sixth of ``longest_s`` and at most ``longest_s``. Small batches are often
    done in a minute, and most of the others take hours.
    """
    return min(longest_s, max(longest_s, age_s) / 6)


def backoff(failures: int, retry_after_s: float | None = None) -> float:
    """Seconds to wait after ``failures`` in a row, which are at least one.

    This is what the provider's Retry-After says, but an hour at most; without it, 2 s, 4 s, and so on up to 300 s.
    """
    if retry_after_s is not None and retry_after_s >= 0:
        return min(retry_after_s, _TOO_LONG_WAIT_S)
    return min(MAX_DELAY_S, BASE_DELAY_S * 2.0 ** min(max(failures, 1) - 1, 16))
