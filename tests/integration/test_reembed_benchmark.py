"""The benchmark of re-embeddings, in small: it measures what it says."""

from __future__ import annotations

import pytest

from chunkmill_workers.benchmarks import reembed


@pytest.mark.slow  # eight processes, each of which imports the package
@pytest.mark.parametrize("million", [False, True])
def test_a_small_run_measures_all_that_is_promised(million: bool) -> None:
    result = reembed.run(quick=True, say=lambda _: None, million=million, rows=1_500, cycles=1)
    assert result["benchmark"] == ("reembed-million" if million else "reembed")
    rows = {(row["group"], row["name"]): row for row in result["measurements"]}
    migration, flips, others = (
        "a migration of 1,500 chunks",
        "flips of 1,500 chunks, while others write and search",
        "others, while 1,500 chunks are flipped",
    )
    assert rows[migration, "from the call to the first ChunkBatch that a worker may take"]["target"] == 10
    twice = rows[migration, "contents embedded twice, after a kill"]
    assert twice["killed_at"] is not None
    assert twice["met"], twice
    assert rows[migration, "poller's peak memory"]["met"]
    for what in ("flip", "rollback"):
        assert rows[flips, f"{what}, the lock is held, at most"]["target"] == 100
        call = rows[flips, f"{what}, the whole call, at most"]
        assert call["tries"][0] >= 1
        assert ("target" in call) == (what == "rollback")
    for words in ("a window of an enqueue waits", "a deletion waits", "a worker's write waits"):
        assert rows[others, f"{words} for a flip, at most"]["locks"] > 0
    assert rows[others, "a search can have waited for a flip, at most"]["searches"] > 0
    assert [turn["what"] for turn in result["turns"]] == ["flip", "rollback"]
    assert {sample["state"] for sample in result["samples"]} & {"filling", "indexing", "judging"}
