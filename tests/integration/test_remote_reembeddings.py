"""Moves to another model by both remote clients, through a real gateway, beside ``Client``: the same is returned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import AccessDenied, Gates, InvalidInput, NotFound, Quote, Reembedding, UnknownModel, WaitTimeout
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.reembedding import ReembeddingState
from chunkmill.embedded import StackStatus
from chunkmill.gateway import lasting
from chunkmill.ledger.reembedding import lives
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors
from tests.conftest import fresh_settings
from tests.support.gateway_scene import (
    ADMIN_OF_MODEL,
    ALIAS,
    DOCS,
    DOCS_ONLY,
    ODD,
    ODD_ONLY,
    SEARCH_ONLY,
    GatewayScene,
    gateway_scene,
)
from tests.support.gateways import KEY, stand_in_worker, vector_of
from tests.support.remotes import Remote, remote

S = ReembeddingState
_numbers = itertools.count()


@pytest.fixture(scope="module")
def scene(stack: StackStatus) -> Iterator[GatewayScene]:
    with fresh_settings(stack) as settings, gateway_scene(settings) as made, stand_in_worker(made.db):
        yield made


@pytest.fixture(scope="module", params=["sync", "async"])
def client(request: pytest.FixtureRequest, scene: GatewayScene) -> Iterator[Remote]:
    with remote(request.param, scene.running.url, KEY) as made:
        yield made


@dataclass
class Pair:
    """Two collections of the test's own, which are complete, and the model that both are to move to."""

    scene: GatewayScene
    first: str
    second: str
    texts: dict[str, list[str]]
    model: str

    def fill(self, move: Reembedding, *states: ReembeddingState) -> None:
        """Give each text of the collection a vector in the new space, and go on to these states."""
        with self.scene.db.begin() as conn:
            space = registry.get(conn, lives.get(conn, move.id).to_space_id)
            texts = self.texts[move.collection]
            vectors = np.stack([vector_of(text, "document", space.spec.dimensions) for text in texts])
            hashes = [content_hash(text) for text in texts]
            n = len(texts)
            fingerprint = space.spec.fingerprint
            write_vectors(conn, space, fingerprint, hashes, np.ones(n, np.int32), np.zeros(n, np.bool_), vectors)
        self.go_on(move, *states)

    def go_on(self, move: Reembedding, *states: ReembeddingState) -> None:
        for state in states:
            with self.scene.db.begin() as conn:
                assert lives.advance(conn, lives.get(conn, move.id), state)


@pytest.fixture
def pair(scene: GatewayScene) -> Iterator[Pair]:
    names = [f"of test {next(_numbers)}" for _ in range(2)]
    texts = {name: [f"{name}, text {i}" for i in range(3)] for name in names}
    for name in names:
        job = scene.client.enqueue([(f"{i}", text) for i, text in enumerate(texts[name])], collection=name)
        scene.embed(job.id)
    with scene.db.begin() as conn:
        query = "SELECT spec ->> 'model' FROM spaces JOIN collections k ON k.space_id = spaces.id WHERE k.name = :name"
        model = str(conn.execute(sa.text(query), {"name": names[0]}).scalar_one())
    yield Pair(scene, names[0], names[1], texts, model)
    for move in scene.client.reembeddings(limit=100):
        if move.state.is_before_flip:
            scene.client.cancel_reembedding(move.id)


