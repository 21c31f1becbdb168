"""Limits of the account and of texts: work waits for room and goes on, uncharged; long and odd texts arrive whole."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill.cli.__main__ import cli
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.domain.windows import window_bounds
from chunkmill.ledger.provider import provider_batches, provider_lanes
from chunkmill.settings import Settings
from chunkmill_workers.provider.steps import _STEPS, _run, advance_provider_batch
from tests.openai_server import OpenAIServer, vector_for
from tests.support.corridor import DIMENSIONS, Corridor, settings_for
from tests.support.corridor_scene import Scene, scene

# The account's budgets


def words(stage: Scene, i: int, n: int) -> str:
    """A text of about ``n`` tokens."""
    return stage.text(i) + " word" * n


def test_enqueued_tokens_are_never_exceeded(settings: Settings, request: pytest.FixtureRequest) -> None:
    """The server refuses what is over its limit; it never has to."""
    with (
        OpenAIServer(in_progress_seconds=0.1, enqueued_tokens=10_000) as own,
        scene(settings, own, request, openai_max_enqueued_tokens=10_000) as stage,
    ):
        own.control(enqueued_tokens=10_000, in_progress_seconds=0.1)
        texts = {f"c{i}": words(stage, i, 900) for i in range(30)}

        [job] = stage.finish(stage.enqueue(texts))

        stage.check_done(job, texts)
        state = own.state()
        assert 5_000 < state["peak_enqueued_tokens"] <= 10_000
        assert state["refused_enqueued"] == 0
        assert stage.charged_attempts() == 1


def test_enqueued_requests_are_never_exceeded(settings: Settings, request: pytest.FixtureRequest) -> None:
    with (
        OpenAIServer() as own,
        scene(settings, own, request, openai_max_enqueued_requests=2, openai_batch_max_inputs=4) as stage,
    ):
        own.control(enqueued_requests=2, in_progress_seconds=3600.0)
        texts = stage.texts(20)
        job = stage.enqueue(texts)
        stage.run_until(lambda: own.state()["peak_enqueued_requests"] == 2)  # none ends before the second is there
        own.control(in_progress_seconds=0.1)

        [job] = stage.finish(job)

        stage.check_done(job, texts)
        state = own.state()
        assert (state["peak_enqueued_requests"], state["refused_enqueued"]) == (2, 0)


@pytest.mark.parametrize("answer", ["batch", "create"])
def test_a_limit_lower_than_we_were_told_is_waited_for(stage: Scene, server: OpenAIServer, answer: str) -> None:
    server.control(enqueued_requests=3, enqueued_overflow=answer, in_progress_seconds=0.2)
    texts = stage.texts(24)
    with stage.corridor.db.begin() as conn:
        provider_lanes.learn_max_inputs(conn, Route.OPENAI, 8)  # batches of two requests

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1


def test_batches_per_hour_are_never_exceeded(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    limits: dict[str, Any] = {"openai_max_batches_per_hour": 2, "openai_batch_max_inputs": 4}
    with scene(settings, server, request, **limits) as stage:
        texts = stage.texts(18)
        job = stage.enqueue(texts)
        lanes = stage.corridor.client.lanes
        stage.run_until(lambda: "PER_HOUR" in (lanes()[0].held_reason or "") and len(stage.batches()) == 2)
        for hours in (1, 2):
            for _ in range(3):
                stage.corridor.turn()
            assert len(stage.batches()) == 2 * hours
            with stage.corridor.db.begin() as conn:
                conn.execute(sa.text("UPDATE provider_batches SET creating_since = creating_since - interval '1 hour'"))
            stage.run_until(lambda hours=hours: len(stage.batches()) == min(5, 2 * hours + 2))  # type: ignore[misc]

        [job] = stage.finish(job)

        stage.check_done(job, texts)
        assert lanes()[0].held_reason is None


def test_what_is_gathered_and_not_made_yet_counts_for_the_hour(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    limits: dict[str, Any] = {"openai_max_batches_per_hour": 2, "openai_batch_max_inputs": 4}
    with scene(settings, server, request, **limits) as stage:
        stage.enqueue(stage.texts(16))
        for _ in range(4):
            stage.corridor.poller.round()
            for batch_id in stage.corridor.due("provider_batches", "state = 'gathering'"):
                with stage.corridor.db.begin() as conn:
                    step = provider_batches.claim_if_due(
                        conn, batch_id, owner="w", lease_seconds=60, server=stage.corridor.context.provider.server
                    )
                assert step is not None
                _STEPS[State.GATHERING](stage.corridor.context, step)

        assert [batch["state"] for batch in stage.corridor.batches()] == ["gathered", "gathered"]


def test_the_months_money_is_never_exceeded(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    with scene(settings, server, request, openai_monthly_budget_usd=Decimal("0.0001")) as stage:
        texts = {f"c{i}": words(stage, i, 900) for i in range(20)}  # twice what 10,000 tokens cost
        job = stage.enqueue(texts)
        lanes = stage.corridor.client.lanes
        stage.run_until(lambda: lanes()[0].held_reason and stage.charges())
        for _ in range(5):
            stage.hurry()
            stage.corridor.turn()
        assert lanes()[0].held_reason is not None
        assert 5_000 < sum(charge["tokens"] for charge in stage.charges()) <= 10_000

        poor, stage.corridor = stage.corridor, Corridor(settings_for(settings, server), server)
        [job] = stage.finish(job)

        stage.check_done(job, texts)
        assert stage.charged_attempts() == 1
        assert lanes()[0].held_reason is None
        stage.corridor.close()
        stage.corridor = poor


def test_the_months_money_holds_plain_requests_too(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    with scene(settings, server, request, openai_monthly_budget_usd=Decimal("0.0003")) as stage:
        texts = [{f"c{i}": words(stage, i, 900) for i in range(first, first + 10)} for first in (0, 10)]
        jobs = [stage.enqueue(text, route="openai-sync") for text in texts]  # each costs two thirds of it
        lanes = stage.corridor.client.lanes
        stage.run_until(lambda: lanes()[1].held_reason)
        for _ in range(3):
            stage.hurry()
            stage.corridor.turn()
        assert [stage.corridor.client.job(job.id).state for job in jobs] == ["completed", "running"]
        assert sum(charge["tokens"] for charge in stage.charges()) <= 15_000

        poor, stage.corridor = stage.corridor, Corridor(settings_for(settings, server), server)
        jobs = stage.finish(*jobs)

        stage.check_done(jobs[1], texts[0] | texts[1])
        assert lanes()[1].held_reason is None
        assert stage.charged_attempts() == 1
        stage.corridor.close()
        stage.corridor = poor


# What the provider says


def test_a_quota_that_is_used_up_stops_the_lane_until_it_is_resumed(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.misbehave("insufficient_quota", times=None, where={"endpoint": "batches.create"})
    texts = stage.texts(6)
    job = stage.enqueue(texts)
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[0].is_stopped)
    for _ in range(5):
        stage.hurry()
        stage.corridor.turn()

    assert stage.asked("batches.create") == 1
    lane = client.lanes()[0]
    assert lane.stop_code == "insufficient_quota"
    assert lane.stop_reason is not None and "chunkmill lanes resume" in lane.stop_reason
    assert server.key not in lane.stop_reason

    server.calm()
    for name in ("database_url", "redis_url"):
        monkeypatch.setenv(name.upper(), str(getattr(stage.corridor.settings, name)))
    said = CliRunner().invoke(cli, ["lanes", "resume", "openai"])
    assert said.exit_code == 0, said.output
    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1


@pytest.mark.parametrize("endpoint", ["batches.create", "files.content"])
def test_retry_after_is_honoured_by_all_workers(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest, endpoint: str
) -> None:
    """Two ProviderBatches and two workers; while the lane pauses nobody asks the server for anything."""
    with scene(settings, server, request, openai_batch_max_inputs=4) as stage:
        server.misbehave("rate_limited", retry_after=3000, where={"endpoint": endpoint})
        texts = stage.texts(8)
        job = stage.enqueue(texts)
        corridor, client = stage.corridor, stage.corridor.client
        stage.run_until(lambda: client.lanes()[0].paused_until is not None)
        other = corridor.worker()
        asked = server.state()["requests"]
        for _ in range(3):
            stage.hurry()
            corridor.turn()
            stage.hurry()
            for batch_id in corridor.due("provider_batches", "state <> 'closed'"):
                advance_provider_batch(other, batch_id)
        assert server.state()["requests"] == asked
        assert corridor.one("SELECT paused_until > now() + interval '2000 s' FROM provider_lanes")
        other.close()
        stage.end_pauses()

        [job] = stage.finish(job)

        stage.check_done(job, texts)
        assert stage.charged_attempts() == 1


def test_a_worker_that_is_under_way_hears_of_a_pause(stage: Scene, server: OpenAIServer) -> None:
    texts = stage.texts(4)
    job = stage.enqueue(texts)
    corridor = stage.corridor
    corridor.poller.round()
    [batch_id] = corridor.due("provider_batches", "state = 'gathering'")
    with corridor.db.begin() as conn:
        step = provider_batches.claim_if_due(
            conn, batch_id, owner="w", lease_seconds=60, server=corridor.context.provider.server
        )
    assert step is not None
    gathered = _STEPS[State.GATHERING](corridor.context, step)
    assert gathered is not None
    with corridor.db.begin() as conn:  # what another worker was told
        provider_lanes.pause(conn, Route.OPENAI, seconds=60, reason="a limit")

    _run(corridor.context, gathered)

    assert stage.asked("files.create") == 0
    corridor.client.resume_lane("openai")
    [job] = stage.finish(job)
    stage.check_done(job, texts)


def test_plain_requests_under_way_hear_of_a_pause(stage: Scene, server: OpenAIServer) -> None:
    texts = stage.texts(12)
    job = stage.enqueue(texts, route="openai-sync")
    corridor = stage.corridor
    embed = corridor.context.provider.embed

    def embed_and_hear(*given: Any, **more: Any) -> dict[str, Any]:
        with corridor.db.begin() as conn:  # what another worker was told meanwhile
            provider_lanes.pause(conn, Route.OPENAI_SYNC, seconds=60, reason="a limit")
        return embed(*given, **more)

    corridor.context.provider.embed = embed_and_hear  # type: ignore[method-assign]
    stage.run_until(lambda: stage.asked("embeddings.create"))
    for _ in range(3):
        stage.hurry()
        corridor.turn()
    assert stage.asked("embeddings.create") == 1

    corridor.context.provider.embed = embed  # type: ignore[method-assign]
    corridor.client.resume_lane("openai-sync")
    [job] = stage.finish(job)
    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1


@pytest.mark.usefixtures("long_pauses")
@pytest.mark.parametrize("retry_after", [None, 0])
def test_a_limit_that_says_nothing_of_when_is_not_asked_at_full_speed(
    stage: Scene, server: OpenAIServer, retry_after: int | None
) -> None:
    server.misbehave("rate_limited", times=2, retry_after=retry_after, where={"endpoint": "batches.create"})
    texts = stage.texts(4)
    job = stage.enqueue(texts)
    client = stage.corridor.client
    for _ in range(2):
        stage.run_until(lambda: client.lanes()[0].paused_until is not None)
        client.resume_lane("openai")

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert stage.asked("batches.create") == 3
    assert stage.charged_attempts() == 1


@pytest.mark.parametrize("status", [429, 400])
def test_no_room_for_tokens_when_it_is_made(stage: Scene, server: OpenAIServer, status: int) -> None:
    server.misbehave("enqueued_on_create", times=7, status=status)
    texts = stage.texts(4)
    job = stage.enqueue(texts)
    client = stage.corridor.client

    def resumed() -> bool:
        client.resume_lane("openai")
        return client.job(job.id).state.is_final

    stage.run_until(resumed)
    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert stage.asked("batches.create") == 8
    assert stage.charged_attempts() == 1


# Texts


def long_text(first: str, tokens: int) -> str:
    """Of exactly so many tokens, each a word."""
    return first + " word" * (tokens - 1)


LONG = {"short": ("alpha", 8_191), "exact": ("beta", 8_192), "over": ("gamma", 8_193), "far": ("delta", 20_000)}


def pooled(first: str, tokens: int) -> np.ndarray[Any, Any]:
    """By the rule of split spaces, over the words: each is one token."""
    mean = np.zeros(DIMENSIONS)
    for start, end, weight in window_bounds(tokens, 8_192):
        text = (first if start == 0 else " word") + " word" * (end - start - 1)
        mean += weight * vector_for(text, DIMENSIONS).astype(np.float64)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
@pytest.mark.parametrize("on_long", ["truncate", "reject", "split"])
def test_long_texts(stage: Scene, server: OpenAIServer, on_long: str, route: str) -> None:
    texts = {name: long_text(*form) for name, form in LONG.items()}

    [job] = stage.finish(stage.enqueue(texts, on_long=on_long, route=route))

    vectors = stage.corridor.client.vectors("docs")
    expected = {name: vector_for(texts[name], DIMENSIONS) for name in ("short", "exact")}
    if on_long == "truncate":
        expected |= {name: vector_for(long_text(LONG[name][0], 8_192), DIMENSIONS) for name in ("over", "far")}
        assert (job.state, job.truncated) == ("completed", 2)
    elif on_long == "split":
        expected |= {name: pooled(*LONG[name]) for name in ("over", "far")}
        assert (job.state, job.truncated) == ("completed", 0)
    else:  # as if they had been refused at the door
        assert (job.state, job.dead) == ("completed", 2)
        dead = {dead_chunk.chunk_id: dead_chunk for dead_chunk in stage.corridor.client.dead_chunks(job.id)}
        assert {name: dead_chunk.code for name, dead_chunk in dead.items()} == {"over": "too_long", "far": "too_long"}
        assert "20000" in dead["far"].reason.replace(",", "")
    assert vectors.keys() == expected.keys()
    for name, vector in expected.items():
        np.testing.assert_allclose(vectors[name], vector, atol=1e-6, err_msg=name)
    windows = sum(charge["inputs"] for charge in stage.charges())
    contents = stage.corridor.one("SELECT sum(contents)::int FROM charges")
    assert windows - contents == (3 if on_long == "split" else 0)
    stage.check_books(unanswered_contents=windows - contents)


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
def test_a_job_that_refuses_long_texts_refuses_what_another_had_cut(stage: Scene, route: str) -> None:
    """Both were enqueued while the text had no vector, so the door let it pass."""
    texts = {name: long_text(*LONG[name]) for name in ("short", "over")}
    cutting = stage.enqueue(texts, collection="cut", route=route, priority="high")
    refusing = stage.enqueue(texts, collection="whole", route=route, on_long="reject")

    cut, whole = stage.finish(cutting, refusing)

    assert (cut.state, cut.embedded, cut.truncated, cut.dead) == ("completed", 2, 1, 0)
    assert (whole.state, whole.embedded, whole.truncated, whole.dead) == ("completed", 1, 0, 1)
    assert [dead_chunk.code for dead_chunk in whole.dead_chunks] == ["too_long"]
    assert stage.corridor.client.vectors("whole").keys() == {"short"}


def test_odd_texts_arrive_as_they_are(stage: Scene, server: OpenAIServer) -> None:
    odd = [
        "a\u2028b\u2029c\x85d",
        "🤖👩‍👩‍👧 émoji",
        "<|endoftext|>",
        'quote " back \\ slash',
        "\ttab\r\nlines\n",
        "﻿mark",
        "x",
    ]
    texts = {f"c{i}": f"{stage.name} {text}" for i, text in enumerate(odd)}

    jobs = stage.finish(
        stage.enqueue(texts),
        stage.enqueue(
            {f"p{i}": f"plain {text}" for i, text in enumerate(odd)}, collection="plain", route="openai-sync"
        ),
    )

    assert [job.state for job in jobs] == ["completed", "completed"]
    stage.corridor.check_vectors(texts)
    stage.corridor.check_vectors({f"p{i}": f"plain {text}" for i, text in enumerate(odd)}, "plain")
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    stage.check_books()


def test_an_empty_text_never_leaves_the_house(stage: Scene, server: OpenAIServer) -> None:
    texts = stage.texts(3)

    [job] = stage.finish(stage.enqueue({**texts, "empty": "", "blank": " \n"}, on_invalid="skip"))

    assert {dead_chunk.chunk_id: dead_chunk.code for dead_chunk in stage.corridor.client.dead_chunks(job.id)} == {
        "empty": "empty_text",
        "blank": "empty_text",
    }
    assert sum(charge["inputs"] for charge in stage.charges()) == 3
    stage.corridor.check_vectors(texts)
    stage.check_books()
