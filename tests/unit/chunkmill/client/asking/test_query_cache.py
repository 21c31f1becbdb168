"""The cache of query vectors: what it may return, how large and how old it gets, and what it takes from a file."""

from __future__ import annotations

import gc
import hashlib
import os
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chunkmill.client.asking import cache as module
from chunkmill.client.asking.cache import ENTRY_BYTES, VectorCache
from chunkmill.client.asking.gathered import DistinctTexts
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.embedded import EmbeddedText
from chunkmill.errors import InvalidInput
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS
from chunkmill.telemetry.metrics import Role

DIMENSIONS = 8
SPACE, OTHER_SPACE = "a1" * 32, "b2" * 32
ENTRY = ENTRY_BYTES + 4 * DIMENSIONS


def a_cache(entries: int = 100, seconds: float = 3600.0, kinds: tuple[str, ...] = ("query",)) -> VectorCache:
    return VectorCache(entries * ENTRY, seconds, kinds)


def embedded(number: int, dimensions: int = DIMENSIONS) -> EmbeddedText:
    return EmbeddedText(np.full(dimensions, number, np.float32), number, number % 2 == 0)


def keep(cache: VectorCache, *numbers: int, space: str = SPACE, kind: str = "query") -> None:
    cache.keep(space, kind, [(content_hash(f"secret {n}"), embedded(n)) for n in numbers])


def read(cache: VectorCache, *numbers: int, space: str = SPACE, kind: str = "query") -> list[int]:
    """The numbers whose vector is known."""
    gathered = DistinctTexts([f"secret {n}" for n in numbers])
    cache.read(space, kind, DIMENSIONS, gathered)
    known = [n for n in numbers if content_hash(f"secret {n}") not in gathered.missing]
    for n, (_, text) in zip(known, gathered.of([content_hash(f"secret {n}") for n in known]), strict=True):
        assert (text.vector.tolist(), text.tokens, text.truncated) == ([float(n)] * DIMENSIONS, n, n % 2 == 0)
    return known


def test_a_vector_is_of_its_space_its_kind_and_its_text() -> None:
    cache = a_cache(kinds=("query", "document"))
    keep(cache, 1, 2)
    keep(cache, 3, space=OTHER_SPACE)
    keep(cache, 4, kind="document")
    assert read(cache, 1, 2, 3, 4, 5) == [1, 2]
    assert read(cache, 1, 2, 3, 4, 5, space=OTHER_SPACE) == [3]
    assert read(cache, 1, 2, 3, 4, 5, kind="document") == [4]


def test_only_the_kinds_that_were_chosen_are_kept() -> None:
    cache = a_cache()
    keep(cache, 1, kind="document")
    assert read(cache, 1, kind="document") == []
    assert cache.statistics().vectors == cache.statistics().misses == 0


def test_what_was_used_least_recently_makes_room() -> None:
    cache = a_cache(entries=3)
    keep(cache, 1, 2, 3)
    assert read(cache, 1) == [1]
    keep(cache, 4)
    assert read(cache, 1, 2, 3, 4) == [1, 3, 4]
    keep(cache, *range(10, 20))
    assert cache.statistics().vectors == 3
    assert cache.statistics().bytes <= cache.statistics().limit == 3 * ENTRY


def test_a_vector_is_not_used_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = a_cache(seconds=100)
    now = time.time()
    keep(cache, 1)
    monkeypatch.setattr(time, "time", lambda: now + 99)
    assert read(cache, 1) == [1], "and reading it does not make it younger"
    monkeypatch.setattr(time, "time", lambda: now + 101)
    assert read(cache, 1) == []
    assert cache.statistics().vectors == cache.statistics().bytes == 0


def test_a_cache_of_no_bytes_is_off() -> None:
    cache = VectorCache(0, 3600.0, ("query",))
    keep(cache, 1)
    assert read(cache, 1) == []
    assert cache.statistics() == type(cache.statistics())(0, 0, 0, 0, 0)


