"""Every odd answer that comes back, line by line: good vectors are kept, and what is wrong is named."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkmill.openai.wire.answers import EmbeddedRequest, SentRequest
from chunkmill.openai.wire.bounds import believed_tokens
from chunkmill.openai.wire.jsonl import TOO_LONG, RefusedRequest, UnreadableLine, decode_line

DIMENSIONS = 4
VECTORS = np.array([[3, 4, 0, 0], [0, 0, 0.5, 0], [1, -1, 1, -1]], np.float32)


def as_base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def data(vectors: NDArray[np.float32] = VECTORS, write: Callable[[Any], Any] = as_base64) -> list[dict[str, Any]]:
    return [{"object": "embedding", "index": n, "embedding": write(vector)} for n, vector in enumerate(vectors)]


def line_of(items: Any, **changes: Any) -> bytes:
    body = {"object": "list", "model": "m-1", "data": items, "usage": {"prompt_tokens": 12, "total_tokens": 12}}
    return answer({"status_code": 200, "request_id": "r", "body": body}, **changes)


def answer(response: Any, **changes: Any) -> bytes:
    return json.dumps({"id": "b", "custom_id": "pb5-2", "response": response, "error": None} | changes).encode()


def decode(
    line: bytes, count: int = 3, *, normalize: bool = False, dimensions: int = DIMENSIONS, tokens: int = 10
) -> Any:
    return decode_line(
        line,
        batch_id=5,
        sent={2: SentRequest(count, tokens)}.get,
        dimensions=dimensions,
        normalize=normalize,
        secrets=("very-secret-token",),
    )


@settings(deadline=None)
@given(count=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), as_floats=st.booleans(), whole_text=st.booleans())
def test_what_was_encoded_is_decoded_in_any_order(count: int, seed: int, as_floats: bool, whole_text: bool) -> None:
    rng = np.random.default_rng(seed)
    vectors = (rng.standard_normal((count, 8)) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
    items = data(vectors, (lambda vector: vector.tolist()) if as_floats else as_base64)
    random.Random(seed).shuffle(items)
    body: Any = {"data": items, "usage": {"prompt_tokens": 3}}
    line = answer({"status_code": 200, "body": json.dumps(body) if whole_text else body})

    plain = decode(line, count, dimensions=8)
    unit = decode(line, count, dimensions=8, normalize=True)

    assert isinstance(plain, EmbeddedRequest)
    assert (plain.request_no, plain.prompt_tokens, plain.problems) == (2, 3, {})
    assert plain.vectors.dtype == unit.vectors.dtype == np.float32
    np.testing.assert_array_equal(plain.vectors, vectors)
    np.testing.assert_allclose(np.linalg.norm(unit.vectors, axis=1), 1, atol=1e-6)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(unit.vectors, vectors / lengths, atol=1e-6)


BAD_VECTORS: list[tuple[str, Any, str]] = [
    ("too few dimensions", as_base64(VECTORS[0][:3]), "has 3 dimensions, the space has 4"),
    ("too many dimensions", [1.0] * 5, "has 5 dimensions, the space has 4"),
    ("not a number", [1.0, float("nan"), 0.0, 0.0], "not finite"),
    ("not finite in base64", as_base64(np.array([1, np.inf, 0, 0], np.float32)), "not finite"),
    ("more than float32 holds", [1e300, 0.0, 0.0, 0.0], "not finite"),
    ("all zero", [0, 0, 0, 0], "is zero"),
    ("damaged base64", as_base64(VECTORS[0])[:-3] + "*==", "not valid base64"),
    ("base64 with a stray character", as_base64(VECTORS[0])[:5] + "*" + as_base64(VECTORS[0])[5:], "not valid base64"),
    ("base64 with Unicode in it", "漢字", "not valid base64"),
    ("half a number", base64.b64encode(b"12345").decode(), "not a whole number of float32"),
    ("texts", ["1", "2", "3", "4"], "not a list of numbers"),
    ("booleans", [True, True, True, True], "not a list of numbers"),
    ("a matrix", [[1.0, 2.0], [3.0, 4.0]], "not a list of numbers"),
    ("ragged", [[1.0], [2.0, 3.0], 4.0, 5.0], "not a list of numbers"),
    ("nulls", [None, 1.0, 1.0, 1.0], "not a list of numbers"),
    ("an enormous integer", [10**400, 1, 1, 1], "not a list of numbers"),
    ("nothing", None, "no vector"),
    ("empty", [], "has 0 dimensions"),
    ("an empty text", "", "has 0 dimensions"),
]


@pytest.mark.parametrize(("bad", "reason"), [case[1:] for case in BAD_VECTORS], ids=[case[0] for case in BAD_VECTORS])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_bad_vector_is_named_and_its_neighbours_are_kept(bad: Any, reason: str, normalize: bool) -> None:
    items = data()
    items[1]["embedding"] = bad

    read = decode(line_of(items), normalize=normalize)

    assert isinstance(read, EmbeddedRequest)
    assert list(read.problems) == [1]
    assert reason in read.problems[1]
    assert not read.vectors[1].any()
    scale = np.linalg.norm(VECTORS, axis=1, keepdims=True) if normalize else 1
    np.testing.assert_allclose(read.vectors[[0, 2]], (VECTORS / scale)[[0, 2]], atol=1e-7)


def test_an_index_that_is_there_twice_or_not_at_all_is_a_problem_of_its_input_alone() -> None:
    items = data()
    twice = decode(line_of([*items, {"index": 0, "embedding": [9, 9, 9, 9]}]))
    missing = decode(line_of(items[:2]))
    strange = decode(
        line_of([*items[:2], *({"index": n, "embedding": [1, 2, 3, 4]} for n in (3, -1, "2", 2.0, True, None))])
    )

    assert list(twice.problems) == [0]
    assert "several vectors" in twice.problems[0]
    assert not twice.vectors[0].any()
    for read in (missing, strange):
        assert read.problems == {2: "the answer has no vector for this input"}
        np.testing.assert_array_equal(read.vectors[:2], VECTORS[:2])


@pytest.mark.parametrize("without", [[0], [1], [2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("null", [False, True])
def test_an_item_without_an_index_is_at_its_place(without: list[int], null: bool) -> None:
    items = data()
    for place in without:
        del items[place]["index"]
        items[place] |= {"index": None} if null else {}

    read = decode(line_of(items))

    assert read.problems == {}
    np.testing.assert_array_equal(read.vectors, VECTORS)


@pytest.mark.parametrize(
    ("indexes", "good"),
    [
        ((1, None, 2), [1, 2]),  # one that is in another place says that there is no order
        ((None, None, 1), [1]),
        ((None, 1, "2"), [1]),
        ((None, 1.0, 2), [2]),
        ((None, 1, 2, 3), [1, 2]),  # one too many
        ((None, 1), [1]),  # one too few
        ((None, None), []),
        ((0, 0, 0), []),
        ((None, True, 2), [2]),
    ],
)
def test_an_item_without_an_index_is_nowhere_if_the_answer_has_no_order(
    indexes: tuple[Any, ...], good: list[int]
) -> None:
    vectors = np.vstack([VECTORS, VECTORS])[: len(indexes)]
    items = [item | {"index": index} for item, index in zip(data(vectors), indexes, strict=True)]

    read = decode(line_of(items))

    assert sorted(set(range(3)) - read.problems.keys()) == good
    assert all("for this input" in problem for problem in read.problems.values())


def test_an_item_that_is_none_leaves_no_order() -> None:
    items: list[Any] = data()
    del items[2]["index"]

    assert sorted(decode(line_of([items[0], "x", items[2]])).problems) == [1, 2]


def test_a_bill_is_believed_within_bounds() -> None:
    def booked(said: object, *, counted: int = 100) -> tuple[int | None, tuple[str, ...]]:
        read = decode(answer({"status_code": 200, "body": {"data": data(), "usage": said}}), tokens=counted)
        return read.prompt_tokens, read.oddities

    for tokens in (0, 100, 1_400):
        assert booked({"prompt_tokens": tokens}) == (tokens, ())
        assert booked({"prompt_tokens": None, "total_tokens": tokens}) == (tokens, ())
    for odd in (-1, 1_401, 10**30, 12.0, "12", True, [12]):
        assert booked({"prompt_tokens": odd, "total_tokens": 100}) == (None, ("usage",))
    assert booked({"prompt_tokens": 5_000}, counted=1_000) == (5_000, ())
    assert believed_tokens({"prompt_tokens": 10_000}, 1_000, 9) == (10_000, False)
    assert believed_tokens({"prompt_tokens": 2_001}, 1_000, 1) == (None, True)
    assert believed_tokens({"prompt_tokens": 100}, 100, 0) == (None, False)


@pytest.mark.parametrize("name", ["", None, 3, ["m"], "\x00", " \u202e "])
def test_a_model_without_a_name_has_none(name: Any) -> None:
    read = decode(answer({"status_code": 200, "body": {"data": data(), "model": name}}))

    assert read.model is None


def test_a_paid_answer_without_a_single_vector_keeps_its_bill() -> None:
    read = decode(line_of([None, 3, "x", {"embedding": []}]))

    assert isinstance(read, EmbeddedRequest)
    assert (sorted(read.problems), read.prompt_tokens, read.model) == ([0, 1, 2], 12, "m-1")


@pytest.mark.parametrize(
    "usage", [None, {}, [], {"prompt_tokens": float("nan")}, {"prompt_tokens": True}, {"total_tokens": -1}]
)
def test_a_missing_or_senseless_bill_is_no_number(usage: Any) -> None:
    read = decode(answer({"status_code": 200, "body": {"data": data(), "usage": usage}}))

    assert isinstance(read, EmbeddedRequest)
    assert read.prompt_tokens is None


REFUSALS: list[tuple[str, bytes, tuple[int | None, str, str]]] = [
    (
        "an HTTP error",
        answer({"status_code": 400, "body": {"error": {"code": "max_tokens_per_request", "message": "Requested 9"}}}),
        (400, "max_tokens_per_request", "Requested 9"),
    ),
    (
        "never executed",
        answer(None, error={"code": "batch_expired", "message": "This request could not be executed"}),
        (None, "batch_expired", "This request could not be executed"),
    ),
    (
        "an error without a code",
        answer({"status_code": 500, "body": {"error": {"type": "server_error", "code": None, "message": "Oops"}}}),
        (500, "server_error", "Oops"),
    ),
    (
        "a body that is JSON as a text",
        answer({"status_code": 429, "body": json.dumps({"error": {"code": "insufficient_quota", "message": "Pay"}})}),
        (429, "insufficient_quota", "Pay"),
    ),
    ("a body that is a text", answer({"status_code": 502, "body": "Bad gateway"}), (502, "http_502", "Bad gateway")),
    ("no body", answer({"status_code": "503", "body": None}), (503, "http_503", "no message")),
    (
        "an error that is the body, its code a number",
        answer(
            {"status_code": 404, "body": {"object": "error", "code": 404, "type": "NotFoundError", "message": "no m"}}
        ),
        (404, "NotFoundError", "no m"),
    ),
    ("an error with vectors", line_of(data()).replace(b"200", b"500"), (500, "http_500", "no message")),
    (
        "a success that says it failed",
        answer({"status_code": 200, "body": {"error": "broken"}}),
        (200, "http_200", "broken"),
    ),
]


@pytest.mark.parametrize(("line", "expected"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_every_shape_of_an_error_is_read(line: bytes, expected: tuple[int | None, str, str]) -> None:
    read = decode(line)

    assert isinstance(read, RefusedRequest)
    assert (read.request_no, read.status, read.code, read.message) == (2, *expected)


UNREADABLE: list[tuple[str, bytes, str, int | None]] = [
    ("cut off", line_of(data())[:100], "not_json", None),
    ("longer than any answer", TOO_LONG, "too_long", None),
    ("not UTF-8", b'{"custom_id": "\xff\xfe"}', "not_json", None),
    ("a list", b"[1, 2]", "not_json", None),
    ("nested without end", b"[" * 100_000, "not_json", None),
    ("endless digits", b'{"a": ' + b"1" * 5_000 + b"}", "not_json", None),
    ("no custom_id", b'{"response": {}}', "no_custom_id", None),
    ("custom_id null", answer(None, custom_id=None), "no_custom_id", None),
    ("somebody else's custom_id", line_of(data(), custom_id="request-1"), "unknown_custom_id", None),
    ("another batch's custom_id", line_of(data(), custom_id="pb6-2"), "unknown_custom_id", None),
    ("a request that was not sent", line_of(data(), custom_id="pb5-3"), "unknown_custom_id", 3),
    ("a custom_id that is no text", line_of(data(), custom_id={"a": 1}), "unknown_custom_id", None),
    ("no answer at all", answer(None), "no_answer", 2),
    ("a success without vectors", answer({"status_code": 200, "body": {"object": "list"}}), "no_answer", 2),
    ("a success whose body is no JSON", answer({"status_code": 200, "body": '{"data": [{"ind'}), "no_answer", 2),
    ("a response that is no object", answer([1]), "no_answer", 2),
]


@pytest.mark.parametrize(
    ("line", "code", "request_no"), [case[1:] for case in UNREADABLE], ids=[case[0] for case in UNREADABLE]
)
def test_a_line_that_answers_nothing_says_why(line: bytes, code: str, request_no: int | None) -> None:
    read = decode(line)

    assert isinstance(read, UnreadableLine)
    assert (read.code, read.request_no) == (code, request_no)
    assert len(read.reason) < 400


ENVELOPE = ["custom_id", "response", "error", "status_code", "body"]
KEYS = [*ENVELOPE, "data", "index", "embedding", "usage", "message", "code"]
LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
ODD_LINES = JSON.map(lambda value: json.dumps({"custom_id": "pb5-2", "response": value, "error": value}).encode())


@settings(deadline=None)
@given(line=st.binary(max_size=200) | ODD_LINES)
def test_nothing_that_is_sent_makes_the_decoder_fail(line: bytes) -> None:
    assert isinstance(decode(line), EmbeddedRequest | RefusedRequest | UnreadableLine)


def test_messages_hold_no_secret_no_text_and_few_characters() -> None:
    text = "It's the caller's private document, which no log may hold."
    message = f"Incorrect API key provided: sk-proj-abc***xyz9, very-secret-token; input was '{text}'. " + "word " * 200

    for line in (
        answer({"status_code": 401, "body": {"error": {"code": "very-secret-token", "message": message}}}),
        answer({"status_code": 400, "body": {"detail": [{"loc": ["input"], "input": text}]}}),
        answer({"status_code": 400, "body": {"message": f"This model's limit, input: \"{text}"}}),
        line_of(data(), custom_id=message),
    ):
        read = decode(line)
        shown = str(read)
        assert "abc" not in shown
        assert "secret" not in shown
        assert "private document" not in shown
        assert len(shown) < 450
        if isinstance(read, RefusedRequest) and read.status == 401:
            assert read.code == "http_401"
            cleaned = "Incorrect API key provided: [redacted], [redacted]; input was '…'. word word"
            assert read.message.startswith(cleaned)
