"""How a process awaits the answers of workers: one connection, exact wake-ups, and a look where nobody tells."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import AsyncClient, Client, ClientClosed, EngineError, WaitTimeout
from chunkmill.client.asking import inquiry, listener
from chunkmill.client.asking.listener import listener_of
from chunkmill.db.connect import create_db
from chunkmill.domain.spaces import OnLong
from chunkmill.embedded import StackStatus
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import ANSWERS_CHANNEL, EmbedRequest
from chunkmill.settings import Settings
from tests.conftest import client_for, fresh_settings
from tests.integration.hands import Hands
from tests.integration.test_forks import child
from tests.support.askers import answer, answering, claim, tell, vector_of
from tests.support.waiting import PATIENCE, Call, running, until

LONG = 3 * PATIENCE
"""Calls wait for longer than tests, because at the end of its time a call looks whether an answer is there."""


@pytest.fixture
def only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for an answer before a notification comes."""
    for module, name in (
        (listener, "SOON_SECONDS"),
        (listener, "LATER_SECONDS"),
        (listener, "PATROL_SECONDS"),
        (inquiry, "PATROL_SECONDS"),
    ):
        monkeypatch.setattr(module, name, LONG)


@pytest.fixture
def other(settings: Settings) -> Iterator[Client]:
    """A second client of the same database."""
    with client_for(settings) as made:
        yield made


@pytest.fixture
def elsewhere(stack: StackStatus) -> Iterator[tuple[Client, sa.Engine]]:
    """A client of a second database, whose requests have the same ids, and connections for a worker there."""
    with fresh_settings(stack) as settings:
        db = create_db(settings.require_database_url(), role="test")
        with client_for(settings) as made:
            yield made, db
        db.dispose()


def listening(db: sa.Engine) -> list[int]:
    """The sessions that listen for answers and have fetched none yet."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query = :listen AND state = 'idle'"
    with db.begin() as conn:
        return list(conn.execute(sa.text(query), {"listen": f"LISTEN {ANSWERS_CHANNEL}"}).scalars())


def claim_all(db: sa.Engine, number: int) -> list[EmbedRequest]:
    """Claim so many requests, in the order of their first texts, once they are asked."""
    claimed: list[EmbedRequest] = []

    def next_one() -> bool:
        if request := claim(db):
            claimed.append(request)
        return len(claimed) == number

    until(next_one, pause=0.001)
    return sorted(claimed, key=lambda request: request.texts)


def test_a_notification_wakes_the_calls_that_it_names_and_no_others(
    client: Client, other: Client, db: sa.Engine, only_told: None
) -> None:
    calls = [
        Call(lambda n=n, by=by: by.embed([f"text {n}"], timeout=LONG)) for n, by in enumerate((client, other, client))
    ]  # type: ignore[misc]
    requests = claim_all(db, 3)
    until(lambda: len(listening(db)) == 1)
    answer(db, *requests, tells=False)
    with db.begin() as conn:
        conn.execute(sa.text(f"NOTIFY {ANSWERS_CHANNEL}, 'nonsense,-1,٣,99999999999999999999999'"))
        tell(conn, 1, requests[0].id, requests[2].id)
    for n in (0, 2):
        assert calls[n].result().argmax() == n
    assert calls[1].is_alive()
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT id FROM embed_requests")).scalars().all() == [requests[1].id]
        tell(conn, requests[1].id)
    assert calls[1].result().argmax() == 1


def test_a_notification_before_the_call_has_begun_to_wait_is_not_missed(
    client: Client, db: sa.Engine, only_told: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker answers within the time that the commit of the request takes to return."""
    first = Call(lambda: client.embed(["text 1"], timeout=LONG))
    (request,) = claim_all(db, 1)
    until(lambda: len(listening(db)) == 1)
    answer(db, request)
    assert first.result().argmax() == 1

    waiting = inquiry.Inquiry._waiting

    def late(self: inquiry.Inquiry) -> object:
        with db.begin() as conn:
            (asked,) = conn.execute(sa.text("SELECT id FROM embed_requests")).scalars()
        answer(db, *claim_all(db, 1))
        until(lambda: asked not in self.mailbox.open)
        return waiting(self)

    monkeypatch.setattr(inquiry.Inquiry, "_waiting", late)
    assert client.embed(["text 2"], timeout=LONG).argmax() == 2


