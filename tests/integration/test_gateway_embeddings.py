"""The routes that return vectors, as real clients call them, over a real socket. A stand-in answers without torch."""

from __future__ import annotations

import base64
import itertools
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.db.connect import create_db
from chunkmill.domain.vectors import shorten
from chunkmill.embedded import StackStatus
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.embedding import MAX_BODY
from chunkmill.gateway.inputs import MAX_INPUTS, MAX_TOKENS, cl100k
from chunkmill.models import DEFAULT_SPEC
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.conftest import fresh_settings
from tests.support.gateways import (
    KEY,
    RunningGateway,
    StandInWorker,
    running_gateway,
    stand_in_worker,
    tokens_of,
    vector_of,
)
from tests.support.waiting import running, until

MINILM = "all-MiniLM-L6-v2"
LARGE = "mixedbread-ai/mxbai-embed-large-v1@0123abcd"
"""A model whose files are not here, and whose vectors may be cut."""
LARGE_SPEC = replace(DEFAULT_SPEC, model=LARGE, revision="0123abcd", dimensions=1024, max_tokens=512)
RESTRICTED = "cmk_for_one_model"
SIZES = {MINILM: 384, LARGE: 1024, "text-embedding-3-small": 384, "voyage-3": 384, "large": 1024}


class TwoKeys:
    """One key that may use every model, and one that may use ``LARGE`` alone."""

    async def caller(self, key: str) -> Caller | None:
        models = {KEY: None, RESTRICTED: frozenset({LARGE})}
        if key not in models:
            return None
        return Caller(None, key, key, frozenset({Scope.EMBED}), models[key])


@pytest.fixture(scope="module")
def of_module(stack: StackStatus) -> Iterator[Settings]:
    with fresh_settings(stack) as made:
        aliases = {"text-embedding-3-small": MINILM, "voyage-3": MINILM, "m": MINILM, "large": LARGE}
        yield made.model_copy(update={"gateway_model_aliases": aliases})


@pytest.fixture(scope="module")
def store(of_module: Settings) -> Iterator[sa.Engine]:
    engine = create_db(of_module.require_database_url(), role="test")
    with engine.begin() as conn:
        registry.register(conn, LARGE_SPEC)
        registry.register(conn, DEFAULT_SPEC)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def worker(store: sa.Engine) -> Iterator[StandInWorker]:
    with stand_in_worker(store) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(of_module: Settings, worker: StandInWorker) -> Iterator[RunningGateway]:
    with running_gateway(of_module, keys=TwoKeys()) as running:
        yield running


def ids(*texts: str) -> list[list[int]]:
    return [cl100k().encode_ordinary(text) for text in texts]


def expected(texts: Sequence[str], *, kind: str = "document", size: int = 384) -> NDArray[np.float32]:
    return np.stack([vector_of(text, kind, size) for text in texts])


def decoded(text: str) -> list[float]:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").tolist()


def rows_of(path: str, answer: Any) -> NDArray[np.float32]:
    """The vectors of an answer, whatever its form."""
    if isinstance(answer, list):
        rows = answer
    elif "data" in answer:
        assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
        assert {item["object"] for item in answer["data"]} == {"embedding"}
        rows = [item["embedding"] for item in answer["data"]]
    elif "embedding" in answer:
        rows = [answer["embedding"]]
    elif isinstance(answer["embeddings"], dict):
        (rows,) = answer["embeddings"].values()
    else:
        rows = answer["embeddings"]
    return np.array([decoded(row) if isinstance(row, str) else row for row in rows], np.float32)


