"""A paid worker's counts against the provider's bill and the ledger's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chunkmill.settings import Settings
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS
from chunkmill.telemetry.metrics import Metric, Role
from tests.openai_server import OpenAIServer
from tests.support.corridor import Corridor, corridor


@pytest.fixture
def paid(settings: Settings, server: OpenAIServer) -> Iterator[Corridor]:
    server.calm()
    with corridor(settings, server) as made:
        yield made


def series(metric: Metric) -> dict[tuple[str, ...], float]:
    return dict(COUNTS.series(metric, frozenset({Role.PROVIDER})))


def grown(metric: Metric, before: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    now = series(metric)
    return {labels: now[labels] - before.get(labels, 0.0) for labels in now if now[labels] != before.get(labels, 0.0)}


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
def test_contents_and_tokens_are_those_of_the_charges(paid: Corridor, route: str) -> None:
    contents, tokens = COUNTS.total(m.CONTENTS), COUNTS.total(m.TOKENS)
    requests = series(m.PROVIDER_REQUESTS)
    paid.finish(paid.enqueue(30, route=route))
    [charged] = paid.rows("SELECT sum(contents)::int AS contents, sum(tokens)::int AS tokens FROM charges")
    assert COUNTS.total(m.CONTENTS) - contents == charged["contents"] == 30
    assert COUNTS.total(m.TOKENS) - tokens == charged["tokens"]
    sent = grown(m.PROVIDER_REQUESTS, requests)
    if route == "openai":
        assert (sent["upload", "ok"], sent["create", "ok"], sent["download", "ok"]) == (1, 1, 1)
        assert sent["retrieve", "ok"] >= 1
        assert sent["delete", "ok"] == 2
    else:
        assert sent == {("embed", "ok"): 1}


def test_what_goes_wrong_is_counted_by_its_kind(paid: Corridor, server: OpenAIServer) -> None:
    requests = series(m.PROVIDER_REQUESTS)
    where = {"endpoint": "embeddings.create"}
    server.misbehave("rate_limited", where=where, times=1, retry_after_ms=1)
    paid.finish(paid.enqueue(5, route="openai-sync"))
    server.misbehave("http_error", where=where, times=1, status=503)
    paid.finish(paid.enqueue(5, text="another {}", collection="more", route="openai-sync"))
    sent = grown(m.PROVIDER_REQUESTS, requests)
    assert sent == {("embed", "ok"): 2, ("embed", "busy"): 1, ("embed", "silent"): 1}
