"""Texts that someone waits for: who takes them, how often, and when they are deleted."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.client.asking import inquiry as of_client
from chunkmill.db.connect import create_db, raw
from chunkmill.domain.spaces import OnLong
from chunkmill.errors import WaitTimeout
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import EmbedAnswer, EmbedRequest
from chunkmill.ledger.jobs import recover
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from tests.integration.hands import Hands
from tests.support import one_request
from tests.support.waiting import PATIENCE, together, until


@pytest.fixture
def requests(client: Client, db: sa.Engine) -> tuple[int, int]:
    """Two open requests, in two spaces. Neither has the number of its space."""
    spaces = [client._space(None, on_long) for on_long in (OnLong.TRUNCATE, OnLong.SPLIT)]
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE embed_requests ALTER COLUMN id RESTART WITH 11"))
        first, second = (
            one_request.ask(conn, space_id=space.id, kind="query", texts=[f"text of space {space.id}"])
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


Row = dict[str, object]


def put(db: sa.Engine, *rows: Row) -> list[int]:
    """Insert open requests. ``texts`` is a number of texts, or the texts; ``left`` the seconds until the deadline."""
    insert = sa.text("""
        INSERT INTO embed_requests (space_id, kind, texts, urgency, caller, attempts, deadline)
        VALUES (1, 'query', :texts, :urgency, :caller, :attempts, now() + make_interval(secs => :left))
        RETURNING id
    """)
    defaults: Row = {"texts": 1, "urgency": 0, "caller": "", "attempts": 0, "left": None}
    ids = []
    with db.begin() as conn:
        for row in rows:
            values = defaults | row
            texts = values["texts"]
            values["texts"] = [f"text {n}" for n in range(texts)] if isinstance(texts, int) else texts
            ids.append(conn.execute(insert, values).scalar_one())
    return ids


def claim_many(db: sa.Engine, **limits: Any) -> list[int]:
    """The ids of one claim, in its order. They stay claimed."""
    with db.begin() as conn:
        claimed = embed_requests.claim_some(
            conn, **({"most_requests": 99, "most_texts": 999, "most_tokens": 9_999} | limits)
        )
    return [request.id for request in claimed.requests]


@pytest.fixture
def space(client: Client) -> Space:
    return client._space(None, OnLong.TRUNCATE)


def test_a_claim_takes_the_short_requests_first_and_the_callers_of_each_in_turns(space: Space, db: sa.Engine) -> None:
    large, *a, b, nobody = put(
        db,
        {"urgency": 1, "caller": "c", "texts": 20},
        {"caller": "a"}, {"caller": "a"}, {"caller": "a"}, {"caller": "b"}, {},
    )  # fmt: skip
    assert claim_many(db) == [a[0], b, nobody, a[1], a[2], large]


def test_a_long_request_does_not_go_first_because_its_caller_says_so(space: Space, db: sa.Engine, hands: Hands) -> None:
    words = " ".join(map(str, range(5_000)))
    long, many, short = put(db, {"texts": [words]}, {"texts": words.split()}, {})
    with db.begin() as conn:
        claimed = embed_requests.claim_some(conn, most_requests=9, most_texts=9_999, most_tokens=99_999).requests
    assert [(request.id, request.urgency) for request in claimed] == [(short, 0), (long, 1), (many, 1)]


def test_a_claim_takes_what_fits_and_the_first_however_large_it_is(space: Space, db: sa.Engine) -> None:
    ids = put(db, {"texts": 9}, {"texts": 3}, {"texts": 3}, {"texts": ["x" * 400]}, {"texts": ["x" * 400]}, {}, {})
    assert claim_many(db, most_texts=5) == ids[:1]
    assert claim_many(db, most_texts=5) == ids[1:2]
    assert claim_many(db, most_tokens=102 + 3 * 3) == ids[2:4]
    assert claim_many(db, most_requests=2) == ids[4:6]
    assert claim_many(db) == ids[6:]


def test_a_claim_that_leaves_some_wakes_the_workers_that_did_not_see_them(space: Space, db: sa.Engine) -> None:
    put(db, {}, {}, {})
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(sa.text(f"LISTEN {embed_requests.CHANNEL}"))
        assert len(claim_many(db, most_requests=2)) == 2
        assert [notice.channel for notice in raw(conn).notifies(timeout=PATIENCE, stop_after=1)]
        assert len(claim_many(db, most_requests=2)) == 1
        with db.begin() as other:
            other.execute(sa.text(f"NOTIFY {embed_requests.CHANNEL}, 'the last'"))
        assert [notice.payload for notice in raw(conn).notifies(timeout=PATIENCE, stop_after=1)] == ["the last"]
        conn.invalidate()


def test_what_its_worker_may_have_died_of_is_claimed_alone(space: Space, db: sa.Engine) -> None:
    """So that it takes no other request along when it kills the next worker."""
    suspect, fresh, other, too = put(db, {"attempts": 1}, {}, {"attempts": 1}, {})
    assert claim_many(db) == [suspect]
    assert claim_many(db) == [fresh]
    assert claim_many(db) == [other]
    assert claim_many(db) == [too]


def test_a_claim_takes_no_request_past_its_deadline(space: Space, db: sa.Engine, hands: Hands) -> None:
    _, patient, endless = put(db, {"left": -1}, {"left": 1_000}, {})
    with db.begin() as conn:
        claimed = embed_requests.claim_some(conn, most_requests=9, most_texts=9, most_tokens=99).requests
    assert [request.id for request in claimed] == [patient, endless]
    assert claimed[0].seconds_left is not None
    assert 900 < claimed[0].seconds_left < 1_001
    assert claimed[1].seconds_left is None


def test_a_worker_that_is_full_takes_short_requests_and_large_ones_of_other_callers(
    space: Space, db: sa.Engine
) -> None:
    mine, theirs, short = put(
        db, {"urgency": 1, "caller": "mine"}, {"urgency": 1, "caller": "theirs"}, {"caller": "mine"}
    )
    with db.connect() as conn, conn.begin() as transaction:
        claimed = embed_requests.claim_some(
            conn, most_requests=9, most_texts=9, most_tokens=99, not_callers=["mine"]
        ).requests
        assert [request.id for request in claimed] == [short, theirs]
        transaction.rollback()
    assert claim_many(db, synchronous=False) == [short]
    assert claim_many(db) == [mine, theirs]


def test_claims_of_many_workers_at_once_never_meet(space: Space, db: sa.Engine) -> None:
    ids = put(db, *({"caller": f"{n % 3}"} for n in range(60)))

    def work() -> list[int]:
        mine: list[int] = []
        while len(taken) < len(ids):
            mine += (some := claim_many(db, most_requests=4))
            taken.extend(some)
        return mine

    taken: list[int] = []
    together(work, work, work)
    assert sorted(taken) == ids


def test_on_the_schema_of_an_older_release_requests_are_claimed_one_after_the_other(
    requests: tuple[int, int], settings: Settings, hands: Hands
) -> None:
    with hands.db.begin() as conn:
        for name in ("urgency", "caller", "deadline", "tokens", "truncated"):
            conn.execute(sa.text(f"ALTER TABLE embed_requests DROP COLUMN {name}"))
    older = create_db(settings.require_database_url(), role="worker")
    assert [claim_many(older), claim_many(older), claim_many(older)] == [[requests[0]], [requests[1]], []]
    with older.begin() as conn:
        vectors = np.ones((1, 384), np.float32)
        embed_requests.answer(conn, requests[0], vectors, np.ones(1, np.int32), np.ones(1, np.bool_))
        recover.delete_old_requests(conn)
        answer = one_request.take_answer(conn, requests[0], dimensions=384)
    assert answer is not None
    assert answer.vectors is not None
    assert answer.tokens is None
    older.dispose()


def test_answers_are_told_together_and_not_those_that_were_withdrawn(
    space: Space, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, withdrawn, second, refused, _ = put(db, {"texts": 2}, {}, {}, {}, {})
    with db.begin() as conn:
        one_request.withdraw(conn, withdrawn)
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as listening:
        listening.execute(sa.text(f"LISTEN {embed_requests.ANSWERS_CHANNEL}"))
        with db.begin() as conn:
            embed_requests.answer_all(
                conn,
                [
                    EmbedAnswer(
                        first, np.full((2, 3), 1, np.float32), np.array([4, 5], np.int32), np.array([True, False])
                    ),
                    EmbedAnswer(withdrawn, np.full((1, 3), 2, np.float32)),
                    EmbedAnswer(second, np.full((1, 3), 3, np.float32)),
                ],
            )
        with db.begin() as conn:
            claimed = {
                request.id: request
                for request in embed_requests.claim_some(conn, most_requests=9, most_texts=9, most_tokens=99).requests
            }
            embed_requests.refuse(conn, claimed[refused], "no")
        notices = list(raw(listening).notifies(timeout=PATIENCE, stop_after=2))
        assert sorted(notices[0].payload.split(",")) == [str(first), str(second)]
        assert [notice.payload for notice in notices[1:]] == [str(refused)]
        listening.invalidate()
    with db.begin() as conn:
        answer = one_request.take_answer(conn, first, dimensions=3)
        other = one_request.take_answer(conn, second, dimensions=3)
    assert answer is not None
    assert answer.vectors is not None
    assert answer.tokens is not None
    assert answer.truncated is not None
    assert answer.vectors.tolist() == [[1, 1, 1]] * 2
    assert (answer.tokens.tolist(), answer.truncated.tolist()) == ([4, 5], [True, False])
    assert other is not None
    assert (other.tokens, other.truncated) == (None, None)


def test_a_notification_of_many_answers_is_cut_where_postgres_would_refuse_it(
    space: Space, db: sa.Engine, hands: Hands
) -> None:
    count = embed_requests.IDS_EACH + 1
    with hands.db.begin() as conn:
        conn.execute(sa.text(f"ALTER TABLE embed_requests ALTER COLUMN id RESTART WITH {10**18}"))
    ids = put(db, *[{}] * count)
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as listening:
        listening.execute(sa.text(f"LISTEN {embed_requests.ANSWERS_CHANNEL}"))
        for tell in (
            lambda conn: embed_requests.tell(conn, ids),
            lambda conn: embed_requests.answer_all(conn, [EmbedAnswer(i, np.ones((1, 3), np.float32)) for i in ids]),
        ):
            with db.begin() as conn:
                tell(conn)
            payloads = [notice.payload for notice in raw(listening).notifies(timeout=PATIENCE, stop_after=2)]
            assert sorted(payload.count(",") + 1 for payload in payloads) == [1, count - 1]
            assert max(map(len, payloads)) <= embed_requests.MOST_PAYLOAD
            assert sorted(int(name) for payload in payloads for name in payload.split(",")) == ids
        listening.invalidate()


def test_leases_are_renewed_for_what_is_still_held_and_waited_for(space: Space, db: sa.Engine, hands: Hands) -> None:
    put(db, *[{}] * 4)
    with db.begin() as conn:
        held = embed_requests.claim_some(conn, most_requests=9, most_texts=9, most_tokens=99).requests
    kept, withdrawn, answered, lost = (request.id for request in held)
    with db.begin() as conn:
        one_request.withdraw(conn, withdrawn)
        embed_requests.answer(conn, answered, np.ones((1, 3), np.float32))
    worker_dies(hands, lost)
    with db.begin() as conn:
        renewed = embed_requests.renew_all(conn, held, lease_seconds=100)
        assert embed_requests.still_open(conn, [request.id for request in held]) == {kept, lost}
    assert list(renewed) == [kept]
    assert hands.rows("SELECT lease_until FROM embed_requests WHERE id = :id", id=kept) == [
        (renewed[kept].lease_until,)
    ]
    with db.begin() as conn:
        embed_requests.release(conn, *held)  # with the lease before
    assert hands.rows("SELECT attempts FROM embed_requests WHERE id = :id", id=kept) == [(1,)]
    with db.begin() as conn:
        embed_requests.release(conn, *renewed.values())
    assert hands.rows("SELECT attempts, lease_until FROM embed_requests WHERE id = :id", id=kept) == [(0, None)]


def test_what_nobody_waits_for_any_more_is_not_asked_of_a_provider(space: Space, db: sa.Engine, hands: Hands) -> None:
    late, patient = put(db, {"left": 1_000}, {"left": 1_000})
    requests = [claim(db), claim(db)]
    hands.rows("UPDATE embed_requests SET deadline = now() WHERE id = :id RETURNING id", id=late)
    with db.begin() as conn:
        renewed = [embed_requests.renew(conn, request, lease_seconds=60) for request in requests if request]
    assert [request and request.id for request in renewed] == [None, patient]


def test_a_poller_deletes_what_is_past_its_deadline(space: Space, db: sa.Engine, hands: Hands) -> None:
    """A little later, because an answer may be on its way to a caller that looks for it a last time."""
    _, just_over, open_, endless = put(db, {"left": -6}, {"left": -1}, {"left": 60}, {})
    with db.begin() as conn:
        recover.delete_old_requests(conn)
    assert hands.rows("SELECT id FROM embed_requests ORDER BY id") == [(just_over,), (open_,), (endless,)]


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
    monkeypatch.setattr(of_client, "PART_TEXTS", 3)
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
    return all(request.done() for request in asked)
