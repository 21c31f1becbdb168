"""The corridor with two of everything: what belongs to one job, batch, database or space is never another's."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.domain.states import Route
from chunkmill.embedded import StackStatus
from chunkmill.errors import ProviderSilent
from chunkmill.ledger.dead.deaths import take_back_expired
from chunkmill.ledger.provider import provider_batches
from chunkmill.ledger.work import chunk_batches
from chunkmill.openai.http import Provider
from chunkmill.openai.wire.answers import LengthLimits
from chunkmill.settings import Settings
from chunkmill.store.delete import delete_some
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.keeper import StepKeeper
from chunkmill_workers.provider.plain import request_chunk_batch
from chunkmill_workers.provider.plain_attempt import PlainAttempt
from chunkmill_workers.provider.responder import ProviderResponder
from tests.conftest import fresh_settings
from tests.openai_server import OpenAIServer
from tests.support.corridor_scene import Scene, scene
from tests.support.waiting import PATIENCE, until

N = 6
CREATE, UPLOAD = {"endpoint": "batches.create"}, {"endpoint": "files.create"}


@pytest.fixture
def elsewhere(
    stage: Scene, stack: StackStatus, server: OpenAIServer, request: pytest.FixtureRequest
) -> Iterator[Scene]:
    """Another database, whose jobs, spaces and ProviderBatches have the same numbers, with the same provider."""
    with fresh_settings(stack) as settings, scene(settings, server, request) as made:
        made.name += " elsewhere"
        yield made


# Two batches at the provider


@pytest.mark.parametrize("applied", [True, False])
def test_a_batch_that_failed_validation_is_not_adopted(stage: Scene, server: OpenAIServer, applied: bool) -> None:
    """It bears the token of the ProviderBatch, too, and its failure has been counted before."""
    server.misbehave("fail_validation", code="who_knows")
    server.misbehave("cut", where=CREATE, after=1, applied=applied)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert [batch["status"] for batch in stage.batches()] == ["failed", "completed"]
    assert stage.corridor.batches()[0]["resends"] == 1


def test_of_two_batches_the_one_that_runs_is_adopted(stage: Scene, server: OpenAIServer) -> None:
    """A create without an answer has made two, and somebody has cancelled the older."""
    server.control(validating_seconds=600.0)
    server.misbehave("created_twice")
    server.misbehave("cut", where=CREATE, applied=True)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: len(stage.batches()) == 2)
    older, younger = stage.batches()
    server.cancel(older["id"])

    stage.run_until(lambda: stage.corridor.batches()[0]["batch_id"])

    assert stage.corridor.batches()[0]["batch_id"] == younger["id"]
    server.control(validating_seconds=0.0)
    [job] = stage.finish(job)
    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1


def test_a_batch_is_found_though_the_providers_clock_is_half_an_hour_behind(stage: Scene, server: OpenAIServer) -> None:
    """Others have made so many batches since that it is on the second page of the list."""
    server.control(clock_behind_seconds=1800.0)
    server.misbehave("cut", where=CREATE, applied=True)
    server.misbehave("fail_validation", times=None, where={"filename": "others.jsonl"})
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.batches())
    others = Provider(stage.corridor.settings)
    try:
        file = others.upload("others.jsonl", io.BytesIO(b"{}\n"))
        for _ in range(100):
            others.create(file, "others")
        others.delete_file(file)
    finally:
        others.close()

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert [batch["status"] for batch in stage.batches() if batch["input_filename"] != "others.jsonl"] == ["completed"]


def test_a_second_batch_that_shows_up_minutes_later_is_cancelled(stage: Scene, server: OpenAIServer) -> None:
    """The list was behind for so long that the batch was made anew."""
    server.control(list_lag_seconds=600.0, validating_seconds=600.0)
    server.misbehave("cut", where=CREATE, applied=True)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE state = 'submitted'"))
    assert len(stage.batches()) == 2
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text("UPDATE provider_batches SET submitted_at = submitted_at - interval '9 minutes'"))

    server.control(list_lag_seconds=0.0)
    stage.run_until(lambda: stage.batches()[0]["status"] == "cancelled")
    server.control(validating_seconds=0.0)
    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert [batch["status"] for batch in stage.batches()] == ["cancelled", "completed"]


def test_a_batch_whose_job_is_cancelled_after_its_upload_is_not_created(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("rate_limited", where=CREATE, retry_after_ms=1)
    texts, others = stage.texts(N), stage.texts(N, first=10)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE state = 'uploaded'"))
    stage.corridor.client.cancel(job.id)

    job, other = stage.finish(job, stage.enqueue(others, collection="other"))

    assert (job.state, other.state) == ("cancelled", "completed")
    assert (stage.bill(texts), stage.bill(others)) == ({}, dict.fromkeys(others, 1))
    assert len(stage.batches()) == 1
    stage.check_books()


# Two jobs


def test_two_jobs_that_share_a_request_are_charged_for_their_own(stage: Scene) -> None:
    """Three short texts of the one and one long text of the other fill a request of four."""
    short, long = stage.texts(3), {"c9": stage.text(9) + " word" * 50}
    jobs = [stage.enqueue(short), stage.enqueue(long, collection="other")]

    stage.finish(*jobs)

    assert stage.corridor.batches()[0]["n_requests"] == 1
    for table in ("charges", "usage"):
        booked = stage.corridor.rows(f"SELECT job_id, contents, tokens FROM {table} ORDER BY job_id")
        assert [(row["job_id"], row["contents"]) for row in booked] == [(jobs[0].id, 3), (jobs[1].id, 1)]
        assert 0 < booked[0]["tokens"] < booked[1]["tokens"]
    stage.check_books()


@pytest.mark.parametrize(("route", "usd_per_million"), [("openai", "0.01"), ("openai-sync", "0.02")])
def test_each_route_is_booked_at_its_price(stage: Scene, route: str, usd_per_million: str) -> None:
    stage.finish(stage.enqueue(stage.texts(N), route=route))

    assert stage.corridor.one("SELECT sum(usd) * 1000000 / sum(tokens) = :usd FROM charges", usd=usd_per_million)


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
def test_a_text_that_is_being_deleted_while_its_vector_is_written_leaves_none(stage: Scene, route: str) -> None:
    """The deletion has begun and not committed when the answer is there: the write waits for it."""
    corridor, texts = stage.corridor, stage.texts(4)
    job = stage.enqueue(texts, route=route)
    collection = corridor.one("SELECT id FROM collections")
    name = {"openai": "collect", "openai-sync": "write vectors"}[route]
    arrived, deleting, done = threading.Event(), threading.Event(), threading.Event()
    transact = corridor.context.transact

    def held(work: Callable[[sa.Connection], Any], what: str, **more: Any) -> Any:
        if what == name:
            arrived.set()
            assert deleting.wait(PATIENCE)
        return transact(work, what, **more)

    def finish() -> None:
        try:
            stage.run_until(arrived.is_set)
        finally:
            done.set()

    corridor.context.transact = held  # type: ignore[method-assign]
    worker = threading.Thread(target=finish, daemon=True)
    worker.start()
    try:
        assert arrived.wait(PATIENCE)
        with corridor.db.begin() as conn:
            delete_some(conn, collection_id=collection, chunk_ids=["c1", "c2"], limit=10)
            deleting.set()
            until(lambda: done.is_set() or waits_for_a_lock(stage))
            waited = not done.is_set()
    finally:
        deleting.set()
    worker.join(PATIENCE)
    assert not worker.is_alive()

    [job] = stage.finish(job)

    table = corridor.one("SELECT 'vectors_' || id FROM spaces")
    assert corridor.one(f"SELECT count(*) FROM {table}") == 2
    assert waited, "the write did not wait for the deletion"
    assert job.state == "completed"


def waits_for_a_lock(stage: Scene) -> bool:
    query = (
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    )
    return bool(stage.corridor.one(query))


def test_a_plain_request_whose_job_is_cancelled_while_it_waits_for_its_turn_is_not_sent(
    stage: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other job's request is sent, once."""
    texts, others = stage.texts(3), stage.texts(3, first=10)
    job = stage.enqueue(texts, route="openai-sync")
    other = stage.enqueue(others, route="openai-sync", collection="other")
    context = stage.corridor.context
    transact = ProviderContext.transact

    def cancelled(self: ProviderContext, work: Any, what: str, **more: Any) -> Any:
        result = transact(self, work, what, **more)
        if what == "take turn":
            stage.corridor.client.cancel(job.id)
            [held] = self.leases._held.values()
            self.leases.renew()
            assert held.lost.is_set(), "the lease keeper noticed it"
        return result

    with monkeypatch.context() as patch:
        patch.setattr(ProviderContext, "transact", cancelled)
        request_chunk_batch(context, stage.corridor.one("SELECT min(id) FROM chunk_batches"))
    assert stage.asked("embeddings.create") == 0

    job, other = stage.finish(job, other)
    assert (job.state, other.state) == ("cancelled", "completed")
    assert (stage.bill(texts), stage.bill(others)) == ({}, dict.fromkeys(others, 1))
    [job] = stage.finish(stage.corridor.client.retry(job.id))
    stage.check_done(job, texts)


