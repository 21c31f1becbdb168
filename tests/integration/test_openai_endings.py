"""Every way a ProviderBatch can end, and what came back: complete, paid once, and the books agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from chunkmill.settings import Settings
from chunkmill_workers.provider.collect import DOWNLOADS, SILENT_DOWNLOADS
from tests.openai_server import OpenAIServer, vector_for
from tests.support.corridor import DIMENSIONS
from tests.support.corridor_scene import Scene, scene
from tests.support.waiting import PATIENCE

N = 10
"""Contents: requests of 4, 4 and 2."""


def dead_list(stage: Scene, job_id: int) -> dict[str, tuple[str, str]]:
    return {
        dead_chunk.chunk_id: (dead_chunk.code, dead_chunk.reason)
        for dead_chunk in stage.corridor.client.dead_chunks(job_id)
    }


# Requests that failed


def test_a_refused_content_is_found_and_its_neighbours_are_paid_once(stage: Scene, server: OpenAIServer) -> None:
    texts = stage.texts(N)
    texts["c5"] += " POISON"
    server.misbehave("line_failures", times=None, marker="POISON", code="invalid_input", message="No such text.")

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    assert job.error is not None and "1 chunk cannot be embedded" in job.error
    [(chunk_id, (code, reason))] = dead_list(stage, job.id).items()
    assert (chunk_id, code) == ("c5", "invalid_input")
    assert "No such text." in reason and "POISON" not in reason
    others = {name: text for name, text in texts.items() if name != "c5"}
    assert stage.bill(texts) == dict.fromkeys(others, 1)
    audit = stage.corridor.client.audit("docs")
    assert (audit.missing, audit.dead, audit.missing_ids) == (1, 1, ("c5",))
    stage.corridor.check_vectors(others)
    stage.check_books()
    assert stage.charged_attempts() == 1
    assert stage.corridor.rows("SELECT * FROM provider_suspects") == []


@pytest.mark.parametrize(
    ("status", "code", "charged"), [(429, "rate_limit_exceeded", 1), (500, None, 2), (408, None, 2)]
)
def test_a_request_that_failed_is_sent_again(
    stage: Scene, server: OpenAIServer, status: int, code: str | None, charged: int
) -> None:
    """A limit is no failure, a server's error is one: attempts are charged for it."""
    server.misbehave("line_failures", times=1, lines=1, status=status, code=code)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert len(stage.batches()) == 2
    assert stage.charged_attempts() == charged


