"""A comparison is shown as a table, as JSON and as a picture, and none of them shows more than was measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from unittest.mock import MagicMock
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from chunkmill.cli import lacks
from chunkmill.cli.__main__ import cli
from chunkmill.cli.collections.compare import fields, show, show_quote
from chunkmill.cli.collections.compare_picture import BETTER, UNKNOWN, WORSE, picture
from chunkmill.cli.output import Screen
from chunkmill.client import Client
from chunkmill.domain.comparing import Change, Changes, Comparison, ComparisonQuote, Contender, LosingQuery

OLD = Contender(
    "org/<old>", "a" * 64, 384, 100, 0, 50, None, 4.0, 9.5, None, None, 1536, 1536 * 2_000
)  # fmt: skip
NEW = Contender(
    "text-embedding-3-small", "b" * 64, 1536, 0, 100, 9_000, 1234.5, 40.0, 95.0, Decimal("0.02"), Decimal("0.004"),
    6144, 6144 * 2_000,
)  # fmt: skip
CHANGES = Changes(
    200, Change(0.6, 0.65, 0.05, 0.01, 0.09), Change(0.7, 0.6, -0.1, -0.15, -0.05),
    Change(0.9, 0.91, 0.01, -0.01, 0.03), Change(0.5, 0.5, 0.0, 0.0, 0.0), 0.8, 0.75, 0.2, None,
    (LosingQuery("q-7", 1.0, 0.25),),
)  # fmt: skip
TOLD = Comparison(
    "docs",
    1_000,
    2_000,
    False,
    3,
    OLD,
    NEW,
    CHANGES,
    0.04,
    ComparisonQuote("docs", 200, 1_000, 0, 100, Decimal(0), None),
)


def test_the_table_has_the_measures_with_their_bounds_and_both_models(capsys: pytest.CaptureFixture[str]) -> None:
    show(Screen(as_json=False), TOLD)
    shown = re.sub(r" +", " ", capsys.readouterr().out)
    for line in (
        "nDCG@10 0.600 0.650 +0.0500 +0.0100 +0.0900",
        "query alone, p95 ms 9.5 95.0",
        "tokens/s - 1,234",
        "USD per million tokens - 0.02",
        "200 queries in 1,000 of 2,000 texts; 3 were left out.",
        "The new one is better: nDCG@10 changes by +0.0500",
        "q-7 1.000 0.250",
    ):
        assert line in shown


def test_a_quote_says_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    show_quote(Screen(as_json=False), TOLD.quote)
    shown = re.sub(r" +", " ", capsys.readouterr().out)
    assert "old 0 0.00" in shown
    assert "new 100 -" in shown


def test_the_json_can_be_read_by_every_reader_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(CHANGES, queries=1, ndcg=Change(1.0, 0.5, -0.5, -math.inf, math.inf), spread=math.nan)
    Screen(as_json=True).document(fields(replace(TOLD, changes=one, loss_seen=math.inf)))

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert document["changes"]["ndcg"]["low"] is None
    assert document["new"]["usd_per_million"] == "0.02"
    assert document["sentence"].startswith("1 queries bound no difference")


def test_the_picture_is_svg_and_its_colours_say_what_is_sure() -> None:
    drawn = picture(TOLD)
    root = ElementTree.fromstring(drawn)  # noqa: S314 - our own
    colours = [node.get("fill") for node in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert colours == [BETTER, WORSE, UNKNOWN, UNKNOWN]
    assert "text-embedding-3-small against org/&lt;old&gt;" in drawn


def test_a_picture_of_one_query_has_no_bounds_and_is_drawn() -> None:
    one = replace(CHANGES, queries=1, ndcg=Change(1.0, 0.5, -0.5, -math.inf, math.inf))
    assert "inf" not in picture(replace(TOLD, changes=one))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were compared, by a client that needs no server."""
    models: list[str] = []

    def compare(_: str, model: str, *, on_progress: Callable[[int], object], **__: object) -> Comparison:
        models.append(model)
        on_progress(1_000)
        return TOLD

    client = MagicMock(compare=compare)
    monkeypatch.setattr(lacks, "of_models", lambda *_: [])
    monkeypatch.setattr(Client, "from_env", lambda: MagicMock(__enter__=lambda _: client))
    return models


def test_the_picture_is_written_to_a_path_as_short_as_that_of_the_page(
    compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["compare", "docs", "org/new@1", "--picture", "compare.svg"])
    assert done.exit_code == 0, done.output
    assert Path("compare.svg").read_text(encoding="utf-8") == picture(TOLD)
    assert "The picture is in compare.svg." in done.output


def test_a_picture_that_cannot_be_written_is_refused_before_a_worker_is_asked(
    compared: list[str], tmp_path: Path
) -> None:
    done = CliRunner().invoke(cli, ["compare", "docs", "org/new@1", "--picture", str(tmp_path / "no" / "compare.svg")])
    assert done.exit_code == 2
    assert "the folder" in done.output
    assert not compared


def test_no_line_of_the_picture_is_wider_than_the_picture() -> None:
    unsure = replace(CHANGES, queries=40, ndcg=Change(0.754, 0.733, -0.0206, -0.0897, 0.0418), needed=851)
    drawn = ElementTree.fromstring(picture(replace(TOLD, changes=unsure)))  # noqa: S314 - our own text
    words = [text.text or "" for text in drawn.iter()]
    assert max(map(len, words)) <= 100
    assert "851" in " ".join(words)
