"""Texts that someone waits for: under which policy, as what, and by whom they are embedded."""

from __future__ import annotations

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.domain.spaces import OnLong
from chunkmill.ledger import embed_requests
from chunkmill.spaces.registry import Space
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder

LONG = "many words in one long text " * 80


def ask(db: sa.Engine, space: Space, kind: str, *texts: str) -> int:
    with db.begin() as conn:
        return embed_requests.ask(conn, space_id=space.id, kind=kind, texts=list(texts))  # type: ignore[arg-type]


def answered(db: sa.Engine, request: int) -> np.ndarray:
    with db.begin() as conn:
        answer = embed_requests.take_answer(conn, request, dimensions=384)
    assert answer is not None
    assert answer.vectors is not None, answer.error
    return answer.vectors


@pytest.mark.parametrize("kind", ["document", "query"])
def test_a_query_is_embedded_under_the_policy_of_its_space(
    kind: str, client: Client, context: WorkerContext, db: sa.Engine
) -> None:
    """One engine serves the spaces of both policies."""
    cut, split = (client._space(None, on_long) for on_long in (OnLong.TRUNCATE, OnLong.SPLIT))
    requests = [ask(db, space, kind, "short", LONG) for space in (cut, split)]
    responder = EmbedResponder(context)
    assert [responder.answer_next() for _ in range(2)] == [True, False]

    first, second = (answered(db, request) for request in requests)

    engine = context.engine_for(cut)
    for on_long, found in ((OnLong.TRUNCATE, first), (OnLong.SPLIT, second)):
        expected = engine.embed(["short", LONG], kind=kind, on_long=on_long).vectors  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(first[1] - second[1]).max() > 1e-3


def test_a_worker_that_leaves_takes_no_request(client: Client, context: WorkerContext, db: sa.Engine) -> None:
    request = ask(db, client._space(None, OnLong.TRUNCATE), "query", "a text")
    context.stopping.set()
    assert not EmbedResponder(context).answer_next()
    with db.begin() as conn:
        assert (
            conn.execute(sa.text("SELECT attempts FROM embed_requests WHERE id = :id"), {"id": request}).scalar() == 0
        )
