"""A collection with two spaces: what is enqueued reaches both, what was there before is filled, nothing slips by."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from alembic import command

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.client import Client as ClientClass
from chunkmill.db.connect import alembic_config
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.states import JobState, Priority
from chunkmill.errors import InvalidInput, SpaceMismatch
from chunkmill.ledger.reembedding import fill
from chunkmill.ledger.reembedding.fill import Coverage, PassedOverJobs
from chunkmill.monitor.servers import read_spaces
from chunkmill.settings import Settings
from chunkmill.spaces import collections, others, registry
from chunkmill.spaces.registry import Space
from chunkmill.store import evict
from tests.integration.hands import Hands
from tests.support import reembeddings
from tests.support.waiting import PATIENCE, Call, running, until


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not end a pass between two pages."""
    monkeypatch.setattr(fill, "SECONDS", PATIENCE)


@pytest.fixture
def small(settings: Settings) -> Settings:
    return settings.model_copy(update={"chunk_batch_size": 2, "enqueue_window": 4})


@pytest.fixture
def client(small: Settings, db: sa.Engine) -> Iterator[Client]:
    with ClientClass(db, Broker.connect(small), small) as made:
        yield made


class Scene:
    """Two collections in one space, with chunks that are embedded. "docs" is being re-embedded, and "stays" is not."""

    def __init__(self, client: Client, db: sa.Engine, hands: Hands, settings: Settings) -> None:
        self.client, self.db, self.hands, self.settings = client, db, hands, settings
        for collection in ("docs", "stays"):
            client.enqueue([(f"{i}", f"text {i} of {collection}") for i in range(7)], collection=collection)
        hands.work()
        with db.begin() as conn:
            docs = collections.find(conn, "docs")
            self.id, self.old = docs.id, registry.get(conn, docs.space_id)
        self.new = reembeddings.second_space(db, "docs")
        self.reembedding = reembeddings.begin(db, "docs", self.new)

    def fill(self) -> bool:
        """One call, with a pass that begins at once."""
        self.hands.rows("UPDATE reembedding_fills SET passed_at = passed_at - interval '1 h' RETURNING 1")
        return fill.fill_some(self.db, self.settings, self.reembedding)

    def fill_all(self) -> None:
        """Fill and embed until all is there."""
        for _ in range(20):
            if self.fill():
                return
            self.hands.work()
        raise AssertionError("it is filled for ever")

    def coverage(self, space: Space) -> Coverage:
        with self.db.begin() as conn:
            return fill.coverage(conn, self.id, space)

    def jobs_in(self, space: Space) -> list[int]:
        return [i for (i,) in self.hands.rows("SELECT id FROM jobs WHERE space_id = :s ORDER BY id", s=space.id)]

    def waiting_in(self, space: Space) -> set[bytes]:
        """The contents in ChunkBatches of a space that are to be embedded."""
        query = """
            SELECT unnest(content_hashes) FROM chunk_batches WHERE space_id = :s AND state IN ('available', 'running')
        """
        return {bytes(h) for (h,) in self.hands.rows(query, s=space.id)}

    def pass_over(self, text: str) -> None:
        """Delete the vector of a text in the new space, as if nobody had embedded it."""
        table = self.new.table_name
        self.hands.rows(f"DELETE FROM {table} WHERE content_hash = :h RETURNING 1", h=content_hash(text))


@pytest.fixture
def scene(client: Client, db: sa.Engine, hands: Hands, small: Settings) -> Scene:
    return Scene(client, db, hands, small)


