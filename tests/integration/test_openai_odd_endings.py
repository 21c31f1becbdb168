"""Endings of a ProviderBatch that no documentation has: nothing is paid twice unseen, and nothing waits for ever."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.errors import ChunkmillError, NotFound
from chunkmill.openai.wire.status import RemoteBatch, RemoteStatus
from chunkmill_workers.provider import follow, steps
from tests.openai_server import OpenAIServer
from tests.support.corridor_scene import Scene
from tests.support.waiting import until

N = 10
"""Contents: requests of 4, 4 and 2."""
RETRIEVE, CREATE, LIST = ({"endpoint": f"batches.{name}"} for name in ("retrieve", "create", "list"))


@pytest.fixture(autouse=True)
def few_last_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was let go and never ends is looked at a few times only."""
    monkeypatch.setattr(steps, "LAST_LOOKS", 5)


def adjustments(stage: Scene) -> dict[str, tuple[int, int]]:
    """``kind → (contents, tokens)`` of what was booked without an answer."""
    rows = stage.corridor.rows("""
        SELECT kind, sum(contents)::int AS contents, sum(tokens)::int AS tokens
        FROM adjustments
        GROUP BY kind
    """)
    return {row["kind"]: (row["contents"], row["tokens"]) for row in rows}


def tokens_of(charges: list[dict[str, Any]]) -> int:
    return sum(charge["tokens"] for charge in charges)


def change(stage: Scene, columns: str, **values: Any) -> None:
    """Change every open ProviderBatch, for example let it be older than it is."""
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text(f"UPDATE provider_batches SET {columns} WHERE state <> 'closed'"), values)


def the_only(stage: Scene) -> int:
    [row] = stage.corridor.batches()
    number: int = row["id"]
    return number


def is_in(stage: Scene, state: str) -> bool:
    return bool(stage.corridor.rows("SELECT FROM provider_batches WHERE state = :state", state=state))


def look_once_more(stage: Scene) -> None:
    stage.hurry()
    stage.corridor.turn()


# Result files that are not there


