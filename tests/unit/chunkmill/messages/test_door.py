"""The door for messages from Redis: what our processes write comes in, and everything else is refused for a reason."""

from __future__ import annotations

import base64
import json
import os
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkmill.broker import ADVANCE_TASK, EMBED_TASK, NEXT_NAMES, REQUEST_TASK
from chunkmill.messages import door
from chunkmill.messages.door import READS, SIGNALS, Refusal
from tests.support.hostile import (
    bell,
    command,
    event,
    hostile_bells,
    hostile_commands,
    hostile_events,
    random_messages,
)

FUZZ = int(os.environ.get("FUZZ", "200"))
"""How many random messages are tried: 200 in `make test`, 10,000 in `make fuzz`."""


def raw(message: Any) -> bytes:
    return json.dumps(message).encode()


def body_of(made: bytes | Refusal) -> Any:
    assert isinstance(made, bytes), made
    return json.loads(base64.b64decode(json.loads(made)["body"]))


@pytest.mark.parametrize(
    ("queue", "task", "label"),
    [
        ("gpu", EMBED_TASK, "ChunkBatch 7"),
        ("gpu", NEXT_NAMES[EMBED_TASK], "ChunkBatch 7"),
        ("openai", REQUEST_TASK, "ChunkBatch 7"),
        ("openai", NEXT_NAMES[REQUEST_TASK], "ChunkBatch 7"),
        ("openai", ADVANCE_TASK, "ProviderBatch 7"),
        ("openai", NEXT_NAMES[ADVANCE_TASK], "ProviderBatch 7"),
    ],
)
def test_a_doorbell_of_each_task_comes_in_on_its_queue_alone(queue: str, task: str, label: str) -> None:
    made = door.doorbell(raw(bell(7, headers={"task": task})), queue, 3)
    assert body_of(made)[0] == [7]
    assert isinstance(made, bytes)
    message = json.loads(made)
    assert (message["headers"]["task"], message["headers"]["argsrepr"]) == (task, label)
    assert message["properties"]["delivery_info"]["routing_key"] == queue
    other = "openai" if queue == "gpu" else "gpu"
    assert door.doorbell(raw(bell(7, headers={"task": task})), other, 3) is Refusal.TASK


def test_what_tracing_libraries_add_is_left_out() -> None:
    """A host program with OpenTelemetry or Sentry adds headers to what its Celery sends. They are not handed on."""
    made = door.doorbell(
        raw(bell(headers={"traceparent": "00-1", "sentry-trace": "x", "baggage": {"a": [1]}})), "gpu", 0
    )
    assert isinstance(made, bytes)
    assert b"trace" not in made
    assert b"baggage" not in made


def test_two_copies_of_a_doorbell_have_two_tags() -> None:
    """kombu keeps what is not acknowledged by its tag, so that two of the same would count as one."""
    message = raw(bell())
    made = [door.doorbell(message, "gpu", 0) for _ in range(2)]
    tags = {json.loads(one)["properties"]["delivery_tag"] for one in made}
    assert len(tags) == 2


def test_what_the_door_wrote_comes_in_again() -> None:
    """A worker that drains puts the doorbells back that it took, for others of this release or of the last."""
    first = door.doorbell(raw(bell(9)), "gpu", 6)
    assert isinstance(first, bytes)
    assert body_of(door.doorbell(first, "gpu", 6))[0] == [9]


@pytest.mark.parametrize(("name", "message"), hostile_bells().items(), ids=list(hostile_bells()))
def test_a_hostile_message_in_a_queue_is_refused(name: str, message: bytes) -> None:
    assert isinstance(door.doorbell(message, "gpu", 0), Refusal)


@pytest.mark.parametrize(("name", "message"), hostile_commands().items(), ids=list(hostile_commands()))
def test_a_hostile_command_is_refused(name: str, message: bytes) -> None:
    assert isinstance(door.command(message), Refusal)


@pytest.mark.parametrize(("name", "message"), hostile_events().items(), ids=list(hostile_events()))
def test_a_hostile_event_is_refused(name: str, message: bytes) -> None:
    assert isinstance(door.event(message), Refusal)


