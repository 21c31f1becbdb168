"""Texts that someone waits for: under which policy, as what, and by whom they are embedded."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.db.connect import raw
from chunkmill.domain.spaces import OnLong
from chunkmill.ledger import embed_requests
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.engine.run import Pass, PassResult, Runner
from chunkmill_workers.local import responder as responder_module
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.hands import Hands
from tests.support import one_request
from tests.support.waiting import PATIENCE, until

LONG = "many words in one long text " * 80


def ask(db: sa.Engine, space: Space, kind: str, *texts: str) -> int:
    with db.begin() as conn:
        return one_request.ask(conn, space_id=space.id, kind=kind, texts=list(texts))  # type: ignore[arg-type]


def answered(db: sa.Engine, request: int) -> np.ndarray:
    with db.begin() as conn:
        answer = one_request.take_answer(conn, request, dimensions=384)
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
    for on_long, answer in ((OnLong.TRUNCATE, first), (OnLong.SPLIT, second)):
        expected = engine.embed(["short", LONG], kind=kind, on_long=on_long).vectors  # type: ignore[arg-type]
        np.testing.assert_allclose(answer, expected, atol=1e-5)
    assert np.abs(first[1] - second[1]).max() > 1e-3


def test_a_worker_that_leaves_takes_no_request(client: Client, context: WorkerContext, db: sa.Engine) -> None:
    request = ask(db, client._space(None, OnLong.TRUNCATE), "query", "a text")
    context.stopping.set()
    assert not EmbedResponder(context).answer_next()
    with db.begin() as conn:
        assert (
            conn.execute(sa.text("SELECT attempts FROM embed_requests WHERE id = :id"), {"id": request}).scalar() == 0
        )


class Gate:
    """Holds the engine in each of its calls that embeds one of ``texts``, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.calls: list[list[str]] = []
        stream = Engine.stream

        def held(engine: Engine, asked: Sequence[str], *args: Any, **more: Any) -> Iterator[TokenBatchResult]:
            self.calls.append(list(asked))
            if set(texts) & set(asked):
                self.entered.set()
                assert self.open.wait(PATIENCE)
            yield from stream(engine, asked, *args, **more)

        monkeypatch.setattr(Engine, "stream", held)


@pytest.fixture
def space(client: Client, context: WorkerContext) -> Space:
    """A space whose model is loaded."""
    made = client._space(None, OnLong.TRUNCATE)
    context.engine_for(made)
    return made


@pytest.fixture
def started(context: WorkerContext) -> Iterator[EmbedResponder]:
    responder = EmbedResponder(context)
    responder.start()
    yield responder
    responder.stop()
    assert not responder.is_alive()


def is_answered(db: sa.Engine, request: int) -> bool:
    with db.begin() as conn:
        return not embed_requests.still_open(conn, [request])