def test_result_files_whose_ids_come_late_are_read_and_deleted(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("late_file_ids", times=5, where=RETRIEVE)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1
    assert adjustments(stage) == {}


def test_an_error_file_whose_id_comes_late_is_read_too(stage: Scene, server: OpenAIServer) -> None:
    """Half of the batch expired, and only the output file is named at first."""
    server.misbehave("line_failures", times=1, lines=1, status=429, code="rate_limit_exceeded")
    retrieve = stage.corridor.context.provider.retrieve
    asked: list[str] = []

    def without_errors(batch_id: str) -> Any:
        remote = retrieve(batch_id)
        if remote.error_file_id and len(asked) < 3:
            asked.append(remote.error_file_id)
            object.__setattr__(remote, "error_file_id", None)
        return remote

    stage.corridor.context.provider.retrieve = without_errors  # type: ignore[method-assign]
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert len(asked) == 3
    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1, "a limit is no failure"
    assert adjustments(stage) == {}


@pytest.mark.parametrize("kind", ["late_file_ids", "failed_after_running"])
@pytest.mark.parametrize("usage", [True, False])
def test_what_ran_and_names_no_result_is_booked_and_not_sent_again(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, kind: str, usage: bool
) -> None:
    monkeypatch.setattr(follow, "LOOKS_FOR_RESULTS", 4)
    if kind == "late_file_ids":
        server.misbehave(kind, times=None)
        if not usage:
            server.misbehave("null_usage", times=None)
    else:
        server.misbehave(kind, usage=usage)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    assert job.error is not None and "no result file" in job.error and "chunkmill retry" in job.error
    assert len(stage.batches()) == 1
    assert stage.asked("batches.retrieve") >= 4
    assert adjustments(stage) == {"lost": (N, tokens_of(stage.charges()))}

    server.calm()
    left = [name for name in ("output_file_id", "error_file_id") if stage.batches()[0][name]]
    for name in left:
        server.vanish(stage.batches()[0][name])  # of which nobody could know
    [job] = stage.finish(stage.corridor.client.retry(job.id))
    assert job.state == "completed"
    assert stage.bill(texts) == dict.fromkeys(texts, 2)
    booked = stage.corridor.one("SELECT sum(tokens)::int FROM charges")
    assert booked + adjustments(stage)["lost"][1] == tokens_of(stage.charges())


@pytest.mark.parametrize("told_by", ["time", "earlier status"])
def test_what_failed_after_it_began_and_says_nothing_of_its_cost_is_booked_and_not_sent_again(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    """No counts, no usage, no files: only the time of its beginning, or what an earlier look saw, says that it ran."""
    monkeypatch.setattr(follow, "LOOKS_FOR_RESULTS", 4)
    for kind in ("null_counts", "null_usage"):
        server.misbehave(kind, times=None)
    if told_by == "earlier status":
        seen_running_once(stage)
    server.misbehave("failed_after_running", usage=False)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    assert job.error is not None
    assert "an unknown number of requests done" in job.error
    assert "may have been charged" in job.error
    assert len(stage.batches()) == 1
    assert adjustments(stage) == {"maybe_charged": (N, tokens_of(stage.charges()))}


@pytest.mark.parametrize("told", [True, False])
def test_what_failed_before_it_began_is_sent_again_and_not_booked(
    stage: Scene, server: OpenAIServer, told: bool
) -> None:
    """The same without counts and usage: a batch that was never seen to begin has cost nothing."""
    if not told:
        for kind in ("null_counts", "null_usage"):
            server.misbehave(kind, times=None)
    server.misbehave("fail_validation", times=1, code="who_knows")
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert len(stage.batches()) > 1
    stage.check_done(job, texts)
    assert adjustments(stage) == {}


@pytest.mark.parametrize("told", ["counts", "usage", "times"])
def test_what_ran_and_failed_is_not_created_again_though_its_create_got_no_answer(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """It is found in the provider's list, whatever of its costs is told there. Another one is never made."""
    monkeypatch.setattr(follow, "LOOKS_FOR_RESULTS", 4)
    for kind in {"counts": ("null_usage",), "usage": ("null_counts",), "times": ("null_counts", "null_usage")}[told]:
        server.misbehave(kind, times=None)
    server.misbehave("cut", where=CREATE, applied=True)
    server.misbehave("failed_after_running", usage=told == "usage")
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    assert len(stage.batches()) == 1
    kind = "maybe_charged" if told == "times" else "lost"
    assert adjustments(stage) == {kind: (N, tokens_of(stage.charges()))}


def seen_running_once(stage: Scene) -> None:
    """As a provider that does not say when a batch began, and that is asked while it runs."""
    provider = stage.corridor.context.provider
    retrieve = provider.retrieve
    seen: set[str] = set()

    def timeless(batch_id: str) -> RemoteBatch:
        remote = dataclasses.replace(retrieve(batch_id), has_begun=False)
        if batch_id in seen:
            return remote
        seen.add(batch_id)
        return dataclasses.replace(remote, status=RemoteStatus.IN_PROGRESS)

    provider.retrieve = timeless  # type: ignore[method-assign]


def test_a_batch_in_which_nothing_succeeded_and_without_files_is_sent_again(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "LOOKS_FOR_RESULTS", 3)
    server.misbehave("all_failed")
    server.misbehave("late_file_ids", times=None, where=RETRIEVE)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: len(stage.batches()) == 2)
    server.calm()
    server.vanish(stage.batches()[0]["error_file_id"])  # of which nobody could know

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert adjustments(stage) == {}
    assert stage.charged_attempts() == 2


# What was paid and lost


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("null_custom_id", {"lines": 2}),
        ("missing_line", {"lines": 9}),
        ("output_vanished", {}),
        ("garbage_line", {"lines": 1}),
    ],
)
def test_what_was_charged_and_lost_is_booked_as_lost(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(follow, "LOOKS_FOR_RESULTS", 3)
    server.misbehave(kind, **options)
    texts = stage.texts(N)
    other = stage.texts(N, first=50)
    jobs = [stage.enqueue(texts), stage.enqueue(other, collection="other")]

    stage.finish(*jobs)

    booked = stage.corridor.one("SELECT coalesce(sum(tokens), 0)::int FROM charges")
    contents, tokens = adjustments(stage)["lost"]
    assert booked + tokens == tokens_of(stage.charges())
    billed = sum(charge["inputs"] for charge in stage.charges())
    assert stage.corridor.one("SELECT coalesce(sum(contents), 0)::int FROM charges") + contents == billed
    rows = stage.corridor.rows("SELECT DISTINCT provider_batch_id, route FROM adjustments")
    assert rows == [{"provider_batch_id": stage.corridor.batches()[0]["id"], "route": "openai"}]


def test_what_may_have_been_charged_is_booked_if_the_provider_does_not_say(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("null_usage", times=None)
    server.misbehave("null_counts", times=None)
    server.misbehave("missing_line", lines=1)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "completed"
    booked = stage.corridor.one("SELECT sum(tokens)::int FROM charges")
    assert adjustments(stage).keys() == {"maybe_charged"}
    assert booked + adjustments(stage)["maybe_charged"][1] == tokens_of(stage.charges())


def test_a_second_batch_that_ran_is_booked_once(stage: Scene, server: OpenAIServer) -> None:
    """A create without an answer made two, and both ran before anybody saw them."""
    server.misbehave("created_twice")
    server.misbehave("cut", where=CREATE, applied=True)
    server.misbehave("http_error", times=3, status=503, where=RETRIEVE)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: len(stage.batches()) == 2, hurry=False)
    until(lambda: [batch["status"] for batch in stage.batches()] == ["completed"] * 2)

    [job] = stage.finish(job)

    assert job.state == "completed"
    assert server.state()["files"] == []
    assert adjustments(stage) == {"lost": (N, stage.charges()[1]["tokens"])}
    assert stage.corridor.one("SELECT sum(tokens)::int FROM charges") == stage.charges()[0]["tokens"]


def test_a_usage_that_cannot_be_is_not_believed(stage: Scene, server: OpenAIServer) -> None:
    """The one says thousand times as much as was sent, and all of its lines were read."""
    retrieve = stage.corridor.context.provider.retrieve

    def boasting(batch_id: str) -> Any:
        remote = retrieve(batch_id)
        object.__setattr__(remote, "used_tokens", 10**12)
        object.__setattr__(remote, "completed", 10**12)
        return remote

    stage.corridor.context.provider.retrieve = boasting  # type: ignore[method-assign]
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert adjustments(stage) == {}


def test_a_batch_that_vanished_may_have_been_charged(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("http_error", times=5, status=404, message="No batch found.", where=RETRIEVE)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "completed"
    assert adjustments(stage) == {"maybe_charged": (N, stage.charges()[0]["tokens"])}


def test_an_old_error_is_gone_after_a_look_that_went_well(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0)
    server.misbehave("http_error", status=503, where=RETRIEVE)
    stage.enqueue(stage.texts(N))
    stage.run_until(lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE error LIKE '%503%'"))
    stage.run_until(lambda: stage.asked("batches.retrieve") >= 2)

    assert stage.corridor.batches()[0]["error"] is None


# Batches that never end


@pytest.mark.parametrize(
    ("status", "expires"),
    [
        ("in_progress", True),
        pytest.param("in_progress", False, marks=pytest.mark.slow),
        pytest.param("finalizing", True, marks=pytest.mark.slow),
        ("finalizing", False),
    ],
)
def test_a_batch_that_never_ends_is_warned_of_cancelled_and_given_up(
    stage: Scene, server: OpenAIServer, expires: bool, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.misbehave("stuck", status=status)
    if not expires:
        server.misbehave("no_expiry", times=None)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.batches() and stage.batches()[0]["status"] == status)
    hours = 24 if expires else stage.corridor.settings.openai_batch_hours
    assert expires or hours > 24

    change(stage, "submitted_at = now() - make_interval(mins => :mins)", mins=int(60 * hours) - 10)
    look_once_more(stage)
    assert stage.corridor.batches()[0]["error"] is None

    change(stage, "submitted_at = now() - make_interval(mins => :mins)", mins=int(60 * hours) + 10)
    look_once_more(stage)
    [row] = stage.corridor.batches()
    assert (row["state"], row["cancel_requested_at"]) == ("submitted", None)
    assert "should have ended" in row["error"] and "lanes abandon" in row["error"]
    assert "should have ended" in caplog.text

    change(stage, "submitted_at = now() - make_interval(mins => :mins)", mins=int(60 * hours) + 61)
    look_once_more(stage)
    [row] = stage.corridor.batches()
    assert row["state"] == "submitted" and row["cancel_requested_at"] is not None
    assert stage.batches()[0]["status"] == "cancelling"

    change(stage, "cancel_requested_at = now() - interval '7 hours'")
    [job] = stage.finish(job)
    assert job.state == "failed"
    assert job.error is not None and "given up" in job.error
    assert adjustments(stage) == {"maybe_charged": (N, stage.charges()[0]["tokens"])}
    assert stage.corridor.rows("SELECT FROM provider_inputs") == []

    server.forget()
    [job] = stage.finish(stage.corridor.client.retry(job.id))
    assert job.state == "completed"


def test_a_batch_that_nobody_wants_is_given_up_though_it_cannot_be_cancelled(
    stage: Scene, server: OpenAIServer
) -> None:
    """Another job waits for the same texts by plain requests."""
    server.misbehave("stuck")
    server.misbehave("http_error", times=None, status=500, where={"endpoint": "batches.cancel"})
    texts = stage.texts(N)
    first = stage.enqueue(texts)
    stage.run_until(lambda: is_in(stage, "submitted"))
    second = stage.enqueue(texts, route="openai-sync", collection="other")
    stage.corridor.client.cancel(first.id)
    stage.run_until(lambda: stage.asked("batches.cancel") >= 2)
    assert not stage.corridor.client.job(second.id).state.is_final

    change(stage, "cancel_requested_at = now() - interval '7 hours'")
    [second] = stage.finish(second)

    assert second.state == "completed"
    assert adjustments(stage)["maybe_charged"] == (N, tokens_of(stage.charges()[:1]))


def test_a_batch_is_abandoned_by_hand_and_its_late_result_changes_nothing(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.batches() and stage.batches()[0]["status"] == "in_progress")

    abandoned = stage.corridor.client.abandon(stage.corridor.batches()[0]["id"])

    assert (abandoned.contents, abandoned.may_be_charged) == (N, True)
    assert adjustments(stage)["maybe_charged"][0] == N
    server.control(in_progress_seconds=0.0)
    [job] = stage.finish(job)
    assert job.state == "completed"
    stage.corridor.check_vectors(texts)
    assert len(stage.batches()) == 2
    assert max(stage.bill(texts).values()) <= 2
    assert stage.server.state()["files"] == [], "those of the abandoned one are deleted too"
    assert adjustments(stage).keys() == {"maybe_charged"}


def test_what_was_not_sent_is_abandoned_without_a_charge(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("unauthorized", times=None)
    job = stage.enqueue(stage.texts(N))
    client = stage.corridor.client
    stage.corridor.poller.round()
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text("UPDATE provider_batches SET state = 'gathered'"))

    number = the_only(stage)

    abandoned = client.abandon(number)

    assert (abandoned.contents, abandoned.may_be_charged) == (0, False)
    assert adjustments(stage) == {}
    with pytest.raises(NotFound, match="chunkmill lanes"):
        client.abandon(999_999)
    server.calm()
    [job] = stage.finish(job)
    assert job.state == "completed"
    with pytest.raises(ChunkmillError, match="closed"):
        client.abandon(number)


# Keys and servers


def with_key(stage: Scene, key: str) -> Any:
    """One more worker, with another key for the same server."""
    from pydantic import SecretStr

    settings = stage.corridor.settings
    try:
        stage.corridor.settings = settings.model_copy(update={"openai_api_key": SecretStr(key)})
        return stage.corridor.worker()
    finally:
        stage.corridor.settings = settings


def test_a_key_of_another_project_stops_the_lane_and_pays_nothing_twice(stage: Scene, server: OpenAIServer) -> None:
    server.control(other_keys=["sk-other-project"], in_progress_seconds=3600.0)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.batches() and stage.batches()[0]["status"] == "in_progress")
    ours, stage.corridor.context = stage.corridor.context, with_key(stage, "sk-other-project")
    client = stage.corridor.client
    for _ in range(8):
        look_once_more(stage)

    lane = client.lanes()[0]
    assert lane.is_stopped and lane.stop_code == "other_key"
    assert lane.stop_reason is not None and "another key" in lane.stop_reason and "lanes abandon" in lane.stop_reason
    [row] = stage.corridor.batches()
    assert row["state"] == "submitted" and "sk-other" not in str(row) and server.key not in str(row)

    stage.corridor.context.close()
    stage.corridor.context = ours
    server.control(in_progress_seconds=0.0)
    client.resume_lane("openai")
    [job] = stage.finish(job)
    stage.check_done(job, texts)
    assert len(stage.batches()) == 1


def test_the_results_of_another_projects_batch_are_not_taken_for_lost(stage: Scene, server: OpenAIServer) -> None:
    server.control(other_keys=["sk-other-project"], in_progress_seconds=3600.0)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: is_in(stage, "submitted"))
    server.control(in_progress_seconds=0.0)
    until(lambda: stage.batches()[0]["status"] == "completed")
    change(stage, "state = 'collecting', output_file_id = :file", file=stage.batches()[0]["output_file_id"])
    ours, stage.corridor.context = stage.corridor.context, with_key(stage, "sk-other-project")
    for _ in range(8):
        look_once_more(stage)
    assert stage.corridor.client.lanes()[0].stop_code == "other_key"

    stage.corridor.context.close()
    stage.corridor.context = ours
    stage.corridor.client.resume_lane("openai")
    [job] = stage.finish(job)
    stage.check_done(job, texts)


def test_a_batch_that_may_exist_is_not_created_with_another_key(stage: Scene, server: OpenAIServer) -> None:
    """The create got no answer, and the list of the other project says nothing about it."""
    server.control(other_keys=["sk-other-project"], in_progress_seconds=3600.0)
    server.misbehave("cut", where=CREATE, applied=True)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: is_in(stage, "creating") and len(stage.batches()) == 1, hurry=False)
    ours, stage.corridor.context = stage.corridor.context, with_key(stage, "sk-other-project")
    change(stage, "creating_since = now() - interval '1 hour'")
    for _ in range(3):
        look_once_more(stage)
    assert len(stage.batches()) == 1
    assert stage.corridor.client.lanes()[0].stop_code == "other_key"

    stage.corridor.context.close()
    stage.corridor.context = ours
    stage.corridor.client.resume_lane("openai")
    server.control(in_progress_seconds=0.0)
    [job] = stage.finish(job)
    stage.check_done(job, texts)


