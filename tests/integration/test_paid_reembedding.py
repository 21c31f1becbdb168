"""A collection goes from one paid model to another and back, and no text is paid twice in either of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import BudgetExceeded, Gates, Reembedding, ReembeddingState
from chunkmill.domain.states import Route
from chunkmill.poller.reembedding import Reembedder
from chunkmill.settings import Settings
from tests.openai_server import OpenAIServer
from tests.support.corridor import MODEL, Corridor, corridor
from tests.support.waiting import until

NEW_MODEL = "text-embedding-3-large"
TEXTS = [f"text {number}" for number in range(12)]
SHARED = TEXTS[:3]
"""Texts that another collection has in the new model already."""
S = ReembeddingState


@pytest.fixture
def paid(settings: Settings, server: OpenAIServer) -> Iterator[Corridor]:
    server.calm()
    with corridor(settings, server, index_seconds=0.0) as made:
        yield made


class Move:
    """Takes the steps of workers, of the provider and of a poller, which somebody may end and begin again."""

    def __init__(self, paid: Corridor, route: Route) -> None:
        self.paid, self.route = paid, route
        self.poller = Reembedder(paid.db, paid.settings)
        self.n_charges = len(paid.server.charges())

    def enqueue(self, texts: list[str], collection: str, model: str) -> Any:
        chunks = [(text, text) for text in texts]
        return self.paid.client.enqueue(chunks, collection=collection, model=model, route=self.route)

    def goes_to(self, state: ReembeddingState) -> Reembedding:
        def is_there() -> bool:
            with self.paid.db.begin() as conn:
                conn.execute(sa.text("UPDATE reembedding_fills SET passed_at = passed_at - interval '1 h'"))
            self.poller.round()
            self.paid.turn()
            return self.paid.client.reembedding("docs").state is state

        until(is_there, lambda: self.paid.client.reembedding("docs"), pause=0.02)
        return self.paid.client.reembedding("docs")

    def all_is_embedded(self) -> None:
        open_ones = "SELECT count(*) FROM chunk_batches WHERE state IN ('available', 'running')"
        self.paid.run_until(lambda: not self.paid.one(open_ones))

    def billed(self) -> Counter[str]:
        """How many texts were charged in each model, by the provider's own bill."""
        billed: Counter[str] = Counter()
        for charge in self.paid.server.charges()[self.n_charges :]:
            billed[charge["model"]] += charge["inputs"]
        return billed

    def booked(self) -> Counter[str]:
        """The same by our own books."""
        query = """
            SELECT s.model, sum(c.contents) AS contents
            FROM charges c
            JOIN spaces s ON s.id = c.space_id
            GROUP BY s.model
        """
        return Counter({row["model"]: int(row["contents"]) for row in self.paid.rows(query)})


@pytest.mark.parametrize("route", [Route.OPENAI, Route.OPENAI_SYNC])
def test_no_text_is_paid_twice_on_the_way_to_another_paid_model_and_back(paid: Corridor, route: Route) -> None:
    move, client = Move(paid, route), paid.client
    paid.finish(move.enqueue(TEXTS, "docs", MODEL), move.enqueue([*SHARED, "of its own"], "stays", NEW_MODEL))
    assert move.billed() == {MODEL: 12, NEW_MODEL: 4}
    quote = client.reembed("docs", to=NEW_MODEL, route=route, dry_run=True)
    assert (quote.contents, quote.cached, quote.to_embed) == (12, 3, 9)
    gates = Gates(canary=False, recall=None, ndcg_loss=None, p95_ratio=None)
    assert quote.usd is not None
    with pytest.raises(
        BudgetExceeded, match=r"collection 'docs' would cost about .* \(max_usd\) is .*Nothing was begun"
    ):
        client.reembed("docs", to=NEW_MODEL, route=route, gates=gates, max_usd=quote.usd / 2)
    assert client.reembeddings() == []
    client.reembed("docs", to=NEW_MODEL, route=route, gates=gates, ramp=(), max_usd=quote.usd)
    move.goes_to(S.FILLING)
    # A producer comes while it is filled: what is new is paid once in each model, and what is known is not paid at all.
    move.enqueue(["a new text", TEXTS[0]], "docs", MODEL)
    move.poller = Reembedder(paid.db, paid.settings)
    move.goes_to(S.FLIPPED)
    move.all_is_embedded()
    assert move.billed() == {MODEL: 13, NEW_MODEL: 4 + 9 + 1}
    move.enqueue(["after the flip"], "docs", NEW_MODEL)
    move.all_is_embedded()
    assert client.rollback("docs").state is S.ROLLED_BACK
    again = client.reembed("docs", to=NEW_MODEL, route=route, dry_run=True)
    assert (again.cached, again.to_embed) == (14, 0)
    assert move.billed() == move.booked() == {MODEL: 14, NEW_MODEL: 15}
    assert client.audit("docs").complete
    assert client.audit("stays").complete
