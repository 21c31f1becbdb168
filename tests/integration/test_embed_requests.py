"""Texts that someone waits for: who takes them, how often, and when they are deleted."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.client import vectors as of_client
from chunkmill.domain.spaces import OnLong
from chunkmill.errors import WaitTimeout
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import EmbedRequest
from chunkmill.ledger.jobs import recover
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, until


@pytest.fixture
def requests(client: Client, db: sa.Engine) -> tuple[int, int]:
    """Two open requests, in two spaces. Neither has the number of its space."""
    spaces = [client._space(None, on_long) for on_long in (OnLong.TRUNCATE, OnLong.SPLIT)]
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE embed_requests ALTER COLUMN id RESTART WITH 11"))
        first, second = (
            embed_requests.ask(conn, space_id=space.id, kind="query", texts=[f"text of space {space.id}"])
            for space in spaces
        )
    return first, second


def claim(db: sa.Engine) -> EmbedRequest | None:
    with db.begin() as conn:
        return embed_requests.claim_next(conn)


def claimed(db: sa.Engine) -> int | None:
    request = claim(db)
    return request and request.id


def worker_dies(hands: Hands, request: int) -> None:
    hands.rows("UPDATE embed_requests SET lease_until = now() - interval '1 s' WHERE id = :id RETURNING id", id=request)


def test_a_request_whose_worker_died_is_taken_once_more_and_then_no_more(
    requests: tuple[int, int], hands: Hands, db: sa.Engine
) -> None:
    """What takes its worker down must not take down all of them. The next request is not held up by it."""
    deadly, other = requests
    assert claimed(db) == deadly
    worker_dies(hands, deadly)
    assert claimed(db) == deadly
    worker_dies(hands, deadly)
    assert claimed(db) == other
    assert claimed(db) is None


def test_a_request_that_a_worker_holds_is_not_taken_by_another(requests: tuple[int, int], db: sa.Engine) -> None:
    assert [claimed(db), claimed(db), claimed(db)] == [*requests, None]


def test_a_request_is_leased_for_four_seconds(requests: tuple[int, int], db: sa.Engine) -> None:
    """So that another worker answers it in about five, if this one is killed."""
    with db.begin() as conn:
        assert embed_requests.claim_next(conn) is not None
        left = "SELECT extract(epoch FROM lease_until - now()) FROM embed_requests WHERE lease_until IS NOT NULL"
        assert conn.execute(sa.text(left)).scalars().all() == [4]


def test_requests_that_nobody_fetches_are_deleted_after_ten_minutes(
    requests: tuple[int, int], hands: Hands, db: sa.Engine
) -> None:
    old, young = requests
    for request, minutes in ((old, 11), (young, 9)):
        hands.rows(
            "UPDATE embed_requests SET created_at = now() - make_interval(mins => :age) WHERE id = :id RETURNING id",
            age=minutes, id=request,
        )  # fmt: skip
    with db.begin() as conn:
        recover.delete_old_requests(conn)
    assert hands.rows("SELECT id FROM embed_requests") == [(young,)]


def test_who_gives_up_takes_the_texts_back(requests: tuple[int, int], client: Client, hands: Hands) -> None:
    with pytest.raises(WaitTimeout):
        client.embed(["nobody is there"], timeout=0.01)
    assert hands.rows("SELECT id FROM embed_requests ORDER BY id") == [(request,) for request in requests]


def test_many_texts_come_back_in_their_order(client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several requests, and beside those of another caller. A vector holds the number that is its text."""
    monkeypatch.setattr(of_client, "EMBED_STEP", 3)
    with ThreadPoolExecutor(2) as threads:
        asked = {start: threads.submit(client.embed, [str(start + i) for i in range(7)]) for start in (0, 100)}
        until(lambda: _answer(db, list(asked.values())))
    for start, vectors in asked.items():
        assert vectors.result(PATIENCE)[:, 0].tolist() == [start + i for i in range(7)]


def _answer(db: sa.Engine, asked: list[Future[object]]) -> bool:
    """Answer what is open; whether nobody waits any more."""
    while request := claim(db):
        numbers = np.array([[float(text)] for text in request.texts], np.float32)
        with db.begin() as conn:
            embed_requests.answer(conn, request.id, np.repeat(numbers, 384, axis=1))
    return all(each.done() for each in asked)