def test_what_was_read_before_a_download_broke_off_is_kept(stage: Scene, server: OpenAIServer) -> None:
    """The file is gone afterwards, so that only what was not read is paid again."""
    provider = stage.corridor.context.provider
    lines = provider.lines

    @contextlib.contextmanager
    def broken(file_id: str, longest: LengthLimits) -> Iterator[Iterator[bytes]]:
        provider.lines = lines  # type: ignore[method-assign]
        with lines(file_id, longest) as whole:
            yield cut_after_the_first(file_id, whole)

    def cut_after_the_first(file_id: str, whole: Iterator[bytes]) -> Iterator[bytes]:
        yield next(whole)
        server.vanish(file_id)
        raise ProviderSilent("the connection was cut")

    provider.lines = broken  # type: ignore[method-assign]
    texts = stage.texts(8)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "completed"
    assert sorted(stage.bill(texts).values()) == [1] * 4 + [2] * 4
    assert stage.corridor.batches()[0]["n_written"] == 4


# Two databases


def test_the_file_of_an_upload_without_an_answer_is_deleted_and_no_other(stage: Scene, elsewhere: Scene) -> None:
    """Two databases lost the answer to an upload, each of its ProviderBatch number 1. One of the jobs is cancelled."""
    jobs, before = [], uploaded(stage)
    for place in (elsewhere, stage):
        stage.server.misbehave("cut", where=UPLOAD, applied=True)
        jobs.append(place.enqueue(place.texts(N)))
        place.run_until(lambda place=place: place.corridor.rows("SELECT FROM provider_batches WHERE failures = 1"))
    [theirs], [ours] = elsewhere.corridor.batches(), stage.corridor.batches()
    assert (ours["id"], ours["space_id"]) == (theirs["id"], theirs["space_id"])
    assert len(uploaded(stage)) == len(before) + 2

    stage.corridor.client.cancel(jobs[1].id)
    stage.finish(jobs[1])

    [left] = [name for name in uploaded(stage) if name not in before]
    assert theirs["token"] in left
    [job] = elsewhere.finish(jobs[0])
    assert job.state == "completed"
    assert uploaded(stage) == before


