"""A claim whose answer was lost is the same worker's claim: it goes on with it, and nothing is charged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import JobState
from chunkmill.ledger import embed_requests
from chunkmill.ledger.work import chunk_batches
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner
from tests.integration.hands import Hands
from tests.support import one_request


def lose_answers(
    db: sa.Engine, statement: str, *, committed: bool, between: Callable[[], object] = lambda: None
) -> Callable[[], None]:
    """The first commit of a transaction that ran ``statement`` breaks the connection, after it was done or before.

    ``between`` runs before the client knows. Returns a function that ends this.
    """
    lost: list[bool] = []

    def note(conn: sa.Connection, _cursor: Any, sql: str, *_: Any) -> None:
        if statement in sql:
            conn.info["claims"] = True

    def commit(conn: sa.Connection) -> None:
        if not conn.info.pop("claims", False) or lost:
            return
        lost.append(True)
        driver: psycopg.Connection[Any] = conn.connection.driver_connection  # type: ignore[assignment]
        driver.commit() if committed else driver.rollback()
        between()
        driver.close()

    sa.event.listen(db, "after_cursor_execute", note)
    sa.event.listen(db, "commit", commit)

    def end() -> None:
        assert lost, "it happened"
        sa.event.remove(db, "after_cursor_execute", note)
        sa.event.remove(db, "commit", commit)

    return end


CLAIM = "SET state = %(running)s, attempt = attempt + 1"


@pytest.mark.parametrize("suspect", [False, True], ids=["", "suspect"])
def test_a_worker_goes_on_with_a_claim_whose_answer_was_lost(
    suspect: bool, context: WorkerContext, runner: Runner, client: Client, hands: Hands
) -> None:
    jobs = [client.enqueue([(name, f"text {name}")], collection=name) for name in ("one", "other")]
    if suspect:
        hands.rows("UPDATE chunk_batches SET deaths = 2 RETURNING id")
    end = lose_answers(context.db, CLAIM, committed=True)
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    end()
    assert hands.rows("SELECT state, attempt, attempt - max_attempts, deaths FROM chunk_batches WHERE id = 1") == [
        ("completed", 2 if suspect else 1, -4, 2 if suspect else 0)
    ]
    assert [runner.finish(job).state for job in jobs] == [JobState.COMPLETED] * 2


def test_a_claim_that_was_never_made_is_made_again(context: WorkerContext, client: Client, hands: Hands) -> None:
    client.enqueue([("a", "text a")], collection="one")
    end = lose_answers(context.db, CLAIM, committed=False)
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    end()
    assert hands.rows("SELECT state, attempt FROM chunk_batches") == [("completed", 1)]


@pytest.mark.parametrize("other", ["test-worker", "another"], ids=["another thread", "another worker"])
def test_a_claim_that_another_made_meanwhile_is_not_taken_for_ones_own(
    other: str, context: WorkerContext, db: sa.Engine, client: Client, hands: Hands
) -> None:
    """It has the same number, because this worker's own claim was rolled back."""
    client.enqueue([("a", "text a")], collection="one")

    def claim() -> None:
        with db.begin() as conn:
            assert chunk_batches.claim_if_due(conn, 1, owner=other, lease_seconds=60) is not None

    end = lose_answers(context.db, CLAIM, committed=False, between=claim)
    assert run_chunk_batch(context, 1) is TaskResult.NOT_OURS
    end()
    assert hands.rows("SELECT state, attempt, lease_owner FROM chunk_batches") == [("running", 1, other)]


@pytest.mark.parametrize("committed", [True, False])
def test_a_query_whose_claim_lost_its_answer_costs_no_try(
    committed: bool, context: WorkerContext, client: Client, hands: Hands, db: sa.Engine
) -> None:
    spaces = [client._space(None, on_long) for on_long in (OnLong.TRUNCATE, OnLong.SPLIT)]
    with db.begin() as conn:
        for space in spaces:
            one_request.ask(conn, space_id=space.id, kind="query", texts=["a query"])
    responder = EmbedResponder(context)
    for _ in range(embed_requests.MAX_ATTEMPTS + 1):
        end = lose_answers(context.db, "UPDATE embed_requests r\nSET attempts = attempts + 1", committed=committed)
        with pytest.raises(sa.exc.OperationalError):
            responder.answer_next()
        end()
    assert [responder.answer_next() for _ in range(2)] == [True, False]
    assert hands.rows("SELECT count(vectors), max(attempts) FROM embed_requests") == [(2, 1)]
