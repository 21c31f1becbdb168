"""Enqueues that delete what their source does not have any more: what goes, and what must stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client, replacing
from chunkmill.client import Client as ClientClass
from chunkmill.db.connect import create_db
from chunkmill.domain.states import JobState
from chunkmill.errors import InvalidChunk, InvalidInput, TooManyRefused
from chunkmill.settings import Settings
from chunkmill.store import replacing as store
from tests.integration.hands import Hands


@pytest.fixture
def producer(settings: Settings, db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """All its windows and slices are of a few chunks, so that each test sees several of them."""
    monkeypatch.setattr(store, "WINDOW", 4)
    monkeypatch.setattr(replacing, "DELETE_STEP", 2)
    monkeypatch.setattr(replacing, "NOTE_STEP", 3)
    small = settings.model_copy(update={"enqueue_window": 5, "chunk_batch_size": 2})
    engine = create_db(settings.require_database_url(), role="client")
    with ClientClass(engine, Broker.connect(small), small) as made:
        yield made


def some(*numbers: int, **metadata: Any) -> list[tuple[str, str, dict[str, Any]]]:
    return [(f"id-{n:02}", f"text {n}", metadata) for n in numbers]


def ids(client: Client, collection: str = "docs") -> list[str]:
    return [chunk.id for chunk in client.chunks(collection, with_text=False)]


def names(*numbers: int) -> list[str]:
    return [f"id-{n:02}" for n in numbers]


def test_what_the_source_does_not_have_goes_with_its_text_and_its_vector(producer: Client, hands: Hands) -> None:
    producer.enqueue(some(*range(20)), collection="docs")
    producer.enqueue(some(*range(0, 20, 2)), collection="other")
    hands.work()
    kept = [*some(*range(3)), ("id-03", "another text"), ("new", "a new text")]
    assert producer.estimate(kept, collection="docs", replace=True).deleted == 16
    job = producer.enqueue(kept, collection="docs", replace=True)
    assert (job.new, job.replaced, job.unchanged, job.refused, job.deleted) == (1, 1, 3, 0, 16)
    assert ids(producer) == [*names(0, 1, 2, 3), "new"]
    assert ids(producer, "other") == names(*range(0, 20, 2))
    # The other collection has some of the texts. That of id-03 goes with prune, as after any enqueue that replaces it.
    left = {f"text {n}" for n in (0, 1, 2, 3, *range(4, 20, 2))}
    texts = {text for (text,) in hands.rows("SELECT text FROM contents")}
    assert texts == left | {"another text", "a new text"}
    assert hands.rows(f"SELECT count(*) FROM {hands.vectors_of(job.id)}") == [(len(left),)]
    hands.work()
    assert (producer.job(job.id).state, producer.job(job.id).deleted) == (JobState.COMPLETED, 16)
    assert producer.enqueue(kept, collection="docs").deleted is None


def test_a_source_that_fails_or_is_not_whole_deletes_and_writes_nothing(
    producer: Client, rows: Callable[[str], int]
) -> None:
    producer.enqueue(some(*range(12)), collection="docs")

    def fails() -> Iterator[object]:
        yield from some(0, 1, 20)
        raise OSError("the disk is gone")

    skips: dict[str, Any] = {"collection": "docs", "replace": True, "on_invalid": "skip"}
    with pytest.raises(OSError, match="the disk is gone"):
        producer.enqueue(fails(), **skips)
    with pytest.raises(InvalidInput, match=r"the source is empty.*allow_empty=True"):
        producer.enqueue([], **skips)
    with pytest.raises(InvalidInput, match=r"at position 1 has no id.*--sync"):
        producer.enqueue([*some(20), ("", "a text without an id")], **skips)
    unreadable = InvalidChunk("not valid JSON", chunk_id="docs.jsonl:3", position=1, reason="unreadable")
    with pytest.raises(InvalidInput, match=r"at position 1 .*not valid JSON"):
        producer.enqueue([*some(20), unreadable], **skips)
    with pytest.raises(InvalidChunk):
        producer.enqueue([*some(20), ("bad", "")], collection="docs", replace=True)
    with pytest.raises(
        TooManyRefused, match=r"2 of 3 chunks are refused, and max_refused allows 1.*position 1"
    ) as told:
        producer.enqueue([*some(20), ("b", ""), ("c", "")], max_refused=1, **skips)
    assert (told.value.refused, told.value.chunks) == (2, 3)
    assert (rows("jobs"), rows("chunks"), ids(producer)) == (1, 12, names(*range(12)))
    job = producer.enqueue([], allow_empty=True, **skips)
    assert (job.deleted, ids(producer)) == (12, [])


@pytest.mark.parametrize(("most", "is_refused"), [(1, True), (2, False), (0.19, True), (0.2, False), (0, True)])
def test_so_many_bad_chunks_and_no_more_are_put_on_the_dead_list(
    producer: Client, rows: Callable[[str], int], most: float, is_refused: bool
) -> None:
    given = [*some(*range(8)), ("a", ""), ("", "b")]
    if is_refused:
        with pytest.raises(TooManyRefused):
            producer.enqueue(given, collection="docs", on_invalid="skip", max_refused=most)
        assert (rows("jobs"), rows("chunks")) == (0, 0)
    else:
        job = producer.enqueue(given, collection="docs", on_invalid="skip", max_refused=most)
        assert (job.new, job.refused, job.dead) == (8, 2, 2)


def test_a_bad_chunk_with_an_id_keeps_what_the_collection_has_of_it(producer: Client) -> None:
    producer.enqueue(some(*range(6)), collection="docs")
    given = [*some(0), ("id-03", ""), ("id-04", "text 4", {"when": object()})]
    job = producer.enqueue(given, collection="docs", replace=True, on_invalid="skip")
    assert (ids(producer), job.refused, job.deleted) == (names(0, 3, 4), 2, 3)


def test_a_document_that_cannot_be_read_keeps_the_chunks_that_were_cut_from_it(producer: Client) -> None:
    cut = [(f"{document}#{n}", f"{document} {n}") for document in ("a.pdf", "a.pdf#b", "b.pdf") for n in range(7)]
    producer.enqueue([*cut, ("a.pdf", "from before it was cut"), ("a", "x")], collection="docs")
    bad = InvalidChunk("no PDF", chunk_id="a.pdf", position=1, reason="unreadable", known_id="a.pdf")
    given = [("b.pdf#3", "b.pdf 3"), bad]
    assert producer.estimate(given, collection="docs", replace=True, on_invalid="skip").deleted == 14
    job = producer.enqueue(given, collection="docs", replace=True, on_invalid="skip")
    assert (ids(producer), job.deleted) == (["a.pdf", *(f"a.pdf#{n}" for n in range(7)), "b.pdf#3"], 14)
    assert producer.enqueue(given[:1], collection="docs", replace=True).deleted == 8


def test_a_filter_says_which_chunks_a_source_stands_for(producer: Client) -> None:
    producer.enqueue([*some(*range(6), source="wiki"), *some(*range(10, 16), source="mail")], collection="docs")
    job = producer.enqueue(some(1, 2, source="wiki"), collection="docs", replace={"source": "wiki"})
    assert (ids(producer), job.deleted) == (names(1, 2, *range(10, 16)), 4)


def test_what_another_enqueue_names_meanwhile_stays(producer: Client, client: Client, hands: Hands) -> None:
    """It is new, replaced or unchanged, and its job is one that may own no chunk that others accepted."""
    producer.enqueue(some(*range(10)), collection="docs")
    producer.enqueue(some(*range(10)), collection="other")
    xmin = "SELECT CAST(xmin AS text) FROM chunks WHERE chunk_id = 'id-06' ORDER BY collection_id"

    def source() -> Iterator[object]:
        yield from some(0)
        before = hands.rows(xmin)
        client.enqueue([("by-other", "a text"), *some(1), ("id-02", "replaced")], collection="docs")
        client.enqueue([*some(3), *some(4, seen=True)], collection="docs", on_long="reject")
        client.enqueue(some(5, 6), collection="other")  # says nothing of the same ids here
        assert hands.rows(xmin) == before  # and nobody watches that collection
        yield from some(9)

    job = producer.enqueue(source(), collection="docs", replace=True)
    assert ids(producer) == ["by-other", *names(0, 1, 2, 3, 4, 9)]
    assert ids(producer, "other") == names(*range(10))
    assert job.deleted == 4
    assert producer.get("docs", ["id-04"])["id-04"].metadata == {"seen": True}
    before = hands.rows(xmin.replace("id-06", "id-01"))
    client.enqueue(some(1), collection="docs")
    assert hands.rows(xmin.replace("id-06", "id-01")) == before, "an unchanged chunk is written although nobody watches"


def test_what_an_open_job_has_written_goes_and_what_it_writes_later_stays(producer: Client, client: Client) -> None:
    """The other job began first, and ends last."""
    producer.enqueue(some(*range(6)), collection="docs")

    def others() -> Iterator[object]:
        yield from some(*range(20, 20 + 2 * client._settings.chunk_batch_size))
        job = producer.enqueue(source(), collection="docs", replace=True)
        assert job.deleted == 6 - 2 + 2 * client._settings.chunk_batch_size
        yield from some(8)

    def source() -> Iterator[object]:
        yield from some(1, 2)

    client.enqueue(others(), collection="docs", on_invalid="skip")
    assert ids(producer) == names(1, 2, 8)


def test_a_producer_that_died_while_it_deleted_is_completed_by_its_key(
    producer: Client, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was enqueued by others since stays, and a third call finds nothing to do."""
    producer.enqueue(some(*range(10)), collection="docs")
    delete, calls = store.delete_missing, 0

    def dies(*args: Any, **options: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return delete(*args, **options)

    call: dict[str, Any] = {"collection": "docs", "replace": True, "idempotency_key": "k"}
    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_missing", dies)
        with pytest.raises(KeyboardInterrupt):
            producer.enqueue(some(0), **call)
    job = producer.jobs(1)[0]
    assert (job.deleted, len(ids(producer))) == (None, 8)
    client.enqueue(some(20), collection="docs")
    again = producer.enqueue(some(0), **call)
    assert (again.id, again.deleted, ids(producer)) == (job.id, 7, names(0, 20))
    client.enqueue(some(3), collection="docs")
    assert producer.enqueue(some(0), **call).deleted == 7
    assert ids(producer) == names(0, 3, 20)


KEYED: dict[str, Any] = {"collection": "docs", "replace": True, "idempotency_key": "k"}


@pytest.fixture
def dies(producer: Client, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Enqueue a source under the key ``k`` in a call that dies before it has deleted anything."""

    def call(source: Any) -> None:
        def die(*_: Any, **__: Any) -> int:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(store, "delete_missing", die)
            producer.enqueue(source, **KEYED)

    return call


def test_a_call_that_is_repeated_keeps_what_jobs_of_lower_numbers_have_written_since(
    producer: Client, client: Client, dies: Callable[[Any], None]
) -> None:
    """A job that is open, one that a second producer goes on with, and one that wrote while the dead call read."""
    producer.enqueue(some(*range(6)), collection="docs")
    producer.enqueue(some(*range(30, 33)), collection="other")

    def broken() -> Iterator[object]:
        yield from some(40)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        client.enqueue(broken(), collection="docs", idempotency_key="older", on_invalid="skip")

    def source() -> Iterator[object]:
        yield from some(0)
        client.enqueue([*some(2), ("id-03", "replaced meanwhile")], collection="docs")

    def is_open() -> Iterator[object]:
        yield from some(*range(50, 50 + 2 * client._settings.chunk_batch_size))
        dies(source())
        yield from some(8)
        yield ("id-04", "replaced since")

    client.enqueue(is_open(), collection="docs", on_invalid="skip")
    client.enqueue(some(41, 42), collection="docs", idempotency_key="older")
    job = producer.enqueue(some(0), **KEYED)
    kept = [*names(0, 2, 3, 4, 8, 41, 42)]
    assert ids(producer) == kept
    assert (job.deleted, ids(producer, "other")) == (2 + 2 * client._settings.chunk_batch_size, names(30, 31, 32))
    assert producer.enqueue(some(0), **KEYED) == job
    assert ids(producer) == kept


def test_a_call_that_died_while_it_wrote_keeps_what_later_jobs_have_written_since(
    producer: Client, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that goes on with it begins after them, but its job was there before them."""
    producer.enqueue(some(*range(6)), collection="docs")
    producer.enqueue(some(*range(30, 33)), collection="other")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(producer, "_ring", die)  # after the first window
        producer.enqueue(some(0, *range(7, 17)), **KEYED)
    begun = producer.jobs(1)[0]
    client.enqueue([*some(20), ("id-04", "replaced since")], collection="docs")
    job = producer.enqueue(some(0, *range(7, 17)), **KEYED)
    assert (job.id, job.deleted, ids(producer)) == (begun.id, 4, names(0, 4, *range(7, 17), 20))
    assert ids(producer, "other") == names(30, 31, 32)


def test_a_call_that_is_repeated_deletes_nothing_if_others_have_found_chunks_unchanged_since(
    producer: Client, client: Client, dies: Callable[[Any], None]
) -> None:
    producer.enqueue(some(*range(6)), collection="docs")
    producer.enqueue(some(*range(3)), collection="other")
    producer.enqueue(some(5), collection="docs")  # before, which hinders nobody
    dies(some(0))
    producer.enqueue(some(1), collection="other")  # elsewhere, which hinders nobody either
    client.enqueue(some(2), collection="docs")
    for _ in range(2):
        with pytest.raises(InvalidInput, match=r"key 'k' belongs to job \d+.*nothing more was deleted.*another key"):
            producer.enqueue(some(0), **KEYED)
    assert ids(producer) == names(*range(6))
    assert producer.enqueue(some(0, 2), **KEYED | {"idempotency_key": "l"}).deleted == 4
    assert ids(producer) == names(0, 2)


def test_a_call_that_is_repeated_in_a_restored_database_deletes_nothing(
    producer: Client, hands: Hands, dies: Callable[[Any], None]
) -> None:
    """The rows are those of another transaction there, and none has the number that the fence means."""
    producer.enqueue(some(*range(6)), collection="docs")
    dies(some(0))
    hands.rows("UPDATE job_streams SET n_new = n_new RETURNING 1")
    with pytest.raises(InvalidInput, match="nothing more was deleted"):
        producer.enqueue(some(0), **KEYED)
    assert ids(producer) == names(*range(6))


def test_a_key_that_has_deleted_nothing_begins_no_deletion(producer: Client) -> None:
    """Its first call was not asked to replace, so nobody knows what was there before it."""
    producer.enqueue(some(*range(4)), collection="docs")
    producer.enqueue(some(0), collection="docs", idempotency_key="k")
    with pytest.raises(InvalidInput, match="nothing more was deleted"):
        producer.enqueue(some(0), **KEYED)
    assert ids(producer) == names(*range(4))


def test_a_job_that_is_cancelled_before_its_end_deletes_nothing(
    producer: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer.enqueue(some(*range(6)), collection="docs")
    ring = producer._ring

    def cancels(conn: sa.Connection) -> None:
        ring(conn)
        producer.cancel(producer.jobs(1)[0].id)

    monkeypatch.setattr(producer, "_ring", cancels)
    job = producer.enqueue(some(1), collection="docs", replace=True)
    assert (job.state, job.deleted, ids(producer)) == (JobState.CANCELLED, None, names(*range(6)))


def test_nothing_of_it_is_left_with_the_connection(producer: Client, client: Client, db: sa.Engine) -> None:
    producer.enqueue(some(1), collection="docs", replace=True)
    producer.enqueue(some(2), collection="docs", replace=True)
    with pytest.raises(InvalidInput):
        producer.enqueue([], collection="docs", replace=True)
    with db.begin() as conn:
        left = "SELECT count(*) FROM pg_class WHERE relname = 'source_ids' AND relpersistence = 't'"
        assert conn.execute(sa.text(left)).scalar_one() == 0
        watching = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2"
        assert conn.execute(sa.text(watching)).scalar_one() == 0


@pytest.mark.parametrize(
    ("next_one", "fence", "written_by", "is_old"),
    [
        (1_000, 900, 899, True), (1_000, 900, 900, False), (1_000, 900, 999, False),
        (2**32 + 100, 2**32 + 40, 2**32 - 5, True), (2**32 + 100, 2**32 + 40, 10, True),
        (2**32 + 100, 2**32 + 40, 50, False), (3 * 2**32 + 7, 3 * 2**32 + 3, 2, True),
        (3 * 2**32 + 7, 3 * 2**32 + 3, 3, False), (2**32 + 7, 2**32 - 3, 2**32 - 3, False),
    ],
)  # fmt: skip
def test_the_number_of_a_rows_transaction_is_read_right_after_four_billion(
    db: sa.Engine, next_one: int, fence: int, written_by: int, is_old: bool
) -> None:
    query = f"""
        SELECT {store.is_old("c.written_by")}
        FROM (VALUES (CAST(:next_one AS bigint))) n(number), (VALUES (CAST(:written_by AS bigint))) c(written_by)
    """
    with db.begin() as conn:
        parameters = {"next_one": next_one, "written_by": written_by, "fence": fence}
        assert conn.execute(sa.text(query), parameters).scalar_one() is is_old
