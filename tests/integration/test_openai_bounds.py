"""A server is believed only within bounds, on both routes: its counts, its words, its order and its name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill.cli.__main__ import cli
from chunkmill.errors import EngineError
from chunkmill.openai import http
from chunkmill.openai.wire import answers
from chunkmill.settings import Settings
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.provider import collect
from chunkmill_workers.provider.responder import ProviderResponder
from tests.openai_server import OpenAIServer
from tests.support.corridor import MODEL, Corridor, corridor
from tests.support.corridor_scene import Scene

ROUTES = ["openai", "openai-sync"]
N = 10
"""Contents: requests of 4, 4 and 2."""


@pytest.fixture
def searched(settings: Settings, server: OpenAIServer) -> Iterator[Corridor]:
    server.calm()
    with corridor(settings, server) as made:
        answering = ProviderResponder(made.context)
        answering.start()
        yield made
        answering.stop()


def charged(stage: Scene) -> dict[str, Any]:
    return stage.corridor.rows(
        "SELECT sum(contents)::int AS contents, sum(tokens)::int AS tokens, min(usd) >= 0 AS paid FROM charges"
    )[0]


def adjusted(lane: Corridor) -> list[tuple[str, int, int]]:
    rows = lane.rows("SELECT kind, contents::int AS n, tokens::int AS tokens FROM adjustments ORDER BY id")
    return [(row["kind"], row["n"], row["tokens"]) for row in rows]


def answering_models(lane: Corridor) -> list[str]:
    return [row["model"] for row in lane.rows("SELECT model FROM answering_models ORDER BY space_id")]


# Counts


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [-(10**9), -1, 10**12, 10**30, "12", 1.5])
def test_a_count_of_tokens_that_cannot_be_true_is_replaced_by_our_own(
    stage: Scene, server: OpenAIServer, caplog: pytest.LogCaptureFixture, route: str, value: Any
) -> None:
    server.misbehave("odd_usage", times=None, lines=N, value=value)
    texts = stage.texts(N)
    before = COUNTS.total(metrics.PROVIDER_ODDITIES)

    with caplog.at_level(logging.WARNING):
        [job] = stage.finish(stage.enqueue(texts, route=route))

    stage.check_done(job, texts)
    said = [record for record in caplog.records if "count of tokens cannot be true" in record.message]
    assert len(said) == 1 and "tokens_factor" in said[0].message
    assert COUNTS.total(metrics.PROVIDER_ODDITIES) - before == 3
    if route == "openai":
        assert stage.oddities() == {"usage": 3}


@pytest.mark.parametrize("route", ROUTES)
def test_a_count_within_bounds_is_booked_and_said_once_if_it_is_much_larger_than_ours(
    stage: Scene, server: OpenAIServer, caplog: pytest.LogCaptureFixture, route: str
) -> None:
    """A server that counts characters, or with another tokenizer: what it charges is booked, as long as it may be."""
    server.misbehave("odd_usage", times=None, lines=N, factor=3.0)
    texts = {name: text + " and so on" * 60 for name, text in stage.texts(N).items()}

    with caplog.at_level(logging.WARNING):
        [job] = stage.finish(stage.enqueue(texts, route=route))

    assert job.state == "completed"
    right = sum(charge["tokens"] for charge in stage.charges())
    assert charged(stage) == {"contents": N, "tokens": 3 * right, "paid": True}
    said = [record.message for record in caplog.records if "times as many tokens as we count" in record.message]
    assert len(said) == 1 and "3.0 times" in said[0] and MODEL in said[0]
    assert stage.oddities() == {}


# Order


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("missing_index", {}), ("odd_index", {"how": "first"}), ("shuffled_data", {})],
)
def test_vectors_without_an_index_or_in_another_order_are_those_of_their_texts(
    stage: Scene, server: OpenAIServer, route: str, kind: str, options: dict[str, Any]
) -> None:
    server.misbehave(kind, times=None, lines=N, **options)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts, route=route))

    stage.check_done(job, texts)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("odd_index", {"how": "zero"}), ("odd_index", {"how": "one"}), ("missing_item", {})],
)
def test_vectors_that_nobody_can_place_are_a_named_error(
    stage: Scene, server: OpenAIServer, route: str, kind: str, options: dict[str, Any]
) -> None:
    server.misbehave(kind, times=None, lines=N, **options)
    job = stage.enqueue(stage.texts(4), route=route)
    if kind == "odd_index" and route == "openai-sync":
        # What no vector could be placed of is sent alone the next time, and is then at index 0.
        stage.run_until(lambda: any("for this input" in str(row["error"]) for row in errors(stage)), hurry=False)
        [job] = stage.finish(job)
        assert (job.state, job.dead) == ("completed", 0)
        assert stage.corridor.client.audit("docs").complete
        stage.check_books()
        return

    [job] = stage.finish(job)

    assert job.state == "failed"
    reasons = [dead.reason for dead in stage.corridor.client.dead_chunks(job.id)]
    assert any("for this input" in said for said in [*reasons, *(str(row["error"]) for row in errors(stage))])


def errors(stage: Scene) -> list[dict[str, Any]]:
    return stage.corridor.rows("SELECT error FROM chunk_batches")


# Words


POISON = "It is\x00 not \ud800 here \x1b[31m\u202e\x9b."
CLEAN = "It is not here [31m."


def test_a_word_that_no_table_takes_wedges_no_result_file(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("line_failures", times=None, lines=N, status=400, code="bad\x00_input", message=POISON)
    texts = stage.texts(3)

    [job] = stage.finish(stage.enqueue(texts))

    assert job.state == "failed"
    reasons = {dead.reason for dead in stage.corridor.client.dead_chunks(job.id)}
    assert len(reasons) == 1 and CLEAN in reasons.pop()


def test_a_word_that_no_table_takes_wedges_no_refused_request(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("http_error", times=None, where={"endpoint": "embeddings.create"}, status=400, message=POISON)

    [job] = stage.finish(stage.enqueue(stage.texts(3), route="openai-sync"))

    assert job.state == "failed"
    assert {CLEAN in dead.reason for dead in stage.corridor.client.dead_chunks(job.id)} == {True}
    assert stage.asked("embeddings.create") <= 5


def test_a_word_that_no_table_takes_wedges_no_batch(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("fail_validation", times=1, code="odd\x00", message=POISON)
    server.misbehave("odd_words", times=1, where={"endpoint": "batches.create"}, value=POISON)
    texts = stage.texts(N)
    job = stage.enqueue(texts)

    stage.run_until(lambda: any(CLEAN in str(batch["error"]) for batch in stage.corridor.batches()))
    [job] = stage.finish(job)

    stage.check_done(job, texts)


def test_an_odd_field_of_a_batch_is_named_and_passes_when_it_does(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("odd_id", times=2, where={"endpoint": "batches.retrieve"}, value="file-\x00")
    server.misbehave("odd_count", times=2, where={"endpoint": "batches.retrieve"}, value=10**12)
    texts = stage.texts(N)
    job = stage.enqueue(texts)

    stage.run_until(lambda: any("output_file_id is not an id" in str(row["error"]) for row in stage.corridor.batches()))
    [job] = stage.finish(job)

    stage.check_done(job, texts)


# Length


def test_a_result_line_without_end_costs_only_itself(stage: Scene, server: OpenAIServer) -> None:
    server.misbehave("long_line", extra=True)
    texts = stage.texts(N)

    [job] = stage.finish(stage.enqueue(texts))

    stage.check_done(job, texts)
    assert stage.oddities() == {"too_long": 1}


def test_a_file_is_read_to_its_end_although_most_of_it_was_committed_before(
    stage: Scene, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file can have follows from what was sent, and not from what is still in flight."""
    for name, size in (("SLACK_BYTES", 100), ("LINE_BYTES", 500), ("DIMENSIONS", 8), ("NUMBER_BYTES", 0.25)):
        monkeypatch.setattr(answers, name, size)
    monkeypatch.setattr(collect, "FLUSH_BYTES", 1)
    monkeypatch.setattr(http, "PIECE", 256)
    server.misbehave("cut_body", where={"purpose": "batch_output"}, fraction=0.95)
    texts = stage.texts(80)

    job = stage.enqueue(texts)
    stage.run_until(lambda: server.fired("cut_body"))
    [batch] = stage.corridor.batches()
    assert batch["n_written"] > 60
    [job] = stage.finish(job)

    stage.check_done(job, texts)
    assert stage.oddities() == {}


