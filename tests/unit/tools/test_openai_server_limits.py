"""What the test server refuses, and how: at once, when it reads the file, or line by line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.openai_server import DEFAULT_MODEL
from tests.openai_server.asking import Asking, jsonl, line
from tests.openai_server.fixtures import asking, client, server

__all__ = ["asking", "client", "server"]


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in line("a", "x").items() if name != key}


WRONG_FILES: dict[str, tuple[bytes, str, int | None]] = {
    "no JSON": (jsonl([line("a", "x")]) + b"{oops\n", "invalid_json_line", 2),
    "a line that is a list": (b"[]\n", "invalid_json_line", 1),
    "an empty line": (jsonl([line("a", "x")]) + b"\n" + jsonl([line("b", "x")]), "invalid_json_line", 2),
    "a byte order mark": (b"\xef\xbb\xbf" + jsonl([line("a", "x")]), "invalid_json_line", 1),
    "NaN": (b'{"custom_id": NaN}\n', "invalid_json_line", 1),
    "one custom_id twice": (jsonl([line("a", "x"), line("a", "y")]), "duplicate_custom_id", 2),
    "a long custom_id": (jsonl([line("a" * 65, "x")]), "invalid_request", 1),
    "a custom_id beyond ASCII": (jsonl([line("ä", "x")]), "invalid_request", 1),
    "another url": (jsonl([{**line("a", "x"), "url": "/v1/completions"}]), "url_mismatch", 1),
    "another method": (jsonl([{**line("a", "x"), "method": "GET"}]), "invalid_request", 1),
    "no method": (jsonl([without("method")]), "invalid_request", 1),
    "an unknown key": (jsonl([{**line("a", "x"), "priority": 1}]), "invalid_request", 1),
    "two models": (jsonl([line("a", "x"), line("b", "x", model="text-embedding-3-large")]), "model_mismatch", 2),
    "an unknown model": (jsonl([line("a", "x", model="gpt-9")]), "model_not_found", 1),
    "too many lines": (jsonl([line(f"t{n}", "x") for n in range(6)]), "too_many_tasks", None),
    "too many inputs": (jsonl([line(f"t{n}", ["x"] * 3) for n in range(3)]), "too_many_tasks", None),
    "nothing": (b"", "empty_file", None),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_wrong_file_fails_its_batch_later(asking: Asking, wrong: str) -> None:
    asking.server.control(max_lines=5, max_inputs_per_batch=8)
    content, code, number = WRONG_FILES[wrong]
    batch = asking.run(content)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert batch.id not in [charge["source"] for charge in asking.server.charges()]


WRONG_BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "an empty text": ({"input": ""}, "empty string"),
    "an empty text among others": ({"input": ["x", ""]}, "empty string"),
    "no text": ({"input": []}, "invalid"),
    "a number": ({"input": [1.5]}, "expected a string"),
    "too many texts": ({"input": ["x"] * 4}, "array too long"),
    "a long text": ({"input": "word " * 80}, "maximum context length is 60 tokens"),
    "long together": ({"input": ["word " * 55] * 2}, "max 100 tokens per request"),
    "unknown tokens": ({"input": [100_000_000]}, "unknown token ids"),
    "no dimensions": ({"dimensions": 0}, "dimensions"),
    "too many dimensions": ({"dimensions": 1537}, "dimensions"),
    "another encoding": ({"encoding_format": "hex"}, "hex"),
    "an unknown argument": ({"truncate": True}, "Unrecognized request argument"),
    "half a character": ({"input": "\ud800"}, "Unicode"),
}


@pytest.mark.parametrize("wrong", WRONG_BODIES)
def test_a_bad_request_in_a_line_is_a_400_in_the_error_file(asking: Asking, wrong: str) -> None:
    asking.server.control(max_inputs_per_request=3, max_tokens_per_input=60, max_tokens_per_request=100)
    body, message = WRONG_BODIES[wrong]
    bad, good = line("bad", "x"), line("good", asking.texts[0])
    bad["body"] |= body
    batch = asking.run(jsonl([good, bad]))
    assert batch.status == "completed"
    failed = asking.results(batch.error_file_id)
    assert list(failed) == ["bad"]
    assert failed["bad"]["response"]["status_code"] == 400
    assert message in failed["bad"]["response"]["body"]["error"]["message"]
    assert list(asking.results(batch.output_file_id)) == ["good"]
    assert asking.charged()[0] == 1

    asking.server.control(request_errors="batch")
    assert asking.run(jsonl([good, bad])).status == "failed"
    raw: Any = {
        "content": json.dumps(bad["body"]).encode(),
        "options": {"headers": {"content-type": "application/json"}},
    }
    with pytest.raises(openai.BadRequestError, match=message):
        asking.client.post("/embeddings", cast_to=object, **raw)
    assert asking.charged()[0] == 1


def test_old_models_have_their_dimensions(asking: Asking) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support specifying dimensions"):
        asking.client.embeddings.create(model="text-embedding-ada-002", input="x", dimensions=8)


UPLOADS: dict[str, tuple[Callable[[openai.OpenAI], object], str]] = {
    "the name": (lambda c: c.files.create(file=("a.json", b"{}"), purpose="batch"), r"Must be \.jsonl"),
    "the size": (lambda c: c.files.create(file=("a.jsonl", b"x" * 101), purpose="batch"), "too large"),
    "the purpose": (lambda c: c.files.create(file=("a.jsonl", b"{}"), purpose="assistants"), "purpose"),
    "the expiry": (
        lambda c: c.files.create(
            file=("a.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 10}
        ),
        "3600 to 2592000",
    ),
}


@pytest.mark.parametrize("wrong", UPLOADS)
def test_a_wrong_upload_is_refused_at_once(asking: Asking, wrong: str) -> None:
    asking.server.control(max_file_bytes=100)
    upload, message = UPLOADS[wrong]
    with pytest.raises(openai.BadRequestError, match=message):
        upload(asking.client)


def test_a_file_says_when_it_expires(asking: Asking) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    file = asking.client.files.create(file=("a.jsonl", b"{}"), purpose="batch", expires_after=expiry)
    assert file.expires_at == file.created_at + 3600
    batch = asking.end(asking.create(jsonl(asking.lines()), output_expires_after=expiry).id)
    assert batch.output_file_id is not None
    output = asking.client.files.retrieve(batch.output_file_id)
    assert output.expires_at == output.created_at + 3600


CREATES: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"input_file_id": None}, "Missing required parameter"),
    "no endpoint": ({"endpoint": None}, "Missing required parameter"),
    "an unknown file": ({"input_file_id": "file-none"}, "Cannot find file file-none"),
    "another endpoint": ({"endpoint": "/v1/chat/completions"}, "This server has '/v1/embeddings'"),
    "another window": ({"completion_window": "12h"}, "completion_window"),
    "much metadata": ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    "a long name": ({"metadata": {"x" * 65: "x"}}, "metadata"),
    "a long value": ({"metadata": {"x": "x" * 513}}, "metadata"),
    "a number as value": ({"metadata": {"x": 1}}, "metadata"),
    "a short expiry": ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "3600 to 2592000"),
    "another anchor": ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "anchor"),
    "an unknown key": ({"priority": "high"}, "Unknown parameter"),
}


@pytest.mark.parametrize("wrong", CREATES)
def test_a_wrong_create_is_refused_at_once(asking: Asking, wrong: str) -> None:
    changes, message = CREATES[wrong]
    file_id = asking.upload(jsonl(asking.lines()))
    body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h", **changes}
    before = asking.server.state()["batches_created"]
    with pytest.raises(openai.BadRequestError, match=message):
        asking.client.post(
            "/batches", cast_to=object, body={name: value for name, value in body.items() if value is not None}
        )
    assert asking.server.state()["batches_created"] == before


def test_a_result_file_is_no_input(asking: Asking) -> None:
    output = asking.run().output_file_id
    assert output is not None
    with pytest.raises(openai.BadRequestError, match="purpose"):
        asking.client.batches.create(input_file_id=output, endpoint="/v1/embeddings", completion_window="24h")


@pytest.mark.parametrize("limit", ["enqueued_tokens", "enqueued_requests"])
def test_what_is_enqueued_has_a_limit_until_a_batch_ends(asking: Asking, limit: str) -> None:
    asking.server.control(in_progress_seconds=60)
    first = asking.create(jsonl(asking.lines()))
    asking.until(first.id, "in_progress")
    state = asking.server.state()
    enqueued = state["enqueued_tokens"][DEFAULT_MODEL]
    assert enqueued == state["batches"][-1]["tokens"] <= state["peak_enqueued_tokens"]
    asking.server.control(**{limit: enqueued * 2 - 1 if limit == "enqueued_tokens" else 19})

    refused = asking.run()
    assert refused.status == "failed"
    assert refused.errors is not None
    assert refused.errors.data is not None
    assert refused.errors.data[0].code == "token_limit_exceeded"
    asking.server.control(enqueued_overflow="create")
    with pytest.raises(openai.RateLimitError, match=r"Enqueued .* limit reached") as error:
        asking.create(jsonl(asking.lines()))
    assert error.value.code == "token_limit_exceeded"

    asking.client.batches.cancel(first.id)
    asking.end(first.id)
    assert asking.server.state()["enqueued_tokens"][DEFAULT_MODEL] == 0
    second = asking.create(jsonl(asking.lines()))
    asking.server.control(in_progress_seconds=0)
    assert asking.end(second.id).status == "completed"


def test_only_so_many_batches_an_hour(asking: Asking) -> None:
    asking.server.control(batches_per_hour=0)
    with pytest.raises(openai.RateLimitError, match="batch creation") as error:
        asking.create(jsonl(asking.lines()))
    assert int(error.value.response.headers["retry-after"]) > 0