# Bodies that real packages send, as they were captured: (who, path, body, texts, kind).
OPENAI = "/v1/embeddings"
CAPTURED: list[tuple[str, str, dict[str, Any], list[str], str]] = [
    (
        "openai-python",
        OPENAI,
        {"model": "m", "input": "one text", "encoding_format": "base64"},
        ["one text"],
        "document",
    ),
    (
        "openai-python list",
        OPENAI,
        {"model": "m", "input": ["one", "two"], "encoding_format": "base64"},
        ["one", "two"],
        "document",
    ),
    ("openai-python ids", OPENAI, {"model": "m", "input": [1212, 318]}, [cl100k().decode([1212, 318])], "document"),
    (
        "openai-python lists of ids",
        OPENAI,
        {"model": "m", "input": [[1212], [318, 257]], "encoding_format": "float"},
        [cl100k().decode([1212]), cl100k().decode([318, 257])],
        "document",
    ),
    (
        "openai-python dimensions",
        OPENAI,
        {"model": "m", "input": "a", "dimensions": 384, "user": "u"},
        ["a"],
        "document",
    ),
    ("openai npm", OPENAI, {"model": "m", "input": "a", "encoding_format": "float"}, ["a"], "document"),
    (
        "langchain-openai",
        OPENAI,
        {"input": [[15339, 1917]], "model": MINILM, "encoding_format": "base64"},
        ["hello world"],
        "document",
    ),
    ("langchain-openai, empty text", OPENAI, {"input": ""}, [""], "document"),
    (
        "langchain-openai, texts",
        "/embeddings",
        {"input": ["hello world", "b"], "model": MINILM, "encoding_format": "base64"},
        ["hello world", "b"],
        "document",
    ),
    ("@langchain/openai", OPENAI, {"input": "hello world", "encoding_format": "base64"}, ["hello world"], "document"),
    (
        "llama-index OpenAIEmbedding",
        OPENAI,
        {"input": ["a b", "c"], "model": "text-embedding-3-small", "encoding_format": "base64"},
        ["a b", "c"],
        "document",
    ),
    (
        "llama-index OpenAILike",
        OPENAI,
        {"input": ["a", "a", "a"], "model": "m", "encoding_format": "base64"},
        ["a"] * 3,
        "document",
    ),
    ("llama-index TEI", "/embed", {"inputs": ["a", "b"], "truncate": True}, ["a", "b"], "document"),
    ("huggingface_hub", "/", {"inputs": "hello", "normalize": True, "truncate": True}, ["hello"], "document"),
    ("huggingface_hub list", "/", {"inputs": ["a", "b"]}, ["a", "b"], "document"),
    (
        "huggingface_hub options",
        "/",
        {
            "inputs": "a",
            "prompt_name": "query",
            "truncation_direction": "right",
            "dimensions": 384,
            "encoding_format": "float",
        },
        ["a"],
        "query",
    ),
    ("@huggingface/inference", "/", {"inputs": "hi", "normalize": True}, ["hi"], "document"),
    (
        "haystack-ai",
        OPENAI,
        {"input": ["a\nb", "c"], "model": MINILM, "encoding_format": "float"},
        ["a\nb", "c"],
        "document",
    ),
    ("haystack-ai text", OPENAI, {"input": "a", "model": MINILM, "encoding_format": "float"}, ["a"], "document"),
    ("ai-sdk", OPENAI, {"model": "m", "input": ["sunny"], "encoding_format": "float"}, ["sunny"], "document"),
    ("litellm", OPENAI, {"model": "m", "input": ["a", "b"]}, ["a", "b"], "document"),
    (
        "litellm's proxy",
        OPENAI,
        {"model": "m", "input": ["a"], "metadata": {"k": 1}, "proxy_server_request": {"url": "x"}},
        ["a"],
        "document",
    ),
    ("litellm ollama", "/api/embed", {"model": "m", "input": ["a"]}, ["a"], "document"),
    (
        "ollama's tag",
        "/api/embed",
        {"model": "m:latest", "input": "a", "options": {}, "keep_alive": "5m"},
        ["a"],
        "document",
    ),
    ("ollama before", "/api/embeddings", {"model": "m", "prompt": "a"}, ["a"], "document"),
    (
        "voyageai",
        OPENAI,
        {
            "input": ["a"],
            "model": "voyage-3",
            "input_type": "query",
            "truncation": True,
            "output_dtype": None,
            "output_dimension": None,
            "encoding_format": "base64",
        },
        ["a"],
        "query",
    ),
    (
        "cohere",
        "/v2/embed",
        {
            "texts": ["a", "b"],
            "model": "large",
            "input_type": "search_query",
            "output_dimension": 256,
            "embedding_types": ["float"],
        },
        ["a", "b"],
        "query",
    ),
    (
        "cohere base64",
        "/v2/embed",
        {"inputs": [{"content": [{"type": "text", "text": "a"}]}], "model": "m", "embedding_types": ["base64"]},
        ["a"],
        "document",
    ),
    ("Open WebUI", OPENAI, {"input": ["a"], "model": "m", "prefix": "search:"}, ["a"], "document"),
    ("Dify validates", OPENAI, {"input": "ping", "model": MINILM}, ["ping"], "document"),
    ("AnythingLLM", OPENAI, {"input": ["a"] * 500, "model": "m", "encoding_format": "base64"}, ["a"] * 500, "document"),
    ("pgai", OPENAI, {"input": ["a"] * 2048, "model": "m", "encoding_format": "float"}, ["a"] * 2048, "document"),
    ("the seed, a text", "/embed", {"texts": "Your text here", "normalize": True}, ["Your text here"], "document"),
    (
        "the seed, texts",
        "/embed",
        {"texts": ["First", "Second"], "normalize": True, "batch_size": 32},
        ["First", "Second"],
        "document",
    ),
    (
        "nulls",
        OPENAI,
        {"input": "a", "model": None, "dimensions": None, "user": None, "encoding_format": None},
        ["a"],
        "document",
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "texts", "kind"), [case[1:] for case in CAPTURED], ids=[case[0] for case in CAPTURED]
)
def test_what_real_clients_send_is_answered_with_the_vectors_of_its_texts(
    gateway: RunningGateway, path: str, body: dict[str, Any], texts: list[str], kind: str
) -> None:
    response = gateway.http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    vectors = rows_of(path, answer)
    if body.get("output_dimension"):
        whole = expected(texts, kind=kind, size=SIZES[body["model"]])
        assert np.allclose(vectors, shorten(whole, body["output_dimension"], normalize=True), atol=1e-6)
    else:
        assert np.array_equal(vectors, expected(texts, kind=kind))
    base64_asked = body.get("encoding_format") == "base64"
    if path in (OPENAI, "/embeddings"):
        assert answer["object"] == "list"
        assert answer["model"] == (body.get("model") or MINILM)
        n_tokens = sum(map(tokens_of, texts))
        assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        assert all(isinstance(item["embedding"], str) == base64_asked for item in answer["data"])
    elif "texts" in body and path == "/embed":
        assert {name: answer[name] for name in ("dimension", "model", "count", "truncated")} == {
            "dimension": 384,
            "model": MINILM,
            "count": len(texts),
            "truncated": [],
        }
        assert answer["processing_time_ms"] > 0
    elif path == "/v2/embed":
        assert answer["meta"]["billed_units"]["input_tokens"] == sum(map(tokens_of, texts))
        assert list(answer["embeddings"]) == body["embedding_types"]
    elif path == "/api/embed":
        assert (answer["model"], answer["prompt_eval_count"]) == (body["model"], sum(map(tokens_of, texts)))


