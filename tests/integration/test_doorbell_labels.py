"""A doorbell in Redis: an id for the worker, and a label for those who look at Flower."""

from __future__ import annotations

import ast
import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.broker import PRIORITY_STEPS, SYNC_BELLS, Broker, Doorbell, StepBell
from chunkmill.domain.states import Priority
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings


def sent(broker: Broker, queue: str) -> list[bytes]:
    """Of every priority: kombu keeps a list for each."""
    keys = (queue, *(f"{queue}\x06\x16{step}" for step in PRIORITY_STEPS[1:]))
    return [message for key in keys for message in reversed(broker.client.lrange(key, 0, -1))]


def messages(broker: Broker, queue: str) -> list[tuple[list[int], str, dict[str, Any], int]]:
    """Arguments, both parts of the label, and the size, in the order of arrival."""
    bells = []
    for raw in sent(broker, queue):
        message = json.loads(raw)
        arguments, kwargs, _ = json.loads(base64.b64decode(message["body"]))
        assert kwargs == {}
        headers = message["headers"]
        bells.append((arguments, headers["argsrepr"], ast.literal_eval(headers["kwargsrepr"]), len(raw)))
    return bells


@pytest.fixture
def ring_again(db: sa.Engine, broker: Broker, settings: Settings) -> Callable[[str], None]:
    def ring(lost: str) -> None:
        broker.client.flushdb()
        with db.begin() as conn:
            conn.execute(sa.text(f"UPDATE chunk_batches SET rung_at = {lost}"))
        Poller(db, broker, settings).round()

    return ring


@pytest.mark.parametrize("lost", ["NULL", "now() - interval '1 hour'"], ids=["first", "again"])
def test_a_doorbell_says_what_it_is_about(
    client: Client, broker: Broker, ring_again: Callable[[str], None], lost: str
) -> None:
    """Rung for the first time or again; of two jobs in turns."""
    client._settings = client._settings.model_copy(update={"chunk_batch_size": 2})
    jobs = [
        client.enqueue([(f"{name}-{i}", f"quagga {i} of {name}") for i in range(3)], collection=name).id
        for name in ("docs", "{'a': 1}\n…")
    ]
    ring_again(lost)
    bells = messages(broker, "gpu")
    assert [label for _, label, _, _ in bells] == [f"ChunkBatch {number}" for (number,), *_ in bells]
    shown = sorted((about["job"], about["collection"], about["contents"]) for _, _, about, _ in bells)
    assert shown == [
        (jobs[0], "docs", 1),
        (jobs[0], "docs", 2),
        (jobs[1], "{'a': 1}\n…", 1),
        (jobs[1], "{'a': 1}\n…", 2),
    ]


def test_it_stays_small(client: Client, broker: Broker, ring_again: Callable[[str], None]) -> None:
    client.enqueue([("a", "quagga " * 500)], collection="𓆣" * 200)
    ring_again("NULL")
    ((_, _, about, size),) = messages(broker, "gpu")
    assert about["collection"] == "𓆣" * 59 + "…"
    assert size < 3000  # with a short name 1,085
    assert b"quagga" not in b"".join(sent(broker, "gpu"))


def test_a_step_says_what_it_is_about(broker: Broker) -> None:
    broker.ring_steps([StepBell(7, {"state": "submitted", "space": 2, "model": "text-embedding-3-small"})])
    ((arguments, label, about, _),) = messages(broker, "openai")
    assert (arguments, label) == ([7], "ProviderBatch 7")
    assert about == {"state": "submitted", "space": 2, "model": "text-embedding-3-small"}


def test_the_next_step_of_what_is_paid_for_is_served_before_new_requests(broker: Broker) -> None:
    """Of jobs of every priority, and whichever rang first."""
    broker.ring([Doorbell(20 + n, priority.rank) for n, priority in enumerate(Priority)], SYNC_BELLS)
    broker.ring_steps([StepBell(7)])
    assert [label for _, label, _, _ in messages(broker, "openai")] == [
        "ProviderBatch 7",
        "ChunkBatch 20",
        "ChunkBatch 21",
        "ChunkBatch 22",
    ]
    assert messages(broker, "gpu") == []