def test_many_requests_are_embedded_in_one_call_and_told_in_one_notification(
    space: Space, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    requests = [ask(db, space, "query", f"text {n}", "another text") for n in range(20)]
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as listening:
        listening.execute(sa.text(f"LISTEN {embed_requests.ANSWERS_CHANNEL}"))
        assert EmbedResponder(context).answer_next()
        told = [
            request
            for notice in raw(listening).notifies(timeout=PATIENCE, stop_after=1)
            for request in map(int, notice.payload.split(","))
        ]
        listening.invalidate()
    assert len(gate.calls) == 1
    assert set(told) <= set(requests)
    assert len(told) > 1
    expected = context.engine_for(space).embed([f"text {n}" for n in range(20)], kind="query").vectors
    for n, request in enumerate(requests):
        np.testing.assert_allclose(answered(db, request)[0], expected[n], atol=1e-5)


def test_who_waits_for_a_text_that_fails_is_told_so_and_nobody_else_is(
    space: Space, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_one(runner: Runner, running: Pass) -> PassResult:
        result = finish(runner, running)
        return dataclasses.replace(result, failures={0: ("not_finite", "it has no numbers")})

    finish = Runner.finish
    requests = [ask(db, space, "query", "a text of its own"), ask(db, space, "query", "a text", "one more text")]
    monkeypatch.setattr(Runner, "finish", fail_one)
    assert EmbedResponder(context).answer_next()
    with db.begin() as conn:
        answers = [one_request.take_answer(conn, request, dimensions=384) for request in requests]
    errors = sorted(answer.error or "" for answer in answers if answer)
    assert errors[0] == ""
    assert errors[1].startswith("test-worker: text 0 of ")
    assert errors[1].endswith("not_finite, it has no numbers")


def test_a_lease_is_renewed_while_the_pass_runs(
    space: Space, started: EmbedResponder, db: sa.Engine, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is short, so that the callers of a worker that is killed wait for a few seconds only."""
    gate = Gate(monkeypatch, "slow")
    request = ask(db, space, "query", "slow")
    assert gate.entered.wait(PATIENCE)
    [(until_first,)] = hands.rows("SELECT lease_until FROM embed_requests")
    until(lambda: hands.rows("SELECT lease_until FROM embed_requests") > [(until_first,)])
    with db.begin() as conn:
        assert embed_requests.claim_next(conn) is None
    gate.open.set()
    until(lambda: is_answered(db, request))
    assert hands.rows("SELECT attempts FROM embed_requests") == [(1,)]


def test_what_a_killed_worker_held_is_answered_by_another_and_each_of_it_alone(
    space: Space, started: EmbedResponder, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells the other worker: the leases end."""
    gate = Gate(monkeypatch)
    with db.begin() as conn:  # the notification comes with the claim, so that the worker finds nothing
        requests = [one_request.ask(conn, space_id=space.id, kind="query", texts=[f"text {n}"]) for n in range(3)]
        held = embed_requests.claim_some(conn, most_requests=9, most_texts=9, most_tokens=99, lease_seconds=0.3)
    assert len(held.requests) == 3
    until(lambda: all(is_answered(db, request) for request in requests))
    assert sorted(gate.calls) == [["text 0"], ["text 1"], ["text 2"]]


def test_a_request_that_comes_while_a_pass_runs_does_not_wait_for_it(
    space: Space, started: EmbedResponder, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "slow")
    slow = ask(db, space, "query", "slow")
    assert gate.entered.wait(PATIENCE)
    other = ask(db, space, "query", "quick")
    until(lambda: is_answered(db, other))
    assert not is_answered(db, slow)
    gate.open.set()
    until(lambda: is_answered(db, slow))


def test_a_large_request_that_is_withdrawn_is_not_computed_to_its_end(
    space: Space, started: EmbedResponder, db: sa.Engine, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder_module, "ASK_SECONDS", 0.0)
    gate = Gate(monkeypatch, "text 0", "text 32")  # its first two slices
    request = ask(db, space, "document", *(f"text {n}" for n in range(320)))
    until(lambda: len(gate.calls) == 2)
    with db.begin() as conn:
        one_request.withdraw(conn, request)
    gate.open.set()
    until(lambda: not started.embedder.n_open)
    assert len(gate.calls) == 2
    other = ask(db, space, "query", "the next one")
    until(lambda: is_answered(db, other))


def test_two_thousand_requests_whose_callers_hang_up_are_not_computed(
    space: Space, started: EmbedResponder, db: sa.Engine, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder_module, "ASK_SECONDS", 0.0)
    gate = Gate(monkeypatch, "slow")
    slow = [ask(db, space, kind, "slow") for kind in ("query", "document")]
    until(lambda: len(gate.calls) == 2)  # no more are under way at a time
    insert = """
        INSERT INTO embed_requests (space_id, kind, texts)
        SELECT :space, 'query', ARRAY['waits in vain'] FROM generate_series(1, 2000)
    """
    hands.rows(f"{insert} RETURNING 1", space=space.id)
    with db.begin() as conn:
        conn.execute(sa.text(f"NOTIFY {embed_requests.CHANNEL}"))
    until(lambda: started.embedder.n_open > 2)  # some are in the worker's hands
    hands.rows("DELETE FROM embed_requests WHERE texts = ARRAY['waits in vain'] RETURNING 1")
    gate.open.set()
    until(lambda: all(is_answered(db, request) for request in slow) and not started.embedder.n_open)
    assert sorted(gate.calls) == [["slow"], ["slow"]]


def test_a_model_is_loaded_aside(
    space: Space, client: Client, context: WorkerContext, started: EmbedResponder, db: sa.Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Requests of other spaces are answered meanwhile, and those of this one are left to workers that have it."""
    entered, go_on = threading.Event(), threading.Event()
    other = client._space(None, OnLong.SPLIT)
    real = context.engine_for

    def slow(wanted: Space) -> Engine:
        if wanted.id == other.id:
            entered.set()
            assert go_on.wait(PATIENCE)
        return real(wanted)

    monkeypatch.setattr(context, "engine_for", slow)
    must_load = ask(db, other, "query", "a text")
    try:
        assert entered.wait(PATIENCE)
        late = ask(db, other, "query", "another text")
        quick = ask(db, space, "query", "a text")
        until(lambda: is_answered(db, quick))
        assert not is_answered(db, must_load)
        with db.begin() as conn:
            claimed = embed_requests.claim_next(conn)
            assert claimed is not None
            assert claimed.id == late
            embed_requests.release(conn, claimed)
    finally:
        go_on.set()
    until(lambda: is_answered(db, must_load) and is_answered(db, late))


def test_a_worker_that_leaves_answers_what_it_computes_and_gives_back_the_rest(
    space: Space, started: EmbedResponder, context: WorkerContext, db: sa.Engine, hands: Hands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gate = Gate(monkeypatch, "slow", "text 0", "text 32")
    slow = ask(db, space, "query", "slow")
    large = ask(db, space, "document", *(f"text {n}" for n in range(320)))
    until(lambda: len(gate.calls) == 3)
    context.stopping.set()
    given_back = "SELECT attempts, lease_until FROM embed_requests WHERE id = :id"
    until(lambda: hands.rows(given_back, id=large) == [(0, None)])
    gate.open.set()
    until(lambda: is_answered(db, slow))
    assert not is_answered(db, large)
    assert hands.rows(given_back, id=large) == [(0, None)]


def test_a_worker_whose_engine_hangs_renews_no_lease(
    space: Space, context: WorkerContext, db: sa.Engine, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker answers then, as if this one had been killed."""
    monkeypatch.setattr(responder_module, "LEASE_SECONDS", 0.0)
    ask(db, space, "query", "a text")
    responder = EmbedResponder(context)
    assert responder._claim_some()
    lease = "SELECT lease_until FROM embed_requests"
    first = hands.rows(lease)
    monkeypatch.setattr(context.engines, "longest_step", lambda: (responder_module.HANGS_SECONDS + 1, "a forward pass"))
    responder.look(may_wait=False)
    assert hands.rows(lease) == first
    monkeypatch.setattr(context.engines, "longest_step", lambda: (0.0, ""))
    responder.look(may_wait=False)
    assert hands.rows(lease) > first
    responder.embedder.settle()
