"""Results print as tables: safe ones in a notebook, whatever the texts hold, and readable ones on a console."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import pickle
import types
import typing
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import chunkmill
from chunkmill import Audit, Client, Job, JobState, Priority, Route, SearchHit
from chunkmill.domain import tables
from chunkmill.domain.maps import CollectionMap
from chunkmill.domain.printed import PrintedResult, Rows
from chunkmill.domain.results import Hits
from chunkmill.domain.retention import Amount

HOSTILE = (
    "</td></table><script>alert(1)</script><img src=x onerror='alert(2)'>\" onload=\"alert(3) \x1b[31m\u202e&amp; 你好"
)
TAGS = {"div", "p", "table", "caption", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {"style", "title", "scope", "dir"}


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever console the tests run on."""
    monkeypatch.setenv("COLUMNS", "120")


class Page(HTMLParser):
    """What a browser makes of a fragment: its tags, its attributes and its cells."""

    def __init__(self, fragment: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[str] = []
        self.said = ""
        self.feed(fragment)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data
        if self.cells and self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    @property
    def titles(self) -> list[str]:
        return [value for name, value in self.attributes if name == "title"]


def hit(number: int, text: str = "a text", **metadata: object) -> SearchHit:
    return SearchHit(1 - number / 10, f"chunk-{number}", text, metadata, False)


def job(number: int, **fields: typing.Any) -> Job:
    return made(Job, **{"id": number, "state": JobState.RUNNING, "collection": f"docs-{number}", **fields})


def made(kind: typing.Any, **fields: typing.Any) -> typing.Any:
    """A result whose texts are all hostile."""
    hints = typing.get_type_hints(kind)
    # What a result holds of its own kind holds no more of it.
    values = {
        f.name: () if kind in typing.get_args(hints[f.name]) else value_of(hints[f.name])
        for f in dataclasses.fields(kind)
    }
    return kind(**values | fields)


def value_of(hint: typing.Any) -> typing.Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return value_of(next(one for one in arguments if one is not type(None)))
    if origin is tuple:
        return (value_of(arguments[0]), value_of(arguments[0]))
    if origin is np.ndarray:
        return np.ones(3, np.float32)
    if origin is Mapping:
        return {HOSTILE: value_of(arguments[1])}
    if dataclasses.is_dataclass(hint):
        return made(hint)
    if issubclass(hint, enum.Enum):
        return next(iter(hint))
    if hint is typing.Any:
        return [HOSTILE]
    simple: dict[type, object] = {
        bool: True, int: 1234567, float: 0.25, Decimal: Decimal("12.5"), str: HOSTILE, Path: Path("x/") / HOSTILE,
        datetime: datetime(2026, 11, 29, 7, 30, tzinfo=UTC), date: date(2026, 11, 29),
    }  # fmt: skip
    return simple[hint]


def results(hints: typing.Iterable[typing.Any]) -> typing.Iterator[type]:
    """The classes of ours in type hints, without the words that are enums."""
    for hint in hints:
        yield from results(typing.get_args(hint))
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield hint


def returned() -> list[type]:
    """The results that the client's methods return, alone or in lists."""
    methods = [member for name, member in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")]
    kinds = {kind for method in methods for kind in results([typing.get_type_hints(method).get("return")])}
    # A map is a picture, and no table.
    return sorted((kinds | {SearchHit}) - {CollectionMap}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", returned(), ids=lambda kind: kind.__name__)
def test_no_text_of_a_result_becomes_markup_and_each_has_a_table(kind: typing.Any) -> None:
    assert issubclass(kind, PrintedResult)
    for result in (made(kind), Rows([made(kind), made(kind)])):
        page = Page(result._repr_html_())
        assert set(page.tags) <= TAGS
        assert {name for name, _ in page.attributes} <= ATTRIBUTES
        assert "\x1b" not in page.said + "".join(page.titles) + str(result)
        assert "\u202e" not in page.said + "".join(page.titles) + str(result)
        assert "table" in page.tags
        assert len(str(result).splitlines()) > 1, "a table and not one line"
        assert "(rows=" not in str(result)
        assert f"{kind.__name__}(" not in str(result)


@pytest.mark.parametrize("kind", returned(), ids=lambda kind: kind.__name__)
def test_a_table_names_no_colour_so_that_dark_and_light_themes_can_show_it(kind: typing.Any) -> None:
    styles = {value for name, value in Page(made(kind)._repr_html_()).attributes if name == "style"}
    for style in styles:
        for declaration in style.rstrip(";").split(";"):
            name, _, value = declaration.partition(":")
            if "color" in name:
                assert value == "inherit"
            assert "#" not in value
            assert "url" not in value
            assert name != "background" or value == "none"


def test_hits_show_the_beginning_of_a_text_and_keep_the_whole_as_the_title() -> None:
    text = "\n".join(f"line {number} of <b>a long text</b>" for number in range(40))
    page = Page(Hits([hit(1, text, lang="en"), hit(2)])._repr_html_())
    cells = page.cells
    assert cells[:5] == ["score", "chunk id", "text", "metadata", "truncated"]
    assert cells[5:7] == ["0.900", "chunk-1"]
    assert cells[7].startswith("line 0 of <b>a long text</b> line 1")
    assert cells[7].endswith("…")
    assert len(cells[7]) == tables.CUT
    assert page.titles == [text]
    assert cells[8:] == ['{"lang": "en"}', "no", "0.800", "chunk-2", "a text", "", "no"]


def test_a_search_of_a_million_hits_does_not_fill_a_notebook() -> None:
    many = Hits([hit(1)] * 2_345)
    page = Page(many._repr_html_())
    assert page.tags.count("tr") == 1 + tables.MAX_ROWS
    assert f"and {2_345 - tables.MAX_ROWS:,} more" in page.said
    assert str(many).splitlines()[-1] == f"and {2_345 - tables.MAX_ROWS:,} more"
    large = Hits([hit(1, "x" * 400_000)] * 10)
    page = Page(large._repr_html_())
    assert page.tags.count("tr") == 1 + 3, "no row is cut, and no more rows are shown than a notebook can hold"
    assert "and 7 more" in page.said
    assert page.titles == ["x" * 400_000] * 3


def test_a_console_shows_hits_in_rows_that_are_no_wider_than_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = Hits([hit(1, "你好 " * 100, lang="en"), hit(2, "short")])
    monkeypatch.setenv("COLUMNS", "150")
    head, first, second = str(hits).splitlines()
    assert head.split() == ["score", "chunk", "id", "text", "metadata", "truncated"]
    assert first.split()[:3] == ["0.900", "chunk-1", "你好"]
    assert "…" in first
    assert second.split() == ["0.800", "chunk-2", "short", "no"]
    # A Chinese character takes two columns.
    monkeypatch.setenv("COLUMNS", "60")
    for line in str(hits).splitlines():
        assert sum(2 if ord(c) > 0x2E80 else 1 for c in line) <= 60


def test_a_job_and_an_audit_print_their_fields_and_the_lists_in_them() -> None:
    dead = chunkmill.DeadChunk("chunk-9", "too_long", "it is too long")
    one = job(7, chunks=1200, contents=1000, cached=100, embedded=400, dead_chunks=(dead,), finished_at=None)
    fields = dict(line.split(maxsplit=1) for line in str(one).splitlines() if len(line.split()) == 2)
    assert fields["id"] == "7"
    assert fields["state"] == "running"
    assert fields["chunks"] == "1,200"
    assert "progress         50 %" in str(one)
    assert "dead chunks\nchunk id  code      reason\nchunk-9   too_long  it is too long" in str(one)
    audit = made(Audit, collection="docs", missing=2, missing_ids=("b", "a"))
    assert "missing ids  b, a\ncomplete     no" in str(audit)
    assert repr(one).startswith("Job(id=7, state='running'"), "a log has one line"


def test_an_id_is_no_amount() -> None:
    assert job(1234567, chunks=1234567)._repr_html_().count("1,234,567") == str(job(1)).count("1,234,567")
    assert "1234567" in Page(Rows([job(1234567)])._repr_html_()).cells


def test_lists_are_lists_in_all_but_their_looks() -> None:
    hits = Hits([hit(1), hit(2), hit(3)])
    assert hits == [hit(1), hit(2), hit(3)]
    assert isinstance(hits, list)
    assert hits[1] == hit(2)
    assert hits[1:] == [hit(2), hit(3)]
    assert repr(hits[1:]) == str(Hits([hit(2), hit(3)]))
    for copied in (pickle.loads(pickle.dumps(hits)), copy.copy(hits), copy.deepcopy(hits)):  # noqa: S301
        assert copied == hits
        assert str(copied) == str(hits)


@pytest.mark.parametrize(
    ("nothing", "said"),
    [(Hits(), "No hits."), (Rows([], Job), "No jobs."), (Hits([hit(1)])[1:], "No hits."), (Rows(), "No rows.")],
    ids=["hits", "jobs", "slice", "rows"],
)
def test_an_empty_list_says_so(nothing: Rows[object], said: str) -> None:
    assert str(nothing) == repr(nothing) == said
    assert nothing._repr_html_() == f"<p>{said}</p>"


class Printer:
    """What IPython hands to ``_repr_pretty_``: it has the objects around the one that is printed."""

    def __init__(self, around: int) -> None:
        self.stack = list(range(around + 1))
        self.said = ""

    def text(self, text: str) -> None:
        self.said += text


def test_ipython_shows_a_table_but_not_among_the_brackets_of_a_list() -> None:
    alone, inside = Printer(0), Printer(1)
    one = job(7)
    one._repr_pretty_(alone, False)
    one._repr_pretty_(inside, False)
    assert alone.said == str(one)
    assert inside.said == repr(one)


@pytest.mark.parametrize("kind", returned(), ids=lambda kind: kind.__name__)
def test_ipython_meets_our_way_of_printing_before_the_repr_of_a_dataclass(kind: type) -> None:
    way = next(vars(base) for base in kind.__mro__ if {"__repr__", "_repr_pretty_"} & vars(base).keys())
    assert "_repr_pretty_" in way


def test_amounts_of_a_prune_are_a_table_and_money_is_in_dollars() -> None:
    pruned = chunkmill.Pruned(True, None, {"jobs": Amount(3, 4096), "vectors": Amount(70_000, 5)}, kept_jobs=2)
    assert Page(pruned._repr_html_()).cells[-9:] == [
        "amounts",
        "rows",
        "bytes",
        "jobs",
        "3",
        "4,096",
        "vectors",
        "70,000",
        "5",
    ]
    cost = chunkmill.Cost("2026-11", Route.OPENAI, 5, 1_000_000, Decimal("0.0203"), None)
    budget = chunkmill.Budget(date(2026, 11, 1), Decimal("0.0203"), Decimal(0), Decimal(50))
    costs = chunkmill.Costs(chunkmill.CostsBy.MONTH, None, (cost,), budget)
    assert str(costs).splitlines()[0].split()[:6] == ["key", "route", "contents", "tokens", "USD", "engine"]
    assert "2026-11" in str(costs)
    assert "0.020" in str(costs)
    assert "limit" in str(costs)


def test_every_priority_and_state_is_shown_as_its_word() -> None:
    assert {"high", "openai-sync"} <= set(
        Page(job(1, priority=Priority.HIGH, route=Route.OPENAI_SYNC)._repr_html_()).cells
    )