def test_the_table_has_more_than_a_hundred_messages_and_names_each_reason() -> None:
    reasons = {door.doorbell(message, "gpu", 0) for message in hostile_bells().values()}
    assert reasons == set(Refusal)
    assert len(hostile_bells()) > 100
    assert len(hostile_commands()) + len(hostile_events()) > 80


@pytest.mark.parametrize("method", sorted(READS | SIGNALS))
def test_what_flower_asks_comes_in_without_arguments(method: str) -> None:
    asked = body_of(
        door.command(raw(command(method, arguments={"with_defaults": True, "x": [1]}, destination=["a@b"])))
    )
    assert (asked["method"], asked["destination"]) == (method, ["a@b"])
    assert asked["arguments"] == ({"safe": True} if method == "active" else {})


def test_the_commands_are_those_of_flower() -> None:
    """Flower would silently show less if it asked for something else one day."""
    from flower.inspector import Inspector

    assert {*Inspector.inspect_methods, "ping"} == READS


def test_a_reply_comes_in_and_a_strange_one_does_not() -> None:
    ticket = "8d5c3a52-6f7e-4a1e-9d53-1c2b3a4d5e6f"
    headers = {"ticket": ticket, "clock": 3}
    right = bell(body={"cpu@host": {"ok": "pong"}}, headers=headers)
    assert body_of(door.reply(raw(right))) == {"cpu@host": {"ok": "pong"}}
    for body in ([], {}, 5, {"a": 1}, {"a": {}, "b": {}}, {"a\n": {}}, {"a": {"__type__": "x", "__value__": 1}}):
        assert door.reply(raw(bell(body=body, headers=headers))) is Refusal.SHAPE, body
    deep: Any = {}
    for _ in range(100):
        deep = {"x": deep}
    assert door.reply(raw(bell(body={"a": deep}, headers=headers))) is Refusal.SHAPE
    for ticket_of_another in (None, 5, "x", [], {}):
        assert door.reply(raw(bell(body={"a": {}}, headers={"ticket": ticket_of_another}))) is Refusal.SHAPE


def test_events_come_in_with_the_fields_that_are_known() -> None:
    """Celery sets each field of an event on its record of the worker, so that a field could replace a method."""
    heartbeat = body_of(door.event(raw(event(heartbeats="x", alive=1, event="x", update=None))))
    assert heartbeat.keys() == body_of(door.event(raw(event()))).keys()
    assert not heartbeat.keys() & {"heartbeats", "alive", "event", "update"}
    task = {"uuid": "8d5c3a52-6f7e-4a1e-9d53-1c2b3a4d5e6f", "name": EMBED_TASK, "args": "ChunkBatch 3", "kwargs": "{}"}
    group = body_of(door.event(raw(event(body=[json.loads(base64.b64decode(event("task-received", **task)["body"]))]))))
    assert (group[0]["uuid"], group[0]["args"]) == (task["uuid"], "ChunkBatch 3")


DOORS = (lambda message: door.doorbell(message, "gpu", 0), door.command, door.event, door.reply)


def test_random_messages_get_a_named_reason_or_come_in_and_take_no_memory() -> None:
    """The seed is fixed. In `make fuzz` there are 10,000 of them."""
    let_in = 0
    tracemalloc.start()
    try:
        for number, message in enumerate(random_messages(seed=16, number=FUZZ)):
            if number == FUZZ // 10:
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
            for enter in DOORS:
                made = enter(message)
                assert isinstance(made, bytes | Refusal)
                let_in += isinstance(made, bytes)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert FUZZ // 10 < let_in < 2 * FUZZ
    assert after - before < 300_000
    assert peak - before < 5_000_000


@hypothesis_settings(max_examples=FUZZ, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(list(bell())), inner),
        max_leaves=20,
    )
    | st.binary()
)
def test_any_json_and_any_bytes_are_refused(message: object) -> None:
    written = message if isinstance(message, bytes) else json.dumps(message).encode()
    wrapped = raw(bell(body=base64.b64encode(written).decode()))
    for enter in DOORS:
        assert isinstance(enter(written), Refusal)
        assert isinstance(enter(wrapped), Refusal)
