"""One bad value spoils neither its neighbours nor its own record."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import JobState
from chunkmill.errors import EngineError
from chunkmill.ledger.dead import deaths
from chunkmill.telemetry.logging import _Json, _Text
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.results import TextFailure, TokenBatchResult
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from tests.integration.conftest import Runner
from tests.integration.hands import Hands

BAD = "a NUL \x00 and a surrogate \ud800"
TEXTS = [("a", "SECRET text a"), ("b", "SECRET text b"), ("c", "SECRET text c")]


@pytest.fixture
def jobs(client: Client, context: WorkerContext) -> tuple[int, int]:
    """Two jobs with a ChunkBatch of each, whose space's canary is heard."""
    context.engine_for(client._space(None, OnLong.TRUNCATE))
    first = client.enqueue(TEXTS, collection="docs").id
    return first, client.enqueue([("d", "another text")], collection="other").id


@pytest.mark.parametrize("error", [EngineError(BAD), ValueError(f"{BAD} SECRET text b")], ids=["ours", "unknown"])
def test_an_error_of_any_words_is_recorded_and_quotes_no_text(
    error: Exception,
    jobs: tuple[int, int],
    context: WorkerContext,
    runner: Runner,
    client: Client,
    hands: Hands,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any, **__: Any) -> Iterator[TokenBatchResult]:
        raise error
        yield

    monkeypatch.setattr(Engine, "stream", fails)
    for _ in range(5):  # its permitted attempts, and no death
        hands.rows("UPDATE chunk_batches SET not_before = now() WHERE id = 1 RETURNING id")
        hands.rows("UPDATE chunk_batches SET rung_at = NULL WHERE id = 2 RETURNING id")  # else it takes its turn
        assert run_chunk_batch(context, 1) is TaskResult.FAILED
    assert hands.rows("SELECT state, deaths, error_code FROM chunk_batches WHERE id = 1") == [
        ("discarded", 0, "engine_error" if isinstance(error, EngineError) else "worker_error")
    ]
    assert client.job(jobs[0]).state is JobState.FAILED
    assert client.job(jobs[0]).dead_chunks == ()
    logged = "\n".join(form.format(record) for record in caplog.records for form in (_Json(), _Text()))
    ledger = str(hands.rows("SELECT error FROM chunk_batches")) + str(hands.rows("SELECT evidence FROM usage"))
    for written in (logged, ledger):
        assert "SECRET" not in written
        assert "\x00" not in written
    assert ("a NUL" in ledger) is isinstance(error, EngineError)
    assert caplog.records[-1].levelno == logging.ERROR

    monkeypatch.undo()
    client.retry(jobs[0])
    assert [runner.finish(client.job(job)).state for job in jobs] == [JobState.COMPLETED] * 2


def test_a_dead_text_whose_reason_has_bad_characters_is_buried_alone(
    jobs: tuple[int, int], context: WorkerContext, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_text(monkeypatch, failure=TextFailure(1, "forward_failed", BAD))
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    job = client.job(jobs[0])
    assert (job.state, job.embedded, job.dead) == (JobState.FAILED, 2, 1)
    [dead] = job.dead_chunks
    assert dead.code == "forward_failed"
    assert "\\x00 and a surrogate \\ud800" in dead.reason


def test_the_evidence_of_a_death_may_have_any_words(jobs: tuple[int, int], hands: Hands, db: sa.Engine) -> None:
    hands.claim(1, "host:1"), hands.claim(2, "host:2")
    with db.begin() as conn:
        assert deaths.take_back_from(conn, "host:1", evidence=BAD).total == 1
    assert hands.rows("SELECT outcome, evidence FROM usage") == [("died", "a NUL \\x00 and a surrogate \\ud800")]


@pytest.mark.parametrize("storage", ["halfvec", "vector"])
@pytest.mark.parametrize(("value", "code"), [(70_000.0, "out_of_range"), (float("nan"), "not_finite")])
def test_a_vector_that_cannot_be_stored_is_one_dead_text(
    storage: str,
    value: float,
    code: str,
    context: WorkerContext,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client._settings = client._settings.model_copy(update={"vector_storage": storage})
    context.engine_for(client._space(None, OnLong.TRUNCATE))
    jobs = [client.enqueue(TEXTS, collection="docs"), client.enqueue([("d", "another text")], collection="other")]
    _fail_text(monkeypatch, value=value)
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    job = client.job(jobs[0].id)
    if storage == "vector" and code == "out_of_range":
        assert (job.state, job.embedded, job.dead) == (JobState.COMPLETED, 3, 0)
        return
    assert (job.state, job.embedded, job.dead) == (JobState.FAILED, 2, 1)
    assert [(dead.chunk_id, dead.code) for dead in job.dead_chunks] == [("b", code)]
    assert client.vectors("docs").keys() == {"a", "c"}
    assert client.job(jobs[1].id).state is JobState.RUNNING


def _fail_text(patch: pytest.MonkeyPatch, *, failure: TextFailure | None = None, value: float | None = None) -> None:
    """The engine answers the text ``b`` with a failure, or with a vector that holds ``value``."""
    stream = Engine.stream

    def changed(self: Engine, texts: Any, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        bad = list(texts).index("SECRET text b")
        for result in stream(self, texts, *args, **kwargs):
            hit = result.indices == bad
            if value is not None:
                vectors = result.vectors.copy()
                vectors[hit, 7] = value
                yield dataclasses.replace(result, vectors=vectors)
            elif hit.any() and failure is not None:
                kept = {name: getattr(result, name)[~hit] for name in ("indices", "vectors", "n_tokens", "truncated")}
                yield dataclasses.replace(result, **kept, failures=(dataclasses.replace(failure, index=bad),))
            else:
                yield result

    patch.setattr(Engine, "stream", changed)
