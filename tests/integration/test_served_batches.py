"""The Batch API of a gateway: a batch is a job, its results are written from the vectors."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import sqlalchemy as sa

from chunkmill.settings import Settings
from tests.support.gateways import RunningGateway, running_gateway, tokens_of, vector_of
from tests.support.served import MODEL, BulkWorker, bulk_worker, jsonl, line
from tests.support.waiting import PATIENCE, until

DIMENSIONS = 384


@pytest.fixture
def gateway(settings: Settings) -> Iterator[RunningGateway]:
    with running_gateway(settings) as running:
        yield running


@pytest.fixture
def worker(db: sa.Engine) -> Iterator[BulkWorker]:
    with bulk_worker(db) as running:
        yield running


@pytest.fixture
def api(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0, timeout=PATIENCE) as client:
        yield client


def ended(api: openai.OpenAI, batch_id: str) -> Any:
    final = ("completed", "failed", "expired", "cancelled")
    until(lambda: api.batches.retrieve(batch_id).status in final, pause=0.02)
    return api.batches.retrieve(batch_id)


def lines_of(api: openai.OpenAI, file_id: str) -> dict[str, Any]:
    read = [json.loads(text) for text in api.files.content(file_id).text.splitlines()]
    assert len({each["custom_id"] for each in read}) == len(read)
    return {each["custom_id"]: each for each in read}


def test_the_flow_of_openais_documentation_ends_with_the_vectors_of_the_worker(
    api: openai.OpenAI, worker: BulkWorker
) -> None:
    content = jsonl(
        line("request-1", "hello world"),
        line("request-2", ["a", "b c", "hello world"], encoding_format="base64"),
    )
    file = api.files.create(file=("batchinput.jsonl", io.BytesIO(content)), purpose="batch")
    assert (file.bytes, file.filename, file.purpose, file.status) == (
        len(content), "batchinput.jsonl", "batch", "processed"
    )  # fmt: skip
    made = api.batches.create(
        input_file_id=file.id,
        endpoint="/v1/embeddings",
        completion_window="24h",
        metadata={"description": "nightly"},
    )
    assert made.object == "batch"
    batch = ended(api, made.id)
    assert (batch.status, batch.model, batch.metadata) == ("completed", MODEL, {"description": "nightly"})
    assert batch.request_counts.to_dict() == {"total": 2, "completed": 2, "failed": 0}
    assert batch.errors is None
    assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    out = lines_of(api, batch.output_file_id)
    first = out["request-1"]["response"]
    assert (first["status_code"], out["request-1"]["error"]) == (200, None)
    assert first["body"]["model"] == MODEL
    assert first["body"]["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    expected = vector_of("hello world", "document", DIMENSIONS)
    np.testing.assert_allclose(first["body"]["data"][0]["embedding"], expected, atol=1e-7)
    second = out["request-2"]["response"]["body"]["data"]
    assert [each["index"] for each in second] == [0, 1, 2]
    for each, text in zip(second, ["a", "b c", "hello world"], strict=True):
        vector = np.frombuffer(base64.b64decode(each["embedding"]), "<f4")
        np.testing.assert_array_equal(vector, vector_of(text, "document", DIMENSIONS))
    tokens = sum(tokens_of(text) for text in ("hello world", "a", "b c", "hello world"))
    assert batch.usage.input_tokens == batch.usage.total_tokens == tokens
    assert api.files.content(batch.error_file_id).content == b""
    assert [each.id for each in api.batches.list(limit=1)] == [made.id]
    assert {each.id for each in api.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
    assert api.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(file.id)
