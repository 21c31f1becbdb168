"""How a stream is cut into windows."""

from __future__ import annotations

from collections.abc import Iterator

from chunkmill.client.enqueue import MAX_WINDOW_BYTES, windows
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.errors import InvalidChunk

QUARTER = bytes(MAX_WINDOW_BYTES // 4)


def chunk(n: int, text: bytes = b"text") -> PreparedChunk:
    return PreparedChunk(f"id-{n}", text, "{}", bytes(32))


def test_windows_grow_up_to_the_largest() -> None:
    sizes = [len(chunks) for chunks, _ in windows((chunk(n) for n in range(100)), 2, 20)]
    assert sizes == [2, 8, 20, 20, 20, 20, 10]


def test_a_window_holds_a_bounded_number_of_bytes_counted_from_its_own_beginning() -> None:
    sizes = [len(chunks) for chunks, _ in windows((chunk(n, QUARTER) for n in range(10)), 1000, 1000)]
    assert sizes == [4, 4, 2]


def test_metadata_and_ids_count_as_bytes_of_a_window() -> None:
    metadata = "x" * (MAX_WINDOW_BYTES // 4)
    chunks = [PreparedChunk(f"id-{n}", b"text", metadata, bytes(32)) for n in range(10)]
    assert [len(chunks) for chunks, _ in windows(chunks, 1000, 1000)] == [4, 4, 2]


def test_the_window_of_a_slow_source_does_not_wait_until_it_is_full() -> None:
    """The clock is the test's: an item comes every second, and a window begins with its first item."""
    now = [0.0]

    def source() -> Iterator[PreparedChunk | InvalidChunk]:
        for n in range(16):
            yield chunk(n) if n % 2 else InvalidChunk("no", chunk_id="bad", position=n, reason="empty_text")
            now[0] += 1
        now[0] += 3600
        for n in range(16, 22):
            yield chunk(n)

    sizes = [len(chunks) + len(refused) for chunks, refused in windows(source(), 4, 1000, lambda: now[0])]
    # 4 fill the first window. The next two, of up to 16, are closed once they have waited for five seconds.
    assert sizes == [4, 6, 6, 6]


def test_refused_chunks_count_for_the_size_of_a_window_and_come_with_it() -> None:
    refused = InvalidChunk("no", chunk_id="bad", position=1, reason="empty_text")
    pages = [
        (len(chunks), [bad_chunk.chunk_id for bad_chunk in bad]) for chunks, bad in windows([chunk(0), refused], 2, 2)
    ]
    assert pages == [(1, ["bad"])]
