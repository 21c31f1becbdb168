"""Plain requests that are refused or get no answer: nobody's text dies for the server's fault, and the books say so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.domain.spaces import OnLong
from chunkmill.errors import EngineError
from chunkmill.ledger.dead.deaths import take_back_expired
from chunkmill.settings import Settings
from chunkmill_workers.provider import plain_attempt
from chunkmill_workers.provider.health import FAILURES, HOPELESS, Health
from chunkmill_workers.provider.plain import request_chunk_batch
from chunkmill_workers.provider.plain_attempt import PAID_TRIES
from chunkmill_workers.provider.probe import PROBE
from chunkmill_workers.provider.responder import ProviderResponder
from tests.openai_server import OpenAIServer, text_hash, vector_for
from tests.support import one_request
from tests.support.corridor import DIMENSIONS, MODEL
from tests.support.corridor_scene import Scene, scene
from tests.support.waiting import PATIENCE, Call

EMBED = {"endpoint": "embeddings.create"}
PLAIN = 1
"""The place of the lane in ``client.lanes()``."""
N = 12


@pytest.fixture
def stage(settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The corridor with its probes. A request has four inputs at most."""
    with scene(settings, server, request, trusting=False) as made:
        yield made


def two_jobs(stage: Scene, route: str = "openai-sync") -> tuple[dict[str, str], list[Any]]:
    """Two jobs with texts of their own, in two collections."""
    texts = stage.texts(2 * N)
    names = list(texts)
    parts = {"docs": names[:N], "other": names[N:]}
    jobs = [stage.enqueue({name: texts[name] for name in part}, collection=c, route=route) for c, part in parts.items()]
    return texts, jobs


def turns(stage: Scene, n: int = 4) -> None:
    for _ in range(n):
        stage.hurry()
        stage.corridor.turn()


def booked(stage: Scene, table: str = "charges") -> dict[str, int]:
    """How many contents, by kind and without the probes."""
    kind = "kind" if table == "adjustments" else "'charged'"
    rows = stage.corridor.rows(
        f"SELECT {kind} AS kind, sum(contents)::int AS contents FROM {table} WHERE job_id <> 0 GROUP BY 1"
    )
    return {row["kind"]: row["contents"] for row in rows}


def check_paid_once(stage: Scene, texts: dict[str, str], jobs: list[Any]) -> None:
    assert [job.state for job in stage.finish(*jobs)] == ["completed"] * len(jobs)
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    stage.check_books()
    assert stage.charged_attempts() == 1


# What concerns everybody

REFUSALS: dict[str, Callable[[OpenAIServer], object]] = {
    "a model that is not there": lambda server: server.control(models={"another-model": 1536}),
    "no such address": lambda server: server.misbehave("http_error", times=None, where=EMBED, status=404, html=True),
    "405": lambda server: server.misbehave("http_error", times=None, where=EMBED, status=405, message="No."),
    "402": lambda server: server.misbehave("http_error", times=None, where=EMBED, status=402, message="Pay."),
    "403": lambda server: server.misbehave("http_error", times=None, where=EMBED, status=403, html=True),
    "billing_not_active": lambda server: server.misbehave(
        "http_error", times=None, where=EMBED, status=429, code="billing_not_active", type="billing_not_active"
    ),
    "a gateway's budget": lambda server: server.misbehave(
        "http_error", times=None, where=EMBED, status=400, code="400", type="budget_exceeded", message="Exceeded!"
    ),
    "base64": lambda server: server.misbehave(
        "http_error", times=None, where=EMBED, status=400, message="`base64` encoding is not currently supported"
    ),
    "dimensions": lambda server: server.misbehave(
        "http_error", times=None, where=EMBED, status=400, message="Model m does not support matryoshka representation"
    ),
    "words that nobody knows": lambda server: server.misbehave(
        "http_error", times=None, where=EMBED, status=400, message="This is not how we do it."
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_of_everything_costs_one_request_and_no_text(
    stage: Scene, server: OpenAIServer, refusal: str
) -> None:
    REFUSALS[refusal](server)
    texts, jobs = two_jobs(stage)
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[PLAIN].is_stopped)
    turns(stage)

    # A server that refuses base64 is asked once more, for floats.
    assert stage.asked("embeddings.create") == 1 + (refusal == "base64")
    lane = client.lanes()[PLAIN]
    assert lane.stop_reason is not None and "stays stopped until: chunkmill lanes resume" in lane.stop_reason
    assert [client.job(job.id).dead for job in jobs] == [0, 0]
    assert stage.charges() == []

    server.calm()
    server.control(models={MODEL: 1536})
    client.resume_lane("openai-sync")
    check_paid_once(stage, texts, jobs)


def test_a_batch_of_a_model_that_is_not_there_is_not_even_uploaded(stage: Scene, server: OpenAIServer) -> None:
    server.control(models={"another-model": 1536})
    texts, jobs = two_jobs(stage, "openai")
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[0].is_stopped)
    turns(stage)

    assert (stage.asked("embeddings.create"), stage.asked("files.create")) == (1, 0)
    assert client.lanes()[0].stop_code == "model_not_found"
    server.control(models={MODEL: 1536})
    client.resume_lane("openai")
    check_paid_once(stage, texts, jobs)


