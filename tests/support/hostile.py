"""Messages as somebody who can write to Redis may put there: a table of shapes, and any number of random ones."""

from __future__ import annotations

import base64
import bz2
import copy
import json
import random
import uuid
import zlib
from collections.abc import Iterator
from typing import Any

from chunkmill.messages.door import REPLIES

MARK = "ZZHOSTILEZZ"
"""In every message whose shape leaves room for it. No log may show it."""
REMOVE = object()
DEEP = "[" * 50_000 + "]" * 50_000


def packed(body: Any) -> str:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return base64.b64encode(text).decode()


def bell(
    number: Any = 1,
    *,
    body: Any = None,
    headers: dict[str, Any] | None = None,
    properties: dict[str, Any] | None = None,
    outer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A doorbell as a producer writes it, with changes. REMOVE takes a part away."""
    task_id = str(uuid.uuid4())
    made: dict[str, Any] = {
        "body": packed([[number], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": "workers.embed_chunk_batch",
            "id": task_id,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": task_id,
            "parent_id": None,
            "argsrepr": f"ChunkBatch {number}",
            "kwargsrepr": f"{{'job': 3, 'collection': '{MARK}', 'contents': 64}}",
            "origin": "gen1@host",
            "ignore_result": True,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
        },
        "properties": {
            "correlation_id": task_id,
            "reply_to": str(uuid.uuid4()),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "gpu"},
            "priority": 3,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }
    if body is not None:
        made["body"] = body if isinstance(body, str) else packed(body)
    for part, changes in ((made["headers"], headers), (made["properties"], properties), (made, outer)):
        for name, value in (changes or {}).items():
            if value is REMOVE:
                del part[name]
            else:
                part[name] = value
    return made


def command(method: Any = "ping", *, body: Any = None, **parts: Any) -> dict[str, Any]:
    """A command of Celery's remote control as Flower sends it, with changes."""
    asked: dict[str, Any] = {
        "method": method,
        "arguments": {},
        "destination": None,
        "pattern": None,
        "matcher": None,
        "ticket": str(uuid.uuid4()),
        "reply_to": {"exchange": REPLIES, "routing_key": str(uuid.uuid4())},
    }
    asked |= parts
    asked = {name: value for name, value in asked.items() if value is not REMOVE}
    return bell(body=asked if body is None else body, headers=dict.fromkeys(_TASK_HEADERS, REMOVE) | {"clock": 5})


_TASK_HEADERS = (
    "lang",
    "task",
    "id",
    "shadow",
    "eta",
    "expires",
    "group",
    "group_index",
    "retries",
    "timelimit",
    "root_id",
    "parent_id",
    "argsrepr",
    "kwargsrepr",
    "origin",
    "ignore_result",
    "replaced_task_nesting",
    "stamped_headers",
    "stamps",
)


def event(kind: Any = "worker-heartbeat", *, body: Any = None, **fields: Any) -> dict[str, Any]:
    """An event of a worker, with changes."""
    said: dict[str, Any] = {
        "type": kind,
        "hostname": "cpu-1@host",
        "timestamp": 1_700_000_000.5,
        "utcoffset": 5.5,
        "pid": 77,
        "clock": 12,
        "freq": 2.0,
        "active": 0,
        "processed": 3,
        "loadavg": [0.1, 0.2, 0.3],
        "sw_ident": "py-celery",
        "sw_ver": "5.7.0",
        "sw_sys": "Linux",
    }
    said |= fields
    said = {name: value for name, value in said.items() if value is not REMOVE}
    return bell(body=said if body is None else body, headers=dict.fromkeys(_TASK_HEADERS, REMOVE) | {"hostname": "x"})


def written(messages: dict[str, Any]) -> dict[str, bytes]:
    return {
        name: message if isinstance(message, bytes) else json.dumps(message).encode()
        for name, message in messages.items()
    }


_BODIES: dict[str, Any] = {
    "an empty list": [],
    "an empty object": {},
    "null": b"null",
    "a number": 5,
    "a text": MARK,
    "one item": [[1]],
    "two items": [[1], {}],
    "four items": [[1], {}, {}, {}],
    "no argument": [[], {}, {}],
    "two arguments": [[1, 2], {}, {}],
    "keywords": [[1], {"x": 1}, {}],
    "keywords that are a list": [[1], [], {}],
    "an argument that is a text": [["1"], {}, {}],
    "an argument that is no whole number": [[1.5], {}, {}],
    "an argument that is true": [[True], {}, {}],
    "an argument that is null": [[None], {}, {}],
    "zero": [[0], {}, {}],
    "a negative number": [[-1], {}, {}],
    "a number of 71 bits": [[2**70], {}, {}],
    "an argument that is a list": [[[1]], {}, {}],
    "an argument that is an object": [[{"__type__": "uuid", "__value__": "x"}], {}, {}],
    "arguments that are a number": [1, {}, {}],
    "arguments that are an object": [{"0": 1}, {}, {}],
    "callbacks": [[1], {}, {"callbacks": [{"task": MARK}]}],
    "error callbacks": [[1], {}, {"errbacks": [MARK]}],
    "a chain": [[1], {}, {"chain": [{"task": "workers.embed_chunk_batch"}]}],
    "a chord": [[1], {}, {"chord": {"task": MARK}}],
    "an unknown embed": [[1], {}, {"x": None}],
    "an embed that is a list": [[1], {}, []],
    "an embed that is null": [[1], {}, None],
    "deep brackets": DEEP.encode(),
    "NaN": b"[[NaN], {}, {}]",
    "infinity": b"[[Infinity], {}, {}]",
    "5,000 digits": b"[[" + b"9" * 5000 + b"], {}, {}]",
    "no JSON": b"hello",
    "no UTF-8": b"\xff\xfe[[1],{},{}]",
    "UTF-16": "[[1], {}, {}]".encode("utf-16"),
    "a NUL": b"[[1], {}, {}]\x00",
    "nothing": b"",
}
_HEADERS: dict[str, dict[str, Any]] = {
    "a foreign task": {"task": f"os.{MARK}"},
    "a built-in task": {"task": "celery.backend_cleanup"},
    "a task of the other queue": {"task": "workers.advance_provider_batch"},
    "a request on this queue": {"task": "chunkmill_workers.request_chunk_batch"},
    "a task that is a list": {"task": ["workers.embed_chunk_batch"]},
    "a task that is an object": {"task": {}},
    "a task that is null": {"task": None},
    "no task": {"task": REMOVE},
    "no id": {"id": REMOVE},
    "an id that is an object": {"id": {}},
    "an id that is a number": {"id": 5},
    "an id that is a path": {"id": "../../etc/passwd"},
    "an id of a megabyte": {"id": "x" * (1 << 20)},
    "a time limit that is a text": {"timelimit": "x"},
    "a time limit": {"timelimit": [1, 1]},
    "a time limit of one": {"timelimit": [None]},
    "stamped headers that are a number": {"stamped_headers": 5},
    "stamped headers": {"stamped_headers": ["x"], "x": [MARK]},
    "stamps": {"stamps": {"x": MARK}},
    "an eta": {"eta": "2099-01-01T00:00:00+00:00"},
    "an eta that is none": {"eta": MARK},
    "an expiry": {"expires": "2001-01-01T00:00:00+00:00"},
    "an expiry that is a number": {"expires": 1e300},
    "a group": {"group": str(uuid.uuid4())},
    "a group index": {"group_index": 7},
    "a parent": {"parent_id": str(uuid.uuid4())},
    "a shadow": {"shadow": MARK},
    "a chord header": {"chord": {"x": 1}},
    "a chain header": {"chain": [1]},
    "callbacks in a header": {"callbacks": [1]},
    "bzip2": {"compression": "application/x-bz2"},
    "gzip": {"compression": "application/x-gzip"},
    "lzma": {"compression": "application/x-lzma"},
    "unknown compression": {"compression": MARK},
    "compression that is a list": {"compression": [1]},
    "a label of many lines": {"kwargsrepr": f"{{}}\n{MARK}"},
    "a label with an escape": {"kwargsrepr": "\x1b[2J"},
    "a long label": {"kwargsrepr": "x" * 2000},
    "a label that is a number": {"kwargsrepr": 5},
    "a label with half a character": {"kwargsrepr": "\ud800"},
}
_OUTER: dict[str, dict[str, Any]] = {
    "pickle": {"content-type": "application/x-python-serialize"},
    "yaml": {"content-type": "application/x-yaml"},
    "msgpack": {"content-type": "application/x-msgpack"},
    "data": {"content-type": "application/data"},
    "no content type": {"content-type": REMOVE},
    "a content type that is a list": {"content-type": ["application/json"]},
    "binary": {"content-encoding": "binary"},
    "no content encoding": {"content-encoding": REMOVE},
    "an unknown encoding": {"content-encoding": MARK},
    "no headers": {"headers": REMOVE},
    "headers that are null": {"headers": None},
    "headers that are a list": {"headers": []},
    "headers that are a text": {"headers": MARK},
    "no properties": {"properties": REMOVE},
    "properties that are null": {"properties": None},
    "properties that are a list": {"properties": [1]},
    "no body": {"body": REMOVE},
    "a body that is an object": {"body": {}},
    "a body that is null": {"body": None},
    "a body that is a number": {"body": 5},
}
_PROPERTIES: dict[str, dict[str, Any]] = {
    "an unknown body encoding": {"body_encoding": MARK},
    "a body encoding that is a list": {"body_encoding": []},
    "no body encoding": {"body_encoding": REMOVE},
    "a body as it is": {"body_encoding": "utf-8"},
}

BOMB_OF_BZIP2 = 100 * bz2.compress(b"x" * 500_000)
"""50 MB in 4,800 bytes: a hundred streams, which a reader joins. A single stream takes 0.4 s of each pytest process."""


def hostile_bells() -> dict[str, bytes]:
    """What may stand in a queue, by what it is. The door refuses all of them."""
    raw: dict[str, Any] = {
        "no bytes": b"",
        "a word": MARK.encode(),
        "bytes": bytes(range(256)),
        "brackets": DEEP.encode(),
        "a list": b"[]",
        "a text": json.dumps(MARK).encode(),
        "a number": b"5",
        "null": b"null",
        "true": b"true",
        "an open object": b'{"body": ',
        "an empty object": b"{}",
        "NaN": b"NaN",
        "a NUL": b"\x00",
        "UTF-16": json.dumps(bell()).encode("utf-16"),
        "a megabyte": MARK.encode() * 90_000,
        "five megabytes": MARK.encode() * 500_000,
        "not base64": bell(body="***"),
        "base64 without its end": bell(body="W1s"),
        "not ASCII": bell(body="\u00e9\u00e9\u00e9\u00e9"),
        "a bomb of bzip2": bell(body=packed(BOMB_OF_BZIP2), headers={"compression": "application/x-bz2"}),
        "a bomb of gzip": bell(
            body=packed(zlib.compress(b"x" * 5_000_000)), headers={"compression": "application/x-gzip"}
        ),
        "protocol 1": {"task": "workers.embed_chunk_batch", "id": "x", "args": [1], "kwargs": {}},
        "protocol 1 in a body": bell(
            body={"task": "workers.embed_chunk_batch", "id": "x", "args": [1]}, headers={"task": REMOVE, "id": REMOVE}
        ),
    }
    table = {f"a message: {name}": message for name, message in raw.items()}
    table |= {f"a body: {name}": bell(body=body) for name, body in _BODIES.items()}
    table |= {f"a header: {name}": bell(headers=changes) for name, changes in _HEADERS.items()}
    table |= {f"a property: {name}": bell(properties=changes) for name, changes in _PROPERTIES.items()}
    table |= {f"an envelope: {name}": bell(outer=changes) for name, changes in _OUTER.items()}
    return written(table)


def hostile_commands() -> dict[str, bytes]:
    """What may be published to the remote control, by what it is. The door refuses all of them."""
    gone = (
        "shutdown",
        "revoke",
        "revoke_by_stamped_headers",
        "terminate",
        "rate_limit",
        "time_limit",
        "election",
        "hello",
        "pool_grow",
        "pool_shrink",
        "pool_restart",
        "autoscale",
        "add_consumer",
        "cancel_consumer",
        "objgraph",
        "memsample",
        "memdump",
        "report",
        "query_task",
        "clock",
        "disable_events",
        "dump_conf",
        MARK,
    )
    arguments = {
        "queue": "gpu",
        "task_id": [MARK * 10],
        "id": "x",
        "topic": "task",
        "action": {"task": "workers.embed_chunk_batch", "args": [424200]},
        "max": 0,
        "min": 0,
        "n": 1,
        "task_name": "workers.embed_chunk_batch",
    }
    table: dict[str, Any] = {f"the command {name}": command(name, arguments=arguments) for name in gone}
    table |= {
        f"a cast of {name}": command(name, reply_to=REMOVE, ticket=REMOVE) for name in ("shutdown", "ping", "stats")
    }
    table |= {
        "no method": command(REMOVE),
        "a method that is a list": command([]),
        "a method that is null": command(None),
        "a pattern": command(pattern="(a+)+$", matcher="pcre"),
        "a matcher alone": command(matcher="glob"),
        "a destination that is a text": command(destination=MARK),
        "a destination of numbers": command(destination=[5]),
        "a destination of lists": command(destination=[[]]),
        "arguments that are a list": command(arguments=[1]),
        "arguments that are a text": command(arguments=MARK),
        "a reply to a queue": command(reply_to={"exchange": "", "routing_key": "gpu"}),
        "a reply to nobody": command(reply_to={}),
        "a reply that is a text": command(reply_to=MARK),
        "a reply that is a list": command(reply_to=[1]),
        "a reply to a path": command(reply_to={"exchange": REPLIES, "routing_key": "*"}),
        "a ticket that is an object": command(ticket={}),
        "no ticket": command(ticket=REMOVE),
        "a body that is a number": command(body=5),
        "a body that is a list": command(body=[]),
        "a body that is null": command(body=b"null"),
        "a body that is a text": command(body=[MARK]),
        "deep brackets": command(body=DEEP.encode()),
        "brackets": DEEP.encode(),
        "a word": MARK.encode(),
        "a number as message": b"5",
        "a megabyte": MARK.encode() * 90_000,
        "five megabytes": MARK.encode() * 500_000,
        "2 MB of ids": command("revoke", arguments={"task_id": MARK * 200_000}),
    }
    return written(table)


def hostile_events() -> dict[str, bytes]:
    """What may be published as an event, by what it is. The door refuses all of them."""
    table: dict[str, Any] = {
        "a number": event(body=5),
        "a list of numbers": event(body=[5]),
        "null": event(body=b"null"),
        "an empty object": event(body={}),
        "an election": event("worker.elect", id=[]),
        "an unknown kind": event("worker-\u00e9"),
        "a kind that is a number": event(5),
        "a kind that is null": event(None),
        "no kind": event(REMOVE),
        "no name": event(hostname=REMOVE),
        "a name that is a list": event(hostname=[]),
        "a name of two lines": event(hostname=f"x\n{MARK}"),
        "a long name": event(hostname="x" * 2000),
        "no time": event(timestamp=REMOVE),
        "a time that is a text": event(timestamp="now"),
        "a time that is infinite": event(body=b'{"type":"worker-heartbeat","hostname":"x","timestamp":1e999}'),
        "a time without end": event(timestamp=10**30),
        "active as a text": event(active="many"),
        "active below zero": event(active=-1),
        "processed as a list": event(processed=[]),
        "a load of two": event(loadavg=[1, 2]),
        "a load of texts": event(loadavg=["a", "b", "c"]),
        "a pace of zero": event(freq=0),
        "a pace that is a text": event(freq="x"),
        "a clock that is a text": event(clock="x"),
        "a clock of 71 bits": event(clock=2**70),
        "a zone that is a text": event(utcoffset="x"),
        "a task without id": event("task-received"),
        "a task whose id is a list": event("task-received", uuid=[]),
        "a runtime that is a text": event("task-succeeded", uuid=str(uuid.uuid4()), runtime="x"),
        "brackets": DEEP.encode(),
        "a word": MARK.encode(),
        "deep brackets": event(body=DEEP.encode()),
    }
    return written(table)


def random_messages(seed: int, number: int) -> Iterator[bytes]:
    """Right messages of all kinds with one to four random changes in their values, their shape or their bytes."""
    chance = random.Random(seed)
    for _ in range(number):
        message = chance.choice((bell, command, event))()
        if chance.random() < 0.5:  # the body changes too
            body = json.loads(base64.b64decode(message["body"]))
            message["body"] = packed(_changed(body, chance))
        for _ in range(chance.randrange(4)):
            message = _changed(message, chance)
        raw = bytearray(json.dumps(message).encode())
        if chance.random() < 0.2:
            for _ in range(chance.randrange(1, 5)):
                raw[chance.randrange(len(raw))] = chance.randrange(256)
        if chance.random() < 0.05:
            del raw[chance.randrange(len(raw)) :]
        yield bytes(raw)


def _changed(value: Any, chance: random.Random) -> Any:
    """A copy of ``value`` in which one value, key or item is another."""
    made = {"": copy.deepcopy(value)}
    holder: Any = made
    key: Any = ""
    while isinstance(holder[key], dict | list) and holder[key] and chance.random() < 0.8:
        holder = holder[key]
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    odd = (
        None,
        True,
        0,
        -1,
        2**70,
        1.5,
        1e300,
        "",
        "x",
        MARK,
        "\x00",
        "\ud800",
        "x" * 5000,
        [],
        [[]],
        {},
        {"x": 1},
        [None, None],
        {"__type__": "datetime", "__value__": "x"},
        "workers.embed_chunk_batch",
        "application/x-bz2",
        "utf-8",
        [1, 2, 3],
    )
    if chance.random() < 0.2 and holder is not made:
        if isinstance(holder, dict):
            holder[chance.choice(("x", "args", "task", "__type__", "compression"))] = holder.pop(key)
        else:
            holder.append(holder[key])
    else:
        holder[key] = copy.deepcopy(chance.choice(odd))
    return made[""]
