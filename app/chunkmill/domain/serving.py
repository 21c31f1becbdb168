"""Which segments a collection's serving index should have. Pure.

A serving index is a log-structured merge tree (O'Neil et al., 1996). New rows are in its tail. A *flush* makes a
small segment of the tail, and a *merge* makes a larger segment of smaller ones, so that there are few segments and each
row is written a few times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MIN_ROWS = 1_000
"""A collection of fewer chunks has no serving index, and a tail of fewer rows is not flushed: an exact search of them
takes a few milliseconds."""
MAX_FLUSH_ROWS = 100_000
"""The most rows of the tail that become one segment, so that a flush takes seconds."""
GRAPH_ROWS = 20_000
"""A segment with at least this many rows gets a graph. Fewer are read from the first to the last in about 20 ms."""
MAX_GRAPH_DIMENSIONS = 4_000
"""The most dimensions of an HNSW index of pgvector on ``halfvec``. Graphs of more dimensions are of bits."""
MIN_BITS = 256
"""The fewest dimensions of a graph of bits."""
MANY_FLAT = 16
"""About how many flat segments of one size are made at most while a merge takes long."""
FANOUT = 4
"""How many segments of about one size are merged into one of the next size."""
STALE_SHARE = 0.2
"""A segment is rewritten once this share of its rows belongs to no chunk any more."""


class SegmentKind(StrEnum):
    FLAT = "flat"
    """Rows without an index, which a search reads from the first to the last."""
    HNSW = "hnsw"
    """Rows with an HNSW graph (Malkov and Yashunin, 2016) on half precision."""
    BITS = "bits"
    """The same on the signs alone, one bit a dimension. A search takes more candidates of it and compares the vectors
    themselves, so that it finds the same in a fifth of the memory."""


class SegmentState(StrEnum):
    BUILDING = "building"
    LIVE = "live"
    """Searches read it."""
    RETIRED = "retired"
    """Only searches that began before may read it."""


class BuilderKind(StrEnum):
    """Who builds a segment. One flush and one merge of a collection may run at the same time."""

    FLUSH = "flush"
    MERGE = "merge"


@dataclass(frozen=True, slots=True)
class Segment:
    """An immutable part of a serving index. Its table is ``segment_<id>``."""

    id: int
    kind: SegmentKind
    rows: int

    @property
    def table_name(self) -> str:
        return f"segment_{self.id}"


def kind_for(rows: int, dimensions: int, *, compact: bool = False) -> SegmentKind:
    """The kind of a segment of so many rows that a merge makes. A flush makes a flat one, because that is quick.

    ``compact`` asks for graphs of bits. Vectors of few dimensions have too few of them to tell neighbours apart, and
    those of many dimensions get no other graph.
    """
    if rows < GRAPH_ROWS:
        return SegmentKind.FLAT
    if dimensions > MAX_GRAPH_DIMENSIONS or (compact and dimensions >= MIN_BITS):
        return SegmentKind.BITS
    return SegmentKind.HNSW


def rows_to_flush(live: Sequence[Segment]) -> int:
    """From how many rows on a tail is flushed: ``MIN_ROWS``, or more while merges do not keep up.

    Each segment costs every search some time, and a merge may take hours. So a flush adds at least a sixteenth to the
    rows of the flat segments, whose number then grows with the logarithm of their rows.
    """
    flat = sum(segment.rows for segment in live if segment.kind is SegmentKind.FLAT)
    return min(MAX_FLUSH_ROWS, max(MIN_ROWS, flat // MANY_FLAT))


def segments_to_merge(live: Sequence[Segment], *, dimensions: int, stale: Sequence[int] = ()) -> list[Segment]:
    """The segments that one merge makes into one; empty if there is nothing to merge.

    These are, in this order: segments that must be rewritten (``stale``, ids), one or more flat segments that are
    together large enough for a graph, and ``FANOUT`` segments of about one size.
    """
    if chosen := [segment for segment in live if segment.id in stale]:
        return chosen
    flat = [segment for segment in live if segment.kind is SegmentKind.FLAT]
    if kind_for(sum(segment.rows for segment in flat), dimensions) is not SegmentKind.FLAT:
        return flat
    sizes: dict[int, list[Segment]] = {}
    for segment in sorted(live, key=lambda segment: segment.rows):
        same = sizes.setdefault(_size_class(segment.rows), [])
        same.append(segment)
    return next((same for _, same in sorted(sizes.items()) if len(same) >= FANOUT), [])


def _size_class(rows: int) -> int:
    """Segments of ``MIN_ROWS`` × ``FANOUT``ⁿ rows or more, and less than the next power, are of class n."""
    size_class, bound = 0, MIN_ROWS * FANOUT
    while rows >= bound:
        size_class, bound = size_class + 1, bound * FANOUT
    return size_class
