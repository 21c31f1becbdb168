"""A large body is read as orjson reads it, or is refused: by how much it holds, or for what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkmill.gateway import large_json
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.large_json import loads_object


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every body counts as large, and is read in many slices and pieces."""
    monkeypatch.setattr(large_json, "_is_simple", lambda body: False)
    monkeypatch.setattr(large_json, "SLICE", 7)
    monkeypatch.setattr(large_json, "PIECE", 16)


def outcome(body: bytes) -> Any:
    """The object, or None if there is none in the body."""
    try:
        return loads_object(body)
    except Refusal as refusal:
        assert refusal.status == 400
        return None


def expected(body: bytes) -> Any:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


WORDS = st.text(alphabet='ab"\\\\/[]{},: é日\n', max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | WORDS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=15,
)


@given(value=st.dictionaries(WORDS, VALUES, max_size=4), escaped=st.booleans(), indent=st.sampled_from([None, 0, 2]))
@settings(max_examples=60)
@pytest.mark.usefixtures("in_small_pieces")
def test_an_object_is_read_whatever_is_in_its_texts(value: dict[str, Any], escaped: bool, indent: int | None) -> None:
    body = json.dumps(value, ensure_ascii=escaped, indent=indent).encode()
    try:
        assert loads_object(body) == value
    except Refusal as refusal:  # an object within it is larger than a piece of it
        assert "an object of more than 16" in refusal.message


@given(
    value=st.dictionaries(WORDS, VALUES, max_size=3),
    place=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from([b"", b",", b"]", b"[", b"}", b"{", b'"', b"\\", b":", b" ", b"x", b"0"]),
)
@settings(max_examples=150)
@pytest.mark.usefixtures("in_small_pieces")
def test_a_body_with_a_wrong_byte_is_never_read_as_something_else(
    value: dict[str, Any], place: float, change: bytes
) -> None:
    body = json.dumps(value).encode()
    at = int(place * len(body))
    wrong = body[:at] + change + body[at + 1 :]
    assert outcome(wrong) in (expected(wrong), None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"[]",
        b"5",
        b'"a"',
        b"{",
        b"}",
        b'{"a"}',
        b'{"a":1,}',
        b'{,"a":1}',
        b'{"a":1}x',
        b'x{"a":1}',
        b'{"a":1}{}',
        b"{1:2}",
        b'{"a":1 2}',
        b'{"a":1:2}',
        b'{"a":[1,2,3,4,5,6,7,8,9,10}',
        b'{"a":[1,2,3,4,5,6,7,8,9,10,]}',
        b'{"a":[,1,2,3,4,5,6,7,8,9,10]}',
        b'{"a":[1,2,3,,4,5,6,7,8,9,10]}',
        b'{"a":[1,2,3,4,5,6,7,8,9] [10]}',
        b'{"a":[1,2,3,4,5,6,7,8,9,10] 5}',
        b'{"a":5 [1,2,3,4,5,6,7,8,9,10]}',
        b'{"a":"unended}',
        b'{"a":"\\"}',
        b'{"a":[}]}',
        b'{"a":"aaaaaaaaaaaaaaaaaaaaaaaaaa" 5}',
    ],
)
@pytest.mark.usefixtures("in_small_pieces")
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        loads_object(body)
    assert refused.value.code == "invalid_json"


def test_long_texts_and_many_ids_are_read() -> None:
    value = {
        "input": ['a, [b] {c} \\ "d" é ' * 10_000, "x" * 1_000_000, *["日本" * 3_000] * 500],
        "ids": [[1] * 1000] * 200,
        "model": "m",
        "none": None,
    }
    for escaped in (True, False):
        body = json.dumps(value, ensure_ascii=escaped).encode()
        assert len(body) > large_json.MAX_VALUE
        assert loads_object(body) == value


MB = 1024 * 1024


@pytest.mark.parametrize(
    ("name", "body", "code"),
    [
        ("numbers", b'{"input":[' + b"1," * (8 * MB) + b"1]}", "too_many_inputs"),
        ("lists", b'{"input":[' + b"[]," * (5 * MB) + b"[]]}", "too_many_inputs"),
        ("texts", b'{"input":[' + b'"a",' * (4 * MB) + b'"a"]}', "too_many_inputs"),
        ("few lists", b'{"input":[' + b"[]," * 20_000 + b"[]]}", "too_many_inputs"),
        ("depth", b'{"input":' + b"[" * (5 * MB), "too_many_inputs"),
        ("blanks", b'{"input":' + b" " * (5 * MB) + b'"a"}', "invalid_input"),
        ("one text", b'{"input":"' + b"a" * (5 * MB) + b'"}', "invalid_input"),
        ("one text in a list", b'{"input":["b","' + b"a" * (5 * MB) + b'"]}', "invalid_input"),
        ("quotes", b'{"input":"' + b'\\"' * (3 * MB) + b'"}', "invalid_input"),
        ("an object", b'{"input":"a","metadata":{"k":"' + b"a" * (5 * MB) + b'"}}', "invalid_input"),
        ("unended", b'{"input":"' + b"a" * (5 * MB), "invalid_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_body_with_too_much_in_it_is_refused_before_it_is_read(
    name: str, body: bytes, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = orjson.loads

    def loads(data: bytes) -> Any:
        assert len(data) < MB, "orjson reads it"
        return read(data)

    monkeypatch.setattr(large_json.orjson, "loads", loads)
    with pytest.raises(Refusal) as refused:
        loads_object(body)
    assert refused.value.code == code