def test_an_estimate_says_what_goes_into_each_space_of_the_collection(scene: Scene, client: Client) -> None:
    known, new = "text 0 of docs", "a text that nobody has embedded"
    chunks = [("again", known), ("new", new), ("twice", new)]
    told = client.estimate(chunks, collection="docs")
    assert (told.space, told.contents, told.cached, told.to_embed) == (scene.old.spec.fingerprint, 2, 1, 1)
    (other,) = told.beside
    assert (other.space, other.chunks, other.contents, other.to_embed) == (scene.new.spec.fingerprint, 3, 2, 2)
    assert (other.route, other.tokens) == ("local", client.estimate(chunks[:2], on_long="split").tokens)
    assert client.estimate(chunks, collection="stays").beside == ()
    scene.fill_all()
    (filled,) = client.estimate(chunks, collection="docs").beside
    assert (filled.cached, filled.to_embed) == (1, 1)


def test_stored_texts_fill_the_new_space_without_the_producer(scene: Scene) -> None:
    assert not scene.fill()
    (job,) = scene.jobs_in(scene.new)
    opened = scene.client.job(job)
    assert (opened.idempotency_key, opened.priority, opened.chunks) == (f"reembed:{scene.reembedding}", "low", 7)
    assert scene.hands.rows("SELECT job_id FROM reembeddings") == [(job,)]
    assert sum(scene.hands.rows("SELECT n_contents FROM chunk_batches WHERE job_id = :j", j=job), ()) == (2, 2, 2, 1)
    assert scene.coverage(scene.new) == Coverage(chunks=7, contents=7, missing=7, pending=7, dead=0)
    scene.hands.work()
    assert scene.client.job(job).state is JobState.COMPLETED
    assert scene.coverage(scene.new) == Coverage(chunks=7, contents=7, missing=0, pending=0, dead=0)
    assert scene.fill()
    assert scene.coverage(scene.old).is_complete


def test_what_is_enqueued_meanwhile_reaches_both_spaces(scene: Scene) -> None:
    scene.fill_all()
    before = scene.jobs_in(scene.new)
    job = scene.client.enqueue([("a", "text a"), ("7", "text 7")], collection="docs", priority="high")
    assert (
        scene.waiting_in(scene.new) == scene.waiting_in(scene.old) == {content_hash("text a"), content_hash("text 7")}
    )
    (beside,) = set(scene.jobs_in(scene.new)) - set(before)
    assert scene.client.job(beside).priority == "high"
    scene.hands.work()
    assert [scene.client.job(j).state for j in (job.id, beside)] == [JobState.COMPLETED] * 2
    assert scene.fill()
    assert not scene.coverage(scene.new).missing


def test_the_producers_job_ends_without_the_other_space(scene: Scene) -> None:
    scene.fill_all()
    job = scene.client.enqueue([("a", "text a")], collection="docs")
    (mine,) = scene.hands.of_job(job.id)
    scene.hands.embed(scene.hands.claim(mine), {})
    assert scene.client.job(job.id).state is JobState.COMPLETED
    assert scene.waiting_in(scene.new) == {content_hash("text a")}


def test_a_text_that_dies_in_the_new_space_is_dead_there_alone(scene: Scene) -> None:
    scene.fill_all()
    job = scene.client.enqueue([("a", "text a"), ("b", "text b")], collection="docs")
    for chunk_batch in scene.hands.due():
        lease = scene.hands.claim(chunk_batch)
        scene.hands.embed(lease, {content_hash("text a"): "not_finite"} if lease.space_id == scene.new.id else {})
    assert scene.client.job(job.id).state is JobState.COMPLETED
    assert scene.client.audit("docs").complete
    assert scene.coverage(scene.new) == Coverage(chunks=9, contents=9, missing=1, pending=0, dead=1)
    assert scene.coverage(scene.new).is_complete
    assert scene.fill()  # nobody tries it again by himself
    (entry,) = scene.client.dead()
    assert (entry.chunk_id, entry.standing) == ("a", "missing")
    scene.client.retry_dead([entry.id])
    scene.hands.work()
    assert not scene.coverage(scene.new).missing


