"""The worker's story against real Postgres, Redis and the real model, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Chunk, Client, InvalidInput, JobFailed, JobState, WaitTimeout
from chunkmill.errors import EngineError, SpaceMismatch
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.jobs import finish
from chunkmill.ledger.work import chunk_batches
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.local import attempt as attempts
from chunkmill_workers.local import pipeline
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from chunkmill_workers.process import context as process_context
from tests.integration.conftest import Runner
from tests.support.waiting import PATIENCE, together

LONG = "many words in one long text " * 80  # past MiniLM's 256 tokens


def some(n: int) -> list[Chunk]:
    return [Chunk(f"id-{i}", f"a text about subject {i}", {"even": i % 2 == 0}) for i in range(n)]


def test_chunks_in_complete_searchable_vectors_out(runner: Runner, client: Client, context: WorkerContext) -> None:
    job = client.enqueue(some(40), collection="docs")
    assert runner.run_due() == [TaskResult.COMPLETED]
    job = client.wait(job.id, timeout=PATIENCE)
    assert (job.state, job.embedded, job.remaining, job.dead) == (JobState.COMPLETED, 40, 0, 0)
    assert job.tokens > 40
    assert job.engine_seconds > 0
    audit = client.audit("docs")
    assert (audit.complete, audit.chunks, audit.embedded, audit.missing) == (True, 40, 40, 0)

    engine = context.engines.for_space(_space(context))
    vectors = client.vectors("docs")
    expected = engine.embed([c.text for c in some(40)]).vectors
    np.testing.assert_allclose([vectors[c.id] for c in some(40)], expected, atol=1e-5)
    hits = client.search(expected[7], collection="docs", k=3)
    assert (hits[0].chunk_id, hits[0].text) == ("id-7", "a text about subject 7")
    assert hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert all(
        h.metadata == {"even": True} for h in client.search(expected[7], collection="docs", metadata={"even": True})
    )


def test_the_second_enqueue_is_answered_from_the_cache(runner: Runner, client: Client) -> None:
    runner.finish(client.enqueue(some(20), collection="docs"))
    client._broker.client.flushdb()
    again = client.enqueue(some(20), collection="docs")
    elsewhere = client.enqueue([(f"other-{i}", c.text) for i, c in enumerate(some(20))], collection="elsewhere")
    for job in (again, elsewhere):
        assert (job.state, job.cached, job.embedded, job.remaining) == (JobState.COMPLETED, 20, 0, 0)
    assert client._broker.client.dbsize() == 0  # a fully cached job never touches Redis
    assert client.audit("elsewhere").complete


def test_completed_means_an_empty_anti_join(
    runner: Runner, client: Client, db: sa.Engine, context: WorkerContext
) -> None:
    """Promise 1: vectors vanish behind the ledger's back, from a cache hit and from a fresh ChunkBatch alike."""
    runner.finish(client.enqueue(some(5), collection="docs"))
    job = client.enqueue(some(10), collection="docs")
    table = _space(context).table_name
    real_finish = finish.finish_if_done

    def vanish_first(conn: sa.Connection, job_id: int, space: registry.Space) -> JobState | None:
        if not vanished:
            vanished.append(conn.execute(sa.text(f"DELETE FROM {table}")).rowcount)
        return real_finish(conn, job_id, space)

    vanished: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_context, "finish_if_done", vanish_first)
        runner.run_due()
        assert vanished == [10]
        assert client.job(job.id).state is JobState.RUNNING
        assert client.audit("docs").missing == 10
    assert runner.finish(job).state is JobState.COMPLETED
    assert client.audit("docs").complete


def test_an_audit_sees_what_is_missing_pending_and_dead(runner: Runner, client: Client, context: WorkerContext) -> None:
    job = client.enqueue(some(3), collection="docs")
    before = client.audit("docs")
    assert (before.complete, before.missing, before.pending) == (False, 3, 3)
    assert before.missing_ids == ("id-0", "id-1", "id-2")
    runner.finish(job)
    with context.db.begin() as conn:
        conn.execute(sa.text(f"DELETE FROM {_space(context).table_name} WHERE ctid = '(0,1)'"))
    after = client.audit("docs")
    assert (after.missing, after.pending, after.dead) == (1, 0, 0)
    # Enqueueing the collection again mends it.
    runner.finish(client.enqueue(some(3), collection="docs"))
    assert client.audit("docs").complete