# What was charged and cannot be used


@pytest.mark.parametrize("kind", ["endless", "deep", "encoded"])
def test_a_plain_answer_that_was_charged_and_cannot_be_read_is_booked_as_lost(
    stage: Scene, server: OpenAIServer, kind: str
) -> None:
    server.misbehave(kind, where={"endpoint": "embeddings.create"})
    texts = stage.texts(4)

    [job] = stage.finish(stage.enqueue(texts, route="openai-sync"))

    assert job.state == "completed"
    first, second = stage.charges()
    assert adjusted(stage.corridor) == [("lost", 4, first["tokens"])]
    assert charged(stage) == {"contents": 4, "tokens": second["tokens"], "paid": True}


def test_an_error_in_a_successful_answer_is_not_booked_and_its_words_are_kept(
    stage: Scene, server: OpenAIServer
) -> None:
    server.misbehave(
        "http_error",
        times=None,
        where={"endpoint": "embeddings.create"},
        status=200,
        message="Out of luck.",
        code="luck",
    )

    texts = stage.texts(2)
    job = stage.enqueue(texts, route="openai-sync")

    said = []
    for _ in range(3):
        stage.hurry()
        stage.corridor.turn()
        said += errors(stage)
    # It is an outage: no text dies.
    assert stage.corridor.client.job(job.id).dead == 0
    assert any("Out of luck." in str(row["error"]) for row in said)
    assert adjusted(stage.corridor) == []
    assert stage.asked("embeddings.create") <= stage.corridor.settings.max_attempts
    server.calm()
    [job] = stage.finish(job)
    stage.check_done(job, texts)


