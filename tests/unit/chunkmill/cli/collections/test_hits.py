"""How the hits of a search, and how they were found, are printed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from chunkmill.cli.collections.search import show_hits, show_plan
from chunkmill.cli.output import Screen
from chunkmill.domain.results import SearchHit, SearchPlan

WHOLE = SearchHit(0.91, "a", "a short text", {}, truncated=False)
CUT = SearchHit(0.52, "b", "a long text", {}, truncated=True)


def test_a_hit_whose_text_was_cut_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    show_hits(Screen(as_json=False), [WHOLE, CUT])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [" 0.910  a", "        a short text", " 0.520  b  (cut)", "        a long text"]
    assert lines[4].startswith("(cut): ")
    show_hits(Screen(as_json=False), [WHOLE])
    assert "cut" not in capsys.readouterr().out


def test_a_hit_of_a_document_says_its_heading_and_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"headings": ["not ours"], "page": 3}
    show_hits(
        Screen(as_json=False),
        [
            SearchHit(0.9, "a#1", "x", {"document": "a", "headings": ["Top", "Stones"], "page": 7}, truncated=False),
            SearchHit(0.8, "b#1", "## y\n\nmore", {"document": "b"}, truncated=False),
            SearchHit(0.7, "c", "z", own, truncated=False),
        ],
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [" 0.900  a#1  Stones, page 7", " 0.800  b#1", " 0.700  c"]
    assert lines[3] == "        ## y more"


def test_the_heading_of_a_hit_is_shortened_to_the_line_of_a_terminal() -> None:
    screen = Screen(as_json=False)
    written = io.StringIO()
    screen.out = Console(width=59, force_terminal=True, file=written, color_system=None)
    long = {"document": "a", "headings": ["The message of an exception that is not ours is left out"], "page": 7}
    show_hits(screen, [SearchHit(0.9, "a-rather-long.md#1", "x", long, truncated=True)])
    assert written.getvalue().splitlines()[0] == " 0.900  a-rather-long.md#1  (cut)  The message of …, page 7"


def test_a_plan_says_what_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    plan = SearchPlan(False, "The collection is large.", candidates=81, segments=3, graphs=1, tail=1200, beam=400)
    show_plan(Screen(as_json=False), plan)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Through the serving index: The collection is large.",
        "81 candidates from 3 segments (1 with a graph) and 1,200 rows of the tail, the graphs with a beam of 400.",
    ]
