"""OpenAI's own client: every shape of input, both encodings, its errors, and the batches of its documentation."""

from __future__ import annotations

import asyncio
import io
import json
import time

import openai
import tiktoken
from cases import ALIAS, KEY, MODEL, QUERY, TEXTS, URL, case, end

api = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)


def ask(**body: object) -> list[list[float]]:
    answer = api.embeddings.create(**{"model": MODEL, "input": TEXTS, **body})
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    assert answer.model == body.get("model", MODEL)
    return [item.embedding for item in answer.data]


async def ask_async() -> list[list[float]]:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as asynchronous:
        answer = await asynchronous.embeddings.create(model=MODEL, input=TEXTS)
    return [item.embedding for item in answer.data]


def embeddings() -> None:
    cl100k = tiktoken.get_encoding("cl100k_base")
    ids = [cl100k.encode(text, disallowed_special=()) for text in TEXTS]
    case("as it asks by default (base64)", ask())
    case("float", ask(encoding_format="float"))
    case("one text", ask(input=TEXTS[0]), TEXTS[:1])
    case("an empty text", ask(input=""), [""])
    case("token ids of one text", ask(input=ids[0]), TEXTS[:1])
    case("lists of token ids", ask(input=ids))
    case("the model's own dimensions", ask(dimensions=384, user="someone"))
    case("an alias", ask(model=ALIAS))
    case("a query", ask(input=[QUERY], extra_body={"input_type": "query"}), [QUERY], "query")
    case("asynchronous", asyncio.run(ask_async()))


def errors() -> None:
    for call, error, code in (
        (lambda: ask(model="no-such-model"), openai.NotFoundError, "model_not_found"),
        (lambda: ask(input=[]), openai.BadRequestError, "empty_input"),
        (lambda: ask(dimensions=383), openai.BadRequestError, "invalid_dimensions"),
        (lambda: api.with_options(api_key="wrong").models.list(), openai.AuthenticationError, "invalid_api_key"),
        (lambda: api.batches.retrieve("batch_none"), openai.NotFoundError, None),
        (lambda: api.files.retrieve("file-none"), openai.NotFoundError, None),
    ):
        try:
            call()
        except error as refused:
            assert code is None or refused.code == code, refused
            assert refused.request_id, refused
        else:
            raise AssertionError(f"no {error.__name__}")


def line(custom_id: str, text: str) -> dict[str, object]:
    body = {"model": MODEL, "input": text}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}


def batches() -> None:
    """Upload, create, poll, download, cancel, list and delete."""
    content = "\n".join(json.dumps(line(f"request-{n}", text)) for n, text in enumerate(TEXTS)).encode()
    file = api.files.create(file=("requests.jsonl", io.BytesIO(content)), purpose="batch")
    assert (file.purpose, file.bytes, file.filename) == ("batch", len(content), "requests.jsonl")
    assert api.files.content(file.id).read() == content
    metadata = {"description": "nightly"}
    batch = api.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata=metadata
    )
    assert (batch.object, batch.metadata, batch.input_file_id) == ("batch", metadata, file.id)
    deadline = time.monotonic() + given_seconds()
    while batch.status not in {"completed", "failed", "expired", "cancelled"}:
        assert time.monotonic() < deadline, batch
        time.sleep(0.2)
        batch = api.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    assert batch.request_counts
    assert (batch.request_counts.total, batch.request_counts.completed) == (len(TEXTS), len(TEXTS)), batch
    assert batch.output_file_id
    answers = {
        answer["custom_id"]: answer["response"]["body"]["data"][0]["embedding"]
        for answer in map(json.loads, api.files.content(batch.output_file_id).iter_lines())
    }
    case("a batch", [answers[f"request-{n}"] for n in range(len(TEXTS))])
    second = api.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    assert {batch.id for batch in api.batches.list(limit=1)} >= {batch.id, second.id}  # it asks for the pages
    if second.status not in {"completed", "finalizing"}:
        try:
            assert api.batches.cancel(second.id).status in {"cancelling", "cancelled"}
        except openai.ConflictError:  # it was faster
            assert api.batches.retrieve(second.id).status in {"completed", "finalizing"}
    assert file.id in {file.id for file in api.files.list(purpose="batch")}
    assert api.files.delete(file.id).deleted
    assert file.id not in {file.id for file in api.files.list()}


def given_seconds() -> float:
    from cases import given

    return float(given["seconds"])


models = {model.id for model in api.models.list()}
assert {MODEL, ALIAS} <= models, models
assert api.models.retrieve(MODEL).id == MODEL
embeddings()
errors()
batches()
end()