def test_a_quote_and_a_move_are_those_of_a_client(scene: GatewayScene, client: Remote, pair: Pair) -> None:
    asked: dict[str, Any] = {
        "to": pair.model, "on_long": "split", "gates": Gates(price=Decimal("0.50"), recall=None), "ramp": (5, 50),
        "step_hours": 0.5, "keep_days": 3, "priority": "normal", "route": "local",
    }  # fmt: skip
    quote = client.reembed(pair.first, dry_run=True, **asked)
    assert isinstance(quote, Quote) and quote.contents == 3
    assert quote == scene.client.reembed(pair.first, dry_run=True, **asked)
    assert scene.client.reembeddings(pair.first) == []
    first = client.reembed(pair.first, **asked)
    second = client.reembed(pair.second, to=pair.model, on_long="split")
    assert isinstance(first, Reembedding)
    assert first == scene.client.reembedding(first.id) == client.reembed(pair.first, **asked)
    assert (first.limits, first.ramp, first.step_hours, first.keep_days) == (asked["gates"], (5, 50), 0.5, 3)
    assert (second.limits, second.collection) == (Gates(), pair.second)
    assert client.reembedding(pair.first) == client.reembedding(first.id) == first
    assert client.reembeddings(pair.second) == scene.client.reembeddings(pair.second) == [second]
    assert client.reembeddings(limit=2) == scene.client.reembeddings(limit=2) == [second, first]
    assert type(client.reembeddings()) is type(scene.client.reembeddings())
    assert client.reembeddings(limit=0) == []


def test_a_move_is_paused_resumed_with_other_gates_and_cancelled(
    scene: GatewayScene, client: Remote, pair: Pair
) -> None:
    move, beside = (client.reembed(name, to=pair.model, on_long="split") for name in (pair.first, pair.second))
    assert client.pause_reembedding(move.id) == scene.client.reembedding(move.id)
    assert scene.client.reembedding(move.id).paused_at is not None
    gates = Gates(missing=1, price=Decimal("0.25"))
    resumed = client.resume_reembedding(pair.first, gates=gates, ramp=[5])
    assert (resumed.limits, resumed.ramp, resumed.paused_at) == (gates, (5,), None)
    again = client.resume_reembedding(move.id)
    assert (again.limits, again.ramp) == (gates, (5,))
    cancelled = client.cancel_reembedding(pair.first)
    assert cancelled == scene.client.reembedding(move.id) and cancelled.state is S.CANCELLED
    assert scene.client.reembedding(beside.id) == beside


def test_a_move_flips_rolls_back_and_is_finished_and_the_other_collection_stays(
    scene: GatewayScene, client: Remote, pair: Pair
) -> None:
    move, beside = (client.reembed(name, to=pair.model, on_long="split") for name in (pair.first, pair.second))
    for one in (move, beside):
        pair.fill(one, S.FILLING, S.INDEXING, S.JUDGING, S.RAMPING)
    flipped = client.flip(pair.first, timeout=5)
    assert flipped == scene.client.reembedding(move.id) and flipped.state is S.FLIPPED
    assert client.audit(pair.first).space == move.to_space
    assert client.rollback(move.id).state is S.ROLLED_BACK
    assert client.audit(pair.first).space == move.from_space
    assert client.audit(pair.second).space == beside.from_space
    assert client.flip(beside.id, missing=0).state is S.FLIPPED
    finished = client.finish_reembedding(pair.second)
    assert finished == scene.client.reembedding(beside.id)
    with pytest.raises(InvalidInput):
        client.rollback(beside.id)


def test_a_flip_that_lacks_vectors_says_how_many_and_changes_nothing(
    scene: GatewayScene, client: Remote, pair: Pair
) -> None:
    move = client.reembed(pair.first, to=pair.model, on_long="split")
    pair.go_on(move, S.FILLING, S.INDEXING, S.JUDGING, S.RAMPING)
    for one in (scene.client, client):
        with pytest.raises(WaitTimeout, match="3 chunks that can be searched have no vector"):
            one.flip(move.id, timeout=0)
    assert client.flip(move.id, missing=3, timeout=0).state is S.FLIPPED


@pytest.mark.parametrize("heartbeat", [lasting.HEARTBEAT_SECONDS, 1e-4])
def test_gates_are_checked_now_also_if_it_takes_a_while(
    scene: GatewayScene, client: Remote, pair: Pair, heartbeat: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting, "HEARTBEAT_SECONDS", heartbeat)
    move, beside = (
        client.reembed(name, to=pair.model, on_long="split", gates=Gates(canary=False, ndcg_loss=None, p95_ratio=None))
        for name in (pair.first, pair.second)
    )
    pair.fill(move, S.FILLING, S.INDEXING, S.JUDGING)
    judged = client.judge_reembedding(pair.first)
    assert judged == scene.client.reembedding(move.id)
    assert {gate.name: gate.passed for gate in judged.gates}["coverage"] is True
    with pytest.raises(InvalidInput, match="planned"):  # after blank lines, if they come so often
        client.judge_reembedding(beside.id)
    assert scene.client.reembedding(beside.id).gates == ()


