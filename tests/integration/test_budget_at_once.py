"""The month's money holds while several workers, threads and routes spend it at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Route
from chunkmill.ledger import embed_requests
from chunkmill.ledger.money import budget, charges, questions
from chunkmill.ledger.provider import provider_inputs
from chunkmill.ledger.provider.provider_room import ProviderRoom
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill_workers.provider import gather as gathering
from chunkmill_workers.provider import responder
from chunkmill_workers.provider.plain import request_chunk_batch
from tests.openai_server import OpenAIServer
from tests.support import one_request
from tests.support.corridor_scene import Scene, scene
from tests.support.paid_ledger import LARGE, SMALL, add_charge, add_inputs, register
from tests.support.waiting import PATIENCE, together

USD = {
    (SMALL, "sync"): Decimal("0.02"), (SMALL, "batch"): Decimal("0.01"),
    (LARGE, "sync"): Decimal("0.13"), (LARGE, "batch"): Decimal("0.065"),
}  # fmt: skip
"""US dollars per million tokens."""
ONE_OF_EACH = Decimal("0.00017")
"""One ChunkBatch of either model by plain requests, and a little more."""


def billed(stage: Scene) -> Decimal:
    """US dollars that the server charged."""
    charges = stage.charges()
    return sum((charge["tokens"] * USD[charge["model"], charge["kind"]] for charge in charges), Decimal(0)) / 1_000_000


@pytest.fixture
def limited(settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest) -> Iterator[Scene]:
    with scene(settings, server, request, chunk_batch_size=10, openai_monthly_budget_usd=ONE_OF_EACH) as stage:
        yield stage


def enqueue(stage: Scene, n_chunk_batches: int, model: str, route: Route) -> None:
    texts = {
        f"{model}-{route}-{i}": stage.text(i) + f" {model} {route}" + " word" * 80 for i in range(10 * n_chunk_batches)
    }
    stage.enqueue(texts, collection=f"{model}-{route}", model=model, route=route)


@pytest.mark.parametrize("at_once", [4, 8])
def test_plain_requests_at_once_spend_no_more_than_the_budget(
    limited: Scene, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks at the budget before all have put their contents in flight."""
    corridor = limited.corridor
    all_in_flight = threading.Barrier(at_once)
    add_own = provider_inputs.add_own

    def add_and_wait(*given: Any) -> set[bytes]:
        mine = add_own(*given)
        all_in_flight.wait(PATIENCE)
        return mine

    monkeypatch.setattr(provider_inputs, "add_own", add_and_wait)
    for model in (SMALL, LARGE):
        enqueue(limited, at_once // 2, model, Route.OPENAI_SYNC)
    due = corridor.due("chunk_batches", "state = 'available'")
    assert len(due) == at_once
    other = corridor.worker()
    try:
        workers = cycle((corridor.context, other))
        together(*(partial(request_chunk_batch, next(workers), chunk_batch) for chunk_batch in due))
    finally:
        other.close()
    assert ONE_OF_EACH / 10 < billed(limited) <= ONE_OF_EACH
    # A small request that fits after a larger one was held takes the reason back, until that one comes again.
    monkeypatch.setattr(provider_inputs, "add_own", add_own)
    limited.run_until(lambda: corridor.client.lanes()[1].held_reason is not None)
    reason = corridor.client.lanes()[1].held_reason
    assert reason is not None
    assert "the budget for paid routes is used up" in reason
    assert billed(limited) <= ONE_OF_EACH


def test_a_provider_batch_leaves_the_money_that_plain_requests_take_while_it_is_filled(
    limited: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    corridor = limited.corridor
    for model in (SMALL, LARGE):
        enqueue(limited, 2, model, Route.OPENAI)
    enqueue(limited, 1, LARGE, Route.OPENAI_SYNC)
    [plain] = corridor.due("chunk_batches", "state = 'available' AND route = 'openai-sync'")
    other = corridor.worker()
    room = gathering.room

    def look_and_be_overtaken(conn: sa.Connection, settings: Settings, space: registry.Space) -> ProviderRoom:
        """The room, as it is before the plain request of another worker."""
        left = room(conn, settings, space)
        if space.spec.model == LARGE:
            monkeypatch.setattr(gathering, "room", room)
            request_chunk_batch(other, plain)
        return left

    monkeypatch.setattr(gathering, "room", look_and_be_overtaken)
    try:
        limited.run_until(lambda: corridor.client.lanes()[0].held_reason and limited.batches() and limited.charges())
        for _ in range(5):
            limited.hurry()
            corridor.turn()
    finally:
        other.close()
    assert {charge["kind"] for charge in limited.charges()} >= {"sync"}
    assert billed(limited) <= ONE_OF_EACH
    with corridor.db.begin() as conn:
        assert not budget.is_exceeded(conn, corridor.settings)


def test_searches_at_once_spend_no_more_than_the_budget(limited: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at the budget before the other has counted its tokens. There is money for one of them."""
    corridor = limited.corridor
    with corridor.db.begin() as conn:
        space = registry.register(conn, corridor.settings.provider_models[LARGE].space(OnLong.TRUNCATE, 8))
        asked = [
            one_request.ask(conn, space_id=space.id, kind="query", texts=[f"{i}" + " word" * 1000]) for i in range(2)
        ]
    both_counted = threading.Barrier(2)
    prepare = responder.prepare

    def prepare_and_wait(*given: Any) -> Any:
        prepared = prepare(*given)
        both_counted.wait(PATIENCE)
        return prepared

    monkeypatch.setattr(responder, "prepare", prepare_and_wait)
    other = corridor.worker()
    try:
        together(*(responder.ProviderResponder(context).answer_next for context in (corridor.context, other)))
    finally:
        other.close()
    with corridor.db.begin() as conn:
        answers = [one_request.take_answer(conn, number, dimensions=8) for number in asked]
        assert budget.committed(conn, corridor.settings) == 0
    errors = [answer.error for answer in answers if answer is not None]
    assert (len(errors), errors.count(None)) == (2, 1)
    assert "the budget for paid routes is used up" in str(errors)
    assert 0 < billed(limited) <= ONE_OF_EACH


def test_a_search_under_way_is_committed_whether_or_not_its_caller_waits(limited: Scene) -> None:
    corridor = limited.corridor
    with corridor.db.begin() as conn:
        asked, until = [], conn.execute(sa.text("SELECT now()")).scalar_one()
        for number, model in enumerate((SMALL, LARGE)):
            space = registry.register(conn, corridor.settings.provider_models[model].space(OnLong.TRUNCATE, 8))
            asked.append(one_request.ask(conn, space_id=space.id, kind="query", texts=["word"]))
            tokens = (number + 1) * 1_000_000
            questions.add(conn, bytes([number]), space_id=space.id, tokens=tokens, until=until)
        assert budget.committed(conn, corridor.settings) == Decimal("0.02") + Decimal("0.26")
        claimed = embed_requests.claim_next(conn, spaces=[space.id - 1])
        assert claimed is not None
        embed_requests.refuse(conn, claimed, "why")
        one_request.withdraw(conn, asked[1])
        assert budget.committed(conn, corridor.settings) == Decimal("0.02") + Decimal("0.26")
        questions.end(conn, bytes([0]))
        assert budget.committed(conn, corridor.settings) == Decimal("0.26")
        questions.end(conn, bytes([1]))
        assert budget.committed(conn, corridor.settings) == 0


def test_what_workers_of_the_last_release_ask_is_committed_too(limited: Scene) -> None:
    """They note it in the request, and know no other table."""
    corridor = limited.corridor
    with corridor.db.begin() as conn:
        for model in (SMALL, LARGE):
            space = registry.register(conn, corridor.settings.provider_models[model].space(OnLong.TRUNCATE, 8))
            one_request.ask(conn, space_id=space.id, kind="query", texts=["word"])
        until = conn.execute(sa.text("SELECT now()")).scalar_one()
        questions.add(conn, b"", space_id=space.id, tokens=1_000_000, until=until)
        conn.execute(sa.text("UPDATE embed_requests SET committed_tokens = 2000000"))
        assert budget.committed(conn, corridor.settings) == Decimal("0.04") + Decimal("0.39")
        conn.execute(sa.text("UPDATE embed_requests SET error = 'why' WHERE space_id = :id"), {"id": space.id})
        assert budget.committed(conn, corridor.settings) == Decimal("0.04") + Decimal("0.13")
        conn.execute(sa.text("DROP TABLE provider_questions"))
        assert budget.committed(conn, corridor.settings) == 0, "its schema has no table of questions"


def test_what_is_booked_between_two_statements_is_not_overlooked(
    db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is booked while the budget is read moves money from one sum to the other."""
    limited = settings.model_copy(update={"openai_monthly_budget_usd": Decimal("0.10")})
    small, large = register(db, settings), register(db, settings, LARGE)
    hashes = [bytes([number]) * 32 for number in range(2)]
    with db.begin() as conn:
        add_inputs(conn, small, None, hashes, sent_tokens=2_500_000)
        add_inputs(conn, large, None, hashes[:1], sent_tokens=100_000)

    def book() -> None:
        with db.begin() as other:
            provider_inputs.remove(other, space_id=small.id, hashes=hashes, provider_batch_id=None)
            add_charge(other, small, "0.10", on=str(charges.today(other)), tokens=5_000_000)

    def overtaken(function: Any) -> Any:
        def call(*given: Any) -> Any:
            result = function(*given)
            monkeypatch.undo()
            book()
            return result

        return call

    for module, name in ((charges, "month_confirmed"), (budget, "committed")):
        monkeypatch.setattr(module, name, overtaken(getattr(module, name)))
    with db.begin() as conn:
        assert budget.read(conn, limited).exceeds()