def test_a_text_that_the_new_space_refuses_stays_in_the_collection(scene: Scene) -> None:
    """Its job rejects long texts, and so does the re-embedding. The chunk is searched in the old space still."""
    scene.hands.rows("UPDATE collection_spaces SET on_long = 'reject' RETURNING 1")
    scene.client.enqueue([("a", "long in the new space alone")], collection="docs", on_long="reject")
    for chunk_batch in scene.hands.due():
        lease = scene.hands.claim(chunk_batch)
        codes = {content_hash("long in the new space alone"): "too_long"} if lease.space_id == scene.new.id else {}
        scene.hands.embed(lease, codes)
    assert scene.client.audit("docs").complete
    assert "a" in scene.client.vectors("docs", ["a"])
    assert scene.coverage(scene.new).dead == 1


def test_a_collection_that_is_enqueued_again_is_not_embedded_twice(scene: Scene) -> None:
    scene.fill()
    scene.client.enqueue([(f"{i}", f"text {i} of docs") for i in range(7)], collection="docs")
    scene.client.enqueue([(f"other {i}", f"text {i} of docs") for i in range(7)], collection="docs")
    query = "SELECT sum(n_contents) FROM chunk_batches WHERE space_id = :s"
    assert scene.hands.rows(query, s=scene.new.id) == [(7,)]


def test_a_pass_leaves_what_an_enqueue_is_at_to_it(scene: Scene) -> None:
    scene.fill_all()
    scene.client.enqueue([("a", "text a")], collection="docs")
    assert scene.fill()
    query = "SELECT count(*) FROM chunk_batches WHERE space_id = :s AND state = 'available'"
    assert scene.hands.rows(query, s=scene.new.id) == [(1,)]


def test_what_a_producer_of_the_last_release_wrote_is_found(scene: Scene) -> None:
    scene.fill_all()
    with pytest.MonkeyPatch.context() as last_release:
        last_release.setattr("chunkmill.client.beside.JobsBeside.needed", lambda *_: {})
        scene.client.enqueue([("a", "text a"), ("1", "text 1, replaced")], collection="docs")
    scene.hands.work()
    assert scene.coverage(scene.new).missing == 2
    assert not scene.fill()
    assert scene.waiting_in(scene.new) == {content_hash("text a"), content_hash("text 1, replaced")}
    scene.fill_all()
    assert not scene.coverage(scene.new).missing


def test_a_job_that_was_begun_before_the_flip_writes_into_the_new_space_too(scene: Scene) -> None:
    scene.fill_all()

    def stream() -> Iterator[tuple[str, str]]:
        yield from ((f"early {i}", f"early {i}") for i in range(4))
        reembeddings.swap(scene.db, "docs")
        yield from ((f"late {i}", f"late {i}") for i in range(4))

    scene.client.enqueue(stream(), collection="docs", on_invalid="skip")
    late = {content_hash(f"late {i}") for i in range(4)}
    assert late <= scene.waiting_in(scene.new)
    assert late <= scene.waiting_in(scene.old)
    scene.hands.work()
    assert scene.client.audit("docs").complete
    assert scene.client.audit("docs").space == scene.new.spec.fingerprint
    assert scene.coverage(scene.old).is_complete


def test_a_job_whose_space_the_collection_has_left_writes_into_the_active_one(scene: Scene) -> None:
    scene.fill_all()

    def stream() -> Iterator[tuple[str, str]]:
        yield from ((f"early {i}", f"early {i}") for i in range(4))
        reembeddings.swap(scene.db, "docs")
        reembeddings.end(scene.db, "docs")
        yield from ((f"late {i}", f"late {i}") for i in range(4))

    scene.client.enqueue(stream(), collection="docs", on_invalid="skip")
    late = {content_hash(f"late {i}") for i in range(4)}
    assert late <= scene.waiting_in(scene.new)
    assert not late & scene.waiting_in(scene.old)
    scene.hands.work()
    assert scene.client.audit("docs").complete


