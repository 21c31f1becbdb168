"""What a provider says of a batch, and what is done about it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from openai.types import Batch

from chunkmill.openai.plan.endings import (
    BuryContent,
    GiveUp,
    Isolate,
    Resend,
    RetryCharged,
    RetryUncharged,
    Reupload,
    SendAlone,
    Split,
    StopLane,
    Wait,
    after_line_error,
    after_validation_failure,
    backoff,
    poll_pause,
)
from chunkmill.openai.wire.status import BatchError, RemoteStatus, read_status, read_time, remote_batch

PLAIN = {
    "id": "batch_1",
    "object": "batch",
    "endpoint": "/v1/embeddings",
    "input_file_id": "file-1",
    "completion_window": "24h",
    "status": "completed",
    "created_at": 1_790_000_000,
    "completed_at": 1_790_000_600,
    "expires_at": 1_790_086_400,
    "output_file_id": "file-2",
    "error_file_id": "",
    "request_counts": {"total": 9, "completed": 8, "failed": 1},
    "usage": {
        "input_tokens": 70,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 70,
    },
    "metadata": {"batch": "5"},
}


@pytest.mark.parametrize("as_object", [False, True])
def test_a_batch_reads_the_same_as_an_object_and_as_a_mapping(as_object: bool) -> None:
    batch = remote_batch(Batch.model_validate(PLAIN) if as_object else PLAIN)

    assert (batch.id, batch.status, batch.is_terminal) == ("batch_1", RemoteStatus.COMPLETED, True)
    assert (batch.input_file_id, batch.output_file_id, batch.error_file_id) == ("file-1", "file-2", None)
    assert batch.created_at == datetime.fromtimestamp(1_790_000_000, UTC)
    assert batch.ended_at == datetime.fromtimestamp(1_790_000_600, UTC)
    assert batch.expires_at == datetime.fromtimestamp(1_790_086_400, UTC)
    assert (batch.total, batch.completed, batch.failed, batch.used_tokens) == (9, 8, 1, 70)
    assert (batch.errors, batch.metadata) == ((), {"batch": "5"})


@pytest.mark.parametrize("as_object", [False, True])
def test_another_dialect_is_read_too(as_object: bool) -> None:
    given: dict[str, Any] = {
        "id": "b",
        "status": "Failed",
        "created_at": "2026-11-20T10:00:00Z",
        "failed_at": "2026-11-20T12:00:00+01:00",
        "input_file_id": "",
        "output_file_id": None,
        "request_counts": {"total": None},
        "usage": None,
        "metadata": None,
        "errors": {
            "object": "list",
            "data": [
                {"code": "invalid_json_line", "message": "Bad key sk-abcdefgh12", "line": 3, "param": None},
                {"line": "x"},
            ],
        },
    }

    batch = remote_batch(Batch.model_construct(**given) if as_object else given)

    assert (batch.status, batch.is_terminal) == (RemoteStatus.FAILED, True)
    assert batch.created_at == datetime(2026, 11, 20, 10, tzinfo=UTC)
    assert batch.ended_at == datetime(2026, 11, 20, 11, tzinfo=UTC)
    assert (batch.input_file_id, batch.output_file_id, batch.error_file_id, batch.expires_at) == (None,) * 4
    assert (batch.total, batch.completed, batch.failed, batch.used_tokens, batch.metadata) == (None,) * 4 + ({},)
    assert batch.errors == (
        BatchError("invalid_json_line", "Bad key [redacted]", 3),
        BatchError("unknown_error", "", None),
    )


def test_a_batch_with_no_more_than_an_id_is_still_running() -> None:
    batch = remote_batch({"id": "b"})

    assert (batch.status, batch.is_terminal, batch.errors) == (RemoteStatus.UNKNOWN, False, ())
    with pytest.raises(ValueError, match="without an id"):
        remote_batch({"status": "completed"})


@pytest.mark.parametrize(
    ("word", "status", "terminal"),
    [
        ("validating", "validating", False),
        ("In_Progress", "in_progress", False),
        ("InProgress", "in_progress", False),
        ("finalizing", "finalizing", False),
        ("COMPLETED", "completed", True),
        ("failed", "failed", True),
        ("expired", "expired", True),
        ("cancelling", "cancelling", False),
        ("canceling", "cancelling", False),
        ("cancelled", "cancelled", True),
        ("canceled", "cancelled", True),
        ("paused", "unknown", False),
        ("", "unknown", False),
        (None, "unknown", False),
        (7, "unknown", False),
        (RemoteStatus.EXPIRED, "expired", True),
    ],
)
def test_status_words(word: object, status: str, terminal: bool) -> None:
    assert read_status(word) == status
    assert remote_batch({"id": "b", "status": word}).is_terminal is terminal


@pytest.mark.parametrize("wrong", [None, 0, -5, "", "soon", "0", float("nan"), float("inf"), 1e300, []])
def test_a_senseless_time_is_none(wrong: object) -> None:
    assert read_time(wrong) is None


def test_times_are_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        naive = read_time("2026-11-20T10:00:00")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert naive == datetime(2026, 11, 20, 10, tzinfo=UTC)
    east = datetime(2026, 11, 20, 10, tzinfo=timezone(timedelta(hours=2)))
    assert read_time(east.isoformat()) == east
    assert read_time("1790000000") == read_time(1_790_000_000) == read_time(1_790_000_000.0)


def after(*errors: BatchError, attempts: int = 1, n_inputs: int = 100, n_requests: int = 10) -> Any:
    return after_validation_failure(errors, attempts=attempts, n_inputs=n_inputs, n_requests=n_requests)


@pytest.mark.parametrize("attempts", [1, 50])
@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("token_limit_exceeded", "Enqueued token limit reached", Wait),
        ("request_limit_exceeded", "", Wait),
        ("invalid_request", "Enqueued request limit reached for text-embedding-3-small. Limit: 1,000,000", Wait),
        ("insufficient_quota", "You exceeded your current quota", StopLane),
        ("billing_hard_limit_reached", "", StopLane),
        ("invalid_api_key", "", StopLane),
        ("billing_not_active", "", StopLane),
        ("budget_exceeded", "", StopLane),
        ("model_not_found", "The model does not exist", StopLane),
        ("model_mismatch", "", StopLane),
        ("url_mismatch", "", StopLane),
        ("too_many_tasks", "", Split),
    ],
)
def test_what_attempts_do_not_change(code: str, message: str, kind: type, attempts: int) -> None:
    decision = after(BatchError(code, message), attempts=attempts)

    assert type(decision) is kind
    assert code in decision.reason
    assert message in decision.reason


@pytest.mark.parametrize("code", ["empty_file", "duplicate_custom_id"])
def test_a_damaged_file_is_sent_again_and_not_for_ever(code: str) -> None:
    assert isinstance(after(BatchError(code, ""), attempts=4), Reupload)
    assert isinstance(after(BatchError(code, ""), attempts=5), GiveUp)


def test_a_file_that_the_provider_lost_is_uploaded_again() -> None:
    lost = BatchError("invalid_request", "Cannot find file file-1, or organization org-1 does not have access to it.")

    assert isinstance(after(lost), Reupload)


def test_lines_that_are_named_go_alone() -> None:
    errors = [BatchError("invalid_request", "Bad input", 7), BatchError("invalid_request", "Bad input", 2)]

    assert after(*errors) == Isolate(
        (1, 6), "invalid_request", "the provider refused the batch: invalid_request: Bad input"
    )
    assert after(BatchError("invalid_json_line", "", 0), BatchError("invalid_json_line", "", 9)).requests == (0, 9)
    assert after(BatchError("invalid_json_line", "", 10)).requests == (9,)
    assert isinstance(after(BatchError("invalid_json_line", "", 11)), Resend)  # no such line
    assert isinstance(after(*errors, attempts=5), Split)  # isolating did not help


@pytest.mark.parametrize("errors", [[], [BatchError("invalid_request", "No reason")]])
def test_an_unexplained_failure_ends_at_the_content_that_is_at_fault(errors: list[BatchError]) -> None:
    assert all(isinstance(after(*errors, attempts=n), Resend) for n in range(1, 5))
    sizes, attempts = [50_000], 5
    while isinstance(step := after(*errors, attempts=attempts, n_inputs=sizes[-1]), Split):
        sizes.append(step.inputs)
        attempts += 1
        assert len(sizes) < 20

    assert sizes[-1] == 1
    assert isinstance(step, GiveUp)


def test_what_concerns_the_most_decides() -> None:
    line = BatchError("invalid_request", "Bad input", 2)
    limit, quota = BatchError("token_limit_exceeded", ""), BatchError("insufficient_quota", "")

    assert isinstance(after(line, limit), Wait)
    assert isinstance(after(line, limit, quota), StopLane)
    assert isinstance(after(line, BatchError("model_not_found", "")), StopLane)


@pytest.mark.parametrize(
    ("status", "code", "several", "single"),
    [
        (None, "batch_expired", RetryUncharged, RetryUncharged),
        (None, "batch_cancelled", RetryUncharged, RetryUncharged),
        (429, "rate_limit_exceeded", RetryUncharged, RetryUncharged),
        (429, "http_429", RetryUncharged, RetryUncharged),
        (429, "insufficient_quota", StopLane, StopLane),
        (401, "invalid_api_key", StopLane, StopLane),
        (402, "http_402", StopLane, StopLane),
        (403, "http_403", StopLane, StopLane),
        (None, "unknown_error", RetryCharged, RetryCharged),
        (200, "http_200", RetryCharged, RetryCharged),
        (408, "timeout", RetryCharged, RetryCharged),
        (409, "conflict", RetryCharged, RetryCharged),
        (425, "http_425", RetryCharged, RetryCharged),
        (500, "server_error", RetryCharged, RetryCharged),
        (503, "http_503", RetryCharged, RetryCharged),
        (424, "http_424", RetryCharged, RetryCharged),
        (429, "billing_not_active", StopLane, StopLane),
        (400, "budget_exceeded", StopLane, StopLane),
        (404, "model_not_found", StopLane, StopLane),
        (404, "http_404", StopLane, StopLane),
        (405, "http_405", StopLane, StopLane),
        (400, "max_tokens_per_request", SendAlone, BuryContent),
        (413, "http_413", SendAlone, BuryContent),
        (422, "http_422", SendAlone, BuryContent),
    ],
)
def test_after_an_error_of_one_request(status: int | None, code: str, several: type, single: type) -> None:
    for count, kind in ((128, several), (1, single)):
        decision = after_line_error(status, code, "Because.", n_inputs_in_request=count)

        assert type(decision) is kind
        assert f"{code}: Because." in decision.reason
        assert ("chunkmill lanes resume" in decision.reason) == (kind is StopLane)


def test_a_limit_of_a_request_is_told_from_a_limit_of_the_account_and_from_what_never_ran() -> None:
    limit = after_line_error(429, "http_429", "Slow down.", n_inputs_in_request=1)
    expired = after_line_error(None, "batch_expired", "Too late.", n_inputs_in_request=1)
    large = after_line_error(413, "http_413", "Too large.", n_inputs_in_request=9)
    bad = after_line_error(400, "invalid_value", "A text is bad.", n_inputs_in_request=9)

    assert (limit, expired) == (RetryUncharged(limit.reason, limited=True), RetryUncharged(expired.reason))
    assert (large, bad) == (SendAlone(large.reason, too_large=True), SendAlone(bad.reason))


def test_a_quota_that_only_the_message_names_stops_the_lane() -> None:
    message = "You exceeded your current quota, please check your plan and billing details."

    assert isinstance(after_line_error(429, "http_429", message, n_inputs_in_request=1), StopLane)


def test_polls_are_quick_at_first() -> None:
    pauses = [poll_pause(age, longest_s=60) for age in (0, 30, 60, 120, 240, 360, 86_400)]

    assert pauses == [10, 10, 10, 20, 40, 60, 60]


def test_backoff_grows_and_the_providers_word_counts() -> None:
    assert [backoff(n) for n in (0, 1, 2, 3, 8, 9, 10_000)] == [2, 2, 4, 8, 256, 300, 300]
    assert backoff(9, 0.5) == 0.5
    assert backoff(1, 40.0) == 40.0
    assert backoff(1, 1e9) == 3_600
    assert backoff(1, -1.0) == 2
