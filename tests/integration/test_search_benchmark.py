"""The benchmark of search, in small: it measures what it says, and its gate lets nothing through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chunkmill.domain import serving
from chunkmill.store import indexing
from chunkmill.store import search as searching
from chunkmill_workers.benchmarks import search
from chunkmill_workers.benchmarks.search import Cell, CellTruth
from chunkmill_workers.benchmarks.topics import Corpus, Kind, World

SIZES = (1, 30, 250)


def run(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Segments from 20 rows on, graphs from 200."""
    monkeypatch.setattr(indexing, "MIN_ROWS", 20)
    monkeypatch.setattr(serving, "MIN_ROWS", 20)
    monkeypatch.setattr(serving, "GRAPH_ROWS", 200)
    monkeypatch.setattr(searching, "MAX_EXACT", 20)
    monkeypatch.setattr(search, "FRESH", 2)
    return search.run(rounds=2, quick=True, say=lambda _: None, sizes=SIZES)


@pytest.mark.slow
def test_a_small_run_measures_all_that_is_promised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from chunkmill_workers.benchmarks import plots  # Matplotlib, whose import takes most of a second

    result = run(monkeypatch)
    rows = {(row["group"], row["name"]): row for row in result["measurements"]}
    for size in SIZES:
        for kind, topics in (("mixed", "own topics"), ("own", "own topics"), ("own", "others' topics")):
            recall = rows[f"{size:,} rows, topics {kind}", f"{topics}, no filter: recall@10"]
            assert (recall["median"], recall["target"], recall["met"]) == (1.0, 0.98, True), recall
            latency = rows[f"{size:,} rows, topics {kind}", f"{topics}, no filter: p95"]
            assert latency["median"] > 0
            assert latency["ratios"]["to the best single plan"]["target"] == 2
            assert len(latency["rounds"]) == 2
            assert {"chunkmill", "exact"} <= latency["plans"].keys()
    assert ("250 rows, topics own", "own topics, 0.5 %: recall@10") in rows
    assert ("250 rows, topics own", "own topics, 0.05 %: recall@10") not in rows
    largest = rows["250 rows, topics own", "own topics, no filter: p95"]
    assert "segment alone" in largest["plans"]
    assert {point["plan"] for point in result["curve"]} == {"graph alone", "chunkmill", "exact"}
    writes = "writes into a collection of 250 rows"
    for what in ("enqueue", "vectors"):
        assert rows[writes, f"{what}, with an index"]["ratios"]["to without an index"]["target"] == 0.5
    fresh = rows[writes, "of 2 new chunks, found in the commit that wrote them"]
    assert (fresh["median"], fresh["met"]) == (2, True)
    of_a_row = "bytes of a row, 250 rows of 384 dimensions"
    assert {name for group, name in rows if group == of_a_row} == {"segment", "graph", "vectors, with their key"}
    assert rows["after deleting a tenth of 250 rows", "longest maintenance, for a million rows"]["seconds"]
    assert rows["build of 250 rows, topics own", "time"]["median"] > 0
    (picture,) = plots.draw(_written(result, tmp_path), tmp_path, "here")
    assert picture.name == "search-here.png"


def _written(result: dict[str, Any], folder: Path) -> Path:
    (folder / "search-here.json").write_text(json.dumps(result))
    return folder


def test_what_fails_the_gate_of_recall_has_no_latency() -> None:
    cell = Cell(Corpus(Kind.OWN, 10, 0, 2), search.OWN, search.NO_FILTER)
    times = {(cell, "chunkmill"): [[1.0, 2.0]], (cell, "exact"): [[3.0, 3.0]]}
    for recalls, passes in (({0: 1.0, 1: 0.97}, True), ({0: 1.0, 1: 0.95}, False)):
        asked = CellTruth(cell.corpus.queries(World(), 2, own=True), recalls=recalls)
        recall, latency = search._rows_of(cell, asked, times)
        assert recall.as_json()["met"] is passes
        assert (latency.as_json()["median"] is not None, bool(latency.ratios)) == (passes, passes)


def test_a_collection_is_made_again_as_it_was_and_has_topics_of_its_own() -> None:
    world = World()
    first, second = (Corpus(Kind.OWN, 5_000, number, 2) for number in (0, 1))
    assert not set(first.topics) & set(second.topics)
    assert set(first.other_topics) == set(second.topics)
    (_, *_), (rows, vectors) = list(first.blocks(world))
    ((again, same),) = first.blocks(World(), rows.start, len(rows))
    assert rows == again
    assert (vectors == same).all()
    assert [chunk.text for chunk in first.chunks(7, 2)] == [first.text(7), first.text(8)]
    near, far = (float((first.queries(world, 50, own=own) @ vectors.T).max(1).mean()) for own in (True, False))
    assert near > far + 0.2