def test_the_stated_bytes_are_those_of_the_memory(tmp_path: Path) -> None:
    """So the bound bounds the process."""
    rows = np.ones((5_000, 384), np.float32)
    hashes = [content_hash(str(n)) for n in range(len(rows))]
    cache = VectorCache(10**9, 3600.0, ("query",))
    gc.collect()
    tracemalloc.start()
    cache.keep(
        SPACE,
        "query",
        ((bytes(bytearray(h)), EmbeddedText(row, 1, False)) for h, row in zip(hashes, rows, strict=True)),
    )
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken <= cache.statistics().bytes <= 1.3 * taken


def test_a_row_of_a_large_answer_does_not_keep_the_answer_in_memory() -> None:
    cache = a_cache()
    answer = np.ones((1_000, DIMENSIONS), np.float32)
    cache.keep(SPACE, "query", [(content_hash("secret 1"), EmbeddedText(answer[1], 1, False))])
    answer[1] = 5
    assert read(cache, 1) == [1]


def test_hits_misses_and_bytes_are_counted() -> None:
    before = [COUNTS.total(metric) for metric in (m.QUERY_CACHE_HITS, m.QUERY_CACHE_MISSES, m.QUERY_CACHE_BYTES)]

    def counted() -> list[float]:
        now = [COUNTS.total(metric) for metric in (m.QUERY_CACHE_HITS, m.QUERY_CACHE_MISSES, m.QUERY_CACHE_BYTES)]
        return [after - b for after, b in zip(now, before, strict=True)]

    cache, second = a_cache(entries=2), a_cache()
    keep(cache, 1, 2, 3)
    keep(second, 1)
    assert (read(cache, 2, 3, 4), read(second, 2)) == ([2, 3], [])
    assert counted() == [2, 2, 3 * ENTRY]
    assert (cache.statistics().hits, cache.statistics().misses, second.statistics().misses) == (2, 1, 1)
    cache.clear()
    assert counted() == [2, 2, ENTRY]
    del second
    gc.collect()
    assert counted() == [2, 2, 0]
    assert COUNTS.series(m.QUERY_CACHE_HITS, frozenset({Role.GATEWAY}))


def test_a_saved_cache_is_loaded_with_the_age_and_the_order_of_its_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, file = a_cache(kinds=("query", "document")), tmp_path / "queries"
    now = time.time()
    keep(cache, 1, 2)
    monkeypatch.setattr(time, "time", lambda: now + 3000)
    keep(cache, 3, space=OTHER_SPACE)
    keep(cache, 4, kind="document")
    assert read(cache, 1) == [1]
    assert cache.save(file) == 4
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"secret" not in file.read_bytes()
    assert list(tmp_path.iterdir()) == [file]
    small = a_cache(entries=2, kinds=("query", "document"))
    assert small.load(file) == 2
    assert (read(small, 1, 2), read(small, 4, kind="document")) == ([1], [4])
    loaded = a_cache(kinds=("query", "document"))
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert loaded.load(file) == 2, "two have become too old"
    assert (read(loaded, 1, 2), read(loaded, 3, space=OTHER_SPACE)) == ([], [3])


def test_a_cache_that_is_off_loads_nothing(tmp_path: Path) -> None:
    cache = a_cache()
    keep(cache, 1)
    cache.save(tmp_path / "queries")
    assert VectorCache(0, 3600.0, ("query",)).load(tmp_path / "queries") == 0
    only_queries = a_cache()
    documents = a_cache(kinds=("document",))
    keep(documents, 2, kind="document")
    documents.save(tmp_path / "documents")
    assert only_queries.load(tmp_path / "documents") == 0


HEAD, RECORD = module._HEAD.size, module._RECORD.size


def sealed(content: bytes) -> bytes:
    """With the digest that fits, as somebody would make it who means harm."""
    return content + hashlib.sha256(content).digest()


