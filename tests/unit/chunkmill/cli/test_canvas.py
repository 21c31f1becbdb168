"""What is drawn on a terminal is where it belongs, and never wider than the terminal."""

from __future__ import annotations

import pytest

from chunkmill.cli.canvas import Canvas, area, bar, round_up, scatter


def words(lines: list[object]) -> list[str]:
    return [str(line) for line in lines]


def test_each_dot_of_a_letter_is_its_own() -> None:
    seen = set()
    for x in range(2):
        for y in range(4):
            canvas = Canvas(1, 1)
            canvas.dot(x, y, "red")
            canvas.dot(7, 7, "red")  # outside
            seen.add(str(canvas.lines()[0]))
    assert len(seen) == 8
    canvas = Canvas(1, 1)
    canvas.dot(0, 0, "red")
    assert str(canvas.lines()[0]) == "⡀"  # the lowest on the left


def test_a_letter_has_the_colour_of_most_of_its_dots() -> None:
    canvas = Canvas(1, 1)
    for y, colour in enumerate(("blue", "red", "red")):
        canvas.dot(0, y, colour)
    assert canvas.lines()[0].spans[0].style.color.name == "red"  # type: ignore[union-attr]


def test_points_keep_their_distances_and_stand_in_the_middle() -> None:
    lines = words(scatter([(0, 0), (10, 0), (0, 1)], ["red"] * 3, 20, 4))
    assert [len(line) for line in lines] == [20] * 4
    filled = [(row, column) for row, line in enumerate(lines) for column, letter in enumerate(line) if letter != " "]
    assert {column for _, column in filled} == {0, 19}
    assert {row for row, _ in filled} <= {1, 2}
    assert words(scatter([], [], 3, 2)) == ["   ", "   "]
    assert any(line.strip() for line in words(scatter([(5, 5), (5, 5)], ["red"] * 2, 3, 2)))


def test_an_area_is_filled_to_its_value_and_empty_where_nothing_is_known() -> None:
    lines = words(area([None, 4.0, 8.0, 0.01], 8.0, "red", 2, 2))
    assert lines == [" ⡇", "⢸⣇"]
    assert words(area([], 1.0, "red", 2, 1)) == ["  "]
    assert words(area([1.0], 0.0, "red", 2, 1)) == ["  "]


@pytest.mark.parametrize(
    ("share", "drawn"), [(0.0, ""), (1.0, "████"), (0.5, "██"), (1e-9, "▏"), (9.0, "████"), (-1, "")]
)
def test_a_bar_is_as_long_as_its_share(share: float, drawn: str) -> None:
    assert bar(share, 4) == drawn


def test_an_axis_ends_at_a_round_number_that_is_not_below_the_value() -> None:
    assert [round_up(value) for value in (0, 0.007, 1, 107, 2102, 9.9e9)] == [1, 0.008, 1, 150, 2500, 1e10]