@pytest.mark.parametrize("kind", ["rate_limited", "http_error"])
def test_a_probe_without_an_answer_holds_no_batch_up(stage: Scene, server: OpenAIServer, kind: str) -> None:
    """Plain requests have limits of their own."""
    server.misbehave(kind, times=None, where=EMBED)
    texts, jobs = two_jobs(stage, "openai")

    check_paid_once(stage, texts, jobs)


@pytest.mark.usefixtures("long_pauses")
def test_batches_of_a_server_that_fails_wait_as_a_lane(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("http_error", times=None, status=503, html=True, where={"endpoint": "files.create"})
    texts, jobs = two_jobs(stage, "openai")
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[0].paused_until is not None)
    asked = stage.asked("files.create")
    turns(stage)
    assert stage.asked("files.create") == asked == FAILURES

    server.calm()
    stage.end_pauses()
    check_paid_once(stage, texts, jobs)


def test_an_address_without_its_path_stops_the_lane(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    wrong = server.url.removesuffix("/v1")
    with scene(settings, server, request, trusting=False, openai_base_url=wrong) as stage:
        _, jobs = two_jobs(stage)
        client = stage.corridor.client
        stage.run_until(lambda: client.lanes()[PLAIN].is_stopped)

        assert "OPENAI_BASE_URL" in str(client.lanes()[PLAIN].stop_reason)
        assert [client.job(job.id).dead for job in jobs] == [0, 0]


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
def test_wrong_dimensions_are_found_for_the_price_of_one_word(stage: Scene, server: OpenAIServer, route: str) -> None:
    server.misbehave("wrong_dimensions", times=None, dimensions=5)
    texts, jobs = two_jobs(stage, route)
    client = stage.corridor.client
    stage.run_until(lambda: any(lane.is_stopped for lane in client.lanes()))
    turns(stage)

    [stopped] = [lane for lane in client.lanes() if lane.is_stopped]
    assert stopped.route == route
    assert "OPENAI_MODELS" in str(stopped.stop_reason) and "5 dimensions" in str(stopped.stop_reason)
    [charge] = stage.charges()
    assert (charge["kind"], charge["inputs"], charge["tokens"]) == ("sync", 1, 1)
    assert stage.corridor.rows("SELECT job_id, contents::int, tokens::int FROM charges") == [
        {"job_id": 0, "contents": 1, "tokens": 1}
    ]

    server.calm()
    client.resume_lane(route)
    check_paid_once(stage, texts, jobs)


def test_vectors_that_become_wrong_stop_the_lane_after_one_request(stage: Scene, server: OpenAIServer) -> None:
    """The probe went well, and then the server changed its model."""
    server.misbehave("wrong_dimensions", times=None, after=1, dimensions=5)
    _, jobs = two_jobs(stage)
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[PLAIN].is_stopped)
    turns(stage)

    assert sum(charge["inputs"] for charge in stage.charges()) == 1 + 4 + 1
    stage.check_books()
    assert [client.job(job.id).dead for job in jobs] == [0, 0]


def test_each_model_and_each_worker_is_probed_once(
    stage: Scene, server: OpenAIServer, settings: Settings, request: pytest.FixtureRequest
) -> None:
    texts, jobs = two_jobs(stage)
    before = server.bill().get(text_hash(PROBE), 0)
    check_paid_once(stage, texts, jobs)
    assert server.bill()[text_hash(PROBE)] - before == 1
    with scene(settings, server, request, trusting=False, embedding_dimensions=16) as wider:
        wider.finish(wider.enqueue(wider.texts(3), route="openai-sync", collection="wider"))
    assert server.bill()[text_hash(PROBE)] - before == 2