def changed(content: bytes, at: int, new: bytes) -> bytes:
    body = content[:-32]
    return sealed(body[:at] + new + body[at + len(new) :])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda _: b"", "ends too early"),
        (lambda _: b"\x80\x04\x95" + bytes(100), "begins in another way"),
        (lambda _: b"PK\x03\x04" + bytes(100), "begins in another way"),
        (lambda good: good[:-1], "digest"),
        (lambda good: good[:-40], "ends too early|digest"),
        (lambda good: good + b"\0", "digest"),
        (lambda good: good[:100] + bytes([good[100] ^ 1]) + good[101:], "digest|holds|finite"),
        (lambda good: changed(good, 8, struct.pack("<I", 2)), "begins in another way"),
        (lambda good: changed(good, 12, struct.pack("<I", 2**32 - 1)), "ends too early"),
        (lambda good: changed(good, 12, struct.pack("<I", 0)), "digest"),
        (lambda good: changed(good, HEAD + 64, b"\x02"), "entry 0 holds"),
        (lambda good: changed(good, HEAD + 65, b"\x02"), "entry 0 holds"),
        (lambda good: changed(good, HEAD + 66, struct.pack("<i", -1)), "entry 0 holds"),
        (lambda good: changed(good, HEAD + 70, struct.pack("<I", 2**31)), "entry 0 holds"),
        (lambda good: changed(good, HEAD + 70, struct.pack("<I", 0)), "entry 0 holds"),
        (lambda good: changed(good, HEAD + 74, struct.pack("<d", float("nan"))), "not finite"),
        (lambda good: changed(good, HEAD + RECORD, struct.pack("<f", float("inf"))), "not finite"),
    ],
)
def test_a_file_that_is_damaged_or_hostile_is_refused_whole(
    wrong: Callable[[bytes], bytes], says: str, tmp_path: Path
) -> None:
    cache, file = a_cache(), tmp_path / "queries"
    keep(cache, 1, 2)
    cache.save(file)
    file.write_bytes(wrong(file.read_bytes()))
    reader = a_cache()
    keep(reader, 3)
    with pytest.raises(InvalidInput, match=says):
        reader.load(file)
    assert read(reader, 1, 2, 3) == [3]


def test_a_vector_of_another_length_is_not_used(tmp_path: Path) -> None:
    """A hostile file may hold one under the fingerprint of a space."""
    cache, file = a_cache(), tmp_path / "queries"
    cache.keep(SPACE, "query", [(content_hash("secret 1"), embedded(1, DIMENSIONS + 1))])
    cache.save(file)
    reader = a_cache()
    assert reader.load(file) == 1
    assert read(reader, 1) == []


def test_a_file_that_others_may_write_to_or_that_is_none_is_refused(tmp_path: Path) -> None:
    cache, file = a_cache(), tmp_path / "queries"
    cache.save(file)
    file.chmod(0o666)
    with pytest.raises(InvalidInput, match="everybody on this machine may write"):
        cache.load(file)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "nothing"):
        with pytest.raises(InvalidInput, match="cannot be read"):
            cache.load(path)
    with pytest.raises(InvalidInput, match="cannot be written"):
        cache.save(tmp_path / "nowhere" / "queries")


def test_a_save_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, file = a_cache(), tmp_path / "queries"
    keep(cache, 1)
    cache.save(file)
    keep(cache, 2)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InvalidInput, match="No space left"):
        cache.save(file)
    assert list(tmp_path.iterdir()) == [file]
    assert a_cache().load(file) == 1


def test_threads_that_read_and_write_keep_its_bounds() -> None:
    cache = a_cache(entries=20)
    failed: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for n in range(300):
                keep(cache, first + n % 30)
                read(cache, *range(first, first + 5))
        except BaseException as error:  # noqa: BLE001 - the test shows it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(10 * t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statistics = cache.statistics()
    assert not failed
    assert statistics.bytes == statistics.vectors * ENTRY <= 20 * ENTRY
