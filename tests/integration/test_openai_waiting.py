"""Texts that someone waits for, of a space that only the provider serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chunkmill.errors import EngineError
from chunkmill.ledger import embed_requests
from chunkmill.settings import Settings
from chunkmill.telemetry import tracing
from chunkmill_workers.provider.responder import ProviderResponder
from tests.openai_server import OpenAIServer, vector_for
from tests.support import one_request
from tests.support.corridor import DIMENSIONS, Corridor, corridor
from tests.support.waiting import until

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


@pytest.fixture
def lane(settings: Settings, server: OpenAIServer) -> Iterator[Corridor]:
    server.calm()
    with corridor(settings, server) as made:
        answering = ProviderResponder(made.context)
        answering.start()
        yield made
        answering.stop()


def test_a_search_is_answered_and_charged_to_nobodys_job(lane: Corridor) -> None:
    job = lane.enqueue(20)
    lane.finish(job)
    [hit] = lane.client.search("text 7", collection="docs", k=1)
    assert (hit.chunk_id, round(hit.score, 5)) == ("chunk-7", 1.0)
    [charge] = lane.rows("SELECT route, contents, tokens, usd FROM charges WHERE job_id = 0")
    assert charge == {"route": "openai-sync", "contents": 1, "tokens": 3, "usd": Decimal("0.0000000600")}


def test_vectors_come_in_the_order_of_the_texts_over_several_requests(lane: Corridor) -> None:
    texts = [f"number {i}" for i in range(300)]
    vectors = lane.client.embed(texts)
    np.testing.assert_allclose(vectors, [vector_for(text, DIMENSIONS) for text in texts], atol=1e-6)
    assert lane.one("SELECT sum(contents) FROM charges") == 300


def test_whoever_waits_gets_the_reason_at_once(lane: Corridor, server: OpenAIServer) -> None:
    server.misbehave("http_error", where={"endpoint": "embeddings.create"}, status=503)
    with pytest.raises(EngineError, match=r"answered 503"):
        lane.client.embed(["a text"])
    assert lane.one("SELECT count(*) FROM charges") == 0


def test_a_call_that_a_provider_answers_is_below_the_span_of_its_caller_and_no_span_has_a_text(
    lane: Corridor, server: OpenAIServer, spans: Callable[[], list[ReadableSpan]]
) -> None:
    with tracing.root("first"):
        lane.client.embed(["a text of ZEBRAFISH"])
    server.misbehave("http_error", where={"endpoint": "embeddings.create"}, status=503)
    with tracing.root("second"), pytest.raises(EngineError, match=r"answered 503"):
        lane.client.embed(["another text of ZEBRAFISH"])
    until(lambda: [span.name for span in spans()].count("chunkmill.embed_request") == 2)
    callers = {span.context.span_id: span for span in spans() if span.name in ("first", "second")}
    below = {
        callers[span.parent.span_id].name: span
        for span in spans()
        if span.name == "chunkmill.embed_request" and span.parent is not None
    }
    assert below["first"].context.trace_id != below["second"].context.trace_id
    assert below["first"].status.is_unset
    assert not below["second"].status.is_ok
    assert "ZEBRAFISH" not in "".join(span.to_json() for span in spans())


def test_a_budget_that_is_used_up_answers_nothing(settings: Settings, server: OpenAIServer) -> None:
    with corridor(settings, server, openai_monthly_budget_usd=Decimal(0)) as made:
        answering = ProviderResponder(made.context)
        answering.start()
        with pytest.raises(EngineError, match=r"OPENAI_MONTHLY_BUDGET_USD"):
            made.client.embed(["a text"])
        answering.stop()


def test_local_workers_leave_it_alone(settings: Settings, server: OpenAIServer) -> None:
    with corridor(settings, server) as made:
        space = made.client._space(None, "truncate")  # type: ignore[arg-type]
        with made.db.begin() as conn:
            one_request.ask(conn, space_id=space.id, kind="query", texts=["a text"])
            assert embed_requests.claim_next(conn) is None
            assert embed_requests.claim_next(conn, spaces=[space.id]) is not None