def test_a_window_waits_for_a_flip_and_is_written_for_the_spaces_after_it(scene: Scene) -> None:
    scene.fill_all()
    is_open, is_flipping = threading.Event(), threading.Event()

    def stream() -> Iterator[tuple[str, str]]:
        yield from ((f"early {i}", f"early {i}") for i in range(4))
        is_open.set()
        assert is_flipping.wait(PATIENCE)
        yield "late", "late"

    def enqueue() -> None:
        scene.client.enqueue(stream(), collection="docs", on_invalid="skip")

    with scene.db.connect() as flipping, running(enqueue, release=is_flipping.set):
        assert is_open.wait(PATIENCE)
        with flipping.begin():
            reembeddings.swap_in(flipping, scene.id)
            is_flipping.set()
            until(scene.hands.waiting)
            assert content_hash("late") not in scene.waiting_in(scene.old)
    assert content_hash("late") in scene.waiting_in(scene.old) & scene.waiting_in(scene.new)


def test_a_flip_waits_for_a_window(scene: Scene) -> None:
    scene.fill_all()
    with scene.db.connect() as window, window.begin():
        others.hold(window, scene.id)
        with running(lambda: reembeddings.swap(scene.db, "docs"), release=window.commit):
            until(scene.hands.waiting)
            assert scene.hands.rows("SELECT space_id FROM collections WHERE id = :id", id=scene.id) == [(scene.old.id,)]


def test_the_space_that_was_left_is_kept_up_to_date(scene: Scene) -> None:
    scene.fill_all()
    reembeddings.swap(scene.db, "docs")
    scene.client.enqueue([("a", "text a")], collection="docs", on_long="split")
    assert scene.waiting_in(scene.old) == {content_hash("text a")}
    scene.hands.work()
    scene.hands.rows(f"DELETE FROM {scene.old.table_name} RETURNING 1")
    scene.fill_all()
    assert scene.coverage(scene.old).is_complete
    keys = {key for (key,) in scene.hands.rows("SELECT idempotency_key FROM jobs WHERE idempotency_key IS NOT NULL")}
    assert keys == {f"reembed:{scene.reembedding}", f"reembed:{scene.reembedding}:back"}


