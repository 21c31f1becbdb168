"""Moves to another model over HTTP and on the page: who may begin, see and flip them, and what wrong bodies get."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.embedded import StackStatus
from tests.conftest import fresh_settings
from tests.support.gateway_scene import DOCS, DOCS_ONLY, ODD, ODD_ONLY, SEARCH_ONLY, GatewayScene, gateway_scene, of
from tests.support.gateways import KEY


@pytest.fixture(scope="module")
def scene(stack: StackStatus) -> Iterator[GatewayScene]:
    with fresh_settings(stack) as settings, gateway_scene(settings) as made:
        yield made


@pytest.fixture
def model(scene: GatewayScene) -> str:
    with scene.db.begin() as conn:
        query = "SELECT spec ->> 'model' FROM spaces JOIN collections k ON k.space_id = spaces.id WHERE k.name = :name"
        return str(conn.execute(sa.text(query), {"name": DOCS}).scalar_one())


@pytest.fixture
def moves(scene: GatewayScene, model: str) -> Iterator[dict[str, dict[str, Any]]]:
    """Both collections on their way to a space with shorter vectors."""
    begun = {}
    for name in (DOCS, ODD):
        answer = scene.ask(KEY, "POST", of(name, "/reembed"), json={"to": model, "on_long": "split"})
        assert answer.status_code == 201, answer.text
        begun[name] = answer.json()
    yield begun
    for move in begun.values():
        if scene.client.reembedding(move["id"]).state.is_before_flip:
            scene.client.cancel_reembedding(move["id"])


def test_a_quote_begins_nothing_and_a_move_is_what_was_asked_for(
    scene: GatewayScene, model: str, moves: dict[str, dict[str, Any]]
) -> None:
    body = {"to": model, "dry_run": True, "dimensions": None, "on_long": "split", "gates": {"price": "0.5"}}
    quote = scene.ask(KEY, "POST", of(DOCS, "/reembed"), json=body)
    assert (quote.status_code, quote.json()["contents"], quote.json()["collection"]) == (200, 6, DOCS)
    move = moves[ODD]
    assert (move["collection"], move["to_model"], move["state"]) == (ODD, model, "planned")
    again = scene.ask(KEY, "POST", of(ODD, "/reembed"), json={"to": model, "on_long": "split"})
    assert (again.status_code, again.json()["id"]) == (201, move["id"])
    other = scene.ask(KEY, "POST", of(ODD, "/reembed"), json={"to": model, "on_long": "split", "ramp": [50]})
    assert other.status_code == 400
    assert str(move["id"]) in other.json()["error"]["message"]


def test_each_key_sees_the_moves_of_its_collections_and_only_admins_act(
    scene: GatewayScene, moves: dict[str, dict[str, Any]]
) -> None:
    def listed(key: str, **query: Any) -> set[str]:
        answer = scene.ask(key, "GET", "/v1/reembeddings", params=query)
        assert answer.status_code == 200, answer.text
        return {move["collection"] for move in answer.json()["reembeddings"] if move["finished_at"] is None}

    assert listed(KEY) == {DOCS, ODD}
    assert listed(KEY, collection=ODD) == {ODD}
    assert listed(DOCS_ONLY) == {DOCS}
    assert listed(ODD_ONLY) == {ODD}
    hidden, own = (f"/v1/reembeddings/{moves[name]['id']}" for name in (DOCS, ODD))
    assert scene.ask(ODD_ONLY, "GET", own).json()["collection"] == ODD
    assert scene.ask(ODD_ONLY, "GET", hidden).status_code == 404
    assert scene.ask(ODD_ONLY, "GET", "/v1/reembeddings", params={"collection": DOCS}).status_code == 404
    for action in ("flip", "rollback", "pause", "resume", "cancel", "finish"):
        assert scene.ask(SEARCH_ONLY, "POST", f"{own}/{action}").status_code == 403
    assert scene.ask(SEARCH_ONLY, "POST", of(ODD, "/reembed"), json={"to": "x"}).status_code == 403
    assert scene.ask(None, "GET", "/v1/reembeddings").status_code == 401


def test_a_move_is_paused_resumed_with_other_gates_and_cancelled(
    scene: GatewayScene, moves: dict[str, dict[str, Any]]
) -> None:
    path, beside = (f"/v1/reembeddings/{moves[name]['id']}" for name in (DOCS, ODD))
    assert scene.ask(KEY, "POST", f"{path}/pause").json()["paused_at"]
    resumed = scene.ask(KEY, "POST", f"{path}/resume", json={"gates": {"price": 0.25, "recall": None}, "ramp": [5]})
    assert resumed.status_code == 200, resumed.text
    limits = resumed.json()["limits"]
    assert (limits["price"], limits["recall"], limits["queries"]) == ("0.25", None, 200)
    assert (resumed.json()["ramp"], resumed.json()["paused_at"]) == ([5], None)
    too_early = scene.ask(KEY, "POST", f"{path}/flip", json={"timeout_s": 0})
    assert too_early.status_code == 400
    assert "cannot flip" in too_early.json()["error"]["message"]
    assert scene.ask(KEY, "POST", f"{path}/cancel").json()["state"] == "cancelled"
    assert scene.ask(KEY, "GET", beside).json()["state"] == "planned"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "to"),
        ({"to": 5}, "to"),
        ({"to": "x", "rampe": []}, "rampe"),
        ({"to": "x", "gates": []}, "gates"),
        ({"to": "x", "gates": {"recal": 1}}, "recal"),
        ({"to": "x", "gates": {"price": "dear"}}, "price"),
        ({"to": "x", "gates": {"recall": "much"}}, "recall"),
        ({"to": "x", "ramp": [50, 10]}, "ramp"),
        ({"to": "x", "ramp": "all"}, "ramp"),
        ({"to": "x", "keep_days": -1}, "keep_days"),
        ({"to": "x", "step_hours": "one"}, "step_hours"),
        ({"to": "x", "dry_run": "yes"}, "dry_run"),
        ({"to": "x", "route": "moon"}, "route"),
    ],
)
def test_a_wrong_body_is_named(scene: GatewayScene, body: dict[str, Any], param: str) -> None:
    answer = scene.ask(KEY, "POST", of(DOCS, "/reembed"), json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param in f"{error.get('param')} {error['message']}"
    assert not [move for move in scene.client.reembeddings(DOCS) if move.is_open]


def test_the_page_shows_moves_and_acts_on_them_for_admins_alone(
    scene: GatewayScene, moves: dict[str, dict[str, Any]]
) -> None:
    http, numbers = scene.clients[None], {name: move["id"] for name, move in moves.items()}
    try:
        for key, names in ((ODD_ONLY, {ODD}), (KEY, {DOCS, ODD})):
            http.cookies.clear()
            assert http.post("/page/login", data={"key": key}, headers={"origin": scene.running.url}).status_code == 303
            overview = http.get("/").text
            for name, number in numbers.items():
                assert (f'href="/page/reembeddings/{number}"' in overview) == (name in names)
                assert http.get(f"/page/reembeddings/{number}").status_code == (200 if name in names else 404)
        shown = http.get(f"/page/reembeddings/{numbers[ODD]}").text
        assert "Cancel" in shown and "Flip now" not in shown
        path = f"/page/reembeddings/{numbers[ODD]}"
        assert http.post(f"{path}/cancel", headers={"origin": "http://elsewhere.example"}).status_code == 403
        assert http.post(f"{path}/burn", headers={"origin": scene.running.url}).status_code == 404
        assert http.post(f"{path}/cancel", headers={"origin": scene.running.url}).headers["location"] == path
        assert "cancelled" in http.get(path).text
        assert scene.client.reembedding(numbers[DOCS]).state == "planned"
    finally:
        http.cookies.clear()