def test_what_is_refused_with_the_same_words_down_to_the_parts_is_put_to_the_probe(
    stage: Scene, server: OpenAIServer
) -> None:
    """The probe went well before, so something has changed since."""
    server.misbehave("http_error", times=None, after=1, where=EMBED, status=400, message="Not any more.")
    texts, jobs = two_jobs(stage)
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[PLAIN].is_stopped)

    assert stage.asked("embeddings.create") == 5, "a probe, four texts, two, one, and the probe again"
    assert [client.job(job.id).dead for job in jobs] == [0, 0]
    server.calm()
    client.resume_lane("openai-sync")
    check_paid_once(stage, texts, jobs)


def test_bad_texts_are_refused_alone_although_all_are_refused_with_the_same_words(
    stage: Scene, server: OpenAIServer
) -> None:
    server.control(max_tokens_per_input=60)
    texts = stage.texts(N)
    bad = {f"c{i}" for i in range(4)}
    for name in bad:
        texts[name] += " word" * 70

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    dead = stage.corridor.client.dead_chunks(job.id)
    assert {dead_chunk.chunk_id for dead_chunk in dead} == bad
    assert stage.bill(texts) == {name: 1 for name in texts if name not in bad}
    assert stage.corridor.client.lanes()[PLAIN].state == "idle"
    stage.check_books()


# How much a server takes


@pytest.mark.parametrize("status", [400, 413])
def test_the_size_that_a_server_takes_is_learnt(stage: Scene, server: OpenAIServer, status: int) -> None:
    server.control(max_inputs_per_request=2)
    if status == 413:
        server.misbehave("http_error", after=1, where=EMBED, status=413, html=True)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    assert job.state == "completed"
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    assert stage.asked("embeddings.create") == 1 + 1 + N // 2, "the probe, the one that was too large, and the rest"
    stage.check_books()


def test_a_request_that_takes_too_long_is_sent_smaller_and_booked(stage: Scene, server: OpenAIServer) -> None:
    server.control(slow_above_inputs=1)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    assert job.state == "completed"
    assert stage.charged_attempts() == 1
    assert sum(stage.bill(texts).values()) == N + 4 + 2, "four inputs were too many, and two of them"
    assert booked(stage) == {"charged": N}
    assert booked(stage, "adjustments") == {"maybe_charged": 4 + 2}
    tokens = stage.corridor.one("SELECT sum(tokens)::int FROM adjustments")
    charged = sum(charge["tokens"] for charge in stage.charges())
    assert charged == tokens + stage.corridor.one("SELECT sum(tokens)::int FROM charges")


