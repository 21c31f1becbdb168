"""The texts of a request, and the fields beside them."""

from __future__ import annotations

from typing import Any

import pytest

from chunkmill.gateway import inputs
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.fields import flag_field, given, number_field, text_field, word_field
from chunkmill.gateway.inputs import MAX_TOKENS, cl100k, count_tokens, may_be_many, read_input, read_texts
from chunkmill.gateway.large_json import MAX_VALUE


@pytest.mark.parametrize("text", ["a b", "日本語", "é \n\t", "<|endoftext|>", "x" * 5000])
def test_token_ids_of_cl100k_are_the_text_that_they_were_made_of(text: str) -> None:
    ids = cl100k().encode_ordinary(text)
    assert read_input(ids, "cl100k") == [text]
    assert read_input([ids, ids], "cl100k") == [text, text]


def test_ids_that_were_split_within_a_character_are_read_as_far_as_they_go() -> None:
    ids = cl100k().encode_ordinary("語")
    assert len(ids) > 1
    assert read_input(ids[:1], "cl100k") == ["\ufffd"]


def test_ids_that_stand_for_a_giant_text_are_refused() -> None:
    spaces = cl100k().encode_ordinary(" " * 81)
    with pytest.raises(Refusal) as refused:
        read_input(spaces * (MAX_TOKENS // len(spaces)), "cl100k")
    assert f"{MAX_VALUE:,}" in refused.value.message


def test_an_empty_text_is_a_text() -> None:
    assert read_input("", "cl100k") == [""]
    assert read_input(["", " "], "reject") == ["", " "]
    assert read_texts("", "texts") == [""]


def test_texts_are_counted_only_if_their_lengths_leave_a_doubt() -> None:
    assert not may_be_many(["a" * 100] * 700, 8000)
    assert not may_be_many(["a" * 100_000] * 1000, 256)
    assert may_be_many(["a" * 1000] * 2000, 256)


def test_a_text_counts_as_many_tokens_as_the_model_reads() -> None:
    texts = ["word " * 1000] * 1000
    count_tokens(texts, 256, "input")
    count_tokens(texts[:299], 8000, "input")
    with pytest.raises(Refusal) as refused:
        count_tokens(texts, 512, "input")
    assert (refused.value.code, refused.value.param) == ("max_tokens_per_request", "input")


def test_a_long_text_is_counted_at_its_beginning_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    class Vocabulary:
        def encode_ordinary(self, text: str) -> list[int]:
            counted.append(len(text))
            return [0] * len(text)

    monkeypatch.setattr(inputs, "cl100k", Vocabulary)
    with pytest.raises(Refusal):
        count_tokens(["a" * 1_000_000] * 1000, 301, "input")
    assert set(counted) == {16 * 301}


BODY: dict[str, Any] = {"n": 5, "flag": True, "word": "Query", "text": "a", "null": None, "real": 1.0}


def test_a_null_is_a_field_that_was_not_given() -> None:
    for read in (flag_field, text_field):
        assert read(BODY, "null") is None
        assert read(BODY, "absent") is None
    assert number_field(BODY, "null", least=1, most=5) is None
    assert word_field(BODY, "null", meanings={}) is None
    assert number_field(BODY, "null", "n", least=1, most=5) == 5


def test_words_are_read_in_any_case_and_two_names_must_agree() -> None:
    assert word_field(BODY, "word", meanings={"query": 7}) == 7
    assert given({"a": 1, "b": 1}, "a", "b") == ("a", 1)
    with pytest.raises(Refusal, match="contradicts a"):
        given({"a": 1, "b": 2}, "a", "b")


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda: flag_field(BODY, "n"), "a number"),
        (lambda: flag_field(BODY, "text"), "a string"),
        (lambda: text_field(BODY, "flag"), "a boolean"),
        (lambda: number_field(BODY, "flag", least=0, most=9), "a boolean"),
        (lambda: number_field(BODY, "real", least=0, most=9), "a number"),
        (lambda: number_field(BODY, "n", least=0, most=4), "from 0 to 4"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_its_kind(read: Any, kind: str) -> None:
    with pytest.raises(Refusal, match=kind):
        read()