def test_a_new_key_of_the_same_project_goes_on(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    stage.run_until(lambda: is_in(stage, "submitted"))
    change(stage, "key_digest = 'of the old key'")
    server.control(in_progress_seconds=0.0)

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert stage.corridor.batches()[0]["key_digest"] == stage.corridor.context.provider.key_digest


def test_an_id_that_a_server_gives_again_belongs_to_the_new_batch(stage: Scene, server: OpenAIServer) -> None:
    """The server forgot everything in a restart, and counts from 1. The old batch is looked for, and booked."""
    server.control(counts_batches=True, in_progress_seconds=3600.0)
    server.forget()
    old, new = stage.texts(N), stage.texts(N, first=50)
    first = stage.enqueue(old)
    stage.run_until(lambda: is_in(stage, "submitted"))
    server.forget()
    server.control(in_progress_seconds=0.0)
    second = stage.enqueue(new, collection="other")

    first, second = stage.finish(first, second)

    assert (first.state, second.state) == ("completed", "completed")
    assert {row["batch_id"] for row in stage.corridor.batches()} <= {"batch_1", "batch_2", "batch_3"}
    stage.corridor.check_vectors(old)
    stage.corridor.check_vectors(new, "other")
    assert stage.bill(new) == dict.fromkeys(new, 1)
    assert adjustments(stage).keys() == {"maybe_charged"}


def test_an_id_that_is_followed_already_is_named(stage: Scene, server: OpenAIServer) -> None:
    server.control(counts_batches=True, in_progress_seconds=3600.0)
    server.forget()
    stage.enqueue(stage.texts(N))
    stage.run_until(lambda: is_in(stage, "submitted"))
    change(stage, "not_before = now() + interval '1 hour'")
    server.forget()
    stage.enqueue(stage.texts(N, first=50), collection="other")
    stage.run_until(lambda: is_in(stage, "creating") or len(stage.corridor.batches()) > 1, hurry=False)
    stage.run_until(
        lambda: stage.corridor.rows("SELECT FROM provider_batches WHERE error LIKE '%batch_1%'"), hurry=False
    )

    first, second = stage.corridor.batches()
    assert f"ProviderBatch {first['id']} " in second["error"]
    assert f"lanes abandon {first['id']}" in second["error"]


# Refusals of a batch as a whole


def test_a_quota_smaller_than_a_batch_cuts_the_batch(stage: Scene, server: OpenAIServer) -> None:
    """The limit is learnt from its number, forgotten when the lane is resumed, and other work goes on."""
    texts = stage.texts(40)
    server.forget()
    server.control(enqueued_tokens=100)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.end_pauses() or stage.corridor.client.job(job.id).state.is_final)

    [job] = stage.finish(job)
    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1
    assert all(batch["tokens"] is None or batch["tokens"] <= 100 for batch in stage.batches())
    lane = stage.corridor.client.lanes()[0]
    assert lane.max_tokens is not None and lane.max_tokens <= 100
    assert stage.corridor.client.resume_lane("openai")
    assert stage.corridor.client.lanes()[0].max_tokens is None