def test_what_fails_every_time_is_dead_after_the_last_attempt(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("line_failures", times=None, lines=10, status=500, code="server_error", message="Sorry.")
    texts = stage.texts(2)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    dead = dead_list(stage, job.id)
    assert {name: code for name, (code, _) in dead.items()} == {"c0": "server_error", "c1": "server_error"}
    assert "no vector after 5 attempts" in dead["c0"][1] and "Sorry." in dead["c0"][1]
    assert stage.bill(texts) == {}
    stage.check_books()


def test_a_quota_that_ends_in_the_middle_stops_the_lane(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("line_failures", times=1, lines=1, status=429, code="insufficient_quota", message="Pay.")
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    client = stage.corridor.client

    stage.run_until(lambda: client.lanes()[0].is_stopped)

    assert client.lanes()[0].stop_code == "insufficient_quota"
    client.resume_lane("openai")
    [job] = stage.finish(job)
    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1


# Batches that ended otherwise than they should


@pytest.mark.parametrize("empty_ids", [False, True])
def test_completed_with_nothing_but_failures(stage: Scene, server: OpenAIServer, empty_ids: bool) -> None:
    server.misbehave("all_failed")
    if empty_ids:
        server.misbehave("empty_file_ids", times=None)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.batches()[0]["output_file_id"] is None
    assert stage.charged_attempts() == 2


@pytest.mark.parametrize("error_lines", [True, False])
def test_expired_keeps_what_was_done_and_sends_the_rest(stage: Scene, server: OpenAIServer, error_lines: bool) -> None:
    server.misbehave("expire", fraction=0.5, error_lines=error_lines)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    first, second = stage.batches()
    assert (first["status"], second["status"]) == ("expired", "completed")
    assert second["tokens"] < stage.corridor.one("SELECT sum(tokens) FROM charges")
    assert stage.charged_attempts() == 1
    written = [batch["n_written"] for batch in stage.corridor.batches()]
    assert sum(written) == N and all(written)


def test_expired_over_and_over_charges_no_attempt(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("expire", times=7, fraction=0.0)
    texts = stage.texts(3)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_cancelled_by_somebody_else(stage: Scene, server: OpenAIServer, fraction: float) -> None:
    """What was done is kept. The rest is charged as an attempt: whoever cancels each time must not keep it circling."""
    server.misbehave("cancelled_by_other", fraction=fraction)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert [batch["status"] for batch in stage.batches()] == ["cancelled", "completed"]
    assert stage.charged_attempts() == 2


@pytest.mark.parametrize("when", ["validating", "in_progress"])
def test_cancelled_by_us_and_taken_up_again(stage: Scene, server: OpenAIServer, when: str) -> None:
    server.control(**{f"{when}_seconds": 3600.0}, partial_fraction=0.5)
    texts = stage.texts(N)
    client = stage.corridor.client
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.batches() and stage.batches()[0]["status"] == when)

    job = client.cancel(job.id)
    [job] = stage.finish(job)

    assert job.state == "cancelled"
    assert [batch["status"] for batch in stage.batches()] == ["cancelled"]
    stage.check_books()
    kept = stage.bill(texts)
    assert client.vectors("docs").keys() == kept.keys()
    assert (len(kept) > 0) == (when == "in_progress")

    server.control(validating_seconds=0.0, in_progress_seconds=0.0)
    [job] = stage.finish(client.retry(job.id))
    stage.check_done(job, texts)


def test_taken_up_again_while_it_is_being_cancelled(stage: Scene, server: OpenAIServer) -> None:
    server.control(in_progress_seconds=3600.0, cancelling_seconds=3600.0, partial_fraction=0.5)
    texts = stage.texts(N)
    client = stage.corridor.client
    job = stage.enqueue(texts)
    stage.run_until(lambda: stage.batches() and stage.batches()[0]["status"] == "in_progress")
    client.cancel(job.id)
    stage.run_until(lambda: stage.batches()[0]["status"] == "cancelling")
    job = client.retry(job.id)
    server.control(in_progress_seconds=0.0, cancelling_seconds=0.0)

    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert [batch["status"] for batch in stage.batches()] == ["cancelled", "completed"]
    assert stage.charged_attempts() == 1


# Validation


def test_validations_that_failed_one_after_the_other(stage: Scene, server: OpenAIServer) -> None:
    """A limit is waited for, and counts for nothing; what may be the file's fault has as many tries as an attempt."""
    limits = ["token_limit_exceeded", "request_limit_exceeded"]
    sent_again = ["empty_file", "duplicate_custom_id", "invalid_json_line", "who_knows"]
    for code in limits + sent_again:
        server.misbehave("fail_validation", code=code)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert [batch["status"] for batch in stage.batches()] == ["failed"] * 6 + ["completed"]
    [batch] = stage.corridor.batches()
    assert batch["resends"] == len(sent_again)
    assert stage.charged_attempts() == 1
    assert stage.corridor.client.lanes()[0].max_inputs is None


def test_a_validation_that_would_fail_for_all_stops_the_lane_and_kills_no_text(
    stage: Scene, server: OpenAIServer
) -> None:
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    client = stage.corridor.client
    codes = ["url_mismatch", "model_mismatch", "model_not_found"]
    for tried, code in enumerate(codes, 1):
        server.misbehave("fail_validation", code=code, message="The model is not here.")
        stage.run_until(lambda: client.lanes()[0].is_stopped)
        for _ in range(3):
            stage.hurry()
            stage.corridor.turn()
        assert len(stage.batches()) == tried
        lane = client.lanes()[0]
        assert lane.stop_code == code
        assert lane.stop_reason is not None
        assert "The model is not here." in lane.stop_reason and "chunkmill lanes resume" in lane.stop_reason
        client.resume_lane("openai")

    [job] = stage.finish(job)
    stage.check_done(job, texts)
    assert stage.asked("files.create") == len(codes) + 1, "a setting may have changed, so the file is made again"
    assert stage.charged_attempts() == 1


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "model_not_found", "The model does not exist."),
        (400, None, "This model does not support specifying dimensions."),
        (403, "billing_not_active", "Pay."),
    ],
)
def test_lines_that_are_refused_for_everybody_stop_the_lane_and_kill_no_text(
    stage: Scene, server: OpenAIServer, status: int, code: str | None, message: str
) -> None:
    server.misbehave("line_failures", lines=N, status=status, code=code, message=message)
    texts = stage.texts(N)
    job = stage.enqueue(texts)
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[0].is_stopped)

    assert message in str(client.lanes()[0].stop_reason)
    assert client.job(job.id).dead == 0
    client.resume_lane("openai")
    [job] = stage.finish(job)
    stage.check_done(job, texts)
    assert stage.charged_attempts() == 1