def test_a_pass_goes_on_where_it_was_killed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "PAGE", 2)
    monkeypatch.setattr(fill, "PAGES", 1)
    assert not scene.fill()
    first = scene.waiting_in(scene.new)
    assert first == set(sorted(content_hash(f"text {i} of docs") for i in range(7))[:2])
    with monkeypatch.context() as dying:
        dying.setattr(fill.chunk_batches, "add", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            scene.fill()
    for _ in range(4):
        assert not scene.fill()
    query = "SELECT sum(n_contents) FROM chunk_batches WHERE space_id = :s"
    assert scene.hands.rows(query, s=scene.new.id) == [(7,)]
    scene.hands.work()
    for _ in range(4):
        assert not scene.fill()
    assert scene.fill()


def test_the_job_that_fills_is_not_judged_before_the_pass_is_over(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That reads all that the job has so far. After each page it would cost the square of the collection."""
    monkeypatch.setattr(fill, "PAGE", 3)
    monkeypatch.setattr(fill, "PAGES", 1)
    states = "SELECT state FROM jobs WHERE idempotency_key LIKE 'reembed:%'"
    for _ in range(3):  # 7 contents
        assert not scene.fill()
        scene.hands.work()
        assert scene.hands.rows(states) == [(JobState.RUNNING,)]
    scene.fill()
    assert scene.hands.rows(states) == [(JobState.COMPLETED,)]


def test_no_more_is_handed_out_than_the_workers_can_use(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "PAGE", 2)
    monkeypatch.setattr(fill, "OPEN_CHUNK_BATCHES", 2)
    assert not scene.fill()
    assert len(scene.waiting_in(scene.new)) == 4
    scene.fill_all()
    assert not scene.coverage(scene.new).missing


def test_a_cancelled_job_stops_the_filling_until_it_is_retried(scene: Scene) -> None:
    scene.fill()
    (job,) = scene.jobs_in(scene.new)
    scene.client.cancel(job)
    assert not scene.fill()
    assert not scene.waiting_in(scene.new)
    with scene.db.begin() as conn:
        said = str(fill.why_waiting(conn, scene.settings, scene.reembedding, PassedOverJobs()))
    assert f"chunkmill retry {job}" in said
    assert f"space {scene.new.spec.fingerprint[:12]} ('{scene.new.spec.model}')" in said
    scene.client.retry(job)
    scene.fill_all()
    assert not scene.coverage(scene.new).missing


def test_discarded_work_is_not_tried_for_ever(scene: Scene) -> None:
    scene.fill()
    (job,) = scene.jobs_in(scene.new)
    for chunk_batch in scene.hands.of_job(job):
        scene.hands.fail(scene.hands.claim(chunk_batch), retryable=False)
    scene.hands.finish(job)
    assert not scene.fill()
    assert not scene.waiting_in(scene.new)
    with scene.db.begin() as conn:
        said = str(fill.why_waiting(conn, scene.settings, scene.reembedding, PassedOverJobs()))
    assert f"7 contents cannot be embedded into space {scene.new.spec.fingerprint[:12]} (" in said
    scene.client.retry(job)
    scene.fill_all()
    with scene.db.begin() as conn:
        assert fill.why_waiting(conn, scene.settings, scene.reembedding, PassedOverJobs()) is None


def test_a_filling_that_is_always_passed_over_says_so(scene: Scene) -> None:
    """But not if nobody embeds anything, if others embed on another lane, or if it goes on now and then."""

    def said() -> bool:
        with scene.db.begin() as conn:
            problem = fill.why_waiting(conn, scene.settings, scene.reembedding, PassedOverJobs())
        assert problem is None or f"Nothing of job {job}" in problem
        return problem is not None

    def embedded(*, job: int, minutes_ago: int) -> None:
        """As a worker does that was at it then."""
        scene.hands.rows(
            """
            INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, contents, tokens,
                               engine_seconds, outcome, created_at, ended_at)
            SELECT id, 1, job_id, space_id, 'local', 'w', 1, 1, 1, 'completed', now() - interval '1 h',
                   now() - make_interval(mins => :minutes)
            FROM chunk_batches
            WHERE job_id = :job
            LIMIT 1
            ON CONFLICT (chunk_batch_id, attempt) DO UPDATE SET ended_at = EXCLUDED.ended_at
            RETURNING 1
            """,
            job=job,
            minutes=minutes_ago,
        )

    def waits(column: str, value: str) -> None:
        scene.hands.rows(f"UPDATE chunk_batches SET {column} = {value} WHERE job_id = :job RETURNING 1", job=job)

    scene.fill()
    (job,) = scene.jobs_in(scene.new)
    embedded(job=job, minutes_ago=11)
    waits("not_before", "now() - interval '11 min'")
    assert not said()
    low, normal = (
        scene.client.enqueue([(priority, f"text {priority}")], collection="stays", priority=priority)
        for priority in ("low", "normal")
    )
    scene.hands.work()
    waits("state", "'available'")
    waits("not_before", "now() - interval '11 min'")
    embedded(job=low.id, minutes_ago=1)
    embedded(job=normal.id, minutes_ago=11)
    assert not said()
    embedded(job=normal.id, minutes_ago=9)
    assert said()
    for column, other, value in (
        ("route", "'openai'", "'local'"),
        ("not_before", "now() - interval '9 min'", "now() - interval '11 min'"),
        ("state", "'running'", "'available'"),
    ):
        waits(column, other)
        assert not said()
        waits(column, value)
        assert said()
    embedded(job=job, minutes_ago=9)
    assert not said()


def test_what_a_look_found_is_said_until_the_next_one(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    passed_over, lacking = PassedOverJobs(), {1: True, 2: False}
    monkeypatch.setattr(fill, "_is_passed_over", lambda conn, job_id: lacking[job_id])
    with scene.db.begin() as conn:
        assert [passed_over.says(conn, job) for job in (1, 2)] == [True, False]
        lacking.update({1: False, 2: True})
        assert [passed_over.says(conn, job) for job in (1, 2)] == [True, False]
        later = time.monotonic() + fill.LOOK_AGAIN_SECONDS
        monkeypatch.setattr(fill.time, "monotonic", lambda: later)
        assert [passed_over.says(conn, job) for job in (1, 2)] == [False, True]


def test_a_key_that_an_enqueue_has_used_is_left_alone(scene: Scene) -> None:
    used = scene.client.enqueue([("x", "x")], collection="stays", idempotency_key=f"reembed:{scene.reembedding}")
    scene.fill()
    (job,) = scene.jobs_in(scene.new)
    assert scene.client.job(job).idempotency_key == f"reembed:{scene.reembedding}."
    assert scene.client.job(used.id).chunks == 1


def test_other_collections_are_left_alone(scene: Scene) -> None:
    scene.fill_all()
    before = scene.jobs_in(scene.new)
    scene.client.enqueue([("a", "text a")], collection="stays")
    assert scene.jobs_in(scene.new) == before
    with scene.db.begin() as conn:
        stays = collections.find(conn, "stays")
        assert fill.coverage(conn, stays.id, scene.new).missing == 8


def test_a_dropped_collection_is_not_filled_and_leaves_its_spaces(scene: Scene) -> None:
    scene.fill_all()
    scene.client.drop_collection("docs")
    assert not scene.fill()
    assert scene.hands.rows("SELECT count(*) FROM collection_spaces") == [(0,)]
    assert scene.hands.rows("SELECT state FROM reembeddings WHERE finished_at IS NULL") == []
    assert scene.hands.rows(f"SELECT count(*) FROM {scene.new.table_name}") == [(0,)]


def test_a_deletion_reaches_both_spaces(scene: Scene) -> None:
    scene.fill_all()
    scene.client.delete("docs", ["0"])
    gone = content_hash("text 0 of docs")
    for space in (scene.old, scene.new):
        query = f"SELECT count(*) FROM {space.table_name} WHERE content_hash = :h"
        assert scene.hands.rows(query, h=gone) == [(0,)]
    assert scene.coverage(scene.new) == Coverage(chunks=6, contents=6, missing=0, pending=0, dead=0)


@pytest.mark.parametrize("is_flipped", [False, True])
def test_the_vectors_of_both_spaces_are_referred_to(scene: Scene, is_flipped: bool) -> None:
    """Without a ChunkBatch or a job that is open: only the rows of the collection say what it has."""
    scene.fill_all()
    if is_flipped:
        reembeddings.swap(scene.db, "docs")
    scene.hands.rows("UPDATE contents SET created_at = now() - interval '90 days' RETURNING 1")
    assert [space.unreferenced.rows for space in scene.client.cache()] == [0, 0]
    assert scene.client.evict(max_bytes=0, dry_run=True).total.rows == 0
    scene.client.evict(max_bytes=0)
    scene.client.prune(0)
    assert scene.coverage(scene.new) == scene.coverage(scene.old) == Coverage(7, 7, 0, 0, 0)
    reembeddings.end(scene.db, "docs")
    left, kept = (scene.old, scene.new) if is_flipped else (scene.new, scene.old)
    scene.client.evict(max_bytes=0)
    assert scene.coverage(left).missing == 7
    assert scene.coverage(kept).missing == 0


def test_a_slice_that_is_about_to_be_evicted_is_kept_if_a_collection_has_come_to_its_space(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.fill_all()
    reembeddings.end(scene.db, "docs")
    begin_deletion = evict.begin_deletion

    def come_back(conn: sa.Connection) -> None:
        begin_deletion(conn)
        reembeddings.begin(scene.db, "docs", scene.new)

    monkeypatch.setattr(evict, "begin_deletion", come_back)
    scene.client.evict(max_bytes=0)
    assert scene.coverage(scene.new).missing == 0


def test_a_job_that_left_a_chunk_of_another_space_without_a_vector_is_not_pruned(scene: Scene) -> None:
    scene.fill_all()
    scene.client.enqueue([("a", "text a")], collection="docs")
    for chunk_batch in scene.hands.due():
        lease = scene.hands.claim(chunk_batch)
        scene.hands.embed(lease, {content_hash("text a"): "not_finite"} if lease.space_id == scene.new.id else {})
    scene.hands.rows("UPDATE jobs SET finished_at = now() - interval '90 days' RETURNING 1")
    (filling, beside) = scene.jobs_in(scene.new)
    assert scene.client.prune(30).kept_jobs == 1
    assert {job.id for job in scene.client.jobs()} == {filling, beside}
    assert len(scene.client.dead()) == 1


def test_a_space_beside_the_active_one_is_not_dropped(scene: Scene) -> None:
    scene.hands.rows("UPDATE spaces SET created_at = now() - interval '90 days' RETURNING 1")
    assert scene.client.prune(30).spaces == ()
    with pytest.raises(InvalidInput, match="collection 'docs' is being re-embedded into it or out of it"):
        scene.client.drop_space(scene.new.spec.fingerprint[:12])
    reembeddings.end(scene.db, "docs")
    assert scene.client.prune(30).spaces == (scene.new.spec.fingerprint,)
    assert scene.hands.rows("SELECT to_space_id FROM reembeddings") == [(scene.new.id,)]


def test_an_empty_collection_with_two_spaces_is_not_moved(scene: Scene) -> None:
    scene.client.delete("docs", [f"{i}" for i in range(7)])
    with pytest.raises(SpaceMismatch, match="is being re-embedded or can still be rolled back"):
        scene.client.enqueue([("a", "text a")], collection="docs", precision="int8")
    scene.client.enqueue([("a", "text a")], collection="docs", on_long="split")  # the other of its two spaces
    with scene.db.begin() as conn:
        assert collections.find(conn, "docs").space_id == scene.old.id


def test_what_waits_for_another_space_is_not_pending_in_the_overview(scene: Scene) -> None:
    scene.fill()
    docs, stays = scene.client.collections()
    assert (docs.embedded, docs.pending, docs.dead) == (7, 0, 0)
    assert stays.pending == 0
    assert [names for _, names in read_spaces(scene.settings)] == [["docs", "stays"], ["docs"]]


def test_on_the_schema_of_the_last_release_a_collection_has_one_space(
    client: Client, settings: Settings, hands: Hands
) -> None:
    command.downgrade(alembic_config(settings.require_database_url()), "0020")
    client.enqueue([("a", "text a"), ("b", "text b")], collection="docs")
    hands.work(dead={"text b": "not_finite"})
    (entry,) = client.dead()
    client.retry_dead([entry.id])
    hands.work()
    assert client.audit("docs").complete
    assert client.evict(max_bytes=0).total.rows == 0
    client.prune(0)
    assert [info.embedded for info in client.collections()] == [2]
    client.drop_collection("docs")


def test_a_text_that_comes_and_goes_is_not_taken_for_one_that_fails(scene: Scene) -> None:
    """Its ChunkBatch is opened again each time that its vector is missed, until it has no attempts left."""
    scene.fill_all()
    (job,) = scene.jobs_in(scene.new)
    (chunk_batch, *_) = scene.hands.of_job(job)
    scene.hands.rows(f"DELETE FROM {scene.new.table_name} RETURNING 1")
    scene.hands.rows("UPDATE chunk_batches SET max_attempts = attempt WHERE id = :id RETURNING 1", id=chunk_batch)
    scene.hands.rows("UPDATE jobs SET state = 'running' WHERE id = :id RETURNING 1", id=job)
    scene.hands.finish(job)
    query = "SELECT state, error_code FROM chunk_batches WHERE id = :id"
    assert scene.hands.rows(query, id=chunk_batch) == [("discarded", "vectors_missing")]
    scene.fill_all()
    assert not scene.coverage(scene.new).missing


def test_a_flip_stands_before_the_windows_that_come_later(scene: Scene) -> None:
    """Windows that overlap for ever would keep a flip waiting for ever if they could pass it."""
    first, second = scene.db.connect(), scene.db.connect()
    first.begin()
    others.hold(first, scene.id)

    def later() -> int | None:
        second.begin()
        return others.hold(second, scene.id).active

    with running(lambda: reembeddings.swap(scene.db, "docs"), release=first.commit):
        until(scene.hands.waiting)
        window = Call(later)
        until(lambda: scene.hands.waiting() == 2)
    assert window.result() == scene.new.id
    for conn in (first, second):
        conn.close()


def test_a_text_that_the_space_it_left_refuses_stays_in_the_collection(scene: Scene) -> None:
    """The chunk belongs to a job of the old space that rejects long texts, and the vector in that space was lost."""
    scene.client.enqueue([("a", "text a")], collection="docs", on_long="reject")
    scene.hands.work()
    scene.fill_all()
    reembeddings.swap(scene.db, "docs")
    scene.hands.rows("UPDATE collection_spaces SET on_long = 'reject' RETURNING 1")
    scene.hands.rows(f"DELETE FROM {scene.old.table_name} WHERE content_hash = sha256('text a') RETURNING 1")
    scene.fill()
    scene.hands.work(dead={"text a": "too_long"})
    assert "a" in scene.client.vectors("docs", ["a"])
    assert scene.coverage(scene.old).dead == 1


def test_a_route_that_nobody_here_serves_is_named(client: Client, db: sa.Engine, hands: Hands, small: Settings) -> None:
    client.enqueue([("a", "text a")], collection="docs")
    hands.work()
    reembedding = reembeddings.begin(db, "docs", reembeddings.second_space(db, "docs"), route="openai", priority="high")
    assert not fill.fill_some(db, small, reembedding)
    with db.begin() as conn:
        assert "cannot be filled from here: " in str(fill.why_waiting(conn, small, reembedding, PassedOverJobs()))
    client.enqueue([("b", "text b")], collection="docs")  # the producer goes on without the other space
    hands.rows("""UPDATE reembeddings SET plan = '{"route": "local", "priority": "high"}' RETURNING 1""")
    assert not fill.fill_some(db, small, reembedding)
    assert hands.rows("SELECT route, priority FROM chunk_batches WHERE space_id = 2 AND state = 'available'") == [
        ("local", Priority.HIGH.rank)
    ]


def test_a_drop_of_the_dead_leaves_what_is_searched_in_the_active_space(scene: Scene) -> None:
    scene.fill_all()
    scene.client.enqueue([("a", "text a"), ("b", "text b")], collection="docs")
    for chunk_batch in scene.hands.due():
        lease = scene.hands.claim(chunk_batch)
        dead = {content_hash("text a"): "not_finite", content_hash("text b"): "too_long"}
        scene.hands.embed(lease, dead if lease.space_id == scene.new.id else {})
    entries = scene.client.dead()
    assert {entry.chunk_id for entry in entries} == {"a", "b"}
    for code in ("not_finite", "too_long"):
        assert scene.client.drop_dead(code=code).entries == 0
    with pytest.raises(InvalidInput, match=r"dead in another space of collection 'docs' than the active one"):
        scene.client.drop_dead([entry.id for entry in entries])
    assert len(scene.client.dead()) == 2
    assert scene.client.audit("docs").chunks == 9
    reembeddings.end(scene.db, "docs")
    assert scene.client.drop_dead(job_id=entries[0].job_id).chunks == 0
    assert scene.client.audit("docs").chunks == 9
