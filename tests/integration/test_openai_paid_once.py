"""No content is paid twice: not by a create without an answer, a crash, a second worker, job or route."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.errors import EngineError, LeaseLost
from chunkmill.ledger.provider import provider_batches
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.reembedding import fill
from chunkmill.settings import Settings
from chunkmill.spaces import collections
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.plain import request_chunk_batch
from chunkmill_workers.provider.responder import ProviderResponder
from chunkmill_workers.provider.steps import _STEPS
from tests.openai_server import OpenAIServer, vector_for
from tests.support import reembeddings
from tests.support.corridor import DIMENSIONS, Corridor
from tests.support.corridor_scene import Scene, scene
from tests.support.waiting import PATIENCE, Call, running, together

N = 6
CREATE = {"endpoint": "batches.create"}
EMBED = {"endpoint": "embeddings.create"}


@pytest.fixture
def looking(settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """One in which a create without an answer is looked for at the provider for as long as the test wants."""
    with scene(settings, server, request, openai_adopt_seconds=PATIENCE) as made:
        yield made


# A create without an answer

NO_ANSWER: dict[str, Callable[[OpenAIServer, bool], object]] = {
    "cut": lambda server, applied: server.misbehave("cut", where=CREATE, applied=applied),
    "hang": lambda server, applied: server.misbehave("hang", where=CREATE, applied=applied, seconds=2.0),
    "500": lambda server, applied: server.misbehave("http_error", where=CREATE, applied=applied),
    "409": lambda server, applied: server.misbehave("http_error", where=CREATE, applied=applied, status=409),
}


def give_up_the_first_create(stage: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """After half a second. All other answers have the time that a stalled machine needs for them."""
    provider = stage.corridor.context.provider
    patient, create = provider._client, provider.create

    def hurried(*args: str) -> object:
        monkeypatch.setattr(provider, "create", create)
        provider._client = patient.with_options(timeout=0.5)
        try:
            return create(*args)
        finally:
            provider._client = patient

    monkeypatch.setattr(provider, "create", hurried)


@pytest.mark.parametrize("kind", NO_ANSWER)
@pytest.mark.parametrize("applied", [True, False])
def test_a_create_without_an_answer(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, kind: str, applied: bool
) -> None:
    NO_ANSWER[kind](server, applied)
    if kind == "hang":
        give_up_the_first_create(stage, monkeypatch)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert len(stage.batches()) == 1, "adopted, or made after it was known that there is none"
    assert stage.corridor.batches()[0]["creates"] == (1 if applied else 2)
    assert stage.charged_attempts() == 1


def test_an_orphan_is_known_by_its_file(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("metadata_dropped", times=None)
    server.misbehave("cut", where=CREATE, applied=True)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert len(stage.batches()) == 1


@pytest.mark.parametrize("answered", [True, False])
def test_a_batch_that_was_made_twice_is_paid_once(stage: Scene, server: OpenAIServer, answered: bool) -> None:
    server.control(validating_seconds=3600.0)
    server.misbehave("created_twice")
    if not answered:
        server.misbehave("cut", where=CREATE, applied=True)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: "cancelled" in [batch["status"] for batch in stage.batches()])
    server.control(validating_seconds=0.0)

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert sorted(batch["status"] for batch in stage.batches()) == ["cancelled", "completed"]


def test_a_list_that_is_behind_is_waited_for(looking: Scene, server: OpenAIServer) -> None:
    stage = looking
    server.control(list_lag_seconds=3600.0)
    server.misbehave("cut", where=CREATE, applied=True)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.asked("batches.list") >= 2)
    server.control(list_lag_seconds=0.0)

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert len(stage.batches()) == 1


def test_what_shows_up_after_all_is_cancelled(stage: Scene, server: OpenAIServer) -> None:
    """The list was behind for longer than anybody waits: the batch was made anew, and the first comes to light."""
    server.control(list_lag_seconds=3600.0, validating_seconds=3600.0)
    server.misbehave("cut", where=CREATE, applied=True)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: len(stage.batches()) == 2)
    server.control(list_lag_seconds=0.0)
    stage.run_until(lambda: stage.batches()[0]["status"] == "cancelled")
    server.control(validating_seconds=0.0)

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert [batch["status"] for batch in stage.batches()] == ["cancelled", "completed"]


# Workers that die


class Died(BaseException):
    """As a SIGKILL: nothing that comes after it runs."""


class Mortal:
    """Counts what a worker does outside itself, transactions and calls, and dies after one of them."""

    def __init__(self, context: ProviderContext, nth: int) -> None:
        self.left = nth
        self.context = context
        transact = context.transact
        context.transact = lambda work, what, **more: self(lambda: transact(work, what, **more))  # type: ignore[method-assign]
        for name in ("upload", "create", "retrieve", "find", "delete_file", "files_named"):
            self._wrap(name)

    def _wrap(self, name: str) -> None:
        call = getattr(self.context.provider, name)
        setattr(self.context.provider, name, lambda *given, **more: self(lambda: call(*given, **more)))

    def __call__(self, act: Callable[[], Any]) -> Any:
        self.left -= 1
        result = act()
        if self.left == 0:
            raise Died
        return result


def expire_leases(stage: Scene) -> None:
    with stage.corridor.db.begin() as conn:
        conn.execute(
            sa.text("UPDATE provider_batches SET lease_until = now() - interval '1 s' WHERE lease_until > now()")
        )


def test_a_worker_may_die_between_any_two_things_it_does(stage: Scene) -> None:
    corridor = stage.corridor
    deaths = 0
    while True:
        texts = stage.texts(2, first=10 * deaths)
        job = stage.enqueue(texts)
        whole, corridor.context = corridor.context, corridor.worker()
        mortal = Mortal(corridor.context, deaths + 1)
        with contextlib.suppress(Died):
            stage.finish(job)
        corridor.context.close()
        corridor.context = whole
        expire_leases(stage)
        [job] = stage.finish(job)
        assert job.state == "completed"
        assert stage.bill(texts) == dict.fromkeys(texts, 1), f"died after {deaths + 1}"
        if mortal.left > 0:
            break
        deaths += 1
    assert deaths >= 15, "it does so much at least"
    assert len(stage.batches()) == deaths + 1
    stage.check_books()


# Workers that are late


def claim(stage: Scene, context: ProviderContext) -> Step:
    with stage.corridor.db.begin() as conn:
        [batch_id] = conn.execute(sa.text("SELECT id FROM provider_batches WHERE state <> 'closed'")).scalars()
        step = provider_batches.claim_if_due(
            conn, batch_id, owner="somebody", lease_seconds=60.0, server=context.provider.server
        )
    assert step is not None
    return step


def walk_to(stage: Scene, state: State) -> Step:
    """Claimed, and at this step."""
    context = stage.corridor.context
    stage.corridor.poller.round()
    step = claim(stage, context)
    while step.state is not state:
        if state is State.CREATING and step.state is State.UPLOADED:
            with stage.corridor.db.begin() as conn:
                return provider_batches.advance(
                    conn, step, State.CREATING, creates=1, creating_since=sa.text("now() - interval '1 hour'")
                )
        following = _STEPS[step.state](context, step)
        assert following is not None
        step = following
    return step


STEPS = [state for state in State if state is not State.CLOSED]


@pytest.mark.parametrize("state", STEPS)
def test_a_worker_that_lost_its_lease_changes_nothing(stage: Scene, server: OpenAIServer, state: State) -> None:
    server.control(in_progress_seconds=0.3 if state is State.SUBMITTED else 0.0)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    late = walk_to(stage, state)
    expire_leases(stage)
    before = claim(stage, stage.corridor.context)
    rows = stage.corridor.rows("SELECT * FROM provider_inputs ORDER BY content_hash")

    with pytest.raises(LeaseLost):
        step: Step | None = late
        while step is not None:
            step = _STEPS[step.state](stage.corridor.context, step)

    assert stage.corridor.batches()[0]["state"] == state
    assert stage.corridor.batches()[0]["attempt"] == before.attempt
    assert stage.corridor.rows("SELECT * FROM provider_inputs ORDER BY content_hash") == rows
    assert stage.corridor.one("SELECT count(*) FROM charges") == (1 if state is State.CLEANING else 0)
    assert len(stage.batches()) == (1 if STEPS.index(state) >= STEPS.index(State.SUBMITTED) else 0)
    expire_leases(stage)
    [job] = stage.finish(job)
    stage.check_done(job, texts)


def test_a_step_that_is_held_is_nobody_elses(stage: Scene, server: OpenAIServer) -> None:
    stage.enqueue(stage.texts(N))
    step = walk_to(stage, State.GATHERED)
    url = stage.corridor.context.provider.server

    def claimed() -> Step | None:
        with stage.corridor.db.begin() as conn:
            return provider_batches.claim_if_due(conn, step.id, owner="other", lease_seconds=60.0, server=url)

    assert claimed() is None
    expire_leases(stage)
    assert claimed() is not None


def test_workers_and_pollers_at_once(stage: Scene, server: OpenAIServer) -> None:
    texts = stage.texts(60)
    names = list(texts)
    jobs = [
        stage.enqueue({name: texts[name] for name in part})
        for part in (names[:40], names[20:], names[10:50], names[::2])
    ]
    others = [Corridor(stage.corridor.settings, server) for _ in range(2)]
    done = threading.Event()

    def turn(corridor: Corridor) -> None:
        while not done.is_set():
            corridor.turn()

    try:
        with running(*[partial(turn, corridor) for corridor in others], release=done.set):
            ended = stage.finish(*jobs)
    finally:
        for corridor in others:
            corridor.close()

    assert [job.state for job in ended] == ["completed"] * 4
    stage.check_done(ended[0], texts)


# Contents that are in flight


def in_flight(stage: Scene) -> Callable[[], bool]:
    return lambda: any(batch["status"] == "in_progress" for batch in stage.batches())


def test_what_another_job_has_in_flight_is_waited_for(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0)
    texts = stage.texts(N + 2)
    first = stage.enqueue({name: texts[name] for name in list(texts)[:N]})
    stage.run_until(in_flight(stage))
    second = stage.enqueue(texts, collection="other")
    stage.run_until(lambda: len(stage.batches()) == 2)
    assert stage.corridor.batches()[1]["n_contents"] == 2
    waits_for = "SELECT count(*) FROM provider_batch_members m JOIN chunk_batches b ON b.id = m.chunk_batch_id "
    assert stage.corridor.one(waits_for + "WHERE b.job_id = :job", job=second.id) == 2, "its own and the other's"

    server.control(in_progress_seconds=0.0)
    first, second = stage.finish(first, second)

    assert (first.state, second.state) == ("completed", "completed")
    stage.corridor.check_vectors(texts, "other")
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    stage.check_books()
    assert stage.charged_attempts() == 1


def test_a_cancelled_job_whose_contents_another_waits_for_goes_on(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0)
    texts = stage.texts(N)
    first = stage.enqueue(texts)
    stage.run_until(in_flight(stage))
    second = stage.enqueue(texts, collection="other")
    stage.run_until(lambda: stage.corridor.one("SELECT count(*) FROM provider_batch_members") == 2)

    stage.corridor.client.cancel(first.id)
    for _ in range(3):
        stage.corridor.turn()
    server.control(in_progress_seconds=0.0)
    [second] = stage.finish(second)

    assert second.state == "completed"
    assert [batch["status"] for batch in stage.batches()] == ["completed"]
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    stage.check_books()


def test_a_collection_that_is_deleted_while_its_contents_are_in_flight(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(in_flight(stage))

    stage.corridor.client.delete("docs", all_chunks=True)
    server.control(in_progress_seconds=0.0)
    [job] = stage.finish(job)

    assert (job.state, job.dead) == ("completed", 0)
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    assert stage.corridor.batches()[0]["n_written"] == 0
    stage.check_books()


def test_a_content_that_is_deleted_before_it_is_sent_is_not_sent(stage: Scene, server: OpenAIServer) -> None:
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    step = walk_to(stage, State.GATHERED)
    stage.corridor.client.delete("docs", ["c1", "c4", "c5"])  # c4 and c5 are all of their request
    with stage.corridor.db.begin() as conn:
        provider_batches.release(conn, step, delay_s=0.0)

    [job] = stage.finish(job)

    left = {name: text for name, text in texts.items() if name not in ("c1", "c4", "c5")}
    stage.check_done(job, left)
    assert stage.bill(texts) == dict.fromkeys(left, 1)


# Plain requests


def test_plain_requests_and_batches_share_what_is_in_flight(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0)
    texts = stage.texts(N)
    batch = stage.enqueue(texts)
    stage.run_until(in_flight(stage))
    plain = stage.enqueue({**texts, **stage.texts(2, first=50)}, collection="other", route="openai-sync")
    stage.run_until(lambda: any(charge["kind"] == "sync" for charge in stage.charges()))
    server.control(in_progress_seconds=0.0)

    batch, plain = stage.finish(batch, plain)

    assert (batch.state, plain.state) == ("completed", "completed")
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    assert stage.bill(stage.texts(2, first=50)) == {"c50": 1, "c51": 1}
    stage.check_books()
    assert stage.charged_attempts() == 1


def test_what_a_killed_worker_left_in_flight_in_a_plain_request(stage: Scene, server: OpenAIServer) -> None:
    """Its job is cancelled, so nobody takes it up again there; a batch does."""
    texts = stage.texts(N)
    plain = stage.enqueue(texts, route="openai-sync")
    [chunk_batch_id] = stage.corridor.due("chunk_batches", "state = 'available'")
    killed = stage.corridor.worker()

    def die(*_: Any, **__: Any) -> None:
        raise Died

    killed.provider.embed = die  # type: ignore[method-assign, assignment]
    with pytest.raises(Died):
        request_chunk_batch(killed, chunk_batch_id)
    killed.close()
    stage.corridor.client.cancel(plain.id)

    [job] = stage.finish(stage.enqueue(texts, collection="other"))

    assert job.state == "completed"
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    stage.check_books()


def test_a_plain_request_that_is_refused_is_halved_down_to_the_one(stage: Scene, server: OpenAIServer) -> None:
    server.control(max_tokens_per_input=60)
    texts = stage.texts(N)
    texts["c2"] += " word" * 70

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    assert job.state == "failed"
    [dead] = stage.corridor.client.dead_chunks(job.id)
    assert dead.chunk_id == "c2" and "maximum" in dead.reason
    assert stage.bill(texts) == {name: 1 for name in texts if name != "c2"}
    stage.check_books()
    assert stage.charged_attempts() == 1


@pytest.mark.parametrize("kind", ["rate_limited", "http_error", "cut"])
def test_a_plain_request_without_an_answer_is_sent_again(stage: Scene, server: OpenAIServer, kind: str) -> None:
    options = {"retry_after": 1} if kind == "rate_limited" else {}
    server.misbehave(kind, times=1, where=EMBED, **options)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    stage.check_done(job, texts)
    assert stage.asked("embeddings.create") == 3
    assert stage.charged_attempts() == 1


def test_a_key_that_is_refused_stops_the_lane_and_nothing_else_is_lost(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("unauthorized", after=1, where=EMBED)
    texts = stage.texts(N)
    job = stage.enqueue(texts, route="openai-sync")
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[1].is_stopped)
    for _ in range(3):
        stage.hurry()
        stage.corridor.turn()
    assert stage.asked("embeddings.create") == 2
    assert server.key not in str(client.lanes())

    client.resume_lane("openai-sync")
    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1


def test_a_plain_answer_in_another_dialect(stage: Scene, server: OpenAIServer) -> None:
    for kind in ("missing_usage", "shuffled_data", "other_encoding"):
        server.misbehave(kind, times=None)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    stage.check_done(job, texts)


@pytest.mark.parametrize("kind", ["not_finite", "missing_item"])
def test_a_plain_answer_without_a_vector_is_booked_and_asked_for_again(
    stage: Scene, server: OpenAIServer, kind: str
) -> None:
    server.misbehave(kind)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    assert job.state == "completed"
    stage.corridor.check_vectors(texts)
    bill = stage.bill(texts)
    assert sum(times == 2 for times in bill.values()) == (1 if kind == "missing_item" else 4)
    assert set(bill.values()) == {1, 2}
    stage.check_books()
    assert stage.charged_attempts() == 2


def test_a_server_without_batches_serves_plain_requests(stage: Scene, server: OpenAIServer) -> None:
    server.control(batches=False)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    stage.check_done(job, texts)


# Texts that somebody waits for


def ask(stage: Scene, texts: list[str]) -> Call:
    """``client.embed`` in a thread, whose request waits for an answer."""
    asked = Call(lambda: stage.corridor.client.embed(texts, timeout=PATIENCE))
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM embed_requests"))
    return asked


@pytest.mark.parametrize("usage", [True, False])
def test_what_somebody_waits_for_is_booked_request_by_request(stage: Scene, server: OpenAIServer, usage: bool) -> None:
    if not usage:
        server.misbehave("missing_usage", times=None)
    texts = list(stage.texts(N).values())
    asked = ask(stage, texts)

    assert ProviderResponder(stage.corridor.context).answer_next()

    for vector, text in zip(asked.result(), texts, strict=True):
        assert np.allclose(vector, vector_for(text, DIMENSIONS), atol=1e-6)
    booked = stage.corridor.rows("SELECT contents, tokens FROM charges")
    assert booked == [{"contents": N, "tokens": sum(charge["tokens"] for charge in stage.charges())}]


def test_what_was_answered_before_a_failure_is_booked(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("http_error", after=1, where=EMBED)
    asked = ask(stage, list(stage.texts(N).values()))

    assert ProviderResponder(stage.corridor.context).answer_next()

    with pytest.raises(EngineError):
        asked.result()
    assert stage.corridor.one("SELECT sum(contents)::int FROM charges") == 4
    assert sum(charge["inputs"] for charge in stage.charges()) == 4


def test_whoever_waits_shares_the_lanes_pause_and_its_stop(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("rate_limited", retry_after=60, where=EMBED)
    server.misbehave("unauthorized", after=1)
    client = stage.corridor.client
    responder = ProviderResponder(stage.corridor.context)
    asked = ask(stage, [stage.text(0)])

    assert responder.answer_next()
    with pytest.raises(EngineError):
        asked.result()
    assert client.lanes()[1].paused_until is not None
    asked = ask(stage, [stage.text(1)])
    assert not responder.answer_next(), "the provider is not asked during the pause"
    client.resume_lane("openai-sync")
    assert responder.answer_next()
    with pytest.raises(EngineError):
        asked.result()
    assert client.lanes()[1].is_stopped
    asked = ask(stage, [stage.text(2)])
    assert responder.answer_next()
    with pytest.raises(EngineError, match="is stopped"):
        asked.result()
    assert stage.asked("embeddings.create") == 2


def test_a_space_that_is_filled_pays_each_content_once(stage: Scene) -> None:
    """The corpus is enqueued again meanwhile, and so is a new text. A second poller fills beside the first."""
    texts, new = stage.texts(N), stage.texts(1, first=N)
    stage.finish(stage.enqueue(texts))
    corridor = stage.corridor
    space = reembeddings.second_space(corridor.db, "docs", dimensions=DIMENSIONS // 2)
    reembedding = reembeddings.begin(corridor.db, "docs", space, route="openai")

    def is_filled() -> bool:
        corridor.rows("UPDATE reembedding_fills SET passed_at = passed_at - interval '1 h' RETURNING 1")
        return fill.fill_some(corridor.db, corridor.settings, reembedding)

    assert not any(together(is_filled, is_filled))
    job = stage.enqueue(texts | new)
    stage.finish(job)
    stage.run_until(is_filled)
    stage.finish(*corridor.client.jobs())

    with corridor.db.begin() as conn:
        collection = collections.find(conn, "docs")
        covered = fill.coverage(conn, collection.id, space)
    assert (covered.contents, covered.missing) == (N + 1, 0)
    assert stage.bill(texts | new) == dict.fromkeys(texts | new, 2), "once for each space"
    stage.check_books()