def test_lines_that_all_meet_a_limit_pause_the_lane(
    settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest
) -> None:
    with scene(settings, server, request, openai_poll_seconds=PATIENCE) as stage:
        server.misbehave("line_failures", times=None, lines=N, status=429, code="rate_limit_exceeded", message="Slow.")
        texts = stage.texts(N)
        job = stage.enqueue(texts)
        client = stage.corridor.client
        stage.run_until(lambda: client.lanes()[0].paused_until is not None)
        for _ in range(3):
            stage.hurry()
            stage.corridor.turn()

        assert len(stage.batches()) == 1
        assert "Slow." in str(client.lanes()[0].pause_reason)
        server.calm()
        client.resume_lane("openai")
        [job] = stage.finish(job)
        stage.check_done(job, texts)
        assert stage.charged_attempts() == 1


def test_too_many_inputs_are_split_and_the_lane_learns(stage: Scene, server: OpenAIServer) -> None:
    server.control(max_inputs_per_batch=3)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.corridor.client.lanes()[0].max_inputs == 3
    assert stage.charged_attempts() == 1


def test_lines_that_validation_names_are_sent_alone(stage: Scene, server: OpenAIServer) -> None:
    server.control(request_errors="batch", max_tokens_per_input=50)
    texts = stage.texts(N)
    texts["c5"] += " word" * 60

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    [(chunk_id, (code, reason))] = dead_list(stage, job.id).items()
    assert (chunk_id, code) == ("c5", "invalid_request")
    assert "maximum" in reason
    assert stage.bill(texts) == {name: 1 for name in texts if name != "c5"}
    stage.check_books()
    assert stage.charged_attempts() == 1


def test_what_fails_validation_without_a_word_is_found_by_halves(stage: Scene, server: OpenAIServer) -> None:
    """And nothing of it is learned: work that comes later is not cut up for it."""
    server.misbehave("fail_validation", times=None, code="invalid_request", where={"filename": "*"})
    texts = stage.texts(3)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    assert {name: code for name, (code, _) in dead_list(stage, job.id).items()} == dict.fromkeys(
        texts, "invalid_request"
    )
    assert len(stage.batches()) == 5 + 4, "five times the whole, and each half once"
    assert stage.charged_attempts() == 1
    server.calm()
    assert stage.corridor.client.lanes()[0].max_inputs is None
    [job] = stage.finish(stage.corridor.client.retry(job.id))
    stage.check_done(job, texts)


def test_halves_that_pass_are_complete(stage: Scene, server: OpenAIServer) -> None:
    """The whole fails, and one of its halves once; a text of several windows is among them."""
    server.misbehave("fail_validation", times=6, code="who_knows")
    texts = stage.texts(7)
    texts["c1"] += " word" * 8_192

    [job] = stage.finish(stage.enqueue(texts, on_long="split"))

    assert (job.state, job.dead) == ("completed", 0)
    assert sorted(batch["n_contents"] for batch in stage.corridor.batches()) == [2, 2, 3]
    short = {name: text for name, text in texts.items() if name != "c1"}
    assert stage.bill(texts) == dict.fromkeys(short, 1)
    vectors = stage.corridor.client.vectors("docs")
    assert vectors.keys() == texts.keys()
    for name, text in short.items():
        np.testing.assert_allclose(vectors[name], vector_for(text, DIMENSIONS), atol=1e-6)
    stage.check_books(unanswered_contents=1)  # its two windows are one content
    assert stage.charged_attempts() == 1