def test_a_quota_without_a_number_is_found_by_halves(stage: Scene, server: OpenAIServer) -> None:
    for _ in range(6):
        server.misbehave("fail_validation", code="token_limit_exceeded", message="No room.")
    texts = stage.texts(16)
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.end_pauses() or stage.corridor.client.job(job.id).state.is_final)

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    sizes = [row["n_contents"] for row in stage.corridor.batches()]
    assert max(sizes[1:]) <= 8 and max(sizes[2:]) <= 4
    assert stage.charged_attempts() == 1


@pytest.mark.parametrize("overflow", ["batch", "create"])
def test_a_quota_that_another_batch_of_ours_fills_pauses_the_lane_and_cuts_nothing(
    stage: Scene, server: OpenAIServer, overflow: str
) -> None:
    texts, others = stage.texts(10), stage.texts(10, first=50)
    server.forget()
    server.control(enqueued_tokens=400, in_progress_seconds=3600.0, enqueued_overflow=overflow)
    first = stage.enqueue(texts)
    stage.run_until(lambda: is_in(stage, "submitted"))
    second = stage.enqueue(others, collection="other")
    stage.run_until(lambda: stage.corridor.client.lanes()[0].paused_until)
    for _ in range(5):
        stage.end_pauses()
        look_once_more(stage)
    assert [row["n_contents"] for row in stage.corridor.batches()] == [10, 10]
    assert "imit" in (stage.corridor.client.lanes()[0].pause_reason or "")
    server.control(in_progress_seconds=0.0)
    stage.run_until(lambda: stage.end_pauses() or stage.corridor.client.job(second.id).state.is_final)
    first, second = stage.finish(first, second)
    assert (first.state, second.state) == ("completed", "completed")
    assert stage.bill(texts | others) == dict.fromkeys(texts | others, 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("missing_line", {"lines": 1}), ("late_file_ids", {"times": None, "where": {"endpoint": "batches.retrieve"}})],
)
def test_a_batch_that_ended_and_waits_for_its_files_leaves_a_small_quota_to_others(
    stage: Scene, server: OpenAIServer, kind: str, options: dict[str, Any]
) -> None:
    """It may wait for hours. What the provider has ended is not in its queue, so that the next may be sent."""
    texts, others = stage.texts(12), stage.texts(12, first=50)
    server.forget()
    server.control(enqueued_tokens=300)
    server.misbehave(kind, **options)
    jobs = [stage.enqueue(texts), stage.enqueue(others, collection="other")]
    waits = "state = 'submitted' AND provider_status = 'completed'"
    stage.run_until(
        lambda: stage.end_pauses() or stage.corridor.rows(f"SELECT FROM provider_batches WHERE {waits}"), hurry=False
    )
    assert stage.corridor.client.lanes()[0].max_tokens is not None
    server.calm()
    with stage.corridor.db.begin() as conn:
        # From now on nothing looks for its files.
        far = "not_before = now() + interval '1 day', lease_until = NULL"
        conn.execute(sa.text(f"UPDATE provider_batches SET {far} WHERE {waits}"))
    open_others = f"SELECT FROM provider_batches WHERE state <> 'closed' AND NOT ({waits})"
    stage.run_until(
        lambda: (
            not stage.corridor.rows(open_others)
            and not stage.corridor.rows("SELECT FROM chunk_batches WHERE state = 'available'")
        ),
        hurry=False,
    )
    assert len(stage.corridor.rows("SELECT FROM provider_batches WHERE state <> 'closed'")) == 1
    assert stage.bill(texts | others).keys() == (texts | others).keys()

    jobs = stage.finish(*jobs)

    assert [job.state for job in jobs] == ["completed"] * 2
    assert len(stage.corridor.client.vectors("docs")) == len(stage.corridor.client.vectors("other")) == 12


