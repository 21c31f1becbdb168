"""The paid routes against a compatible server that takes less than OpenAI does, with two models of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from chunkmill.settings import Settings
from tests.openai_server import OpenAIServer, text_hash
from tests.support.corridor import Corridor, corridor

SIZES = {"one": 16, "two": 24}
EMBED = "embeddings.create"
ONE: dict[str, Any] = {"embedding_model": "one", "embedding_dimensions": None, "openai_request_inputs": 2048}


@pytest.fixture(scope="module")
def private() -> Iterator[OpenAIServer]:
    with OpenAIServer(models=SIZES, base64=False, max_inputs_per_request=32, max_request_bytes=12_000) as running:
        yield running


def models(**fields: object) -> str:
    return json.dumps({name: {"dimensions": size, "usd": 1, **fields} for name, size in SIZES.items()})


def embed_both(made: Corridor, route: str, name: str, *, words: int = 1) -> dict[str, str]:
    """Embeds sixty texts with both models, and asserts that they are complete and were charged once for each."""
    texts = {f"c{i}": f"{name} {i}" + " word" * words for i in range(60)}
    before = Counter(made.server.bill())
    jobs = [
        made.client.enqueue(texts.items(), collection=f"{name} {model}", model=model, route=route) for model in SIZES
    ]
    assert [job.state for job in made.finish(*jobs)] == ["completed", "completed"]
    for model, size in SIZES.items():
        assert {len(vector) for vector in made.client.vectors(f"{name} {model}").values()} == {size}
    after = Counter(made.server.bill())
    assert after - before == Counter({text_hash(text): 2 for text in texts.values()})
    return texts


def refused(server: OpenAIServer) -> int:
    answers = server.state()["requests"].get(EMBED, {})
    return sum(times for status, times in answers.items() if not status.startswith("2"))


def test_plain_requests_learn_the_encoding_and_keep_within_the_limits(
    settings: Settings, private: OpenAIServer
) -> None:
    """Of all requests, one for each model is refused: that for base64, from which floats are learnt."""
    before = refused(private)
    limits = models(request_inputs=32, request_bytes=12_000)
    with corridor(settings, private, openai_models=limits, openai_batches=False, **ONE) as made:
        embed_both(made, "openai-sync", "learns")
        assert refused(private) == before + len(SIZES)
        embed_both(made, "openai-sync", "has learnt", words=150)  # 750 bytes each, so that bytes are the limit
        assert refused(private) == before + len(SIZES)
        assert made.rows("SELECT * FROM provider_lanes WHERE stop_code IS NOT NULL OR paused_until IS NOT NULL") == []


def test_batches_ask_for_floats_if_the_model_says_so(settings: Settings, private: OpenAIServer) -> None:
    with corridor(settings, private, openai_models=models(encoding="float", request_inputs=32), **ONE) as made:
        embed_both(made, "openai", "by batch")


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
def test_a_server_that_counts_characters_is_booked_with_our_own_count(
    route: str, settings: Settings, private: OpenAIServer
) -> None:
    private.control(counts_characters=True)
    try:
        given = models(encoding="float", request_inputs=32, tokens_factor=0)
        charged_before = sum(charge["tokens"] for charge in private.charges())
        with corridor(settings, private, openai_models=given, **ONE) as made:
            embed_both(made, route, f"characters {route}")
            charged = sum(charge["tokens"] for charge in private.charges()) - charged_before
            assert made.one("SELECT sum(tokens)::int FROM charges") == charged
            assert made.rows("SELECT kind, tokens::int, reason FROM adjustments") == []
    finally:
        private.control(counts_characters=False)