def uploaded(stage: Scene) -> list[str]:
    return [file["filename"] for file in stage.server.state()["files"] if file["purpose"] == "batch"]


def keys_of(context: ProviderContext) -> list[str]:
    """The keys of its requests, as they come."""
    keys: list[str] = []
    embed = context.provider.embed

    def noted(*given: Any, idempotency_key: str, **more: Any) -> dict[str, Any]:
        keys.append(idempotency_key)
        return embed(*given, idempotency_key=idempotency_key, **more)

    context.provider.embed = noted  # type: ignore[method-assign]
    return keys


def test_a_question_has_a_key_that_no_other_database_has(stage: Scene, elsewhere: Scene) -> None:
    """Both number their questions alike, and a server that knows keys would answer the second with the first."""
    keys = [keys_of(place.corridor.context) for place in (stage, elsewhere)]
    for place in (stage, elsewhere):
        asking = threading.Thread(target=place.corridor.client.embed, args=([place.text(0)],), daemon=True)
        asking.start()
        until(ProviderResponder(place.corridor.context).answer_next)
        asking.join(PATIENCE)
        assert not asking.is_alive()

    assert len(keys[0]) == len(keys[1]) == 1
    assert keys[0] != keys[1]
    for place in (stage, elsewhere):
        booked = place.corridor.rows(
            "SELECT job_id, contents, sum(usd) * 1000000 / sum(tokens) AS usd FROM charges GROUP BY 1, 2"
        )
        assert [(row["job_id"], row["contents"], float(row["usd"])) for row in booked] == [(0, 1, 0.02)]


