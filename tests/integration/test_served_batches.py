"""The Batch API of a gateway: a batch is a job, its results are written from the vectors."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import sqlalchemy as sa

from chunkmill import Client, InvalidInput, NotFound
from chunkmill.errors import StoreLimit
from chunkmill.gateway.batches import keeper as keeper_module
from chunkmill.gateway.batches.keeper import BatchKeeper
from chunkmill.ledger.served.batches import ServedBatch
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.support.gateways import RunningGateway, running_gateway, tokens_of, vector_of
from tests.support.served import (
    MODEL,
    BulkWorker,
    TwoTenants,
    bulk_worker,
    ended,
    jsonl,
    line,
    lines_of,
    openai_client,
    rows,
    start,
    texts,
    upload,
)
from tests.support.waiting import until

DIMENSIONS = 384


@pytest.fixture
def gateway(settings: Settings) -> Iterator[RunningGateway]:
    with running_gateway(settings, keys=TwoTenants()) as running:
        yield running


@pytest.fixture
def worker(db: sa.Engine) -> Iterator[BulkWorker]:
    with bulk_worker(db) as running:
        yield running


@pytest.fixture
def api(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai_client(gateway, "cmk_first") as client:
        yield client


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
    assert [embedding["index"] for embedding in second] == [0, 1, 2]
    for shown, text in zip(second, ["a", "b c", "hello world"], strict=True):
        vector = np.frombuffer(base64.b64decode(shown["embedding"]), "<f4")
        np.testing.assert_array_equal(vector, vector_of(text, "document", DIMENSIONS))
    tokens = sum(tokens_of(text) for text in ("hello world", "a", "b c", "hello world"))
    assert batch.usage.input_tokens == batch.usage.total_tokens == tokens
    assert api.files.content(batch.error_file_id).content == b""
    assert [batch.id for batch in api.batches.list(limit=1)] == [made.id]
    assert {file.id for file in api.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
    assert api.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(file.id)


# --- what is wrong with a file ---------------------------------------------------------------------------------------

WRONG_FILES = {
    "not JSON": ([line("a", "x"), b"{no\n"], "invalid_json_line", 2, None),
    "a byte order mark": ([b"\xef\xbb\xbf" + jsonl(line("a", "x"))], "invalid_json_line", 1, None),
    "not an object": ([b"[1]\n"], "invalid_json_line", 1, None),
    "an empty line between others": ([line("a", "x"), b"\n", line("b", "x")], "invalid_json_line", 2, None),
    "no custom_id": ([{**line("a", "x"), "custom_id": None}], "missing_required_parameter", 1, "custom_id"),
    "an odd custom_id": ([{**line("a", "x"), "custom_id": "a\0b"}], "invalid_custom_id", 1, "custom_id"),
    "a custom_id twice": ([line("a", "x"), line("b", "x"), line("a", "y")], "duplicate_custom_id", 3, "custom_id"),
    "another method": ([{**line("a", "x"), "method": "GET"}], "invalid_method", 1, "method"),
    "another url": ([{**line("a", "x"), "url": "/v1/chat/completions"}], "url_mismatch", 1, "url"),
    "no model": ([line("a", "x", model=None)], "missing_required_parameter", 1, "body.model"),
    "two models": ([line("a", "x"), line("b", "x", model="other")], "model_mismatch", 2, "body.model"),
    "an unknown model": ([line("a", "x", model="nobody/knows")], "model_not_found", 1, "body.model"),
    "nothing": ([b""], "empty_file", None, None),
    "empty lines alone": ([b"\n\n"], "empty_file", None, None),
}


def test_a_file_with_a_wrong_line_fails_its_batch_with_the_code_and_the_line(
    api: openai.OpenAI, worker: BulkWorker, client: Client, db: sa.Engine
) -> None:
    started = {name: start(api, *given[0]).id for name, given in WRONG_FILES.items()}
    told = {}
    for name, batch_id in started.items():
        batch = ended(api, batch_id)
        assert (batch.status, batch.request_counts.total) == ("failed", 0), name
        assert batch.failed_at
        (error,) = batch.errors.data
        told[name] = (error.code, error.line, error.param)
        assert api.files.content(batch.output_file_id).content == b""
        assert api.files.content(batch.error_file_id).content == b""
    assert told == {name: given[1:] for name, given in WRONG_FILES.items()}
    assert (client.jobs(), texts(db), worker.embedded) == ([], set(), [])


def test_a_file_tells_all_of_its_errors_up_to_twenty(api: openai.OpenAI) -> None:
    batch = ended(api, start(api, *([line("a", "x")] + [b"{\n"] * 30)).id)
    assert [error.line for error in batch.errors.data] == list(range(2, 22))


def test_too_many_lines_and_too_many_inputs_fail_the_batch(api: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkmill.gateway.batches.lines.MAX_LINES", 3)
    for given in ([line(str(i), "x") for i in range(4)], [line("a", ["x", "y"]), line("b", ["x", "y"])]):
        batch = ended(api, start(api, *given).id)
        assert (batch.status, batch.errors.data[0].code) == ("failed", "too_many_tasks")


def test_a_bad_request_fails_its_line_alone(api: openai.OpenAI, worker: BulkWorker) -> None:
    worker.dead["kills"] = "kills_workers"
    lines = {
        "good": line("good", "x", user="u", encoding_format=None, dimensions=None),
        "same size": line("same size", "x", dimensions=DIMENSIONS),
        "ids": line("ids", [15339, 1917]),
        "empty": line("empty", ["x", ""]),
        "no input": line("no input", None),
        "NUL": line("NUL", "a\0b"),
        "too many": line("too many", ["x"] * 2049),
        "dimensions": line("dimensions", "x", dimensions=DIMENSIONS + 1),
        "format": line("format", "x", encoding_format="int8"),
        "query": line("query", "x", input_type="query"),
        "deadly": line("deadly", ["x", "kills"]),
    }
    batch = ended(api, start(api, *lines.values()).id)
    assert batch.status == "completed"
    assert batch.request_counts.to_dict() == {"total": 11, "completed": 3, "failed": 8}
    out, errors = lines_of(api, batch.output_file_id), lines_of(api, batch.error_file_id)
    assert (set(out), set(errors)) == ({"good", "same size", "ids"}, set(lines) - {"good", "same size", "ids"})
    np.testing.assert_allclose(
        out["ids"]["response"]["body"]["data"][0]["embedding"],
        vector_of("hello world", "document", DIMENSIONS),
        atol=1e-7,
    )
    told = {
        name: (failure["response"]["status_code"], error["code"], error["param"], error["type"], failure["error"])
        for name, failure in errors.items()
        for error in (failure["response"]["body"]["error"],)
    }
    bad = "invalid_request_error"
    assert told == {
        "empty": (400, "empty_text", "input[1]", bad, None),
        "no input": (400, "invalid_input", "input", bad, None),
        "NUL": (400, "invalid_input", "input", bad, None),
        "too many": (400, "too_many_inputs", "input", bad, None),
        "dimensions": (400, "invalid_dimensions", "dimensions", bad, None),
        "format": (400, "invalid_input", "encoding_format", bad, None),
        "query": (400, "invalid_input", "kind", bad, None),
        "deadly": (500, "kills_workers", "input[1]", "server_error", None),
    }


def test_lines_say_which_texts_were_cut_and_may_refuse_that(api: openai.OpenAI, worker: BulkWorker) -> None:
    long = "word " * 300
    batch = ended(api, start(api, line("cut", ["x", long]), line("refuses", ["x", long], truncate=False)).id)
    body = lines_of(api, batch.output_file_id)["cut"]["response"]["body"]
    assert (body["truncated"], body["usage"]["prompt_tokens"]) == ([1], 3 + 256)
    refused = lines_of(api, batch.error_file_id)["refuses"]["response"]["body"]["error"]
    assert (refused["code"], refused["param"]) == ("context_length_exceeded", "input[1]")


# --- a batch is a job ------------------------------------------------------------------------------------------------


def test_a_batch_is_a_job_in_a_collection_that_nobody_sees(
    api: openai.OpenAI, worker: BulkWorker, client: Client, db: sa.Engine
) -> None:
    client.enqueue([("c1", "shared")], collection="docs")
    until(lambda: client.audit("docs").complete)
    batch = ended(api, start(api, line("a", ["shared", "new", "new"]), line("b", "new")).id)
    assert (batch.status, sorted(worker.embedded)) == ("completed", ["new", "shared"])
    job = client.jobs()[0]
    assert (job.state, job.collection, job.chunks, job.contents, job.cached) == ("completed", batch.id, 4, 2, 1)
    assert [info.name for info in client.collections()] == ["docs"]
    for ask in (
        lambda: client.search("new", collection=batch.id),
        lambda: client.audit(batch.id),
        lambda: client.index(batch.id),
        lambda: client.delete(batch.id, all_chunks=True),
        lambda: client.drop_collection(batch.id),
        lambda: client.set_alias("mine", batch.id),
    ):
        with pytest.raises(NotFound):
            ask()
    with pytest.raises(InvalidInput, match="cannot be named"):
        client.enqueue([("c", "x")], collection=batch.id)
    assert rows(db, "SELECT relname FROM pg_class WHERE relkind = 'v' AND relname LIKE 'batch%'") == []
    with db.begin() as conn:
        changed = conn.execute(sa.text("SELECT refresh_collection_views(500)")).scalar_one()
    assert changed == 0


def test_a_batch_in_progress_counts_what_is_embedded_and_completes_only_with_all_of_it(
    api: openai.OpenAI, worker: BulkWorker, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.may.clear()
    made = start(api, *(line(str(i), f"text {i}") for i in range(5)), line("bad", ""))
    until(lambda: api.batches.retrieve(made.id).status == "in_progress")
    monkeypatch.setattr("chunkmill.ledger.served.batches.COUNT_SECONDS", 0)
    assert api.batches.retrieve(made.id).request_counts.to_dict() == {"total": 6, "completed": 0, "failed": 0}
    # Somebody else embeds two of the texts.
    (space_id,) = rows(db, "SELECT DISTINCT space_id FROM jobs")[0]
    Hands(db).write(space_id, ["text 1", "text 3"])
    assert api.batches.retrieve(made.id).request_counts.completed == 2
    # A ledger that says too much does not complete the batch: the anti-join finds what has no vector.
    rows(db, "UPDATE chunk_batches SET state = 'completed', n_embedded = n_contents, finished_at = now()")
    Hands(db).finish(rows(db, "SELECT id FROM jobs")[0].id)
    assert api.batches.retrieve(made.id).status == "in_progress"
    worker.may.set()
    batch = ended(api, made.id)
    assert batch.request_counts.to_dict() == {"total": 6, "completed": 5, "failed": 1}
    assert len(lines_of(api, batch.output_file_id)) == 5


def test_a_key_stands_for_its_batch(api: openai.OpenAI, gateway: RunningGateway, db: sa.Engine) -> None:
    file = upload(api, line("a", "x"))
    given = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    headers = {"authorization": "Bearer cmk_first", "idempotency-key": "mine"}
    first, again = (gateway.http.post("/v1/batches", json=given, headers=headers) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    other = gateway.http.post("/v1/batches", json={**given, "completion_window": "1h"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert len(rows(db, "SELECT FROM served_batches")) == 1
    assert api.batches.create(**given).id != first.json()["id"]


WRONG_BODIES = (
    ({"endpoint": None}, "missing_required_parameter", "endpoint"),
    ({"endpoint": "/v1/completions"}, "invalid_value", "endpoint"),
    ({"completion_window": "8d"}, "invalid_value", "completion_window"),
    ({"completion_window": "0h"}, "invalid_value", "completion_window"),
    ({"input_file_id": "file-none"}, "file_not_found", "input_file_id"),
    ({"input_file_id": 7}, "invalid_input", "input_file_id"),
    ({"metadata": {"a": 1}}, "invalid_input", "metadata"),
    ({"metadata": {str(i): "v" for i in range(17)}}, "invalid_input", "metadata"),
    (
        {"output_expires_after": {"anchor": "created_at", "seconds": 60}},
        "invalid_value",
        "output_expires_after.seconds",
    ),
    ({"route": "moon"}, "invalid_input", "route"),
)


def test_a_wrong_request_for_a_batch_is_refused_with_its_field(
    api: openai.OpenAI, gateway: RunningGateway, db: sa.Engine
) -> None:
    file = upload(api, line("a", "x"))
    right = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    told = []
    for change, *_ in WRONG_BODIES:
        answer = gateway.http.post("/v1/batches", json=right | change, headers={"authorization": "Bearer cmk_first"})
        error = answer.json()["error"]
        told.append((answer.status_code, error["code"], error["param"]))
    assert told == [(400, code, param) for _, code, param in WRONG_BODIES]
    assert rows(db, "SELECT FROM served_batches") == []


# --- the ends --------------------------------------------------------------------------------------------------------


def some_done(worker: BulkWorker, api: openai.OpenAI, db: sa.Engine) -> str:
    """A batch in progress of ten lines, of which the first three are embedded."""
    worker.may.clear()
    made = start(api, *(line(f"line {i}", f"text {i}") for i in range(10)))
    until(lambda: api.batches.retrieve(made.id).status == "in_progress")
    (space_id,) = rows(db, "SELECT DISTINCT space_id FROM jobs")[0]
    Hands(db).write(space_id, [f"text {i}" for i in range(3)])
    return str(made.id)


def check_partial(api: openai.OpenAI, batch: Any, code: str) -> None:
    assert batch.request_counts.to_dict() == {"total": 10, "completed": 3, "failed": 7}
    assert set(lines_of(api, batch.output_file_id)) == {f"line {i}" for i in range(3)}
    errors = lines_of(api, batch.error_file_id)
    assert {(error["response"], error["error"]["code"]) for error in errors.values()} == {(None, code)}
    assert set(errors) == {f"line {i}" for i in range(3, 10)}


def test_a_cancelled_batch_keeps_what_was_embedded(
    api: openai.OpenAI, worker: BulkWorker, client: Client, db: sa.Engine
) -> None:
    batch_id = some_done(worker, api, db)
    assert api.batches.cancel(batch_id).status in ("cancelling", "cancelled")
    batch = ended(api, batch_id)
    assert (batch.status, batch.cancelled_at >= batch.cancelling_at) == ("cancelled", True)
    check_partial(api, batch, "batch_cancelled")
    assert client.jobs()[0].state == "cancelled"
    with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'cancelled'"):
        api.batches.cancel(batch_id)


def test_a_batch_expires_with_what_was_embedded(
    api: openai.OpenAI, worker: BulkWorker, client: Client, db: sa.Engine
) -> None:
    batch_id = some_done(worker, api, db)
    rows(db, "UPDATE served_batches SET expires_at = now()")
    batch = ended(api, batch_id)
    assert (batch.status, batch.completed_at) == ("expired", None)
    assert batch.expired_at
    check_partial(api, batch, "batch_expired")
    assert client.jobs()[0].state == "cancelled"


def test_a_batch_whose_job_somebody_cancels_is_cancelled(
    api: openai.OpenAI, worker: BulkWorker, client: Client, db: sa.Engine
) -> None:
    batch_id = some_done(worker, api, db)
    client.cancel(client.jobs()[0].id)
    batch = ended(api, batch_id)
    assert batch.status == "cancelled"
    check_partial(api, batch, "batch_cancelled")


def test_a_batch_that_is_cancelled_before_its_job_exists_leaves_nothing(
    api: openai.OpenAI, gateway: RunningGateway, client: Client, db: sa.Engine, settings: Settings
) -> None:
    assert gateway.gateway.batches is not None
    gateway.gateway.batches.stop()
    made = start(api, line("a", "x"))
    assert api.batches.cancel(made.id).status == "cancelling"
    assert gateway.gateway.batches.take_step()
    batch = ended(api, made.id)
    assert (batch.status, batch.request_counts.total) == ("cancelled", 0)
    assert (client.jobs(), texts(db)) == ([], set())


def test_a_batch_that_a_limit_of_postgres_stops_says_so_once_and_goes_on_later(
    api: openai.OpenAI, worker: BulkWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"first": "statement_timeout of this role is too low", "second": "temp_file_limit is too low"}
    tried: Counter[int] = Counter()
    low = True
    own = BatchKeeper._validate

    def validate(keeper: BatchKeeper, batch: ServedBatch) -> None:
        tried[batch.id] += 1
        if low:
            raise StoreLimit(limits[batch.asked.metadata["name"]])
        own(keeper, batch)

    monkeypatch.setattr(BatchKeeper, "_validate", validate)
    monkeypatch.setattr(keeper_module, "PAUSE_SECONDS", 0.01)
    made = {name: start(api, line(name, "x"), metadata={"name": name}).id for name in limits}
    until(lambda: len(tried) == 2 and min(tried.values()) >= 3)
    low = False
    assert {ended(api, batch_id).status for batch_id in made.values()} == {"completed"}

    said = [record.getMessage() for record in caplog.records if "waits" in record.getMessage()]
    assert sorted(said) == sorted(
        f"batch {batch_id} waits, and its step is tried again every 0.01 seconds until it works: {limits[name]}"
        for name, batch_id in made.items()
    )


# --- tenants ---------------------------------------------------------------------------------------------------------


def test_another_tenants_files_and_batches_do_not_exist(
    api: openai.OpenAI, gateway: RunningGateway, worker: BulkWorker
) -> None:
    mine = ended(api, start(api, line("a", "x")).id)
    with openai_client(gateway, "cmk_second") as other:
        theirs = upload(other, line("a", "x"))
        for ask in (
            lambda: other.files.retrieve(mine.input_file_id),
            lambda: other.files.content(mine.output_file_id),
            lambda: other.files.delete(mine.output_file_id),
            lambda: other.batches.retrieve(mine.id),
            lambda: other.batches.cancel(mine.id),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        with pytest.raises(openai.BadRequestError):
            other.batches.create(input_file_id=mine.input_file_id, endpoint="/v1/embeddings", completion_window="24h")
        with pytest.raises(openai.BadRequestError):
            other.files.list(after=mine.input_file_id)
        assert [file.id for file in other.files.list()] == [theirs]
        assert list(other.batches.list()) == []
        failed = ended(other, start(other, line("a", "x")).id)
        assert failed.errors.data[0].code == "model_not_found"
    assert theirs not in {file.id for file in api.files.list()}
    with openai_client(gateway, "cmk_third") as third, pytest.raises(openai.PermissionDeniedError):
        third.files.list()
