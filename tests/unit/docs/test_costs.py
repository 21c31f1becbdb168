"""docs/costs.md: every table follows from the assumptions above it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkmill.domain.prices import OPENAI_PRICES

PAGE = (Path(__file__).parents[3] / "docs/costs.md").read_text()
LAYERS = {"bge-base": (12, 768), "bge-large": (24, 1024)}
SHOWN = 0.006
"""Relative: three digits are shown."""


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in block.splitlines()]
        yield [dict(zip(head, row, strict=True)) for row in rows]


ASSUMED, OWN, OPENAI, STORED = tables(PAGE)
GIVEN = {row["what"]: float(row["value"]) for row in ASSUMED}
TOKENS = GIVEN["tokens in a chunk"]
USEFUL = GIVEN["useful share of paid hours"]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def flop(model: str) -> int:
    layers, width = LAYERS[model]
    return round((24 * layers * width**2 + 4 * layers * width * TOKENS) / 1e6)


@pytest.mark.parametrize("row", OWN, ids=lambda row: f"{row['machine']}, {row['model']}")
def test_own_machines(row: dict[str, str]) -> None:
    machine, tokens_s = row["machine"], number(row["tokens/s"])
    if row["model"] in LAYERS:
        reached = GIVEN[f"{machine}, TFLOP/s"] * 1e12 * GIVEN["share of it that is reached"]
        assert tokens_s == pytest.approx(reached / (flop(row["model"]) * 1e6), rel=SHOWN)
    else:
        assert tokens_s == GIVEN[f"{machine}, tokens/s"]
    a_million = GIVEN[f"{machine}, USD an hour"] / (tokens_s * 3600) * 1e6 / USEFUL
    assert number(row["USD a million tokens"]) == pytest.approx(a_million, rel=SHOWN)
    assert number(row["USD, 1 M chunks"]) == pytest.approx(a_million * TOKENS, rel=SHOWN)
    assert number(row["USD, 100 M chunks"]) == pytest.approx(a_million * 100 * TOKENS, rel=SHOWN)
    hours = 100e6 * TOKENS / tokens_s / 3600 / USEFUL
    assert number(row["machine hours, 100 M chunks"]) == pytest.approx(hours, rel=SHOWN)


@pytest.mark.parametrize("row", OPENAI, ids=lambda row: row["model"])
def test_openai(row: dict[str, str]) -> None:
    price = OPENAI_PRICES[row["model"]][-1]
    plain, batch = float(price.plain), float(price.batch_api)
    assert number(row["USD a million tokens, plain"]) == plain
    assert number(row["USD a million tokens, Batch"]) == batch
    assert number(row["USD, 1 M chunks, Batch"]) == pytest.approx(batch * TOKENS, rel=SHOWN)
    assert number(row["USD, 100 M chunks, Batch"]) == pytest.approx(batch * 100 * TOKENS, rel=SHOWN)
    assert number(row["USD, 100 M chunks, plain"]) == pytest.approx(plain * 100 * TOKENS, rel=SHOWN)


@pytest.mark.parametrize("row", STORED, ids=lambda row: f"{row['type']}({row['dimensions']})")
def test_storage(row: dict[str, str]) -> None:
    per_number = number(row["bytes for a dimension"])
    assert per_number == {"vector": 4, "halfvec": 2}[row["type"]]
    size = (per_number * number(row["dimensions"]) + 8 + 100) * 100e6 / 1e9
    assert number(row["GB, 100 M vectors"]) == pytest.approx(size, rel=SHOWN)


def test_what_the_page_says_in_words() -> None:
    assert f"bge-base (12 layers, 768) {flop('bge-base')} million" in PAGE
    assert f"bge-large (24 layers, 1,024) {flop('bge-large')} million" in PAGE
    own = {(row["machine"], row["model"]): number(row["USD, 100 M chunks"]) for row in OWN}
    batch = {row["model"]: number(row["USD, 100 M chunks, Batch"]) for row in OPENAI}
    assert "less than a thirtieth" in PAGE
    assert own["L4 spot", "bge-base"] * 30 < min(batch.values())
    assert "One million chunks cost $2 " in PAGE
    assert min(number(row["USD, 1 M chunks, Batch"]) for row in OPENAI) == 2
