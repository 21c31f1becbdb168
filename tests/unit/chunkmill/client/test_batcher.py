"""A batcher enqueues by count, bytes and seconds, and loses neither a chunk nor an error."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from chunkmill.client.batcher import Batcher
from chunkmill.domain.chunks import Chunk
from chunkmill.errors import BudgetExceeded, ClientClosed, InvalidChunk, StoreUnavailable, WaitTimeout
from tests.support.waiting import PATIENCE, until

LONG = float(PATIENCE)
NEVER = 10_000.0


class Store:
    """Where a batcher enqueues. ``says`` has an error or None for each call; the last one holds for all further."""

    def __init__(self) -> None:
        self.says: list[Exception | None] = [None]
        self.jobs: list[list[str]] = []
        self.keys: list[str] = []
        self.calls: queue.Queue[str] = queue.Queue()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def enqueue(self, chunks: Sequence[object], key: str) -> Any:
        self.keys.append(key)
        self.calls.put(key)
        assert self.may_go_on.wait(LONG)
        said = self.says[0] if len(self.says) == 1 else self.says.pop(0)
        if said is not None:
            raise said
        self.jobs.append([chunk.id if isinstance(chunk, Chunk) else "?" for chunk in chunks])  # type: ignore[attr-defined]
        return SimpleNamespace(id=300 + len(self.jobs))


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def make(store: Store) -> Iterator[Callable[..., Batcher]]:
    made: list[Batcher] = []

    def make(**given: Any) -> Batcher:
        options = {"max_chunks": 3, "max_bytes": 10**6, "max_seconds": NEVER, "timeout": LONG, "skips": False} | given
        made.append(Batcher(store.enqueue, **options))
        return made[-1]

    yield make
    store.says = [None]
    store.may_go_on.set()
    for batcher in made:
        batcher.close()


def test_a_batch_goes_when_it_has_so_many_chunks_and_the_rest_at_the_end(
    make: Callable[..., Batcher], store: Store
) -> None:
    with make() as add:
        for number in range(7):
            add(number, f"text {number}", {"n": number})
        until(lambda: len(store.jobs) == 2)
        assert (add.added, add.enqueued) == (7, 6)
    assert store.jobs == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert add.jobs == [301, 302, 303]
    assert len(set(store.keys)) == 3
    with pytest.raises(ClientClosed):
        add("8", "too late")


def test_a_batch_goes_when_it_has_so_many_bytes(make: Callable[..., Batcher], store: Store) -> None:
    add = make(max_bytes=10)
    add("a", "12345")
    add("b", "12345")
    until(lambda: store.jobs == [["a", "b"]])
    add({"id": "c", "text": "1", "metadata": {"long": "metadata"}})
    until(lambda: store.jobs == [["a", "b"], ["c"]])


def test_a_batch_goes_when_its_first_chunk_has_waited_long_enough(make: Callable[..., Batcher], store: Store) -> None:
    add = make(max_seconds=0.01)
    add("a", "one")
    until(lambda: store.jobs == [["a"]])
    add("b", "two")
    until(lambda: store.jobs == [["a"], ["b"]])


def test_flush_returns_when_all_that_was_added_is_enqueued(make: Callable[..., Batcher], store: Store) -> None:
    add = make()
    add.flush()
    assert store.jobs == []
    add({"id": "a", "text": "one"})
    add(Chunk("b", "two"))
    add.flush()
    assert store.jobs == [["a", "b"]]
    assert add.rest() == []


def test_a_bad_chunk_is_refused_at_once_and_the_others_go(make: Callable[..., Batcher], store: Store) -> None:
    with make() as add:
        add("a", "one")
        with pytest.raises(InvalidChunk, match="chunk 'b' at position 1"):
            add("b", " ")
        add("c", "three")
    assert store.jobs == [["a", "c"]]


def test_a_bad_chunk_that_is_skipped_goes_to_the_dead_list(make: Callable[..., Batcher], store: Store) -> None:
    with make(skips=True) as add:
        add("b", " ")
        add("a", "one")
    assert store.jobs == [["?", "a"]]


def test_what_is_added_is_a_copy(make: Callable[..., Batcher]) -> None:
    add = make()
    document: dict[str, Any] = {"id": "a", "text": "one", "tags": ["x"]}
    add(document)
    document["text"] = "changed"
    document["tags"].append("y")
    assert add.rest() == [Chunk("a", "one", {"tags": ["x"]})]


def test_an_outage_is_waited_for_and_the_same_batch_goes_under_the_same_key(
    make: Callable[..., Batcher], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkmill.client.batcher.FIRST_PAUSE_S", 0.01)
    store.says = [StoreUnavailable("away"), StoreUnavailable("away"), None]
    with make() as add:
        for number in range(4):
            add(number, "text")
    assert store.jobs == [["0", "1", "2"], ["3"]]
    first, again, once_more, second = store.keys
    assert first == again == once_more != second


def test_without_room_an_outage_is_raised_and_the_chunk_was_not_taken(
    make: Callable[..., Batcher], store: Store
) -> None:
    store.says = [StoreUnavailable("Postgres is away")]
    add = make(timeout=0.01)
    for number in range(3):
        add(number, "text")
    until(lambda: not store.calls.empty() and len(add.rest()) == 3)
    added = 3
    with pytest.raises(StoreUnavailable, match="Postgres is away"):
        for _ in range(4):
            add(added, "text")
            added += 1
    assert added == add.added == len(add.rest()) == 6
    with pytest.raises(StoreUnavailable):
        add.flush()
    store.says = [None]
    add._timeout = LONG
    add.flush()
    assert store.jobs == [["0", "1", "2"], ["3", "4", "5"]]


def test_a_slow_enqueue_bounds_what_waits(make: Callable[..., Batcher], store: Store) -> None:
    store.may_go_on.clear()
    add = make(timeout=0.01)
    for number in range(3):
        add(number, "text")
    store.calls.get(timeout=LONG)
    for number in range(3):
        add(number, "text")
    with pytest.raises(WaitTimeout, match="no room for another chunk"):
        add("7", "text")
    assert add.added == 6


def test_an_error_that_stays_is_raised_by_every_call_until_it_is_gone(
    make: Callable[..., Batcher], store: Store
) -> None:
    store.says = [BudgetExceeded("the budget is used up")]
    add = make(max_chunks=1)
    add("a", "one")
    until(lambda: add._error is not None)
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            add("b", "two")
    with pytest.raises(BudgetExceeded):
        add.flush()
    assert add.rest() == [Chunk("a", "one")]
    store.says = [None]
    add.flush()
    add("b", "two")
    add.flush()
    assert store.jobs == [["a"], ["b"]]


def test_the_end_of_the_block_raises_what_keeps_the_rest(make: Callable[..., Batcher], store: Store) -> None:
    store.says = [BudgetExceeded("the budget is used up")]
    with pytest.raises(BudgetExceeded), make() as add:
        add("a", "one")
    assert add.rest() == [Chunk("a", "one")]
    assert add._thread is not None
    add._thread.join(LONG)
    assert not add._thread.is_alive()


def test_an_error_of_the_block_is_raised_with_a_note_and_what_was_added_goes(
    make: Callable[..., Batcher], store: Store
) -> None:
    with pytest.raises(ZeroDivisionError), make() as add:
        add("a", "one")
        raise ZeroDivisionError
    assert store.jobs == [["a"]]
    store.says = [BudgetExceeded("the budget is used up")]
    with pytest.raises(ZeroDivisionError) as caught, make() as add:
        add("b", "two")
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["The batcher was closed, and 1 chunks were not enqueued: the budget is used up"]


def test_many_threads_add_and_every_chunk_goes_once(make: Callable[..., Batcher], store: Store) -> None:
    with make(max_chunks=7) as add:

        def work(name: str) -> None:
            for number in range(50):
                add(f"{name}{number}", "text")

        threads = [threading.Thread(target=work, args=[name]) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
    gone = [chunk_id for job in store.jobs for chunk_id in job]
    assert sorted(gone) == sorted(f"{name}{number}" for name in "abcd" for number in range(50))
    assert all(len(job) <= 7 for job in store.jobs)


def test_a_forked_child_begins_empty(make: Callable[..., Batcher], store: Store) -> None:
    add = make()
    add("a", "one")
    child = os.fork()
    if child == 0:
        os._exit(0 if not add.rest() and add.added == 0 and add._thread is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert add.rest() == [Chunk("a", "one")]