def test_a_lowered_limit_packs_again_what_is_gathered_and_not_sent(stage: Scene, server: OpenAIServer) -> None:
    texts = {f"c{i}": stage.text(i) + " word" * 1000 for i in range(20)}
    server.misbehave("http_error", times=1, status=503, where={"endpoint": "files.create"})
    job = stage.enqueue(texts)
    stage.run_until(lambda: is_in(stage, "gathered"), hurry=False)
    context = stage.corridor.context
    context.settings = context.settings.model_copy(update={"openai_max_enqueued_tokens": 10_000})

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert [batch["tokens"] <= 10_000 for batch in stage.batches()] == [True] * len(stage.batches())
    assert stage.charged_attempts() == 1


@pytest.mark.parametrize("status", [400, 413])
def test_a_file_that_is_too_large_is_cut(stage: Scene, server: OpenAIServer, status: int) -> None:
    server.control(max_file_bytes=1_500, too_large_status=status)
    texts = {f"c{i}": stage.text(i) + " word" * 20 for i in range(N)}

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert len(stage.batches()) > 1
    assert stage.charged_attempts() == 1


def test_a_server_that_knows_no_expiry_of_files_gets_them_without(stage: Scene, server: OpenAIServer) -> None:
    server.control(file_expiry=False)
    jobs = [(stage.texts(N), "docs"), (stage.texts(N, first=50), "other")]
    ended = stage.finish(*[stage.enqueue(texts, collection=name) for texts, name in jobs])
    assert [job.state for job in ended] == ["completed"] * 2
    [job] = stage.finish(stage.enqueue(stage.texts(N, first=90)))
    assert job.state == "completed"
    assert server.state()["requests"]["files.create"].get("400", 0) >= 1
    assert stage.asked("files.create") <= 4, "it is asked for once with an expiry and never again"