def test_a_vector_of_another_space_cannot_be_written(runner: Runner, client: Client, context: WorkerContext) -> None:
    """Promise 5, at the door itself and through a worker that has other files under the same name."""
    job = client.enqueue(some(2), collection="docs")
    space = _space(context)
    other = dataclasses.replace(space.spec, revision="sha256:other")
    one = np.ones((1, 384), dtype=np.float32)
    arguments = ([bytes(32)], np.ones(1, dtype=np.int32), np.zeros(1, dtype=bool), one)
    with pytest.raises(SpaceMismatch, match="cannot enter space"), context.db.begin() as conn:
        write_vectors(conn, space, other.fingerprint, *arguments)
    with context.db.begin() as conn:
        conn.execute(
            sa.text('UPDATE spaces SET fingerprint = :f, spec = spec || \'{"revision": "sha256:other"}\''),
            {"f": other.fingerprint},
        )
    with context.db.begin() as conn, pytest.raises(SpaceMismatch):
        context.engines.for_space(registry.get(conn, space.id))  # nor may it answer queries
    context.engines.left_to_others.clear()
    assert runner.run_due() == [TaskResult.RELEASED]
    context.engines.left_to_others.clear()
    with context.db.begin() as conn:
        row = conn.execute(sa.text("SELECT state, error_code, max_attempts - attempt FROM chunk_batches")).one()
    assert tuple(row) == ("available", "space_mismatch", 5)
    assert client.audit("docs").embedded == 0
    assert client.job(job.id).state is JobState.RUNNING


@pytest.mark.parametrize(
    ("vectors", "says"),
    [(np.ones((1, 383), dtype=np.float32), "shape"), (np.full((1, 384), np.nan, dtype=np.float32), "not finite")],
)
def test_the_door_refuses_what_is_not_a_vector(client: Client, context: WorkerContext, vectors: Any, says: str) -> None:
    client.enqueue(some(1), collection="docs")
    space = _space(context)
    with pytest.raises(EngineError, match=says), context.db.begin() as conn:
        write_vectors(
            conn, space, space.spec.fingerprint, [bytes(32)], np.ones(1, np.int32), np.zeros(1, bool), vectors
        )


def test_truncation_is_counted_and_stored(runner: Runner, client: Client) -> None:
    job = runner.finish(client.enqueue([("short", "a few words"), ("long", LONG)], collection="docs"))
    assert (job.state, job.truncated, job.dead) == (JobState.COMPLETED, 1, 0)
    assert client.audit("docs").truncated == 1
    vector = client.vectors("docs", ["long"])["long"]
    assert [h.truncated for h in client.search(vector, collection="docs", k=2)] == [True, False]
    assert client.enqueue([("long", LONG)], collection="docs").truncated == 1  # from the cache, too


def test_reject_names_the_long_chunk_and_embeds_its_neighbours(runner: Runner, client: Client) -> None:
    job = runner.finish(client.enqueue([("short", "a few words"), ("long", LONG)], collection="docs", on_long="reject"))
    assert (job.state, job.embedded, job.truncated, job.dead) == (JobState.COMPLETED, 1, 0, 1)
    (dead,) = job.dead_chunks
    assert (dead.chunk_id, dead.code) == ("long", "too_long")
    assert "256" in dead.reason
    assert "many words" not in dead.reason
    audit = client.audit("docs")
    assert (audit.chunks, audit.complete) == (1, True)


def test_reject_also_refuses_what_the_cache_holds_truncated(runner: Runner, client: Client) -> None:
    runner.finish(client.enqueue([("long", LONG)], collection="docs"))
    job = client.enqueue([("again", LONG), ("short", "fine")], collection="docs", on_long="reject")
    assert [(d.chunk_id, d.code) for d in job.dead_chunks] == [("again", "too_long")]
    assert client.audit("docs").chunks == 2  # the first one, truncated as it was asked for, and "short"


def test_split_is_a_space_of_its_own_and_cuts_nothing(runner: Runner, client: Client) -> None:
    runner.finish(client.enqueue([("long", LONG)], collection="cut"))
    job = runner.finish(client.enqueue([("long", LONG)], collection="whole", on_long="split"))
    assert (job.state, job.cached, job.truncated) == (JobState.COMPLETED, 0, 0)
    cut, whole = client.vectors("cut")["long"], client.vectors("whole")["long"]
    assert client.job(job.id).space != client.audit("cut").space
    assert 0.5 < float(cut @ whole) < 0.99999


