"""The errors of a gateway are those of ``chunkmill.errors`` again on the other side."""

from __future__ import annotations

import inspect
import json

import pytest

from chunkmill import errors
from chunkmill.errors import (
    AccessDenied,
    ChunkmillError,
    ClientClosed,
    GatewayUnavailable,
    InvalidChunk,
    InvalidInput,
    JobCancelled,
    JobFailed,
    NotFound,
    ProviderError,
    ProviderRefused,
    ProviderStopped,
    WaitTimeout,
)
from chunkmill.gateway.errors import Refusal, refusal_of
from chunkmill.remote.asking import pause_after, told_timeout_ms
from chunkmill.remote.refusals import Failure, failure_of, retry_after
from chunkmill.remote.steps import Answer

SECRET = "cmk_secret"
KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ChunkmillError) and kind is not ChunkmillError
]


def error_of(kind: type[ChunkmillError]) -> ChunkmillError:
    if kind is InvalidChunk:
        return InvalidChunk("the text is empty", chunk_id="c1", position=3, reason="empty_text")
    if issubclass(kind, JobFailed):
        return kind("job 3 failed", job_id=3)
    if kind is ProviderRefused:
        return ProviderRefused("the provider refused", status=400, provider_code="bad")
    if kind is ProviderStopped:
        return ProviderStopped("the provider stopped", provider_code="unpaid")
    return kind(f"what {kind.__name__} says")


def answered(refusal: Refusal) -> Failure:
    reply = refusal.reply()
    headers = {name.lower(): value for name, value in reply.headers.items()}
    return failure_of(Answer(reply.status_code, headers, bytes(reply.body)), "https://gateway", [SECRET])


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_gateway_is_of_the_same_class_and_says_the_same(kind: type[ChunkmillError]) -> None:
    error = error_of(kind)
    same = answered(refusal_of(error)).error
    known = {
        ProviderRefused: ProviderError,
        ProviderStopped: ProviderError,
        InvalidChunk: InvalidInput,
        JobCancelled: ChunkmillError,
        JobFailed: ChunkmillError,
    }
    assert type(same) is known.get(kind, kind)
    assert str(same) == str(error)


def test_what_a_chunk_and_a_job_are_named_by_comes_along_if_it_is_there() -> None:
    said = {"message": "line 4: empty", "code": "invalid_chunk", "chunk_id": "c", "position": 3, "reason": "r"}
    body = json.dumps({"error": said}).encode()
    error = failure_of(Answer(400, {}, body), "https://gateway", []).error
    assert isinstance(error, InvalidChunk) and (error.chunk_id, error.position, error.reason) == ("c", 3, "r")
    assert str(error) == "line 4: empty"
    body = b'{"error": {"message": "job 3 failed", "code": "job_failed", "job_id": 3}}'
    error = failure_of(Answer(500, {}, body), "https://gateway", []).error
    assert isinstance(error, JobFailed) and error.job_id == 3


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Refusal(401, "invalid_api_key", "wrong"), AccessDenied),
        (Refusal(403, "scope", "no"), AccessDenied),
        (Refusal(403, "model_not_allowed", "no"), AccessDenied),
        (Refusal(404, "anything", "no"), NotFound),
        (Refusal(400, "anything", "no"), InvalidInput),
        (Refusal(405, "method_not_allowed", "no"), InvalidInput),
        (Refusal(409, "idempotency_conflict", "no"), InvalidInput),
        (Refusal(413, "body_too_large", "no"), InvalidInput),
        (Refusal(429, "rate_limit_exceeded", "no"), GatewayUnavailable),
        (Refusal(503, "draining", "no"), GatewayUnavailable),
        (Refusal(503, "no_worker", "no"), WaitTimeout),
        (Refusal(504, "timeout", "no"), WaitTimeout),
        (Refusal(500, "internal", "no"), GatewayUnavailable),
        (Refusal(503, "client_closed", "no"), ClientClosed),
    ],
)
def test_the_other_refusals_have_a_class_by_their_code_or_their_status(
    refusal: Refusal, kind: type[ChunkmillError]
) -> None:
    failure = answered(refusal)
    assert type(failure.error) is kind
    assert failure.may_repeat is (refusal.status in (429, 503, 504))
    assert failure.is_undone is (refusal.status in (429, 503, 504))  # our 504 says that nothing was changed


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b'{"error": 3}', b'{"error": {"message": {}, "code": []}}', b"[" * 100_000, b"\xff"],
)
def test_a_refusal_in_any_form_is_an_error_with_a_sentence(body: bytes) -> None:
    error = failure_of(Answer(400, {}, body), "https://gateway", []).error
    assert type(error) is InvalidInput and str(error) == "https://gateway answered 400 and did not say why."


def test_a_message_is_shown_without_the_key_and_without_signs_that_a_terminal_obeys() -> None:
    body = b'{"error": {"message": "key cmk_secret\\u001b[2J\\nis odd"}}'
    assert str(failure_of(Answer(400, {}, body), "https://gateway", [SECRET]).error) == "key [redacted][2J is odd"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after-ms": "1e300"}, None),
        ({}, None),
    ],
)
def test_a_pause_is_what_the_gateway_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_pauses_double_up_to_a_bound_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from chunkmill.remote import asking

    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.25)
    monkeypatch.setattr(asking, "LONGEST_PAUSE_S", 8.0)
    for tries, most in enumerate([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]):
        pauses = [pause_after(tries) for _ in range(50)]
        assert most / 2 <= min(pauses) and max(pauses) <= most and len(set(pauses)) > 10
    assert pause_after(10_000) <= 8.0


def test_the_gateway_is_told_less_time_than_the_caller_has() -> None:
    assert [told_timeout_ms(seconds) for seconds in (600, 30, 5, 0.1, 0.0001)] == [599_000, 29_000, 4_500, 90, 1]