def test_a_search_that_was_charged_and_cannot_be_read_is_booked_as_lost(
    searched: Corridor, server: OpenAIServer
) -> None:
    server.misbehave("deep", where={"endpoint": "embeddings.create"})

    with pytest.raises(EngineError, match="JSON that can be read"):
        searched.client.embed(["a text"])

    assert [(kind, n) for kind, n, _ in adjusted(searched)] == [("lost", 1)]


# The model that answers


@pytest.mark.parametrize("route", ROUTES)
def test_another_models_vectors_stay_out_of_the_space(stage: Scene, server: OpenAIServer, route: str) -> None:
    before = stage.texts(4)
    stage.finish(stage.enqueue(before, route=route))
    server.misbehave("other_model", times=1, name="a-router's-fallback")
    texts = stage.texts(4, first=20)
    job = stage.enqueue(texts, route=route)
    lane = ROUTES.index(route)

    stage.run_until(lambda: stage.corridor.client.lanes()[lane].is_stopped)

    stopped = stage.corridor.client.lanes()[lane]
    assert stopped.stop_code == "other_model"
    assert "a-router's-fallback" in str(stopped.stop_reason) and MODEL in str(stopped.stop_reason)
    stage.corridor.check_vectors(before)
    assert stage.bill(texts) == dict.fromkeys(texts, 1)
    lost = sum(n for _, n, _ in adjusted(stage.corridor))
    assert (charged(stage)["contents"], lost) == ((8, 0) if route == "openai" else (4, 4))
    stage.corridor.client.resume_lane(route)
    [job] = stage.finish(job)
    assert job.state == "completed"
    stage.corridor.check_vectors(before | texts)


