"""What was gathered and not sent is let go when its lane cannot send it, and who waits for it is told the truth."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from chunkmill.cli.__main__ import cli
from chunkmill.domain.states import Route
from chunkmill.ledger.provider import provider_lanes
from tests.openai_server import OpenAIServer
from tests.support.corridor_scene import Scene

N = 10
UPLOAD = {"endpoint": "files.create"}


@pytest.fixture
def gathered(stage: Scene, server: OpenAIServer) -> Scene:
    """A corridor whose files cannot be uploaded for now."""
    server.misbehave("http_error", times=None, status=503, where=UPLOAD)
    return stage


def is_gathered(stage: Scene, n: int = 1) -> bool:
    return len(stage.corridor.rows("SELECT FROM provider_batches WHERE state = 'gathered'")) == n


def stop(stage: Scene) -> None:
    with stage.corridor.db.begin() as conn:
        provider_lanes.stop(conn, Route.OPENAI, code="invalid_api_key", reason="the key is refused")


def states(stage: Scene, job_id: int) -> set[tuple[str, str]]:
    rows = stage.corridor.rows("SELECT route, state FROM chunk_batches WHERE job_id = :job", job=job_id)
    return {(row["route"], row["state"]) for row in rows}


def test_gathered_work_of_an_auto_job_moves_when_the_lane_stops(gathered: Scene, server: OpenAIServer) -> None:
    stage = gathered
    auto, named = stage.texts(N), stage.texts(N, first=50)
    job = stage.enqueue(auto, route="auto")
    other = stage.enqueue(named, collection="other")
    stage.run_until(lambda: is_gathered(stage))
    stop(stage)

    [job] = stage.finish(job)

    assert job.state == "completed"
    assert stage.bill(auto) == dict.fromkeys(auto, 1)
    assert {charge["kind"] for charge in stage.charges()} == {"sync"}
    assert states(stage, other.id) == {("openai", "available")}, "what was asked for by name waits"
    server.calm()
    stage.corridor.client.resume_lane("openai")
    [other] = stage.finish(other)
    assert other.state == "completed"
    assert stage.charged_attempts() == 1
    stage.check_books()


@pytest.mark.parametrize("state", ["gathered", "uploaded"])
def test_unsent_work_of_an_auto_job_moves_when_its_deadline_comes_near(
    stage: Scene, server: OpenAIServer, state: str
) -> None:
    """Another job, which has time, keeps its lane."""
    endpoint = {"gathered": "files.create", "uploaded": "batches.create"}[state]
    server.misbehave("rate_limited", times=None, retry_after=3600, where={"endpoint": endpoint})
    late, early = stage.texts(N), stage.texts(N, first=50)
    job = stage.enqueue(late, route="auto", deadline=timedelta(hours=40))
    other = stage.enqueue(early, route="auto", deadline=timedelta(hours=80), collection="other")
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE state = :state", state=state))
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET deadline = now() + interval '20 hours' WHERE id = :id"), {"id": job.id})

    stage.run_until(lambda: stage.corridor.client.job(job.id).state.is_final)

    assert stage.corridor.client.job(job.id).state == "completed"
    assert {route for route, _ in states(stage, other.id)} == {"openai"}
    [moved] = [step for step in stage.corridor.client.explain(job.id).routing if "moved" in step.because]
    assert "deadline" in moved.because
    server.calm()
    stage.corridor.client.resume_lane("openai")
    [job, other] = stage.finish(job, other)
    assert stage.bill(late | early) == dict.fromkeys(late | early, 1)
    stage.check_books()


def test_a_lane_that_stopped_holds_no_text_of_a_cancelled_job(gathered: Scene) -> None:
    """Its job was cancelled, and another waits for the same texts by plain requests."""
    stage = gathered
    texts = stage.texts(N)
    first = stage.enqueue(texts)
    stage.run_until(lambda: is_gathered(stage))
    stop(stage)
    second = stage.enqueue(texts, route="openai-sync", collection="other")
    stage.corridor.client.cancel(first.id)

    [second] = stage.finish(second)

    assert second.state == "completed"
    assert stage.bill(texts) == dict.fromkeys(texts, 1)


def test_who_waits_for_a_text_that_another_has_in_flight_is_told_so(gathered: Scene, server: OpenAIServer) -> None:
    stage = gathered
    texts = stage.texts(N)
    first = stage.enqueue(texts)
    stage.run_until(lambda: is_gathered(stage))
    second = stage.enqueue(texts, route="openai-sync", collection="other")
    third = stage.enqueue(stage.texts(3, first=50), route="openai-sync", collection="third")
    stage.run_until(lambda: stage.corridor.client.job(third.id).state.is_final)
    client = stage.corridor.client
    number = stage.corridor.batches()[0]["id"]

    [sentence] = client.explain(second.id).waits
    assert f"because ProviderBatch {number} has some of the same texts in flight" in sentence
    assert "stopped" not in sentence

    stop(stage)
    for job in (first, second):
        [sentence] = client.explain(job.id).waits
        assert f"ProviderBatch {number}" in sentence
        assert "stopped" in sentence and "invalid_api_key" in sentence and "lanes resume openai" in sentence


def test_what_a_provider_batch_ended_with_names_the_lane_to_resume(stage: Scene, server: OpenAIServer) -> None:
    """Also of a second job, whose ProviderBatch the stopped lane never touched."""
    server.misbehave("unauthorized", times=None, where={"endpoint": "files.create"})
    job = stage.enqueue(stage.texts(N))
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE error IS NOT NULL"))
    other = stage.enqueue(stage.texts(3, first=50), collection="other")

    [shown] = stage.corridor.client.explain(job.id).provider_batches

    assert shown.error is not None
    assert shown.error.endswith("The lane stays stopped until: chunkmill lanes resume openai")
    assert [batch.error for batch in stage.corridor.client.explain(other.id).provider_batches] in ([], [None])


def test_who_waits_for_a_batch_at_the_provider_is_not_told_of_a_lane_that_stopped(
    stage: Scene, server: OpenAIServer
) -> None:
    """What was sent is collected all the same."""
    server.control(in_progress_seconds=3600.0)
    job = stage.enqueue(stage.texts(N))
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE state = 'submitted'"))
    stop(stage)

    [sentence] = stage.corridor.client.explain(job.id).waits

    assert "ProviderBatch" in sentence and "stopped" not in sentence


# The command


def call(stage: Scene, *args: str, **more: Any) -> Result:
    settings = stage.corridor.settings
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    return CliRunner().invoke(cli, list(args), env=env, **more)


def test_the_command_asks_before_it_lets_go(gathered: Scene, server: OpenAIServer) -> None:
    stage = gathered
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: is_gathered(stage))
    number = str(stage.corridor.batches()[0]["id"])

    refused = call(stage, "lanes", "abandon", number)
    assert refused.exit_code != 0 and "--yes" in refused.output
    assert is_gathered(stage)
    done = call(stage, "lanes", "abandon", number, "--yes", "--json")
    assert json.loads(done.output) == {"provider_batch_id": int(number), "contents": N, "may_be_charged": False}
    missing = call(stage, "lanes", "abandon", "999999", "--yes")
    assert missing.exit_code != 0 and "there is no ProviderBatch 999999" in missing.output

    server.calm()
    [job] = stage.finish(job)
    stage.check_done(job, texts)
    closed = call(stage, "lanes", "abandon", number, "--yes")
    assert closed.exit_code != 0 and "is closed" in closed.output


def test_a_second_call_does_not_wait_for_the_files(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0)
    stage.enqueue(stage.texts(N))
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE state = 'submitted'"))
    number = str(stage.corridor.batches()[0]["id"])

    first = call(stage, "lanes", "abandon", number, "--yes")
    assert "They may have been charged" in first.output and f"{N} texts" in first.output
    assert stage.corridor.batches()[0]["state"] == "cleaning"
    call(stage, "lanes", "abandon", number, "--yes")
    assert stage.corridor.batches()[0]["state"] == "closed"
    assert stage.corridor.one("SELECT count(*) FROM adjustments") == 1
