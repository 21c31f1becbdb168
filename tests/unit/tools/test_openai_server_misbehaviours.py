"""Each misbehaviour of the test server, seen once by the official SDK."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from tests.openai_server import text_hash
from tests.openai_server.asking import Asking, embed, jsonl
from tests.openai_server.fixtures import asking, client, server
from tests.openai_server.kinds import ANSWERS

__all__ = ["asking", "client", "server"]


@pytest.mark.parametrize(
    ("kind", "options", "status", "code"),
    [
        ("http_error", {"status": 503}, 503, None),
        ("http_error", {"status": 500, "applied": True}, 500, None),
        ("http_error", {"status": 502, "html": True}, 502, None),
        ("http_error", {"status": 400, "code": "odd", "type": "invalid_request_error"}, 400, "odd"),
        ("rate_limited", {}, 429, "rate_limit_exceeded"),
        ("insufficient_quota", {}, 429, "insufficient_quota"),
        ("unauthorized", {}, 401, "invalid_api_key"),
    ],
)
def test_any_endpoint_answers_with_an_error(
    asking: Asking, kind: str, options: dict[str, Any], status: int, code: str | None
) -> None:
    assert kind in ANSWERS
    number = asking.server.misbehave(kind, times=2, where={"endpoint": "embeddings.*"}, **options)
    asking.client.batches.list()  # another endpoint is not meant
    for _ in range(2):
        with pytest.raises(openai.APIStatusError) as error:
            embed(asking, asking.texts[0])
        assert (error.value.status_code, error.value.code) == (status, code)
        assert (asking.server.key in str(error.value)) == (kind == "unauthorized")
    embed(asking, asking.texts[1])
    assert asking.server.fired(number) == 2
    assert asking.charged()[:2] == [2 * options.get("applied", False), 1]


def test_a_429_says_how_long_to_wait_or_does_not(asking: Asking) -> None:
    asking.server.misbehave("rate_limited", retry_after=7, retry_after_ms=6900)
    asking.server.misbehave("rate_limited")
    for wanted in ("7", None):
        with pytest.raises(openai.RateLimitError) as error:
            asking.client.files.list()
        assert error.value.response.headers.get("retry-after") == wanted


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("kind", ["cut", "hang"])
def test_no_answer_to_create_with_the_batch_made_or_not(asking: Asking, kind: str, applied: bool) -> None:
    options: dict[str, Any] = {"seconds": 60.0} if kind == "hang" else {}
    asking.server.misbehave(kind, where={"endpoint": "batches.create"}, applied=applied, **options)
    before = asking.server.state()["batches_created"]
    file_id = asking.upload(jsonl(asking.lines()))
    asked = asking.client.with_options(timeout=0.1) if kind == "hang" else asking.client
    with pytest.raises(openai.APIConnectionError):
        asked.batches.create(input_file_id=file_id, endpoint="/v1/embeddings", completion_window="24h")
    if kind == "cut":
        assert asking.server.state()["batches_created"] - before == applied
        batches = [batch for batch in asking.client.batches.list() if batch.input_file_id == file_id]
        assert len(batches) == applied


def test_an_upload_arrives_and_its_answer_does_not(asking: Asking) -> None:
    asking.server.misbehave("cut", where={"endpoint": "files.create"}, applied=True)
    with pytest.raises(openai.APIConnectionError):
        asking.upload(b"{}", "lost-answer.jsonl")
    assert "lost-answer.jsonl" in [file.filename for file in asking.client.files.list(purpose="batch").data]
    assert asking.server.state()["requests"]["files.create"]["cut"] == 1


def test_slow_answers(asking: Asking) -> None:
    hurried = asking.client.with_options(timeout=0.1)
    asking.server.misbehave("slow", seconds=60.0)
    with pytest.raises(openai.APITimeoutError):
        hurried.files.list()
    asking.server.control(delays={"files.list": 60.0})
    with pytest.raises(openai.APITimeoutError):
        hurried.files.list()
    asking.client.files.retrieve(asking.upload(b"{}"))  # others are as quick as ever


def test_requests_of_a_test_that_is_over_are_not_counted_later(asking: Asking) -> None:
    """``state`` waits for nothing, so the request is counted before ``settle`` returns or never."""

    def cuts() -> int:
        counted = asking.server.state()["requests"]
        return sum(counted.get(endpoint, {}).get("cut", 0) for endpoint in ("files.list", "batches.list"))

    asking.server.settle()
    before = cuts()
    hurried = asking.client.with_options(timeout=0.1)
    asking.server.misbehave("slow", seconds=3600.0)
    asking.server.misbehave("hang", where={"endpoint": "batches.list"}, seconds=3600.0)
    for listing in (hurried.files.list, hurried.batches.list):
        with pytest.raises(openai.APITimeoutError):
            listing()
    asking.server.settle()
    assert cuts() - before == 2


def test_create_is_refused_for_what_is_enqueued(asking: Asking) -> None:
    asking.server.misbehave("enqueued_on_create", status=400)
    with pytest.raises(openai.BadRequestError) as error:
        asking.create(jsonl(asking.lines()))
    assert error.value.code == "token_limit_exceeded"


def test_one_create_makes_two_batches(asking: Asking) -> None:
    asking.server.misbehave("created_twice")
    batch = asking.create(jsonl(asking.lines()))
    same = [
        shown_batch.id
        for shown_batch in asking.client.batches.list(limit=2)
        if shown_batch.input_file_id == batch.input_file_id
    ]
    assert len(same) == 2
    assert same[1] == batch.id
    for batch_id in same:
        asking.end(batch_id)
    assert asking.charged() == [2] * 10


def test_metadata_is_dropped(asking: Asking) -> None:
    asking.server.misbehave("metadata_dropped")
    assert asking.create(jsonl(asking.lines()), metadata={"a": "b"}).metadata is None


def test_files_vanish(asking: Asking) -> None:
    asking.server.misbehave("input_vanished")
    with pytest.raises(openai.BadRequestError, match="Cannot find file"):
        asking.create(jsonl(asking.lines()))
    asking.server.misbehave("output_vanished")
    output = asking.run().output_file_id
    with pytest.raises(openai.NotFoundError):
        asking.raw(output)
    file_id = asking.upload(b"{}")
    asking.server.vanish(file_id)
    with pytest.raises(openai.NotFoundError):
        asking.client.files.delete(file_id)


def test_a_delete_fails(asking: Asking) -> None:
    file_id = asking.upload(b"{}")
    asking.server.misbehave("delete_fails", where={"id": file_id})
    with pytest.raises(openai.InternalServerError):
        asking.client.files.delete(file_id)
    assert asking.client.files.delete(file_id).deleted


def test_a_download_is_cut_short(asking: Asking) -> None:
    output = asking.run().output_file_id
    assert output is not None
    asking.server.misbehave("truncated", fraction=0.55)
    cut = asking.raw(output)
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut[-1])
    asking.server.misbehave("cut_body")
    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
        asking.raw(output)
    assert len(asking.raw(output)) == 10


def test_batch_objects_look_odd(asking: Asking) -> None:
    for kind in ("odd_status", "iso_dates", "null_counts", "null_usage", "empty_file_ids"):
        asking.server.misbehave(kind, where={"endpoint": "batches.retrieve"})
    batch = asking.create(jsonl(asking.lines()))
    odd: Any = asking.client.batches.retrieve(batch.id)
    assert odd.status[0].isupper()
    assert odd.created_at.endswith("+00:00")
    assert (odd.request_counts, odd.usage, odd.error_file_id) == (None, None, "")
    assert asking.end(batch.id).created_at == batch.created_at


@pytest.mark.parametrize("code", ["invalid_request", "token_limit_exceeded", "never_heard_of"])
def test_validation_fails(asking: Asking, code: str) -> None:
    asking.server.misbehave("fail_validation", code=code, line=3, where={"metadata": {"mark": code}})
    assert asking.run().status == "completed"
    batch = asking.end(asking.create(jsonl(asking.lines()), metadata={"mark": code, "more": "x"}).id)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, 3)]


def test_a_readable_file_cannot_be_found(asking: Asking) -> None:
    asking.server.misbehave("cannot_find_file")
    batch = asking.run()
    assert batch.status == "failed"
    assert batch.errors is not None
    assert "or organization" in str(batch.errors.data)
    assert asking.charged() == [0] * 10


def test_a_batch_expires_or_is_cancelled_by_somebody_else(asking: Asking) -> None:
    asking.server.misbehave("expire", fraction=0.2, error_lines=False)
    batch = asking.run()
    assert (batch.status, len(asking.raw(batch.output_file_id)), batch.error_file_id) == ("expired", 2, None)
    asking.server.misbehave("cancelled_by_other", fraction=0.1)
    batch = asking.run()
    assert (batch.status, len(asking.raw(batch.output_file_id))) == ("cancelled", 1)
    asking.server.control(in_progress_seconds=60)
    batch = asking.create(jsonl(asking.lines()))
    asking.server.cancel(batch.id)
    assert asking.end(batch.id).status == "cancelled"


def test_a_misbehaviour_waits_for_its_turn_and_is_recorded(asking: Asking) -> None:
    number = asking.server.misbehave("http_error", after=2, where={"endpoint": "files.*"})
    asking.client.files.list()
    asking.client.files.list()
    with pytest.raises(openai.InternalServerError):
        asking.client.files.list()
    recorded = next(
        misbehaviour for misbehaviour in asking.server.state()["misbehaviours"] if misbehaviour["number"] == number
    )
    assert [strike["endpoint"] for strike in recorded["fired"]] == ["files.list"]
    asking.server.misbehave("http_error", times=None)
    asking.server.calm()
    asking.client.files.list()
    assert text_hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