@pytest.mark.parametrize("route", ROUTES)
def test_a_server_that_calls_its_model_otherwise_is_taken_at_its_first_word(
    stage: Scene, server: OpenAIServer, caplog: pytest.LogCaptureFixture, route: str
) -> None:
    """A deployment's name is its owner's, and the server answers with the name of the model behind it."""
    server.misbehave("other_model", times=None, lines=N, name="m-1")
    texts = stage.texts(N)

    with caplog.at_level(logging.WARNING):
        [job] = stage.finish(stage.enqueue(texts, route=route))

    stage.check_done(job, texts)
    assert answering_models(stage.corridor) == ["m-1"]
    said = [record.message for record in caplog.records if "answers as m-1" in record.message]
    assert len(said) == 1 and MODEL in said[0]


def test_a_dated_name_is_the_same_model_and_another_date_is_not(stage: Scene, server: OpenAIServer) -> None:
    stage.finish(stage.enqueue(stage.texts(2)))
    assert answering_models(stage.corridor) == [MODEL]
    server.misbehave("other_model", times=1, name=f"{MODEL}-2024-01-25")
    stage.finish(stage.enqueue(stage.texts(2, first=10)))
    assert answering_models(stage.corridor) == [f"{MODEL}-2024-01-25"]
    stage.finish(stage.enqueue(stage.texts(2, first=20)))  # under its plain name again

    server.misbehave("other_model", times=1, name=f"{MODEL}-2026-06-01")
    stage.enqueue(stage.texts(2, first=30))
    stage.run_until(lambda: stage.corridor.client.lanes()[0].is_stopped)


def test_one_of_openais_models_never_passes_for_another(stage: Scene, server: OpenAIServer) -> None:
    """The very first answer is of another model, of the same dimensions."""
    server.misbehave("other_model", times=1, name="text-embedding-ada-002-v2")
    stage.enqueue(stage.texts(2), route="openai-sync")

    stage.run_until(lambda: stage.corridor.client.lanes()[1].is_stopped)

    assert answering_models(stage.corridor) == []
    assert stage.corridor.client.audit("docs").missing == 2


def test_a_search_does_not_compare_vectors_of_two_models(searched: Corridor, server: OpenAIServer) -> None:
    searched.client.embed(["a text"])
    server.misbehave("other_model", times=1, name="m-2")

    with pytest.raises(EngineError, match="'m-2'"):
        searched.client.embed(["another text"])

    assert [(kind, n) for kind, n, _ in adjusted(searched)] == [("lost", 1)]
    assert searched.client.lanes()[1].is_stopped


def test_a_model_that_was_only_renamed_enters_after_somebody_says_so(
    stage: Scene, server: OpenAIServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.finish(stage.enqueue(stage.texts(2)))
    server.misbehave("other_model", times=None, lines=N, name="m-2")
    texts = stage.texts(2, first=10)
    job = stage.enqueue(texts)
    client = stage.corridor.client
    stage.run_until(lambda: client.lanes()[0].is_stopped)
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())

    said = CliRunner().invoke(cli, ["models", "canary", "--reset", MODEL])

    assert said.exit_code == 0 and "Deleted the reference" in said.output, said.output
    assert answering_models(stage.corridor) == []
    client.resume_lane("openai")
    [job] = stage.finish(job)
    assert job.state == "completed"
    assert answering_models(stage.corridor) == ["m-2"]


def test_a_schema_of_the_last_release_compares_nothing(stage: Scene, server: OpenAIServer) -> None:
    """During an upgrade this code runs on it too."""
    with stage.corridor.db.begin() as conn:
        conn.execute(sa.text("DROP TABLE answering_models"))
    server.misbehave("other_model", times=1, name="m-2")
    texts = stage.texts(N)

    for route in ROUTES:
        [job] = stage.finish(stage.enqueue(texts, route=route))
        assert job.state == "completed"
