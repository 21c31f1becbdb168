"""How a stream is cut into windows."""

from __future__ import annotations

from chunkmill.client.enqueue import MAX_WINDOW_BYTES, windows
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.errors import InvalidChunk

QUARTER = bytes(MAX_WINDOW_BYTES // 4)


def chunk(n: int, text: bytes = b"text") -> PreparedChunk:
    return PreparedChunk(f"id-{n}", text, "{}", bytes(32))


def test_windows_grow_up_to_the_largest() -> None:
    found = [len(chunks) for chunks, _ in windows((chunk(n) for n in range(100)), 2, 20)]
    assert found == [2, 8, 20, 20, 20, 20, 10]


def test_a_window_holds_a_bounded_number_of_bytes_counted_from_its_own_beginning() -> None:
    found = [len(chunks) for chunks, _ in windows((chunk(n, QUARTER) for n in range(10)), 1000, 1000)]
    assert found == [4, 4, 2]


def test_refused_chunks_count_for_the_size_of_a_window_and_come_with_it() -> None:
    refused = InvalidChunk("no", chunk_id="bad", position=1, reason="empty_text")
    found = [(len(chunks), [each.chunk_id for each in bad]) for chunks, bad in windows([chunk(0), refused], 2, 2)]
    assert found == [(1, ["bad"])]
