"""Running heads and page numbers, which stand on most pages of a document and belong to none."""

from __future__ import annotations

import io

import pytest

from chunkmill.chunking import Kind
from chunkmill.chunking.reading import read
from chunkmill.chunking.running_lines import without_running_lines
from tests.support.pdf_files import pdf


def body(number: int) -> list[str]:
    return [f"Page {number} begins with its own words.", f"Of {number} stones.", f"It ends with {number * number}."]


def pages(n: int, head: list[str], foot: list[str]) -> list[str]:
    """Pages from 1 to ``n``. In ``head`` and ``foot``, ``#`` stands for the page's number and four more."""
    return [
        "\n".join([*(line.replace("#", str(i + 4)) for line in head), *body(i),
                   *(line.replace("#", str(i + 4)) for line in foot)])
        for i in range(1, n + 1)
    ]  # fmt: skip


BARE = ["\n".join(body(i)) for i in range(1, 6)]


@pytest.mark.parametrize(
    ("head", "foot", "kept"),
    [
        (["Mill manual"], ["Private"], ("Mill manual\n", "\nPrivate")),
        (["Mill manual", "#"], ["- # -"], ("Mill manual\n", "")),
        (["#/9"], ["Private", "Page # of 9"], ("", "\nPrivate\nPage 5 of 9")),
        ([], ["2024 · #"], ("", "")),
        (["* 2024 *"], ["#"], ("* 2024 *\n", "")),  # the same on all pages, and no page number
    ],
)
def test_what_repeats_on_the_pages_stands_once_and_page_numbers_go(
    head: list[str], foot: list[str], kept: tuple[str, str]
) -> None:
    assert without_running_lines(pages(5, head, foot)) == [kept[0] + BARE[0] + kept[1], *BARE[1:]]


@pytest.mark.parametrize(
    ("head", "foot"),
    [
        (
            ["Exercise #", "Task #"],
            ["Of # pages", "End"],
        ),  # words and a number that counts up may be the title of a page
        (["One", "Two", "The third line"], ["The third line from below", "One", "Two"]),
    ],
)
def test_what_may_belong_to_a_page_stays(head: list[str], foot: list[str]) -> None:
    made = without_running_lines(pages(5, head, foot))
    lines = [line.replace("#", str(4 + i)) for i in (3,) for line in (*head, *foot)]
    outside = {"One", "Two", "End"}
    assert [line for line in made[2].split("\n") if line not in body(3)] == [
        line for line in lines if line not in outside
    ]


def test_no_line_that_stands_once_is_lost() -> None:
    """Not even at the places of the others, and not where numbers differ by more than their pages."""
    made = pages(6, ["Mill manual"], ["#"])
    made[3] = "A chapter begins\n" + "\n".join(body(4)) + "\n1984"
    made.insert(0, "Title")
    made.append("")
    assert without_running_lines(made) == [
        "Title", "Mill manual\n" + BARE[0], *BARE[1:3], made[4], BARE[4], "\n".join(body(6)), "",
    ]  # fmt: skip
    few = pages(2, ["Mill manual"], ["#"])
    assert without_running_lines(few) == few
    mixed = [f"{head}\n{page}" for head, page in zip("abxcdxefx", pages(9, [], []), strict=True)]
    assert without_running_lines(mixed) == mixed


def test_right_and_left_pages_have_heads_of_their_own() -> None:
    made = [f"{'Mill manual' if i % 2 else 'Of stones'}\n{page}" for i, page in enumerate(BARE[:4] + BARE[:3])]
    assert [page.split("\n")[0] for page in without_running_lines(made)[:2]] == ["Of stones", "Mill manual"]
    assert without_running_lines(made)[2:] == [*BARE[2:4], *BARE[:3]]


def test_a_pdf_gives_its_text_without_them() -> None:
    made = pdf([page.split("\n") for page in pages(4, ["Mill manual"], ["#"])])
    document = read(io.BytesIO(made), Kind.PDF, "a.pdf")
    assert document.text == "\n".join(["Mill manual\n" + BARE[0], *BARE[1:4]])
    assert [document.text[at:].split("\n")[0] for at in document.pages[1:]] == [body(i)[0] for i in (2, 3, 4)]
