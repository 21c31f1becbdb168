"""Few segments, each row written a few times, graphs where they pay."""

from __future__ import annotations

import itertools
import random

import pytest

from chunkmill.domain.serving import (
    GRAPH_ROWS,
    MAX_FLUSH_ROWS,
    MIN_ROWS,
    Segment,
    SegmentKind,
    kind_for,
    rows_to_flush,
    segments_to_merge,
)

FLAT, HNSW = SegmentKind.FLAT, SegmentKind.HNSW


def test_a_graph_is_for_many_rows_of_dimensions_that_pgvector_indexes() -> None:
    assert kind_for(GRAPH_ROWS - 1, 384) is FLAT
    assert kind_for(GRAPH_ROWS, 384) is HNSW
    assert kind_for(GRAPH_ROWS, 4_000) is HNSW
    assert kind_for(GRAPH_ROWS - 1, 4_001) is FLAT
    assert kind_for(GRAPH_ROWS, 4_001) is SegmentKind.BITS


def test_a_compact_graph_is_of_bits_if_there_are_enough_of_them() -> None:
    assert kind_for(GRAPH_ROWS - 1, 384, compact=True) is FLAT
    assert kind_for(GRAPH_ROWS, 255, compact=True) is HNSW
    assert kind_for(GRAPH_ROWS, 256, compact=True) is SegmentKind.BITS


def test_segments_that_must_be_written_anew_come_first_and_alone() -> None:
    live = [Segment(1, HNSW, 50_000), Segment(2, FLAT, 19_000), Segment(3, FLAT, 19_000)]
    assert segments_to_merge(live, dimensions=384, stale=[1]) == live[:1]
    assert segments_to_merge(live, dimensions=384) == live[1:]


def test_flat_segments_wait_until_they_are_worth_a_graph() -> None:
    live = [Segment(1, HNSW, 500_000), Segment(2, FLAT, GRAPH_ROWS // 2), Segment(3, FLAT, GRAPH_ROWS // 2 - 1)]
    assert segments_to_merge(live, dimensions=384) == []
    live.append(Segment(4, FLAT, 1))
    assert segments_to_merge(live, dimensions=384) == live[1:]


def test_a_lone_segment_of_the_first_fill_gets_its_graph() -> None:
    assert segments_to_merge([Segment(1, FLAT, 1_000_000)], dimensions=384) == [Segment(1, FLAT, 1_000_000)]
    assert segments_to_merge([Segment(1, HNSW, 1_000_000)], dimensions=384) == []


@pytest.mark.parametrize("dimensions", [384, 8_000])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_growing_collection_has_few_segments_and_writes_each_row_a_few_times(dimensions: int, seed: int) -> None:
    rng, numbers = random.Random(seed), itertools.count(1)
    live: list[Segment] = []
    total = written = most = 0
    while total < 2_000_000:
        rows = rng.randrange(MIN_ROWS, 5 * MIN_ROWS)
        live.append(Segment(next(numbers), FLAT, rows))
        total += rows
        while old := segments_to_merge(live, dimensions=dimensions):
            merged = sum(segment.rows for segment in old)
            live = [segment for segment in live if segment not in old]
            live.append(Segment(next(numbers), kind_for(merged, dimensions), merged))
            written += merged
        most = max(most, len(live))
    assert sum(segment.rows for segment in live) == total
    assert most <= 20
    assert written <= 7 * total


def test_while_no_merge_ends_a_large_collection_gets_few_segments() -> None:
    """A merge of millions of rows takes hours, and each segment costs every search some time."""
    live: list[Segment] = []
    total = 0
    while total < 5_000_000:
        rows = rows_to_flush(live)
        assert MIN_ROWS <= rows <= MAX_FLUSH_ROWS
        live.append(Segment(len(live), FLAT, rows))
        total += rows
    assert len(live) <= 150


def test_while_merges_keep_up_a_small_tail_is_flushed() -> None:
    live = [Segment(1, HNSW, 1_000_000), *(Segment(i, FLAT, MIN_ROWS) for i in range(2, 17))]
    assert rows_to_flush(live) == rows_to_flush([]) == MIN_ROWS