@pytest.mark.parametrize("tells", [True, False], ids=["told", "untold"])
def test_calls_of_two_databases_with_the_same_ids_get_their_own_answers(
    tells: bool, client: Client, db: sa.Engine, elsewhere: tuple[Client, sa.Engine]
) -> None:
    there, their_db = elsewhere
    calls = [
        Call(lambda n=n, by=by: by.embed([f"text {n + i}" for i in range(2)], timeout=LONG))  # type: ignore[misc]
        for n, by in enumerate((client, there) * 4)
    ]
    with answering(db, tells=tells) as ours, answering(their_db, tells=tells) as theirs:
        assert [call.result().argmax(axis=1).tolist() for call in calls] == [[n, n + 1] for n in range(8)]
    assert {request.id for request in ours.answered} & {request.id for request in theirs.answered}


def test_answers_of_a_worker_that_tells_nobody_are_looked_for(client: Client, db: sa.Engine) -> None:
    """As of the last release, or behind a pooler that swallows notifications."""
    with answering(db, tells=False):
        for n in range(5):
            assert Call(lambda n=n: client.embed([f"text {n}"], timeout=LONG)).result().argmax() == n  # type: ignore[misc]
    assert listener_of(client._db)._trust == 0


def test_a_missed_notification_costs_a_moment_and_not_the_answer(client: Client, db: sa.Engine) -> None:
    """Notifications arrive, but one of them is lost."""
    with answering(db):
        until(lambda: client.embed(["text 1"], timeout=LONG) is not None and listener_of(client._db)._trust)
    call = Call(lambda: client.embed(["text 2"], timeout=LONG))
    answer(db, *claim_all(db, 1), tells=False)
    assert call.result().argmax() == 2


def test_all_clients_of_a_database_share_one_connection_that_is_none_of_their_pools(
    client: Client, other: Client, db: sa.Engine, only_told: None
) -> None:
    calls = [
        Call(lambda n=n, by=by: by.embed([f"text {n}"], timeout=LONG)) for n, by in enumerate((client, other) * 15)
    ]  # type: ignore[misc]
    requests = claim_all(db, 30)
    until(lambda: len(listening(db)) == 1)
    for one in (client, other):
        until(lambda one=one: one._db.pool.checkedout() == 0)  # type: ignore[misc]
    assert [thread.name for thread in threading.enumerate()].count("chunkmill-answers") == 1
    answer(db, *requests)
    assert [call.result().argmax() for call in calls] == list(range(30))


def test_a_call_whose_listener_lost_its_connection_gets_its_answer_and_the_next_one_listens_again(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch, only_told: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "RECONNECT_SECONDS", 0.0)
    for number in range(2):
        calls = [Call(lambda n=n: client.embed([f"text {n}"], timeout=LONG)) for n in (2 * number, 2 * number + 1)]  # type: ignore[misc]
        requests = claim_all(db, 2)
        until(lambda: len(listening(db)) == 1)
        with db.begin() as conn:
            conn.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": listening(db)[0]})
        answer(db, *requests)
        assert [call.result().argmax() for call in calls] == [2 * number, 2 * number + 1]
    assert len([record for record in caplog.records if "cannot listen for answers" in record.message]) == 1
    call = Call(lambda: client.embed(["text 7"], timeout=LONG))
    requests = claim_all(db, 1)
    until(lambda: len(listening(db)) == 1)
    answer(db, *requests)
    assert call.result().argmax() == 7