ERRORS: list[tuple[type[Exception], Callable[[Any, Pair], Any]]] = [
    (NotFound, lambda c, p: c.reembedding(10**9)),
    (NotFound, lambda c, p: c.reembedding("absent")),
    (NotFound, lambda c, p: c.reembedding(p.second)),
    (NotFound, lambda c, p: c.reembeddings("absent")),
    (NotFound, lambda c, p: c.reembed("absent", to=p.model, on_long="split")),
    (NotFound, lambda c, p: c.flip(10**9)),
    (NotFound, lambda c, p: c.cancel_reembedding(p.second)),
    (UnknownModel, lambda c, p: c.reembed(p.first, to="no such model")),
    (InvalidInput, lambda c, p: c.reembed(p.first, to=p.model)),
    (InvalidInput, lambda c, p: c.reembed(p.first, to=p.model, on_long="split", ramp=[9])),
    (InvalidInput, lambda c, p: c.reembed(p.first, to=p.model, ramp=[50, 10])),
    (InvalidInput, lambda c, p: c.reembed(p.first, to=p.model, keep_days=-1)),
    (InvalidInput, lambda c, p: c.reembed(p.first, to=p.model, gates="strict")),
    (InvalidInput, lambda c, p: c.reembed(p.first, to=p.model, dimensions=7)),
    (InvalidInput, lambda c, p: c.flip(p.first)),
    (InvalidInput, lambda c, p: c.rollback(p.first)),
    (InvalidInput, lambda c, p: c.finish_reembedding(p.first)),
    (InvalidInput, lambda c, p: c.judge_reembedding(p.first)),
    (InvalidInput, lambda c, p: c.flip(p.first, timeout=-1)),
]


def test_a_remote_client_raises_what_a_client_raises(scene: GatewayScene, client: Remote, pair: Pair) -> None:
    scene.client.reembed(pair.first, to=pair.model, on_long="split")
    for kind_of_error, call in ERRORS:
        for one in (scene.client, client):
            with pytest.raises(kind_of_error) as raised:
                call(one, pair)
            assert type(raised.value) is kind_of_error, (one, raised.value)


def test_each_key_does_what_it_may_with_what_it_may_see(scene: GatewayScene, client: Remote, pair: Pair) -> None:
    moves = {name: scene.client.reembed(name, to=pair.model, on_long="split") for name in (DOCS, ODD)}
    with remote(client.kind, scene.running.url, DOCS_ONLY) as docs:
        assert {move.collection for move in docs.reembeddings()} == {DOCS}
        assert docs.pause_reembedding(ALIAS) == scene.client.reembedding(moves[DOCS].id)
        for call in (
            lambda: docs.reembedding(ODD),
            lambda: docs.reembedding(moves[ODD].id),
            lambda: docs.judge_reembedding(moves[ODD].id),
            lambda: docs.cancel_reembedding(moves[ODD].id),
            lambda: docs.reembed(pair.first, to=pair.model, on_long="split"),
        ):
            with pytest.raises(NotFound):
                call()
    for key in (ODD_ONLY, SEARCH_ONLY):
        with remote(client.kind, scene.running.url, key) as reader:
            assert reader.reembedding(ODD) == moves[ODD]
            for verb in ("flip", "rollback", "judge_reembedding", "pause_reembedding", "resume_reembedding"):
                with pytest.raises(AccessDenied):
                    getattr(reader, verb)(moves[ODD].id)
    with remote(client.kind, scene.running.url, ADMIN_OF_MODEL) as other:
        with pytest.raises(AccessDenied, match="may not use model"):
            other.reembed(pair.first, to=pair.model, on_long="split")
        with pytest.raises(UnknownModel):
            other.reembed(pair.first, to="another-model")
    assert scene.client.reembeddings(pair.first) == []
    assert scene.client.reembedding(moves[ODD].id) == moves[ODD]
