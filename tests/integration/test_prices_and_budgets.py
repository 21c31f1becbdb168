"""A budget counts only what has a price, so under one a model without a price is refused, and nothing of it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.providers import read_models
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Route
from chunkmill.errors import BudgetExceeded, InvalidSetting
from chunkmill.ledger.money import budget
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill_workers.provider.responder import ProviderResponder
from tests.conftest import client_for
from tests.support import one_request
from tests.support.corridor import Corridor
from tests.support.corridor_scene import Scene
from tests.support.paid_ledger import LARGE, SMALL

TWIN = {"dimensions": 384, "max_tokens": 256, "same_as": "all-MiniLM-L6-v2", "tokenizer": "cl100k"}
UNPRICED = {
    SMALL: {"dimensions": 8, "can_cut": True},
    "mine": {"dimensions": 8},
    "free": {"dimensions": 8, "usd": 0},
    "twin": TWIN,
}
BUDGET = {"openai_monthly_budget_usd": Decimal(5)}
SAID = r"model 'mine' has no price, so OPENAI_MONTHLY_BUDGET_USD cannot limit.*\"usd\": 0"


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    own = settings.model_copy(update={"openai_models": read_models(UNPRICED), **BUDGET})
    made = client_for(own)
    yield made
    made.close()


@pytest.mark.parametrize("route", ["openai", "openai-sync", "auto"])
def test_under_a_budget_a_model_without_a_price_is_refused_before_anything_is_read(client: Client, route: str) -> None:
    read: list[object] = []
    with pytest.raises(InvalidSetting, match=SAID):
        client.enqueue((read.append(c) or c for c in [("a", "text")]), collection="docs", model="mine", route=route)  # type: ignore[func-returns-value]
    assert read == []
    assert client.jobs() == []


def test_a_model_that_is_free_or_has_openais_price_is_taken(client: Client) -> None:
    assert client.enqueue([("a", "text")], collection="free", model="free", route="openai-sync").chunks == 1
    assert client.enqueue([("a", "text")], collection="small", model=SMALL, route="openai").chunks == 1


def test_auto_passes_a_lane_over_whose_cost_nobody_can_limit(client: Client) -> None:
    told = client.explain(client.enqueue([("a", "text")], collection="docs").id)
    assert told.routing[-1].route is Route.LOCAL
    assert "openai is out: model 'twin' has no price" in told.routing[-1].because


def test_an_estimate_says_that_the_price_is_not_known(client: Client) -> None:
    told = client.estimate([("a", "text")], model="mine")
    assert [lane.unknown for lane in told.lanes] == ["the model has no price: give it one in OPENAI_MODELS"] * 2


@pytest.fixture
def limited(stage: Scene) -> Iterator[Corridor]:
    """The same paid corridor with a budget, and with models that have no price."""
    settings = stage.corridor.settings
    models = {name: replace(settings.provider_models[name], prices=()) for name in (SMALL, LARGE)}
    made = Corridor(settings.model_copy(update={"openai_models": models, **BUDGET}), stage.server)
    yield made
    made.close()


def test_what_waits_without_a_price_is_held_and_not_sent(stage: Scene, limited: Corridor) -> None:
    """It was enqueued before there was a budget, of two models and on both routes."""
    jobs = [
        stage.enqueue(stage.texts(4), collection=f"{model}-{route}", model=model, route=route)
        for model in (SMALL, LARGE)
        for route in ("openai", "openai-sync")
    ]

    limited.run_until(lambda: all(lane.held_reason for lane in limited.client.lanes()))

    assert all("has no price" in (lane.held_reason or "") for lane in limited.client.lanes())
    assert stage.charges() == []
    assert stage.asked("files.create") == 0
    with limited.db.begin() as conn:
        assert budget.committed(conn, limited.settings) == 0
    stage.finish(*jobs)  # without a budget


def test_a_search_without_a_price_is_refused_and_not_sent(stage: Scene, limited: Corridor) -> None:
    job = stage.enqueue(stage.texts(1), model=SMALL, route="openai-sync")
    with limited.db.begin() as conn:
        space = registry.find(conn, job.space)
        assert space is not None
        number = one_request.ask(conn, space_id=space.id, kind="query", texts=["what"])
    assert ProviderResponder(limited.context).answer_next()
    with limited.db.begin() as conn:
        answer = one_request.take_answer(conn, number, dimensions=8)
    assert answer is not None
    assert "has no price" in (answer.error or "")
    assert stage.charges() == []


def test_without_a_budget_nothing_needs_a_price(settings: Settings, db: sa.Engine) -> None:
    own = settings.model_copy(update={"openai_models": read_models(UNPRICED)})
    with db.begin() as conn:
        for model in (own.provider_models["mine"], own.provider_models["free"]):
            budget.require_budget(conn, own, model.space(OnLong.TRUNCATE, None))


def test_a_used_up_budget_is_still_its_own_error(client: Client) -> None:
    own = client._settings.model_copy(update={"openai_monthly_budget_usd": Decimal(0)})
    with client_for(own) as poor:
        for model in ("free", SMALL):
            with pytest.raises(BudgetExceeded):
                poor.enqueue([("a", "text")], collection=model, model=model, route="openai-sync")
