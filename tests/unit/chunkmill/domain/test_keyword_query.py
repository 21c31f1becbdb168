"""Any text is a keyword query: words, phrases and prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.keyword_query import MAX_CHARACTERS, MAX_PHRASES, KeywordQuery, read


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("two  words", KeywordQuery("two words")),
        ('a "red  fox" runs', KeywordQuery("a runs", ("red fox",))),
        ('"fox" and "fox', KeywordQuery("and fox fox")),
        ("univ* of re*", KeywordQuery("of re", (), ("univ",))),
        ("a*b *c 2*3 **", KeywordQuery("a*b *c 2*3 **")),
        ("don't* état*", KeywordQuery("", (), ("don't", "état"))),
        ('""', KeywordQuery("")),
        ('"a b" "a b"', KeywordQuery("", ("a b",))),
    ],
)
def test_phrases_and_prefixes_are_told_from_words(text: str, query: KeywordQuery) -> None:
    assert read(text) == query


@given(st.text())
def test_every_text_is_read(text: str) -> None:
    query = read(text)
    assert '"' not in query.words
    assert len(query.words) <= len(text)


def test_a_long_query_is_cut() -> None:
    query = read('"a b" ' * 100 + " ".join(f'"a {i}"' for i in range(100)) + "x " * MAX_CHARACTERS)
    assert len(query.words) <= MAX_CHARACTERS
    assert len(query.phrases) == MAX_PHRASES