def test_a_poison_text_is_isolated_and_the_rest_finishes(
    runner: Runner, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 7. The fake is the model's refusal of one text; everything after it is real."""
    poison = some(20)[11].text
    job = client.enqueue(some(20), collection="docs")
    _hear_canary(runner.context)
    _fail_on(monkeypatch, poison)
    job = runner.finish(job)
    assert (job.state, job.embedded, job.dead) == (JobState.FAILED, 19, 1)
    assert [(d.chunk_id, d.code) for d in job.dead_chunks] == [("id-11", "not_finite")]
    with pytest.raises(JobFailed, match="id-11"):
        client.wait(job.id)
    audit = client.audit("docs")
    assert (audit.missing, audit.dead, audit.missing_ids) == (1, 1, ("id-11",))
    monkeypatch.undo()
    assert runner.finish(client.retry(job.id)).state is JobState.COMPLETED
    assert client.job(job.id).dead == 0


def test_a_failing_chunk_batch_backs_off_and_is_discarded(
    runner: Runner, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> Iterator[TokenBatchResult]:
        raise MemoryError("no room for it")

    job = client.enqueue(some(3), collection="docs")
    _hear_canary(runner.context)
    monkeypatch.setattr(Engine, "stream", broken)
    monkeypatch.setattr("chunkmill.domain.retries.BASE_DELAY_S", PATIENCE)
    for attempt in range(1, 6):
        assert runner.run_due() == [TaskResult.FAILED]
        assert runner.due() == []  # not before its delay is over
        with db.begin() as conn:
            row = conn.execute(sa.text("SELECT state, attempt, error_code, error FROM chunk_batches")).one()
            conn.execute(sa.text("UPDATE chunk_batches SET not_before = now()"))
        assert row.attempt == attempt
        assert row.error == "test-worker: MemoryError"
    assert row.state == "discarded"
    job = client.job(job.id)
    assert job.state is JobState.FAILED
    assert "1 ChunkBatch was discarded" in (job.error or "")
    monkeypatch.undo()
    assert runner.finish(client.retry(job.id)).state is JobState.COMPLETED


def test_only_one_of_many_claims_gets_the_lease(client: Client, context: WorkerContext) -> None:
    client.enqueue(some(3), collection="docs")

    def claim() -> chunk_batches.Lease | None:
        with context.db.begin() as conn:
            return chunk_batches.claim_if_due(conn, 1, owner="w", lease_seconds=60)

    assert sorted(lease is None for lease in together(*[claim] * 8)) == [False] + [True] * 7


def test_a_zombie_cannot_finish_what_another_has_claimed(
    runner: Runner, client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker sleeps past its lease, another takes over, the first wakes up: its completion finds no row."""
    job = client.enqueue(some(8), collection="docs")
    _hear_canary(context)
    real_stream = Engine.stream
    second: list[TaskResult] = []

    def sleeps(self: Engine, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        monkeypatch.setattr(Engine, "stream", real_stream)
        with db.begin() as conn:
            conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() - interval '1 s'"))
            assert deaths.take_back_expired(conn).available == 1
        second.append(run_chunk_batch(context, 1))
        yield from real_stream(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "stream", sleeps)
    monkeypatch.setattr(pipeline, "FLUSH_SECONDS", 1e9)  # it learns of its loss with all its results in hand
    assert run_chunk_batch(context, 1) is TaskResult.LEASE_LOST
    assert second == [TaskResult.COMPLETED]
    job = client.job(job.id)
    assert (job.state, job.embedded) == (JobState.COMPLETED, 8)
    with db.begin() as conn:
        booked = conn.execute(sa.text("SELECT attempt, contents, recomputed, outcome FROM usage ORDER BY attempt"))
        assert booked.all() == [(1, 0, 8, "died"), (2, 8, 0, "completed")]  # all it did had been done by then


def test_a_zombie_changes_nothing_while_another_attempt_runs(
    client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fencing number decides, not the state: the ChunkBatch is running, but in another's hands."""
    client.enqueue(some(8), collection="docs")
    _hear_canary(context)
    real_stream = Engine.stream

    def sleeps(self: Engine, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        with db.begin() as conn:
            conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() - interval '1 s'"))
            assert deaths.take_back_expired(conn).available == 1
            assert chunk_batches.claim_if_due(conn, 1, owner="another", lease_seconds=60) is not None
        yield from real_stream(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "stream", sleeps)
    assert run_chunk_batch(context, 1) is TaskResult.LEASE_LOST
    with db.begin() as conn:
        row = conn.execute(sa.text("SELECT state, attempt, lease_owner, n_embedded FROM chunk_batches")).one()
        assert tuple(row) == ("running", 2, "another", 0)
        # Its vectors are right and stay; the attempt that took over has nothing booked by it.
        assert conn.execute(sa.text("SELECT attempt, contents, outcome FROM usage")).all() == [(1, 8, "died")]


def test_vectors_that_never_stay_fail_the_job_in_the_end(
    runner: Runner, client: Client, context: WorkerContext, db: sa.Engine
) -> None:
    job = client.enqueue(some(1), collection="docs")
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET max_attempts = 3"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "write_vectors", lambda *args: 0)
        # It is lost with the end of an attempt. What an earlier flush has lost is embedded again, however often.
        patch.setattr(pipeline, "FLUSH_SECONDS", 1e9)
        job = runner.finish(job)
    assert job.state is JobState.RUNNING
    with db.begin() as conn:
        assert finish.finish_if_done(conn, job.id, _space(context)) is JobState.FAILED
    assert "vectors were missing" in (client.job(job.id).error or "")


def test_the_lease_keeper_renews_and_notices_a_loss(client: Client, context: WorkerContext, db: sa.Engine) -> None:
    client.enqueue(some(1), collection="docs")
    with context.db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, 1, owner="w", lease_seconds=1)
        until = conn.execute(sa.text("SELECT lease_until FROM chunk_batches")).scalar_one()
    assert lease is not None
    with context.leases.holding(lease) as held:
        context.leases.renew()
        with db.begin() as conn:
            renewed = conn.execute(sa.text("SELECT lease_until FROM chunk_batches")).scalar_one()
        assert renewed > until
        held.check()
        client.cancel(client.jobs()[0].id)
        context.leases.renew()
        with pytest.raises(Exception, match="lost its lease"):
            held.check()


def test_a_stopping_worker_keeps_what_it_did_and_gives_the_rest_back(
    runner: Runner, client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_stream = Engine.stream

    def stops_after_one(self: Engine, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        for result in real_stream(self, *args, **kwargs):
            yield result
            context.stopping.set()

    chunks = [
        (str(i), f"text number {i}, " + "with many words to fill several forward passes " * 4) for i in range(300)
    ]
    job = client.enqueue(chunks, collection="docs")
    _hear_canary(context)
    monkeypatch.setattr(Engine, "stream", stops_after_one)
    assert runner.run_due() == [TaskResult.RELEASED]
    done = client.job(job.id)
    assert 0 < done.embedded < 300
    with db.begin() as conn:
        row = conn.execute(sa.text("SELECT state, attempt, max_attempts, rung_at FROM chunk_batches")).one()
    assert tuple(row) == ("available", 1, 6, None)  # not charged
    context.stopping.clear()
    monkeypatch.undo()
    finished = runner.finish(job)
    assert (finished.state, finished.embedded) == (JobState.COMPLETED, 300)
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT sum(contents) FROM usage")).scalar_one() == 300  # both attempts are booked


def test_a_chunk_deleted_meanwhile_does_not_hold_the_job(
    runner: Runner, client: Client, rows: Callable[[str], int]
) -> None:
    job = client.enqueue(some(5), collection="docs")
    assert client.delete("docs", ["id-1", "id-3"]) == 2
    assert runner.finish(job).state is JobState.COMPLETED
    assert rows("contents") == 3
    assert client.audit("docs").embedded == 3


def test_delete_takes_texts_and_vectors_with_the_last_reference(
    runner: Runner, client: Client, rows: Callable[[str], int], context: WorkerContext
) -> None:
    runner.finish(client.enqueue([("a", "shared"), ("b", "own")], collection="one"))
    runner.finish(client.enqueue([("c", "shared")], collection="two"))
    assert client.delete("one", all_chunks=True) == 2
    assert rows("contents") == rows(_space(context).table_name) == 1
    assert client.audit("two").complete
    assert client.delete("one", all_chunks=True) == 0
    # An emptied collection may move to another space.
    client.enqueue([("a", "shared")], collection="one", on_long="split")


def test_embed_requests_are_answered_between_bulk_work(client: Client, context: WorkerContext) -> None:
    client.enqueue(some(3), collection="docs")
    responder = EmbedResponder(context)
    responder.start()
    try:
        vectors = client.embed(["one text", "another text"], timeout=PATIENCE)
        expected = context.engines.for_space(_space(context)).embed(["one text", "another text"]).vectors
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert client.search("a subject", collection="docs", timeout=PATIENCE) == []
        assert client.embed([]).shape == (0, 384)
    finally:
        responder.stop()
    with pytest.raises(WaitTimeout, match="One is connected, so allow more time"):
        client.embed(["nobody is there"], timeout=0.1)
    with pytest.raises(InvalidInput, match=r"texts\[1\]"):
        client.embed(["fine", "not\x00fine"])


def test_halfvec_storage_exactly_and_through_segments(
    settings: Settings, runner: Runner, client: Client, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Client(client._db, client._broker, settings.model_copy(update={"vector_storage": "halfvec"}))
    job = runner.finish(half.enqueue(some(60), collection="docs"))
    assert job.state is JobState.COMPLETED
    space = _space(context)
    assert space.storage == "halfvec"
    query = context.engines.for_space(space).embed(["a text about subject 33"]).vectors[0]
    exact = half.search(query, collection="docs", k=5, exact=True)
    assert exact[0].chunk_id == "id-33"
    monkeypatch.setattr("chunkmill.store.indexing.MIN_ROWS", 10)
    index = half.index("docs")
    assert (index.is_ready, index.rows) == (True, 60)
    assert [h.chunk_id for h in half.search(query, collection="docs", k=5)] == [h.chunk_id for h in exact]


def test_search_goes_through_the_graph_and_filters_inside_it(
    runner: Runner, client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkmill.store.indexing.MIN_ROWS", 10)
    monkeypatch.setattr("chunkmill.domain.serving.GRAPH_ROWS", 40)
    monkeypatch.setattr("chunkmill.store.search.MAX_EXACT", 3)
    runner.finish(client.enqueue(some(80), collection="docs"))
    runner.finish(client.enqueue([(f"o{i}", f"unrelated matter {i}") for i in range(80)], collection="other"))
    query = context.engines.for_space(_space(context)).embed(["a text about subject 12"]).vectors[0]
    exact = client.search(query, collection="docs", k=5, metadata={"even": True}, exact=True)
    assert client.index("docs").graph_rows == 80
    statements: list[tuple[str, Any]] = []
    listener = lambda *args: statements.append((args[2], args[3]))  # noqa: E731
    sa.event.listen(client._db, "before_cursor_execute", listener)
    hits = client.search(query, collection="docs", k=5, metadata={"even": True})
    sa.event.remove(client._db, "before_cursor_execute", listener)
    assert [h.chunk_id for h in hits] == [h.chunk_id for h in exact]
    statement, parameters = [asked for asked in statements if "<=>" in asked[0]][-1]
    with db.begin() as conn:
        # Eighty rows are too few for the planner to prefer an index on its own.
        for method in ("seqscan", "sort", "bitmapscan"):
            conn.execute(sa.text(f"SET LOCAL enable_{method} = off"))
        plan = "\n".join(conn.exec_driver_sql("EXPLAIN " + statement, parameters).scalars())
    assert "Index Scan using ix_segment_" in plan, plan


def test_only_what_is_missing_is_embedded_on_a_later_attempt(
    runner: Runner, client: Client, db: sa.Engine, context: WorkerContext
) -> None:
    first = runner.finish(client.enqueue(some(6), collection="docs"))
    with db.begin() as conn:
        conn.execute(sa.text(f"DELETE FROM {_space(context).table_name} WHERE ctid = '(0,1)'"))
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'available', rung_at = NULL"))
        conn.execute(sa.text("UPDATE jobs SET state = 'running'"))
    assert runner.finish(first).state is JobState.COMPLETED
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT contents FROM usage ORDER BY attempt")).scalars().all() == [6, 1]


def _space(context: WorkerContext) -> registry.Space:
    with context.db.begin() as conn:
        return registry.all_spaces(conn)[0]


def _hear_canary(context: WorkerContext) -> None:
    """As a worker does on its start, so that what a test then does to the engine meets its chunks alone."""
    context.engine_for(_space(context))


def _fail_on(monkeypatch: pytest.MonkeyPatch, poison: str) -> None:
    """Let the model return NaN for one text, whatever batch it is in."""
    real_stream = Engine.stream

    def poisoned(self: Engine, texts: Any, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        from chunkmill_workers.engine.results import TextFailure

        bad = texts.index(poison)
        for result in real_stream(self, texts, *args, **kwargs):
            keep = result.indices != bad
            failures = () if keep.all() else (TextFailure(bad, "not_finite", "the vector is not finite"),)
            yield dataclasses.replace(
                result,
                indices=result.indices[keep],
                vectors=result.vectors[keep],
                n_tokens=result.n_tokens[keep],
                truncated=result.truncated[keep],
                failures=failures,
            )

    monkeypatch.setattr(Engine, "stream", poisoned)