def test_a_plain_request_has_a_key_of_its_contents_and_its_space(
    stage: Scene, settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    """The same texts in a space of other dimensions are another request; sent again they are the same one."""
    keys = keys_of(stage.corridor.context)
    server.misbehave("cut", where={"endpoint": "embeddings.create"})
    stage.finish(stage.enqueue(stage.texts(3), route="openai-sync"))
    with scene(settings, server, request, embedding_dimensions=16) as wider:
        others = keys_of(wider.corridor.context)
        wider.finish(wider.enqueue(stage.texts(3), route="openai-sync", collection="wider"))

    assert len(keys) == 2 and len(set(keys)) == 1
    assert len(others) == 1 and others != keys[:1]


# What the poller and the keeper of leases do for others


def test_what_no_step_has_settled_is_settled_in_its_own_space(
    stage: Scene, settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    """Workers were killed after the vectors of ChunkBatches of two spaces were written."""
    stage.finish(stage.enqueue(stage.texts(3)))
    with scene(settings, server, request, embedding_dimensions=16) as wider:
        wider.finish(wider.enqueue(wider.texts(3, first=10), collection="wider"))
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'running', finished_at = NULL, n_embedded = 0"))

    stage.corridor.poller.round()

    rows = stage.corridor.rows("SELECT state, n_embedded FROM chunk_batches ORDER BY id")
    assert rows == [{"state": "completed", "n_embedded": 3}] * 2


def test_a_step_keeps_its_lease_though_one_renewal_failed(stage: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.enqueue(stage.texts(3))
    stage.corridor.poller.round()
    with stage.corridor.db.begin() as conn:
        [number] = conn.execute(sa.text("SELECT id FROM provider_batches")).scalars()
        step = provider_batches.claim_if_due(conn, number, owner="somebody", lease_seconds=3600.0, server="here")
    assert step is not None
    renew = provider_batches.renew_if_held
    failures: list[str] = []

    def fails_once(*given: Any, **more: Any) -> set[int]:
        if not failures:
            failures.append("once")
            raise sa.exc.TimeoutError("no connection came free")
        return renew(*given, **more)

    monkeypatch.setattr(provider_batches, "renew_if_held", fails_once)
    keeper = StepKeeper(stage.corridor.db, 0.3)
    keeper.start()
    try:
        with keeper.holding(step):
            soon = "SELECT lease_until < now() + interval '30 minutes' FROM provider_batches"
            until(lambda: stage.corridor.one(soon), lambda: "the lease was not renewed")
    finally:
        keeper.stop()
    assert failures


def test_an_attempt_that_was_taken_back_keeps_its_end_on_record(stage: Scene) -> None:
    """Its worker was silent for longer than its lease, and gives the ChunkBatch back when it wakes up."""
    context = stage.corridor.context
    stage.enqueue(stage.texts(3), route="openai-sync")
    stage.enqueue(stage.texts(3, first=10), route="openai-sync", collection="other")
    attempts = []
    with stage.corridor.db.begin() as conn:
        for number in conn.execute(sa.text("SELECT id FROM chunk_batches ORDER BY id")).scalars().all():
            lease = chunk_batches.claim_if_due(
                conn, number, owner="somebody", lease_seconds=600.0, route=Route.OPENAI_SYNC
            )
            assert lease is not None
            attempts.append(lease)
    first, second = (PlainAttempt(context, lease) for lease in attempts)
    first.start()
    second.start()
    with stage.corridor.db.begin() as conn:
        over = "UPDATE chunk_batches SET lease_until = now() - interval '1 s' WHERE id = :id"
        conn.execute(sa.text(over), {"id": first.lease.chunk_batch_id})
        take_back_expired(conn)

    first.release()
    second.release()

    outcomes = stage.corridor.rows("SELECT outcome FROM usage ORDER BY chunk_batch_id")
    assert [row["outcome"] for row in outcomes] == ["died", "released"]
