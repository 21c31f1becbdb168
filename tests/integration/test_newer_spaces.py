"""Spaces that a newer release registered: this one leaves their work to it, and all else goes on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.domain.states import JobState
from chunkmill.errors import NewerSpace, WaitTimeout
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner
from tests.support import one_request

TEXTS = [("a", "one"), ("b", "two"), ("c", "three")]


@pytest.fixture
def jobs(db: sa.Engine, client: Client, engines: Engines) -> Iterator[dict[str, int]]:
    """A job in a space of this release, and one in each of two spaces of a newer release: its id by collection."""
    made = {
        "ours": client.enqueue(TEXTS, collection="ours").id,
        "word": client.enqueue(TEXTS, collection="word", on_long="split").id,
        "field": client.enqueue(TEXTS, collection="field", precision="int8").id,
    }
    word = """UPDATE spaces SET spec = spec || '{"pooling": "late"}', fingerprint = repeat('1', 64) WHERE id = 2"""
    field = """UPDATE spaces SET spec = spec || '{"instruction": "x"}', fingerprint = repeat('2', 64) WHERE id = 3"""
    with db.begin() as conn:
        conn.execute(sa.text(word))
        conn.execute(sa.text(field))
    registry._said.clear()
    yield made
    engines.left_to_others.clear()  # other tests share the engines, and their spaces have the same ids


def states(db: sa.Engine) -> list[tuple[str, int, int]]:
    with db.begin() as conn:
        rows = conn.execute(sa.text("SELECT state, attempt, max_attempts FROM chunk_batches ORDER BY id"))
        return [tuple(row) for row in rows]  # type: ignore[misc]


def test_a_worker_leaves_their_chunk_batches_uncharged_and_embeds_the_others(
    jobs: dict[str, int], db: sa.Engine, client: Client, context: WorkerContext, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_chunk_batch(context, 2) is TaskResult.RELEASED
    assert run_chunk_batch(context, 3) is TaskResult.RELEASED
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    assert client.job(jobs["ours"]).state is JobState.COMPLETED
    before = states(db)
    assert [state for state, _, _ in before] == ["completed", "available", "available"]
    assert all(most - attempt == 5 for _, attempt, most in before[1:])  # as many attempts are left as at first
    assert [run_chunk_batch(context, number) for number in (2, 3)] == [TaskResult.NOT_OURS] * 2
    assert states(db) == before
    assert "space 2 (fingerprint 111111111111) was registered by a newer release" in caplog.text
    assert "fields ['instruction'] change its vectors" in caplog.text


def test_a_responder_answers_the_others_requests_and_leaves_theirs_as_they_are(
    jobs: dict[str, int], db: sa.Engine, client: Client, context: WorkerContext
) -> None:
    with db.begin() as conn:
        theirs = [one_request.ask(conn, space_id=number, kind="query", texts=["q"]) for number in (2, 3)]
        ours = one_request.ask(conn, space_id=1, kind="query", texts=["q"])
    responder = EmbedResponder(context)
    while responder.answer_next():
        pass
    with db.begin() as conn:
        answer = one_request.take_answer(conn, ours, dimensions=384)
        assert answer is not None
        assert answer.vectors is not None
        left = conn.execute(sa.text("SELECT id, attempts, lease_until, error FROM embed_requests ORDER BY id")).all()
    assert [tuple(row) for row in left] == [(number, 0, None, None) for number in theirs]


def test_delete_prune_evict_and_cache_go_on_and_treat_their_vectors_as_any_others(
    jobs: dict[str, int], db: sa.Engine, client: Client, runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    run_chunk_batch(runner.context, 1)
    with db.begin() as conn:
        for table in ("vectors_2", "vectors_3"):
            copied = f"INSERT INTO {table} SELECT content_hash, n_tokens, truncated, embedding FROM vectors_1"
            conn.execute(sa.text(copied))
    assert len(client.cache()) == 1
    assert client.delete("ours", ["a"]) == 1
    assert client.delete("word", ["a"]) == 1
    assert client.delete("field", ["a"]) == 1
    with db.begin() as conn:
        counts = [conn.execute(sa.text(f"SELECT count(*) FROM vectors_{n}")).scalar_one() for n in (1, 2, 3)]
    assert counts == [2, 2, 2]  # the text that nothing refers to any more is gone from all of them
    client.prune(older_than=timedelta(days=1), dry_run=True)
    client.prune(older_than=timedelta(days=1))
    client.evict(max_bytes=0)
    assert client.audit("ours").complete
    assert len(client.vectors("ours")) == 2
    assert len([r for r in caplog.records if "space 2 (" in r.message]) == 1


def test_a_poller_ends_their_jobs_takes_back_their_leases_and_goes_on(
    jobs: dict[str, int], db: sa.Engine, broker: Broker, settings: Settings, client: Client, context: WorkerContext
) -> None:
    run_chunk_batch(context, 1)
    lost = """
        UPDATE chunk_batches
        SET state = 'running', attempt = 1, deaths = 1, lease_owner = 'gone', lease_until = now() - interval '1 s'
        WHERE id IN (2, 3)
    """
    with db.begin() as conn:
        conn.execute(sa.text(lost))
    poller = Poller(db, broker, settings)
    assert poller.round().taken_back.split == 2
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'completed' WHERE state = 'available'"))
        for table in ("vectors_2", "vectors_3"):
            copied = f"INSERT INTO {table} SELECT content_hash, n_tokens, truncated, embedding FROM vectors_1"
            conn.execute(sa.text(copied))
    assert poller.round().finished == 2
    assert {client.job(number).state for number in jobs.values()} == {JobState.COMPLETED}


def test_a_client_is_told_which_space_it_cannot_use(jobs: dict[str, int], client: Client) -> None:
    for name in ("word", "field"):
        with pytest.raises(NewerSpace, match="Upgrade this process"):
            client.search(np.ones(384, np.float32), collection=name)
    assert client.search(np.ones(384, np.float32), collection="ours") == []
    assert client.enqueue([("d", "four")], collection="ours").chunks == 1
    with pytest.raises(WaitTimeout):
        client.search("a query", collection="ours", timeout=0.0)


def test_a_field_that_changes_no_vector_is_ignored(db: sa.Engine, client: Client, runner: Runner) -> None:
    job = client.enqueue(TEXTS, collection="ours")
    with db.begin() as conn:
        conn.execute(sa.text("""UPDATE spaces SET spec = spec || '{"licence": "MIT"}'"""))
    assert runner.finish(job).state is JobState.COMPLETED
    assert client.enqueue([("d", "four")], collection="ours").chunks == 1
    with db.begin() as conn:
        assert len(registry.all_spaces(conn)) == 1