# (path, body, status, code, param, a part of the message). Bytes are sent as they are.
A = {"input": "a"}
LONG = "word " * 300
REFUSED: list[tuple[str, object, int, str, str | None, str]] = [
    (OPENAI, b"", 400, "invalid_json", None, "not JSON"),
    (OPENAI, b"{", 400, "invalid_json", None, "not JSON"),
    (OPENAI, b'{"input":"\xff"}', 400, "invalid_json", None, "not JSON"),
    (OPENAI, b'{"input":"\\ud800"}', 400, "invalid_json", None, "not JSON"),
    (OPENAI, b"[" * 10_000, 400, "invalid_json", None, "not JSON"),
    (OPENAI, b"[" * 100_000, 400, "too_many_inputs", None, "more values"),
    (OPENAI, b'{"input":NaN}', 400, "invalid_json", None, "not JSON"),
    (OPENAI, b"[]", 400, "invalid_json", None, "object"),
    (OPENAI, b'"a"', 400, "invalid_json", None, "object"),
    (OPENAI, {}, 400, "invalid_input", "input", "missing"),
    (OPENAI, {"input": None}, 400, "invalid_input", "input", "missing"),
    (OPENAI, {"input": []}, 400, "empty_input", "input", "empty"),
    (OPENAI, {"input": [[]]}, 400, "empty_input", "input", "input[0]"),
    (OPENAI, {"input": 5}, 400, "invalid_input", "input", "list of texts"),
    (OPENAI, {"input": {"a": 1}}, 400, "invalid_input", "input", "list of texts"),
    (OPENAI, {"input": ["a", 5]}, 400, "invalid_input", "input", "input[1]"),
    (OPENAI, {"input": ["a", None]}, 400, "invalid_input", "input", "input[1]"),
    (OPENAI, {"input": [None]}, 400, "invalid_input", "input", "input[0]"),
    (OPENAI, {"input": [5, "secret words"]}, 400, "invalid_token_ids", "input", "input[1]"),
    (OPENAI, {"input": [[5], "secret words"]}, 400, "invalid_input", "input", "input[1]"),
    (OPENAI, {"input": [[5], [6, 1.5]]}, 400, "invalid_token_ids", "input", "input[1][1]"),
    (OPENAI, {"input": [True]}, 400, "invalid_token_ids", "input", "input[0]"),
    (OPENAI, {"input": [5, 100_256]}, 400, "invalid_token_ids", "input", "check_embedding_ctx_length=False"),
    (OPENAI, {"input": [[5], [6, 100_256]]}, 400, "invalid_token_ids", "input", "input[1][1]"),
    (OPENAI, {"input": [[5], [-1]]}, 400, "invalid_token_ids", "input", "input[1][0]"),
    (OPENAI, {"input": [2**63]}, 400, "invalid_token_ids", "input", "input[0]"),
    (OPENAI, {"input": ["a"] * (MAX_INPUTS + 1)}, 400, "too_many_inputs", "input", "2,048"),
    (OPENAI, {"input": [[5]] * (MAX_INPUTS + 1)}, 400, "too_many_inputs", "input", "2,048"),
    (OPENAI, {"input": [5] * (MAX_TOKENS + 1)}, 400, "max_tokens_per_request", "input", "300,000"),
    (OPENAI, {"input": [[5] * 1000] * 301}, 400, "max_tokens_per_request", "input", "300,000"),
    (OPENAI, {"input": [LONG] * 2048}, 400, "max_tokens_per_request", "input", "300,000"),
    (OPENAI, {"input": ["a", "secret\0words"]}, 400, "invalid_input", "input", "input[1]"),
    (OPENAI, A | {"model": "gpt-17"}, 404, "model_not_found", "model", MINILM),
    (OPENAI, A | {"model": "/etc"}, 404, "model_not_found", "model", MINILM),
    (OPENAI, A | {"model": ""}, 400, "invalid_input", "model", "empty"),
    (OPENAI, A | {"model": 5}, 400, "invalid_input", "model", "string"),
    (OPENAI, A | {"dimensions": 100}, 400, "invalid_dimensions", "dimensions", "384"),
    (OPENAI, A | {"dimensions": 385}, 400, "invalid_dimensions", "dimensions", "384"),
    (OPENAI, A | {"dimensions": 0}, 400, "invalid_dimensions", "dimensions", "from 1"),
    (OPENAI, A | {"dimensions": "384"}, 400, "invalid_dimensions", "dimensions", "whole number"),
    (OPENAI, A | {"dimensions": True}, 400, "invalid_dimensions", "dimensions", "whole number"),
    (OPENAI, A | {"dimensions": 10**30}, 400, "invalid_dimensions", "dimensions", "number"),
    (OPENAI, A | {"model": "large", "dimensions": 64}, 400, "invalid_dimensions", "dimensions", "128"),
    (OPENAI, A | {"encoding_format": "int8"}, 400, "invalid_input", "encoding_format", "base64"),
    (OPENAI, A | {"output_dtype": "binary"}, 400, "invalid_input", "output_dtype", "float"),
    (OPENAI, A | {"input_type": "image"}, 400, "invalid_input", "input_type", "query"),
    (OPENAI, A | {"kind": "query", "input_type": "document"}, 400, "invalid_input", "input_type", "contradicts"),
    (OPENAI, A | {"user": 5}, 400, "invalid_input", "user", "string"),
    (OPENAI, A | {"normalize": "yes"}, 400, "invalid_input", "normalize", "true or false"),
    (OPENAI, A | {"truncate": 1}, 400, "invalid_input", "truncate", "true or false"),
    (OPENAI, A | {"timeout_ms": 0}, 400, "invalid_input", "timeout_ms", "from 1"),
    (OPENAI, {"input": ["a", LONG], "truncate": False}, 400, "invalid_input", "input", "input[1]"),
    ("/embed", {"text": "a"}, 400, "invalid_input", "texts", "missing"),
    ("/embed", {"texts": "a", "inputs": "a"}, 400, "invalid_input", "texts", "both"),
    ("/embed", {"texts": []}, 400, "empty_input", "texts", "empty"),
    ("/embed", {"inputs": [[1, 2]]}, 400, "invalid_input", "inputs", "inputs[0]"),
    ("/embed", {"inputs": {"source_sentence": "a"}}, 400, "invalid_input", "inputs", "list of texts"),
    ("/embed", {"inputs": ["a", LONG], "truncate": False}, 400, "invalid_input", "inputs", "inputs[1]"),
    ("/", {"inputs": LONG, "truncation_direction": "Left"}, 400, "invalid_input", "inputs", "ends only"),
    ("/", {"inputs": "a", "prompt_name": "sts"}, 400, "invalid_input", "prompt_name", "query"),
    ("/v2/embed", {"texts": ["a"], "embedding_types": ["int8"]}, 400, "invalid_input", "embedding_types", "float"),
    ("/v2/embed", {"images": ["x"]}, 400, "invalid_input", "images", "texts"),
    ("/v2/embed", {}, 400, "invalid_input", "texts", "missing"),
    ("/v2/embed", {"inputs": [{"content": [{"type": "image_url"}]}]}, 400, "invalid_input", "inputs", "inputs[0]"),
    ("/v2/embed", {"texts": ["a", LONG], "truncate": "NONE"}, 400, "invalid_input", "texts", "texts[1]"),
    ("/api/embed", {"input": [1]}, 400, "invalid_input", "input", "input[0]"),
    ("/api/embeddings", {"prompt": ["a"]}, 400, "invalid_input", "prompt", "string"),
    ("/v1/embeddings/", A, 404, "not_found", None, "path"),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param", "words"),
    REFUSED,
    ids=[f"{path} {str(body)[:50]}" for path, body, *_ in REFUSED],
)
def test_a_body_that_is_wrong_is_refused_with_its_place_and_without_its_text(
    gateway: RunningGateway, path: str, body: object, status: int, code: str, param: str | None, words: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = gateway.http.post(path, content=content)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert words in error["message"]
    assert "secret" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"].startswith("req_")


# --- What the answers say ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    """The client of OpenAI's own package."""
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_official_client_gets_the_same_vectors_in_every_encoding(
    official: openai.OpenAI, how: Mapping[str, Any]
) -> None:
    answer = official.embeddings.create(model="text-embedding-3-small", input=["a", "b c"], **how)
    rows = [decoded(row) if isinstance(row := item.embedding, str) else row for item in answer.data]
    assert np.array_equal(np.array(rows, np.float32), expected(["a", "b c"]))
    assert answer.model == "text-embedding-3-small"
    assert answer.usage.prompt_tokens == tokens_of("a") + tokens_of("b c")


def test_the_official_client_lists_models_and_reads_refusals(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == [
        MINILM, LARGE, "text-embedding-3-small", "voyage-3", "m", "large"
    ]  # fmt: skip
    assert official.models.retrieve(LARGE).to_dict()["fingerprint"] == LARGE_SPEC.fingerprint
    with pytest.raises(openai.NotFoundError) as unknown:
        official.embeddings.create(model="gpt-17", input="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as empty:
        official.embeddings.create(model="m", input=[])
    assert empty.value.code == "empty_input"


def test_a_model_is_described_with_its_space(gateway: RunningGateway) -> None:
    described = gateway.http.get(f"/v1/models/{LARGE}").json()
    assert described["created"] > 1_600_000_000
    assert {name: described[name] for name in ("id", "object", "dimensions", "max_tokens", "fingerprint")} == {
        "id": LARGE,
        "object": "model",
        "dimensions": 1024,
        "max_tokens": 512,
        "fingerprint": LARGE_SPEC.fingerprint,
    }
    alias = gateway.http.get("/v1/models/large").json()
    assert (alias["id"], alias["alias_of"], alias["fingerprint"]) == ("large", LARGE, LARGE_SPEC.fingerprint)
    refused = gateway.http.get("/v1/models/none")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("name", [LARGE, "large", LARGE.partition("@")[0], "large:latest"])
def test_a_model_answers_to_its_names_and_the_one_asked_for_is_echoed(gateway: RunningGateway, name: str) -> None:
    answer = gateway.http.post(OPENAI, json={"input": "a", "model": name}).json()
    assert answer["model"] == name
    assert np.array_equal(rows_of(OPENAI, answer), expected(["a"], size=1024))


def test_a_key_for_one_model_sees_and_uses_no_other(gateway: RunningGateway) -> None:
    with gateway.client(RESTRICTED) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [LARGE, "large"]
        refused = http.post(OPENAI, json={"input": "a", "model": MINILM})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        assert http.post(OPENAI, json={"input": "a"}).status_code == 403
        assert http.get(f"/v1/models/{MINILM}").status_code == 403
        unknown = http.post(OPENAI, json={"input": "a", "model": "gpt-17"})
        assert unknown.status_code == 404
        assert LARGE in unknown.text
        assert MINILM not in unknown.text
        assert http.post(OPENAI, json={"input": "a", "model": "large"}).status_code == 200


def test_a_space_that_was_just_registered_is_served(settings: Settings, db: sa.Engine) -> None:
    ask = {"input": "a", "model": "org/new@1"}
    with running_gateway(settings) as gateway, stand_in_worker(db):
        assert gateway.http.post(OPENAI, json=ask).status_code == 404
        with db.begin() as conn:
            registry.register(conn, replace(LARGE_SPEC, model="org/new@1", dimensions=32))
        until(lambda: gateway.http.post(OPENAI, json=ask).status_code == 200)
        assert "org/new@1" in gateway.http.get("/v1/models").text


def test_a_text_that_is_cut_is_named_and_its_tokens_are_those_that_were_read(gateway: RunningGateway) -> None:
    response = gateway.http.post(OPENAI, json={"input": ["a", LONG, "b", LONG]})
    assert response.headers["x-chunkmill-truncated"] == "2"
    assert response.json()["truncated"] == [1, 3]
    assert response.json()["usage"]["prompt_tokens"] == tokens_of("a") + 256 + tokens_of("b") + 256
    assert gateway.http.post("/embed", json={"texts": ["a", LONG]}).json()["truncated"] == [1]
    whole = gateway.http.post(OPENAI, json={"input": "a"})
    assert "x-chunkmill-truncated" not in whole.headers
    assert "truncated" not in whole.json()


def test_shorter_vectors_are_cut_from_the_space_of_the_model(gateway: RunningGateway, store: sa.Engine) -> None:
    response = gateway.http.post(OPENAI, json={"input": ["a", "b"], "model": LARGE, "dimensions": 256})
    vectors = rows_of(OPENAI, response.json())
    assert np.allclose(vectors, shorten(expected(["a", "b"], size=1024), 256, normalize=True), atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert response.headers["x-chunkmill-fingerprint"] == replace(LARGE_SPEC, dimensions=256).fingerprint
    full = gateway.http.post(OPENAI, json={"input": "a", "model": LARGE, "dimensions": 1024})
    assert full.headers["x-chunkmill-fingerprint"] == LARGE_SPEC.fingerprint
    with store.begin() as conn:
        assert {space.spec.dimensions for space in registry.all_spaces(conn) if space.spec.model == LARGE} == {1024}


def test_token_ids_have_the_vectors_of_their_texts(gateway: RunningGateway, worker: StandInWorker) -> None:
    texts = ["日本語 text é", "plain"]
    answer = gateway.http.post(OPENAI, json={"input": ids(*texts)}).json()
    assert np.array_equal(rows_of(OPENAI, answer), expected(texts))
    single = gateway.http.post(OPENAI, json={"input": ids(texts[0])[0]}).json()
    assert np.array_equal(rows_of(OPENAI, single), expected(texts[:1]))


def test_a_gateway_that_takes_no_token_ids_says_so(of_module: Settings, worker: StandInWorker) -> None:
    with running_gateway(of_module.model_copy(update={"gateway_token_ids": "reject"})) as strict:
        for body in ([1, 2], [[1], [2]]):
            refused = strict.http.post(OPENAI, json={"input": body})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_token_ids")
            assert "check_embedding_ctx_length=False" in refused.text
        assert strict.http.post(OPENAI, json={"input": "a"}).status_code == 200


def test_a_model_of_a_provider_is_not_asked_for_the_vector_of_an_empty_text(settings: Settings, db: sa.Engine) -> None:
    with db.begin() as conn:
        registry.register(conn, replace(LARGE_SPEC, provider="openai", model="text-embedding-3-large", dimensions=3072))
    with running_gateway(settings) as gateway:
        ask = {"input": ["a", " "], "model": "text-embedding-3-large"}
        refused = gateway.http.post(OPENAI, json=ask).json()["error"]
    assert (refused["code"], "input[1]" in refused["message"]) == ("empty_input", True)
    assert requests_in(db) == 0


# --- Bodies that are large, compressed, or too much ---------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_whether_or_not_its_length_is_announced(gateway: RunningGateway) -> None:
    piece = b" " * (1 << 20)
    for content in (piece * (MAX_BODY // len(piece)) + b"x", itertools.repeat(piece, 40)):
        try:
            response = gateway.http.post(OPENAI, content=content)
        except httpx2.WriteError:  # the gateway had answered and closed before all was sent
            continue
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_compressed_body_is_refused(gateway: RunningGateway) -> None:
    response = gateway.http.post(OPENAI, content=b"x", headers={"content-encoding": "gzip"})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_encoding")


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_large_answer_has_all_vectors_in_order(gateway: RunningGateway, encoding: str) -> None:
    texts = [f"{i} {'x' * 100}" for i in range(MAX_INPUTS)]
    response = gateway.http.post(OPENAI, json={"input": texts, "encoding_format": encoding})
    assert response.headers["transfer-encoding"] == "chunked"
    assert np.array_equal(rows_of(OPENAI, response.json()), expected(texts))


# --- When there is no answer --------------------------------------------------------------------------------------


def requests_in(db: sa.Engine) -> int:
    with db.begin() as conn:
        return int(conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one())


def test_what_a_caller_asked_is_withdrawn_when_it_hangs_up(
    gateway: RunningGateway, worker: StandInWorker, store: sa.Engine
) -> None:
    body = json.dumps({"input": "a caller that goes away"})
    head = f"POST {OPENAI} HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
    worker.may.clear()
    other = {"input": ["another caller"]}
    with running(lambda: gateway.http.post(OPENAI, json=other), release=worker.may.set) as (of_another,):
        until(lambda: requests_in(store) == 1)
        with socket.create_connection(gateway.address) as caller:
            caller.sendall(f"{head}{body}".encode())
            until(lambda: requests_in(store) == 2)
        until(lambda: requests_in(store) == 1)
        worker.may.set()
        assert of_another.result().status_code == 200
    assert ("a caller that goes away",) not in worker.asked


def test_a_request_that_gets_no_vectors_in_time_learns_whether_a_worker_lives(
    gateway: RunningGateway, worker: StandInWorker, store: sa.Engine
) -> None:
    ask = {"input": "never seen before", "timeout_ms": 1}
    worker.may.clear()
    worker.report()
    late = gateway.http.post(OPENAI, json=ask)
    worker.is_silent = True

    def without_worker() -> httpx2.Response:
        with store.begin() as conn:
            conn.execute(sa.text("UPDATE worker_reports SET seen_at = now() - interval '1 hour'"))
        return gateway.http.post(OPENAI, json=ask)

    until(lambda: without_worker().status_code == 503)  # its last report may just be on its way
    alone = without_worker()
    worker.is_silent = False
    worker.may.set()
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert (alone.status_code, alone.json()["error"]["code"]) == (503, "no_worker")
    assert int(alone.headers["retry-after"]) >= 1


def test_an_error_of_the_worker_is_told_in_the_form_of_openai(gateway: RunningGateway, worker: StandInWorker) -> None:
    worker.fails = "out of memory"
    try:
        response = gateway.http.post(OPENAI, json={"input": "fails"})
    finally:
        worker.fails = None
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "out of memory" in response.text
