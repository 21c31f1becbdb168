"""Columns of a table are as wide as their words, or the table is none."""

from __future__ import annotations

import random

import pytest

from chunkmill.domain.fitting import GAP, LONGEST_WORD, column_widths


def lines_of(text: str, width: int) -> list[str]:
    """``text`` in lines that are broken between words; a word that is longer than the column stays."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def test_a_table_that_fits_is_as_wide_as_its_cells() -> None:
    assert column_widths([["job", "12"], ["state", "completed"]], 80, len) == [3, 9]


def test_what_is_left_goes_to_the_column_that_needs_it() -> None:
    assert column_widths([["job", "12"], ["why", "a sentence of words " * 9]], 60, len) == [3, 55]


def test_a_date_and_a_share_stay_on_their_line_before_a_sentence_does() -> None:
    widths = column_widths([["began", "11-29 17:04"], ["done", "100 %"], ["why", "one word of many"]], 32, len)
    assert widths is not None
    assert widths[:2] == [11, 5]


def test_columns_that_do_not_fit_are_no_table() -> None:
    assert column_widths([["a" * 30], ["b" * 30]], 60, len) is None
    assert column_widths([["a" * 30], ["b" * 28]], 60, len) == [30, 28]


def test_a_word_that_is_too_long_for_any_column_does_not_prevent_the_table() -> None:
    assert column_widths([["job", "1"], ["path", "x" * 300]], 60, len) == [3, 55]


@pytest.mark.parametrize("screen", [70, 80])
def test_no_word_is_broken_and_no_line_is_too_long(screen: int) -> None:
    source = random.Random(screen)
    tables = 0
    for _ in range(300):
        columns = [
            [" ".join("w" * source.randint(1, LONGEST_WORD) for _ in range(source.randint(1, 6))) for _ in range(3)]
            for _ in range(source.randint(1, 7))
        ]
        widths = column_widths(columns, screen, len)
        if widths is None:
            continue
        tables += 1
        assert sum(widths) + GAP * (len(widths) - 1) <= screen
        for column, width in zip(columns, widths, strict=True):
            assert all(len(line) <= width for text in column for line in lines_of(text, width))
    assert tables > 50