def test_a_listener_that_hangs_is_noticed_by_those_who_wait(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its connection leads to a machine that is gone."""
    hangs = threading.Event()
    monkeypatch.setattr(listener.Listener, "_listen", lambda *_: hangs.wait(PATIENCE))
    for module in (listener, inquiry):
        monkeypatch.setattr(module, "PATROL_SECONDS", 0.01)
    call = Call(lambda: client.embed(["text 3"], timeout=LONG))
    answer(db, *claim_all(db, 1))
    try:
        assert call.result().argmax() == 3
    finally:
        hangs.set()


def test_a_listener_that_works_again_brings_the_answers_that_a_call_looks_for_itself(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener.Listener, "has_stopped", lambda _: True)
    monkeypatch.setattr(inquiry, "PATROL_SECONDS", 0.01)
    for name in ("FIRST_LOOK_SECONDS", "LAST_LOOK_SECONDS"):
        monkeypatch.setattr(inquiry, name, LONG)
    call = Call(lambda: client.embed(["text 3"], timeout=LONG))
    requests = claim_all(db, 1)
    until(lambda: looked_for_itself(call))
    answer(db, *requests)
    assert call.result().argmax() == 3


def looked_for_itself(call: Call) -> bool:
    """Whether the call has gone adrift: it waits for longer than between two looks of the listener."""
    frame = sys._current_frames().get(call.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "wait" and float(frame.f_locals.get("seconds", 0)) > PATIENCE:
            return True
        frame = frame.f_back
    return False


def test_nothing_is_waited_for_when_all_calls_are_over(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the listener brought the answer, the call looked itself, or nobody came."""
    with answering(db):
        client.embed(["text 1"], timeout=LONG)
        monkeypatch.setattr(listener.Listener, "has_stopped", lambda _: True)
        monkeypatch.setattr(inquiry, "PATROL_SECONDS", 0.0)
        for n in range(20):
            client.embed([f"text {n}"], timeout=LONG)
    with pytest.raises(WaitTimeout):
        client.embed(["text 1"], timeout=0.01)
    assert listener_of(client._db)._waiting == {}


def test_the_connection_is_given_up_when_nobody_has_waited_for_a_while(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("IDLE_SECONDS", "RHYTHM_SECONDS"):
        monkeypatch.setattr(listener, name, 0.0)
    with answering(db):
        for n in range(3):
            assert client.embed([f"text {n}"], timeout=LONG).argmax() == n
            until(lambda: not is_listening())


def is_listening() -> bool:
    return any(thread.name == "chunkmill-answers" for thread in threading.enumerate())


def test_the_connection_goes_with_the_last_client_of_its_database(
    client: Client, settings: Settings, db: sa.Engine, elsewhere: tuple[Client, sa.Engine]
) -> None:
    there, their_db = elsewhere
    with client_for(settings) as second, answering(db), answering(their_db):
        for one in (client, second, there):
            assert one.embed(["text 1"], timeout=LONG).argmax() == 1
        client.close()
        assert listener_of(second._db)._thread is not None
        assert second.embed(["text 2"], timeout=LONG).argmax() == 2
        with pytest.raises(ClientClosed):
            client.embed(["text 3"], timeout=LONG)
        client.close()
        second.close()
        assert listener_of(second._db)._thread is None
        assert listener_of(there._db)._thread is not None
        assert there.embed(["text 2"], timeout=LONG).argmax() == 2


def test_a_child_process_listens_on_a_connection_of_its_own(client: Client, db: sa.Engine) -> None:
    """The parent waits for an answer while its children are forked."""
    with answering(db):
        assert client.embed(["text 1"], timeout=LONG).argmax() == 1
    waits = Call(lambda: client.embed(["text 2"], timeout=LONG))
    (open_request,) = claim_all(db, 1)

    def calls(first: int) -> None:
        for n in range(first, first + 5):
            assert client.embed([f"text {n}"], timeout=LONG).argmax() == n

    children = [child(lambda first=first: calls(first)) for first in (10, 20, 30)]  # type: ignore[misc]
    with answering(db):
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
        answer(db, open_request)
        assert waits.result().argmax() == 2
        assert client.embed(["text 3"], timeout=LONG).argmax() == 3


def test_many_texts_wait_side_by_side_in_parts_that_no_worker_holds_for_long(client: Client, db: sa.Engine) -> None:
    texts = [f"text {n}" for n in range(100)]
    call = Call(lambda: client.embed_texts(texts, caller="somebody", timeout=LONG))
    requests = claim_all(db, 4)
    assert sorted(len(request.texts) for request in requests) == [4, 32, 32, 32]
    with db.begin() as conn:
        rows = conn.execute(sa.text("SELECT urgency, caller, deadline > now() FROM embed_requests")).all()
    assert [tuple(row) for row in rows] == [(1, "somebody", True)] * 4
    for request in reversed(requests):
        answer(db, request)
    embedded = call.result()
    assert embedded.vectors.argmax(axis=1).tolist() == list(range(100))
    assert embedded.tokens.tolist() == [len(text) for text in texts]


def test_a_part_is_sent_when_others_are_answered_so_that_a_bounded_number_is_open(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inquiry, "PART_TEXTS", 2)
    monkeypatch.setattr(inquiry, "OPEN_PARTS", 4)
    call = Call(lambda: client.embed([f"text {n}" for n in range(30)], timeout=LONG))
    answered, held = 0, []
    while answered < 15:
        expected = min(4, 15 - answered)
        held += claim_all(db, expected - len(held))
        until(lambda: count(db) == expected)  # noqa: B023
        answer(db, *held[:2])
        answered, held = answered + len(held[:2]), held[2:]
    assert call.result().argmax(axis=1).tolist() == list(range(30))


def count(db: sa.Engine) -> int:
    with db.begin() as conn:
        return int(conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one())


@pytest.mark.parametrize("asynchronous", [False, True], ids=["threads", "asyncio"])
def test_all_parts_are_withdrawn_when_one_fails(asynchronous: bool, client: Client, db: sa.Engine) -> None:
    texts = [f"text {n}" for n in range(70)]
    call = Call(lambda: in_a_loop(client, texts) if asynchronous else client.embed(texts, timeout=LONG))
    requests = claim_all(db, 3)
    with db.begin() as conn:
        embed_requests.refuse(conn, requests[1], "the second part is too much")
        tell(conn, requests[1].id)
    with pytest.raises(EngineError, match="the second part is too much"):
        call.result()
    assert count(db) == 0


def in_a_loop(client: Client, texts: list[str]) -> object:
    return asyncio.run(AsyncClient(client).embed(texts, timeout=LONG))


def test_all_parts_are_withdrawn_when_the_caller_gives_up(client: Client, hands: Hands) -> None:
    with pytest.raises(WaitTimeout):
        client.embed([f"text {n}" for n in range(70)], timeout=0.01)
    assert hands.rows("SELECT count(*) FROM embed_requests") == [(0,)]


def test_equal_texts_of_a_call_are_asked_once(client: Client, db: sa.Engine) -> None:
    with answering(db) as worker:
        vectors = client.embed(["text 1", "text 2", "text 1", "text 3", "text 2"], timeout=LONG)
    assert vectors.argmax(axis=1).tolist() == [1, 2, 1, 3, 2]
    assert worker.texts == ["text 1", "text 2", "text 3"]
    vectors[0] = 0
    assert vectors[2].argmax() == 1, "each row is the caller's own"


def test_a_few_short_texts_and_every_short_query_are_urgent(client: Client, db: sa.Engine) -> None:
    long = "word " * 600 + "1"
    with answering(db) as worker:
        client.embed(["text 1"], timeout=LONG)
        client.embed([long], timeout=LONG)
        client.embed([long], kind="query", timeout=LONG)
        client.embed([f"text {n}" for n in range(9)], kind="query", timeout=LONG)
    assert len(worker.answered) == 4
    inquiries = [({b"": "text 1"}, "document", True), ({b"": long}, "document", False), ({b"": long}, "query", True)]
    for texts, kind, urgent in inquiries:
        assert inquiry.is_short(texts, kind) is urgent
    assert not inquiry.is_short({bytes([n]): "a" for n in range(9)}, "query")


def test_on_the_schema_of_the_last_release_answers_come_without_counts(client: Client, db: sa.Engine) -> None:
    with db.begin() as conn:
        for name in ("truncated", "tokens", "deadline", "caller", "urgency"):
            conn.execute(sa.text(f"ALTER TABLE embed_requests DROP COLUMN {name}"))
    with answering(db, tells=False):
        embedded = client.embed_texts(["text 1", "text 2"], timeout=LONG)
    assert embedded.vectors.argmax(axis=1).tolist() == [1, 2]
    assert embedded.tokens.tolist() == [0, 0]


# --- spaces


def test_a_space_that_was_dropped_since_the_last_call_is_registered_anew(
    client: Client, other: Client, db: sa.Engine
) -> None:
    with answering(db):
        client.embed(["text 1"], timeout=LONG)
        spec = client._space(None, OnLong.TRUNCATE)
        other.drop_space(spec.spec.fingerprint)
        assert client.embed(["text 2"], timeout=LONG).argmax() == 2
        assert client._space(None, OnLong.TRUNCATE).id > spec.id
        other.drop_space(spec.spec.fingerprint)
        assert client.embed(["text 3"], kind="query", timeout=LONG).argmax() == 3


def test_another_space_that_has_the_id_of_a_known_one_is_not_taken_for_it(client: Client, db: sa.Engine) -> None:
    """As after the database was made anew under a running process."""
    with answering(db):
        client.embed(["text 1"], timeout=LONG)
        known = client._space(None, OnLong.TRUNCATE)
        with db.begin() as conn:
            filled = "(sha256('text 2'), 1, false, array_fill(1::real, '{384}')::vector)"
            fill = f"INSERT INTO {known.table_name} VALUES {filled}"
            conn.execute(sa.text(fill))
            conn.execute(sa.text("UPDATE spaces SET fingerprint = repeat('0', 64)"))
        for kind in ("document", "query"):
            assert client.embed(["text 2"], kind=kind, timeout=LONG).argmax() == 2  # type: ignore[call-overload]
        assert client._space(None, OnLong.TRUNCATE).id > known.id


def test_a_drop_while_a_call_asks_makes_it_fail_in_no_case(client: Client, db: sa.Engine) -> None:
    """The drop holds the space when the call asks; it is registered anew once the drop is committed."""
    with answering(db):
        client.embed(["text 1"], timeout=LONG)
        for kind in ("document", "query"):
            space = client._space(None, OnLong.TRUNCATE)
            with db.connect() as conn:
                transaction = conn.begin()
                drop = "SELECT drop_unused_space(:space, 'infinity', true)"
                until(lambda: conn.execute(sa.text(drop), {"space": space.id}).scalar_one())  # noqa: B023
                ask: Callable[[], object] = lambda kind=kind: client.embed(["text 2"], kind=kind, timeout=LONG)  # type: ignore[call-overload,misc] # noqa: E731
                with running(ask, release=lambda: transaction.is_active and transaction.commit()) as (call,):  # noqa: B023
                    until(lambda: waits_for_a_lock(db))
                    transaction.commit()
            assert np.array_equal(call.result(), [vector_of("text 2")])


def waits_for_a_lock(db: sa.Engine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with db.begin() as conn:
        return bool(conn.execute(sa.text(query)).scalar_one())