def test_a_create_without_an_answer_and_without_a_list_stops_the_lane(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("cut", where=CREATE, applied=True)
    number = server.misbehave("http_error", times=None, status=404, where=LIST)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[0].is_stopped)

    lane = client.lanes()[0]
    assert lane.stop_code == "create_unknown"
    assert lane.stop_reason is not None and f"lanes abandon {the_only(stage)}" in lane.stop_reason
    assert len(stage.batches()) == 1 and server.fired(number) > 0
    [sentence] = client.explain(job.id).waits
    assert "stopped" in sentence and "create_unknown" in sentence

    assert client.abandon(the_only(stage)).may_be_charged
    client.resume_lane("openai")
    server.calm()
    [job] = stage.finish(job)
    assert job.state == "completed"
    assert adjustments(stage)["maybe_charged"][0] == N
    booked = stage.corridor.one("SELECT sum(tokens)::int FROM charges")
    assert booked + adjustments(stage)["maybe_charged"][1] == tokens_of(stage.charges())


# Steps that fail again and again


def test_a_step_that_fails_equally_stops_its_lane_with_the_reason(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "EQUAL_FAILURES", 4)
    server.misbehave("http_error", times=None, status=418, message="I am a teapot.", where={"endpoint": "files.create"})
    context = stage.corridor.context
    context.settings = context.settings.model_copy(update={"max_attempts": 100})
    job = stage.enqueue(stage.texts(N))
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[0].is_stopped)

    lane = client.lanes()[0]
    assert lane.stop_code == "step_failed"
    assert lane.stop_reason is not None and "I am a teapot." in lane.stop_reason and "4 times" in lane.stop_reason
    assert stage.asked("files.create") == 4
    [sentence] = client.explain(job.id).waits
    assert "lanes resume openai" in sentence and "teapot" in sentence


def test_an_outage_stops_no_lane_for_hours(stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "EQUAL_FAILURES", 4)
    server.misbehave("http_error", times=9, status=503, where={"endpoint": "files.create"})
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