def test_a_connection_that_gives_no_answer_in_time_is_booked(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.misbehave("hang", after=1, where=EMBED, applied=True, seconds=1.0)
    provider = stage.corridor.context.provider
    texts = stage.texts(4)
    job = stage.enqueue(texts, route="openai-sync")
    embed, patient = provider.embed, provider._client

    def hurried(model: str, inputs: list[str], **more: Any) -> dict[str, Any]:
        is_first = len(inputs) == 4
        provider._client = patient.with_options(timeout=0.3) if is_first else patient
        return embed(model, inputs, **more)

    monkeypatch.setattr(provider, "embed", hurried)
    [job] = stage.finish(job)

    assert job.state == "completed"
    assert stage.bill(texts) == dict.fromkeys(texts, 2)
    assert booked(stage, "adjustments") == {"maybe_charged": 4}


# A server that fails


@pytest.mark.usefixtures("long_pauses")
@pytest.mark.parametrize("status", [503, 424])
def test_an_outage_pauses_the_lane_and_charges_no_attempt(stage: Scene, server: OpenAIServer, status: int) -> None:
    server.misbehave("http_error", times=None, after=1, where=EMBED, status=status, html=True)
    texts, jobs = two_jobs(stage)
    client = stage.corridor.client
    for _ in range(3):
        stage.run_until(lambda: client.lanes()[PLAIN].paused_until is not None)
        asked = stage.asked("embeddings.create")
        turns(stage)
        assert stage.asked("embeddings.create") == asked, "nothing is sent in a pause"
        stage.end_pauses()
    # The probe, the requests in a row, perhaps a probe that asks who is at fault, and one word after each pause.
    assert asked <= 1 + FAILURES + 1 + 2
    assert "got no answer" in str(stage.corridor.one("SELECT pause_reason FROM provider_lanes"))

    server.calm()
    check_paid_once(stage, texts, jobs)


@pytest.mark.usefixtures("long_pauses")
def test_a_server_that_cannot_be_reached_costs_nothing(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    with scene(settings, server, request, trusting=False, openai_base_url="http://127.0.0.1:9/v1") as stage:
        two_jobs(stage)
        client = stage.corridor.client
        stage.run_until(lambda: client.lanes()[PLAIN].paused_until is not None)

        assert stage.corridor.rows("SELECT * FROM adjustments") == []
        assert {charged for charged, _ in stage.attempts()} == {0}


def test_a_text_that_breaks_the_server_is_named_and_its_neighbours_are_paid_once(
    stage: Scene, server: OpenAIServer
) -> None:
    server.control(breaks_at="POISON")
    texts = stage.texts(N)
    texts["c5"] += " POISON"

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    [dead] = stage.corridor.client.dead_chunks(job.id)
    assert (dead.chunk_id, dead.code) == ("c5", "no_answer")
    assert "POISON" not in dead.reason
    assert stage.bill(texts) == {name: 1 for name in texts if name != "c5"}
    assert stage.charged_attempts() == PAID_TRIES
    assert stage.asked("embeddings.create") < 40


def test_texts_that_all_break_the_server_stop_the_lane_and_stay_alive(stage: Scene, server: OpenAIServer) -> None:
    """The probe gets an answer each time, and so it is the server that cannot do the work."""
    server.control(breaks_at="text")
    texts, jobs = two_jobs(stage)
    client = stage.corridor.client

    def stopped() -> bool:
        stage.end_pauses()
        return client.lanes()[PLAIN].is_stopped

    stage.run_until(stopped)

    assert f"{HOPELESS} requests in a row" in str(client.lanes()[PLAIN].stop_reason)
    assert [client.job(job.id).dead for job in jobs] == [0, 0]
    assert {charged for charged, _ in stage.attempts()} == {0}
    server.control(breaks_at=None)
    client.resume_lane("openai-sync")
    check_paid_once(stage, texts, jobs)


def test_a_text_that_never_has_a_vector_is_named_by_plain_requests_too(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("not_finite", times=None, marker="POISON")
    texts = stage.texts(N)
    texts["c9"] += " POISON"

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    [dead] = stage.corridor.client.dead_chunks(job.id)
    assert (dead.chunk_id, dead.code) == ("c9", "bad_vector")
    assert f"no vector after {PAID_TRIES} attempts" in dead.reason
    assert stage.bill({"c9": texts["c9"]}) == {"c9": PAID_TRIES}
    assert stage.corridor.one("SELECT state FROM chunk_batches") == "completed"
    stage.check_books()


def test_pauses_grow_until_work_is_answered() -> None:
    from chunkmill.domain.states import Route

    health, lane = Health(), Route.OPENAI_SYNC
    assert health.pause(lane) is None
    for _ in range(FAILURES):
        health.failed(lane)
    assert [health.pause(lane) for _ in range(3)] == [1, 2, 3]
    assert health.pause(Route.OPENAI) is None
    health.prove((MODEL, None))
    assert health.pause(lane) == 4, "a probe is no work"
    health.answered(lane)
    assert health.pause(lane) is None


# Answers that nobody has


class Died(BaseException):
    """As a SIGKILL: nothing that comes after it runs."""


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
def test_an_answer_that_died_with_its_worker_is_booked_by_whoever_takes_over(stage: Scene, route: str) -> None:
    texts = stage.texts(N)
    plain = stage.enqueue(texts, route="openai-sync")
    [chunk_batch_id] = stage.corridor.due("chunk_batches", "state = 'available'")
    killed = stage.corridor.worker()
    embed = killed.provider.embed

    def die(model: str, inputs: list[str], **more: Any) -> Any:
        answer = embed(model, inputs, **more)
        if len(inputs) > 1:
            raise Died
        return answer

    killed.provider.embed = die  # type: ignore[method-assign, assignment]
    with pytest.raises(Died):
        request_chunk_batch(killed, chunk_batch_id)
    killed.close()
    if route == "openai":
        stage.corridor.client.cancel(plain.id)
        [job] = stage.finish(stage.enqueue(texts, collection="other"))
    else:
        lose_the_lease(stage, chunk_batch_id)
        [job] = stage.finish(plain)

    assert job.state == "completed"
    assert booked(stage) == {"charged": N}
    assert booked(stage, "adjustments") == {"maybe_charged": 4}
    assert sum(stage.bill(texts).values()) == N + 4


def lose_the_lease(stage: Scene, chunk_batch_id: int) -> None:
    with stage.corridor.db.begin() as conn:
        over = "UPDATE chunk_batches SET lease_until = now() - interval '1 s' WHERE id = :id"
        conn.execute(sa.text(over), {"id": chunk_batch_id})
        take_back_expired(conn)


def test_a_late_answer_is_on_the_books_although_another_attempt_has_the_contents(stage: Scene) -> None:
    texts = stage.texts(4)
    stage.enqueue(texts, route="openai-sync")
    [chunk_batch_id] = stage.corridor.due("chunk_batches", "state = 'available'")
    late, other = stage.corridor.worker(), stage.corridor.worker()
    embed = late.provider.embed

    def overtaken(model: str, inputs: list[str], **more: Any) -> Any:
        answer = embed(model, inputs, **more)
        if len(inputs) > 1:
            lose_the_lease(stage, chunk_batch_id)
            stage.hurry()
            request_chunk_batch(other, chunk_batch_id)
        return answer

    late.provider.embed = overtaken  # type: ignore[method-assign, assignment]
    request_chunk_batch(late, chunk_batch_id)
    late.close()
    other.close()

    assert stage.bill(texts) == dict.fromkeys(texts, 2)
    assert booked(stage) == {"charged": 4}
    assert booked(stage, "adjustments") == {"maybe_charged": 4}


def test_an_answer_takes_nothing_that_a_later_attempt_has_in_flight(stage: Scene) -> None:
    """The later attempt's answer is still to come, and will be charged by itself."""
    stage.enqueue(stage.texts(4), route="openai-sync")
    [chunk_batch_id] = stage.corridor.due("chunk_batches", "state = 'available'")
    late, other = stage.corridor.worker(), stage.corridor.worker()
    embeds = {worker: worker.provider.embed for worker in (late, other)}
    taken_over, answered = threading.Event(), threading.Event()

    def wait_for_the_late_answer(model: str, inputs: list[str], **more: Any) -> Any:
        answer = embeds[other](model, inputs, **more)
        if len(inputs) > 1:
            taken_over.set()
            answered.wait(PATIENCE)
        return answer

    def overtaken(model: str, inputs: list[str], **more: Any) -> Any:
        answer = embeds[late](model, inputs, **more)
        if len(inputs) > 1:
            lose_the_lease(stage, chunk_batch_id)
            stage.hurry()
            calls.append(Call(lambda: request_chunk_batch(other, chunk_batch_id)))
            assert taken_over.wait(PATIENCE)
        return answer

    calls: list[Call] = []
    late.provider.embed = overtaken  # type: ignore[method-assign, assignment]
    other.provider.embed = wait_for_the_late_answer  # type: ignore[method-assign, assignment]
    request_chunk_batch(late, chunk_batch_id)
    answered.set()
    calls[0].result()
    late.close()
    other.close()

    assert booked(stage) == {"charged": 4}
    assert booked(stage, "adjustments") == {"maybe_charged": 4}


def test_an_answer_that_cannot_be_written_is_booked_as_lost_and_not_paid_for_ever(
    stage: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise ValueError("it cannot be written")

    monkeypatch.setattr(plain_attempt, "write", refuse)
    texts = stage.texts(4)

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    assert job.state == "failed"
    assert stage.bill(texts) == dict.fromkeys(texts, PAID_TRIES)
    assert booked(stage, "adjustments") == {"lost": 4 * PAID_TRIES}


# Questions


def ask(stage: Scene, texts: list[str]) -> Call:
    asked = Call(lambda: stage.corridor.client.embed(texts, timeout=PATIENCE))
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM embed_requests"))
    return asked


def test_a_question_has_all_its_vectors_whatever_a_provider_batch_may_hold(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    with scene(settings, server, request, openai_batch_max_inputs=2) as stage:
        texts = list(stage.texts(9).values())
        asked = ask(stage, texts)

        assert ProviderResponder(stage.corridor.context).answer_next()

        vectors = asked.result()
        assert len(vectors) == 9
        for vector, text in zip(vectors, texts, strict=True):
            assert np.allclose(vector, vector_for(text, DIMENSIONS), atol=1e-6)


def test_a_question_is_leased_for_longer_than_its_answer_may_take(stage: Scene) -> None:
    context = stage.corridor.context
    embed = context.provider.embed
    left: list[float] = []

    def looked(*given: Any, **more: Any) -> Any:
        query = "SELECT extract(epoch FROM lease_until - clock_timestamp())::float FROM embed_requests"
        left.append(stage.corridor.one(query))
        return embed(*given, **more)

    context.provider.embed = looked  # type: ignore[method-assign]
    asked = ask(stage, list(stage.texts(8).values()))
    assert ProviderResponder(context).answer_next()
    asked.result()

    assert len(left) == 3
    assert all(seconds > context.settings.openai_timeout_seconds for seconds in left)


def test_a_question_that_another_worker_took_over_is_not_asked_any_more(stage: Scene) -> None:
    context = stage.corridor.context
    embed = context.provider.embed

    def overtaken(*given: Any, **more: Any) -> Any:
        answer = embed(*given, **more)
        with stage.corridor.db.begin() as conn:
            conn.execute(sa.text("UPDATE embed_requests SET lease_until = now() + interval '1 hour'"))
        return answer

    context.provider.embed = overtaken  # type: ignore[method-assign]
    asked = ask(stage, list(stage.texts(8).values()))
    assert ProviderResponder(context).answer_next()

    assert stage.asked("embeddings.create") <= 2
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text("UPDATE embed_requests SET error = 'the test is over'"))
    with pytest.raises(EngineError):
        asked.result()


@pytest.mark.parametrize(("committed", "is_awaited"), [(False, True), (True, True), (True, False)])
def test_an_answer_to_a_question_is_booked_once_though_the_connection_breaks(
    stage: Scene, monkeypatch: pytest.MonkeyPatch, committed: bool, is_awaited: bool
) -> None:
    """It was paid for: it must neither be asked for again nor booked twice, though nobody waits for it any more."""
    transact = stage.corridor.context.transact
    broken: list[str] = []

    def breaking(work: Callable[[sa.Connection], Any], what: str, **more: Any) -> Any:
        def once(conn: sa.Connection) -> Any:
            if what == "book an answer" and not is_awaited:
                conn.execute(sa.text("DELETE FROM embed_requests"))
            result = work(conn)
            if what == "book an answer" and not broken:
                broken.append(what)
                if not committed:
                    conn.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
            return result

        result = transact(once, what, **more)
        return transact(work, what, **more) if committed and what in broken else result  # its answer was lost

    monkeypatch.setattr(stage.corridor.context, "transact", breaking)
    texts = stage.texts(2)
    if is_awaited:
        asked = ask(stage, list(texts.values()))
    else:
        space = stage.corridor.client._space(None, OnLong.TRUNCATE)
        with stage.corridor.db.begin() as conn:
            one_request.ask(conn, space_id=space.id, kind="document", texts=list(texts.values()))

    assert ProviderResponder(stage.corridor.context).answer_next()

    if is_awaited:
        assert len(asked.result()) == 2
    assert broken
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    stage.check_books()
    assert stage.corridor.rows("SELECT FROM adjustments") == []


@pytest.mark.parametrize("status", [400, 413])
def test_a_question_learns_the_size_that_a_server_takes(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest, status: int
) -> None:
    with scene(settings, server, request, openai_request_inputs=32) as stage:
        server.control(max_inputs_per_request=3)
        if status == 413:
            server.misbehave("http_error", after=1, where=EMBED, status=413, html=True)
        for first in (0, 20):
            texts = stage.texts(12, first=first)
            asked = ask(stage, list(texts.values()))
            assert ProviderResponder(stage.corridor.context).answer_next()

            vectors = asked.result()
            assert all(
                np.allclose(vector, vector_for(text, DIMENSIONS), atol=1e-6)
                for vector, text in zip(vectors, texts.values(), strict=True)
            )
            assert stage.bill(texts) == dict.fromkeys(texts, 1)
        stage.check_books()


@pytest.mark.usefixtures("long_pauses")
def test_a_question_without_an_answer_is_booked_and_counts_for_the_lane(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("cut", times=None, where=EMBED, applied=True)
    responder = ProviderResponder(stage.corridor.context)
    for n in range(FAILURES):
        asked = ask(stage, [stage.text(n)])
        assert responder.answer_next()
        with pytest.raises(EngineError):
            asked.result()

    assert stage.corridor.one("SELECT sum(contents)::int FROM adjustments") == FAILURES
    assert stage.corridor.client.lanes()[PLAIN].paused_until is not None
