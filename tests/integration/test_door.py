"""What our own processes write to Redis comes through the door: a producer's doorbells, and Celery's events."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import redis

from chunkmill.broker import LOCAL_BELLS, SYNC_BELLS, Bells, Broker, Doorbell, StepBell, keys_of
from chunkmill.messages import door
from chunkmill.messages.door import LARGEST_DOORBELL, Refusal
from tests.support.waiting import PATIENCE

LONGEST = {
    "job": 2**31,
    "collection": "\N{ELEPHANT}" * 200,
    "contents": 2**31,
    "model": "\u202e" * 200,
    "state": "gathering",
}


def opened(made: bytes | Refusal) -> tuple[dict[str, Any], Any]:
    """Return the headers and the body."""
    assert isinstance(made, bytes), made
    message = json.loads(made)
    return message["headers"], json.loads(base64.b64decode(message["body"]))


@pytest.mark.parametrize("bells", [LOCAL_BELLS, SYNC_BELLS], ids=["gpu", "openai"])
def test_each_doorbell_of_a_producer_comes_in_with_its_label(bells: Bells, broker: Broker) -> None:
    broker.ring([Doorbell(2**60, 9, LONGEST), Doorbell(7, 0)], bells)
    if bells is SYNC_BELLS:
        broker.ring_steps([StepBell(8, LONGEST)])
    seen = set()
    for key, priority in zip(keys_of(bells.queue), (0, 3, 6, 9), strict=True):
        for message in broker.client.lrange(key, 0, -1):
            assert len(message) < LARGEST_DOORBELL / 2
            headers, body = opened(door.doorbell(message, bells.queue, priority))
            sent = json.loads(message)
            assert body == json.loads(base64.b64decode(sent["body"]))
            assert {name: headers[name] for name in ("task", "id", "argsrepr", "kwargsrepr")} == {
                name: sent["headers"][name] for name in ("task", "id", "argsrepr", "kwargsrepr")
            }
            seen.add(body[0][0])
    assert seen == {2**60, 7, *([8] if bells is SYNC_BELLS else [])}


def test_a_producer_leaves_nothing_else_in_redis(broker: Broker) -> None:
    """A table of kombu's would be one more thing that somebody could put something into."""
    broker.ring([Doorbell(1, 0)])
    broker.ring_steps([StepBell(2)])
    assert set(broker.client.keys("*")) == {b"gpu", b"openai"}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (
            "worker-online",
            {"freq": 2.0, "active": 0, "processed": 0, "loadavg": (0.1, 0.2, 0.3), "sw_ident": "py-celery"},
        ),
        ("worker-offline", {"freq": 2.0}),
        (
            "task-received",
            {"name": "workers.embed_chunk_batch", "args": "ChunkBatch 3", "kwargs": "{}", "retries": 0, "eta": None},
        ),
        ("task-failed", {"exception": "ValueError('x')", "traceback": "Traceback:\n  x\n"}),
        ("task-succeeded", {"result": "None", "runtime": 0.25}),
    ],
)
def test_each_event_of_celery_comes_in_as_it_was_sent(kind: str, fields: dict[str, Any], broker: Broker) -> None:
    with broker.client.pubsub() as listener:
        listener.psubscribe("*celeryev*")
        assert listener.get_message(timeout=PATIENCE)
        with broker.celery.events.default_dispatcher(hostname="cpu-1@host") as dispatcher:
            task = {"uuid": "8d5c3a52-6f7e-4a1e-9d53-1c2b3a4d5e6f"} if kind.startswith("task") else {}
            dispatcher.send(kind, **fields, **task)
        message = listener.get_message(timeout=PATIENCE)
    assert message is not None
    _, body = opened(door.event(message["data"]))
    assert body == json.loads(base64.b64decode(json.loads(message["data"])["body"]))
    assert body["type"] == kind


def test_a_key_of_another_type_keeps_neither_producer_nor_poller_from_ringing(broker: Broker) -> None:
    client: redis.Redis = broker.client
    client.set("gpu", "x")
    client.sadd("openai\x06\x163", "x")
    assert broker.doorbells_by_queue() == {"gpu": 0, "openai": 0}
    broker.ring([Doorbell(1, 0)])
    broker.ring([Doorbell(1, 3)], SYNC_BELLS)
    assert broker.doorbells_by_queue() == {"gpu": 1, "openai": 1}
    client.set("gpu\x06\x169", "x")
    assert broker.clear("gpu") == 1
    assert broker.doorbells_by_queue() == {"gpu": 0, "openai": 1}