def test_a_line_that_is_named_for_no_reason(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("fail_validation", code="invalid_json_line", line=2)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert [batch["requests"] for batch in stage.batches()] == [None, 6], "four alone, the others as before"
    assert stage.charged_attempts() == 1
    assert stage.corridor.rows("SELECT * FROM provider_suspects") == []


def test_the_incident_of_files_that_are_not_found(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("cannot_find_file", times=2)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    [batch] = stage.corridor.batches()
    assert (batch["uploads"], batch["resends"]) == (3, 2)
    assert stage.asked("files.delete") >= 3


def test_a_file_that_is_never_found_is_given_up(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("cannot_find_file", times=None)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    assert job.error is not None and "annot find file" in job.error
    assert len(stage.batches()) == stage.corridor.settings.max_attempts
    stage.check_books()


# Files and batches that vanished


def test_an_input_file_that_vanished_before_the_create(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("input_vanished")
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.corridor.batches()[0]["uploads"] == 2
    assert stage.charged_attempts() == 1


def test_an_upload_that_is_refused_for_good_is_given_up(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave(
        "http_error", times=None, status=400, message="No file of this kind.", where={"endpoint": "files.create"}
    )
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    assert job.error is not None and "No file of this kind." in job.error
    assert stage.asked("files.create") == stage.corridor.settings.max_attempts
    stage.check_books()


def test_an_output_file_that_vanished_was_paid_and_is_lost(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("output_vanished")
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    first = stage.charges()[0]
    stage.check_done(job, texts, unanswered_contents=first["inputs"], unanswered_tokens=first["tokens"])
    assert stage.bill(texts) == dict.fromkeys(texts, 2)
    assert stage.oddities() == {"unanswered": N}
    assert stage.charged_attempts() == 2


def test_a_batch_that_vanished_for_good(stage: Scene, server: OpenAIServer) -> None:
    where = {"endpoint": "batches.retrieve"}
    for _ in range(3):  # of another kind, and long ago
        server.misbehave("http_error", status=500, where=where)
    server.misbehave("http_error", times=5, status=404, message="No batch found.", where=where)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    first = stage.charges()[0]
    server.vanish(stage.batches()[0]["output_file_id"])  # of which nobody could know
    stage.check_done(job, texts, unanswered_contents=first["inputs"], unanswered_tokens=first["tokens"])
    assert stage.bill(texts) == dict.fromkeys(texts, 2)
    assert stage.charged_attempts() == 2


def test_a_batch_that_is_not_found_for_a_while(stage: Scene, server: OpenAIServer) -> None:
    where = {"endpoint": "batches.retrieve"}
    server.misbehave("http_error", times=4, status=500, where=where)
    server.misbehave("http_error", times=4, status=404, where=where)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)


# What is in the files


@pytest.mark.parametrize("kind", ["truncated", "cut_body"])
@pytest.mark.parametrize("expired", [False, True])
def test_a_download_that_ended_early_is_read_again(
    stage: Scene, server: OpenAIServer, kind: str, expired: bool
) -> None:
    if expired:
        server.misbehave("expire", fraction=0.5)
    server.misbehave(kind, fraction=0.6)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert len(stage.batches()) == 1 + expired
    assert stage.charged_attempts() == 1
    assert "unknown_custom_id" not in stage.oddities()


def test_an_outage_is_not_paid_for(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("http_error", times=SILENT_DOWNLOADS - 1, status=503, where={"endpoint": "files.content"})
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.asked("files.content") == SILENT_DOWNLOADS
    assert stage.charged_attempts() == 1


@pytest.mark.parametrize(("kind", "tries"), [("truncated", DOWNLOADS), ("cut_body", SILENT_DOWNLOADS)])
def test_a_download_that_always_ends_early(stage: Scene, server: OpenAIServer, kind: str, tries: int) -> None:
    """What could be read is kept; only the rest, which is paid and lost, is sent again."""
    texts = stage.texts(N)
    server.misbehave(kind, times=tries, fraction=0.6)

    [job] = stage.finish(stage.enqueue(texts))

    bill = stage.bill(texts)
    lost = [name for name, times in bill.items() if times == 2]
    assert bill.keys() == texts.keys() and set(bill.values()) <= {1, 2}
    assert len(lost) < N or kind == "cut_body", "a connection that was cut gives nothing of a small file"
    assert stage.oddities()["unanswered"] == len(lost)
    tokens = sum(charge["tokens"] for charge in stage.charges())
    booked = stage.corridor.one("SELECT sum(tokens)::int FROM charges")
    stage.check_done(job, texts, unanswered_contents=len(lost), unanswered_tokens=tokens - booked)
    assert stage.charged_attempts() == 2


HARMLESS = {
    "duplicate": lambda server: server.misbehave("duplicate_line", lines=2),
    "unknown_custom_id": lambda server: server.misbehave("unknown_line", lines=2),
    "not_json": lambda server: server.misbehave("garbage_line", lines=1, extra=True),
}


@pytest.mark.parametrize("oddity", HARMLESS)
def test_lines_too_many_change_nothing(stage: Scene, server: OpenAIServer, oddity: str) -> None:
    HARMLESS[oddity](server)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.oddities().keys() == {oddity}
    assert len(stage.batches()) == 1


@pytest.mark.parametrize(
    ("kind", "oddity"),
    [("missing_line", None), ("null_custom_id", "no_custom_id"), ("garbage_line", "not_json")],
)
def test_a_line_without_an_answer_is_paid_and_lost(
    stage: Scene, server: OpenAIServer, kind: str, oddity: str | None
) -> None:
    server.misbehave(kind, lines=1)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    bill = stage.bill(texts)
    lost = [name for name, times in bill.items() if times == 2]
    assert len(lost) in (2, 4) and bill.keys() == texts.keys()
    assert stage.oddities()["unanswered"] == len(lost)
    if oddity:
        assert stage.oddities()[oddity] == 1
    tokens = sum(charge["tokens"] for charge in stage.charges())
    booked = stage.corridor.one("SELECT sum(tokens)::int FROM charges")
    stage.check_done(job, texts, unanswered_contents=len(lost), unanswered_tokens=tokens - booked)
    assert stage.charged_attempts() == 2


def test_vectors_that_are_none_are_paid_again(stage: Scene, server: OpenAIServer) -> None:
    """They were answered, so they are booked as well as charged; and an attempt is charged for each."""
    kinds = {"wrong_dimensions": {}, "not_finite": {}, "zero_vector": {}, "odd_index": {"how": "zero"}}
    for passed, (kind, options) in enumerate(kinds.items()):
        server.misbehave(kind, after=passed, lines=1, **options)
    texts = stage.texts(4)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "completed"
    assert [server.fired(kind) > 0 for kind in kinds] == [True] * 4
    assert stage.bill(texts) == dict.fromkeys(texts, 5)
    stage.corridor.check_vectors(texts)
    stage.check_books()
    assert stage.charged_attempts() == 5


def test_one_vector_that_is_not_there_costs_no_other(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("missing_item", lines=1)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "completed"
    assert sorted(stage.bill(texts).values()) == [1] * (N - 1) + [2]
    stage.corridor.check_vectors(texts)
    stage.check_books()


def test_a_vector_that_is_never_one_is_dead(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("zero_vector", times=None, marker="NAUGHT")
    texts = stage.texts(2) | {"bad": f"{stage.name} NAUGHT"}

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    dead = dead_list(stage, job.id)
    assert dead["bad"][0] == "bad_vector" and "zero" in dead["bad"][1]
    assert stage.bill(texts)["bad"] == stage.corridor.settings.max_attempts
    stage.check_books()


SHAPES = ("odd_status", "iso_dates", "null_counts", "null_usage", "empty_file_ids", "metadata_dropped")
DIALECTS: dict[str, Callable[[OpenAIServer], object]] = {
    "shapes": lambda server: [server.misbehave(kind, times=None) for kind in SHAPES],
    "string_body": lambda server: server.misbehave("string_body", times=None, lines=9),
    "vectors": lambda server: [
        server.misbehave(kind, times=None, lines=9) for kind in ("shuffled_data", "other_encoding", "missing_usage")
    ],
    "empty_error_file": lambda server: server.misbehave("empty_error_file", times=None),
    "no_list": lambda server: server.misbehave(
        "http_error", times=None, status=404, where={"endpoint": "batches.list"}
    ),
    "delete_fails": lambda server: server.misbehave("delete_fails", times=2),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_only_said_otherwise(stage: Scene, server: OpenAIServer, dialect: str) -> None:
    DIALECTS[dialect](server)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.oddities() == {}
    assert len(stage.batches()) == 1
