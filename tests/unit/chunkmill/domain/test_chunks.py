from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.chunks import (
    MAX_ID_BYTES,
    MAX_METADATA_BYTES,
    MAX_TEXT_BYTES,
    Chunk,
    content_hash,
    prepare,
    prepare_or_skip,
)
from chunkmill.errors import InvalidChunk

REFUSED = [
    (Chunk("", "text"), "empty_id"),
    (Chunk(7.5, "text"), "id_not_text"),
    (Chunk(True, "text"), "id_not_text"),
    (Chunk("a\x00b", "text"), "nul_in_id"),
    (Chunk("a\ud800", "text"), "surrogate_in_id"),
    (Chunk("é" * MAX_ID_BYTES, "text"), "id_too_long"),
    (Chunk("a", None), "text_not_text"),
    (Chunk("a", b"bytes"), "text_not_text"),
    (Chunk("a", ""), "empty_text"),
    (Chunk("a", " \n\t"), "empty_text"),
    (Chunk("a", "one\x00two"), "nul_in_text"),
    (Chunk("a", "half a pair: \ud83d"), "surrogate_in_text"),
    (Chunk("a", "text", {"when": object()}), "bad_metadata"),
    (Chunk("a", "text", {"note": "é" * (MAX_METADATA_BYTES // 2)}), "metadata_too_long"),
    (Chunk("a", "text", {"x": object()}), "bad_metadata"),
    (Chunk("a", "text", {"x": "\x00"}), "bad_metadata"),
    (Chunk("a", "text", {"x": "\ud800"}), "bad_metadata"),
    (Chunk("a", "text", ["not", "an", "object"]), "bad_metadata"),
    ({"id": "a"}, "bad_shape"),
    ({"id": "a", "txet": "t"}, "bad_shape"),
    ({"id": None, "text": "t"}, "id_not_text"),
    ({"id": 2**70, "text": "t"}, "id_not_text"),
    ({"id": "a", "text": "t", "when": object()}, "bad_metadata"),
    ("just a text", "bad_shape"),
    (("a", "b", {}, "too many"), "bad_shape"),
]


@pytest.mark.parametrize(("item", "reason"), REFUSED, ids=[f"{reason}-{i}" for i, (_, reason) in enumerate(REFUSED)])
def test_a_bad_chunk_is_named_with_what_to_do(item: object, reason: str) -> None:
    with pytest.raises(InvalidChunk) as caught:
        prepare(item, 41)
    assert caught.value.reason == reason
    assert caught.value.position == 41
    message = str(caught.value)
    assert "position 41" in message
    assert 'on_invalid="skip"' in message
    message.encode()  # whatever was wrong with the id, the message itself can be printed and stored


@pytest.mark.parametrize("letter", ["a", "é", "漢", "🧪"])
def test_the_limits_are_in_bytes_and_what_just_fits_is_taken(letter: str) -> None:
    size = len(letter.encode())
    name, text = letter * (MAX_ID_BYTES // size), letter * (MAX_TEXT_BYTES // size)
    assert prepare((name, text), 0).text == text.encode()
    with pytest.raises(InvalidChunk) as caught:
        prepare((name + letter, text), 0)
    assert caught.value.reason == "id_too_long"
    with pytest.raises(InvalidChunk) as caught:
        prepare((name, text + letter), 0)
    assert caught.value.reason == "text_too_long"


@pytest.mark.parametrize("item", [Chunk("a", "text"), ("a", "text"), ["a", "text"], {"id": "a", "text": "text"}])
def test_every_documented_form_is_the_same_chunk(item: object) -> None:
    assert prepare(item, 0) == prepare(Chunk("a", "text", {}), 0)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1))
def test_any_unicode_text_is_kept_byte_for_byte(text: str) -> None:
    if text.isspace():
        return
    prepared = prepare(("id", text), 0)
    assert prepared.text.decode() == text
    assert prepared.content_hash == content_hash(text) == hashlib.sha256(text.encode()).digest()


def test_skipping_keeps_the_good_and_collects_the_bad() -> None:
    a, b, c, d = prepare_or_skip([("a", "one"), ("", "two"), ("c", "three"), ("d", 4)])
    assert (a, c) == (prepare(("a", "one"), 0), prepare(("c", "three"), 0))
    assert isinstance(b, InvalidChunk)
    assert isinstance(d, InvalidChunk)
    assert [(b.position, b.reason), (d.position, d.reason)] == [(1, "empty_id"), (3, "text_not_text")]
    # Frames of the call would keep the texts in memory as long as the errors are kept.
    assert (b.__traceback__, d.__traceback__) == (None, None)


@pytest.mark.parametrize("value", ["\\u0000", "\\\\u0000", "C:\\u0000folder", "u0000"])
def test_metadata_may_hold_what_only_looks_like_a_nul(value: str) -> None:
    assert json.loads(prepare(("a", "text", {"x": value}), 0).metadata) == {"x": value}


@pytest.mark.parametrize("value", ["\x00", "\\\x00", "\\\\\x00", "u0000\x00"])
def test_metadata_holds_no_nul_whatever_stands_before_it(value: str) -> None:
    with pytest.raises(InvalidChunk) as caught:
        prepare(("a", "text", {"x": value}), 0)
    assert caught.value.reason == "bad_metadata"


def test_no_error_shows_the_text() -> None:
    with pytest.raises(InvalidChunk) as caught:
        prepare(("a", "the secret plan\x00"), 0)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("item", [Chunk(7, "text"), (7, "text"), {"id": 7, "text": "text"}, (7, "text", {})])  # type: ignore[arg-type]
def test_a_whole_number_is_an_id_as_its_text(item: object) -> None:
    assert prepare(item, 0) == prepare(Chunk("7", "text"), 0)
