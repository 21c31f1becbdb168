"""What may enter from Redis: doorbells, and what Celery needs to be watched. Everything else is refused. Pure.

Whoever can write to Redis can put any bytes there, and Celery and kombu trust what they read. So nothing of a message
reaches them as it came: each function here reads one kind of message and writes it anew from the few values that it
checked, or says why it is refused. Headers that we do not know are left out of the new message, because the tracing
libraries of a host program add some.
"""

from __future__ import annotations

import base64
import json
import math
import re
import uuid
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from chunkmill.broker import ADVANCE_TASK, EMBED_TASK, NEXT_NAMES, PROVIDER_QUEUE, QUEUE, REQUEST_TASK

LARGEST_DOORBELL = 16 << 10
"""Bytes. The largest that a producer writes, with the longest names in its label, has about 4,000."""
LARGEST_COMMAND = 16 << 10
LARGEST_EVENT = 256 << 10
"""Bytes. A worker sends events of tasks in groups, of about 600 bytes a task."""
LARGEST_REPLY = 1 << 20
"""Bytes. The longest reply is the list of a worker's settings, about 10,000."""
LONGEST_LABEL = 1000
"""Characters of a doorbell's label (``chunkmill.broker.Shown``)."""
LONGEST_NAME = 250
"""Characters of the name of a worker or of a queue for replies."""
DEEPEST = 30
LARGEST_NUMBER = 2**63 - 1

TASKS: Mapping[str, Mapping[str, str]] = {
    QUEUE: {EMBED_TASK: "ChunkBatch", NEXT_NAMES[EMBED_TASK]: "ChunkBatch"},
    PROVIDER_QUEUE: {
        REQUEST_TASK: "ChunkBatch",
        NEXT_NAMES[REQUEST_TASK]: "ChunkBatch",
        ADVANCE_TASK: "ProviderBatch",
        NEXT_NAMES[ADVANCE_TASK]: "ProviderBatch",
    },
}
"""The tasks of each queue, under their names of this release and of the next, and what their number counts."""
READS = frozenset(
    {"ping", "stats", "active_queues", "registered", "scheduled", "active", "reserved", "revoked", "conf"}
)
"""The commands of Celery's remote control that Flower reads and that workers answer. None of them changes a worker."""
SIGNALS = frozenset({"enable_events", "heartbeat"})
"""The commands that Flower sends to all workers. They change nothing either: our workers always send events."""
REPLIES = "reply.celery.pidbox"
"""The end of the name of each list with replies to commands."""


class Refusal(StrEnum):
    """Why a message is refused. The values are those of a metric's label."""

    SIZE = "size"
    """It has too many bytes."""
    SHAPE = "shape"
    """It is not JSON, or has other parts than such a message has."""
    TASK = "task"
    """It names a task or a command that does not exist, or not here."""
    OPTIONS = "options"
    """It asks for something that this project never asks for: compression, a delay, an expiry, a callback, a chain."""


class _Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_EMPTY: tuple[object, ...] = (None, "", [], {}, [None, None])
_OPTIONS = (
    "compression", "eta", "expires", "timelimit", "shadow", "group", "group_index", "parent_id", "chain", "chord",
    "callbacks", "errbacks", "stamps", "stamped_headers",
)  # fmt: skip
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def doorbell(raw: bytes, queue: str, priority: int) -> bytes | Refusal:
    """The doorbell that was taken from the list of ``queue`` and ``priority``, rewritten, or why it is refused."""
    return _written_anew(_doorbell, raw, queue, priority)


def command(raw: bytes) -> bytes | Refusal:
    """The command of Celery's remote control that was published, rewritten, or why it is refused."""
    return _written_anew(_command, raw)


def reply(raw: bytes) -> bytes | Refusal:
    """A worker's reply to a command, rewritten, or why it is refused."""
    return _written_anew(_reply, raw)


def event(raw: bytes) -> bytes | Refusal:
    """An event of a worker or of a task, or a group of them, rewritten, or why it is refused."""
    return _written_anew(_event, raw)


def _written_anew(read: Callable[..., dict[str, Any]], raw: bytes, *where: object) -> bytes | Refusal:
    try:
        return json.dumps(read(raw, *where), allow_nan=False).encode()
    except _Refused as refused:
        return refused.refusal
    except (ValueError, RecursionError):  # no UTF-8, no JSON, no base64, an infinite number, or too deep
        return Refusal.SHAPE


def _doorbell(raw: bytes, queue: str, priority: int) -> dict[str, Any]:
    headers, body = _opened(raw, LARGEST_DOORBELL)
    for option in _OPTIONS:
        if headers.get(option) not in _EMPTY:
            raise _Refused(Refusal.OPTIONS)
    task, task_id = headers.get("task"), headers.get("id")
    counted = TASKS[queue].get(task) if isinstance(task, str) else None
    if counted is None:
        raise _Refused(Refusal.TASK)
    _require(isinstance(task_id, str) and _UUID.fullmatch(task_id))
    _require(isinstance(body, list) and len(body) == 3)
    arguments, keywords, embed = body
    _require(isinstance(arguments, list) and len(arguments) == 1 and keywords == {} and isinstance(embed, dict))
    if any(value is not None for value in embed.values()) or not embed.keys() <= _EMBED.keys():
        raise _Refused(Refusal.OPTIONS)
    number = _whole(arguments[0], least=1)
    label = _line(headers.get("kwargsrepr", "{}"), LONGEST_LABEL)
    return _envelope(
        [[number], {}, _EMBED],
        headers={
            "lang": "py",
            "task": task,
            "id": task_id,
            "root_id": task_id,
            "argsrepr": f"{counted} {number}",
            "kwargsrepr": label,
            "ignore_result": True,
            "retries": 0,
            "timelimit": [None, None],
            "eta": None,
            "expires": None,
        },
        routing_key=queue,
        priority=priority,
        correlation_id=task_id,
    )


def _command(raw: bytes) -> dict[str, Any]:
    _, body = _opened(raw, LARGEST_COMMAND)
    _require(isinstance(body, dict))
    method, arguments = body.get("method"), body.get("arguments")
    if not isinstance(method, str) or method not in READS | SIGNALS:
        raise _Refused(Refusal.TASK)
    # A pattern may be a regular expression that takes for ever. Names are enough.
    _require(body.get("pattern") is None and body.get("matcher") is None)
    _require(arguments in _EMPTY or isinstance(arguments, dict))
    destination = body.get("destination")
    if destination is not None:
        _require(isinstance(destination, list))
        destination = [_line(name, LONGEST_NAME) for name in destination]
    # Flower asks for one argument. `safe` shows arguments as the labels that they are.
    anew: dict[str, Any] = {"method": method, "arguments": {}, "destination": destination}
    if method == "active":
        anew["arguments"] = {"safe": True}
    if method in READS:
        wanted = body.get("reply_to")
        _require(isinstance(wanted, dict) and wanted.get("exchange") == REPLIES)
        key, ticket = wanted.get("routing_key"), body.get("ticket")
        _require(all(isinstance(value, str) and _UUID.fullmatch(value) for value in (key, ticket)))
        anew |= {"reply_to": {"exchange": REPLIES, "routing_key": key}, "ticket": ticket}
    return _envelope(anew)


def _reply(raw: bytes) -> dict[str, Any]:
    headers, body = _opened(raw, LARGEST_REPLY)
    ticket = headers.get("ticket")
    _require(isinstance(ticket, str) and _UUID.fullmatch(ticket))
    _require(isinstance(body, dict) and len(body) == 1)
    ((name, said),) = body.items()
    _line(name, LONGEST_NAME)
    _require(isinstance(said, dict | list) and _is_plain(said))
    return _envelope(body, headers={"ticket": ticket, "clock": _whole(headers.get("clock", 0))})


def _event(raw: bytes) -> dict[str, Any]:
    _, body = _opened(raw, LARGEST_EVENT)
    _require(body)
    return _envelope([_one_event(one) for one in body] if isinstance(body, list) else _one_event(body))


def _is_id(value: Any) -> Any:
    _require(value is None or (isinstance(value, str) and _UUID.fullmatch(value)))
    return value


def _is_text(value: Any) -> Any:
    _require(value is None or (isinstance(value, str) and len(value) <= 100_000))
    return value.encode("utf-8", "backslashreplace").decode() if value else value


def _is_line(value: Any) -> Any:
    return None if value is None else _line(value, LONGEST_LABEL)


def _is_moment(value: Any) -> Any:
    return _number(value, most=2.0**33)  # Unix time, until the year 2242


def _is_amount(value: Any) -> Any:
    return None if value is None else _number(value, most=float(2**53))


def _is_clock(value: Any) -> Any:
    return _whole(value)


def _is_load(value: Any) -> Any:
    _require(isinstance(value, list) and len(value) == 3)
    return [_number(one, most=1e6) for one in value]


def _is_zone(value: Any) -> Any:
    _require(type(value) in (int, float) and -24 <= value <= 24)
    return value


def _is_pace(value: Any) -> Any:
    _require(_number(value, most=86_400) > 0)
    return value


_ANY_EVENT: dict[str, Callable[[Any], Any]] = {
    "hostname": _is_line, "timestamp": _is_moment, "utcoffset": _is_zone, "pid": _is_amount, "clock": _is_clock,
}  # fmt: skip
_FIELDS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "worker": {
        "freq": _is_pace, "active": _is_amount, "processed": _is_amount, "loadavg": _is_load, "sw_ident": _is_line,
        "sw_ver": _is_line, "sw_sys": _is_line,
    },
    "task": {
        "uuid": _is_id, "name": _is_line, "args": _is_line, "kwargs": _is_line, "retries": _is_amount, "eta": _is_line,
        "expires": _is_line, "root_id": _is_id, "parent_id": _is_id, "runtime": _is_amount, "result": _is_text,
        "exception": _is_text, "traceback": _is_text, "requeue": bool, "terminated": bool, "signum": _is_line,
        "expired": bool, "queue": _is_line, "exchange": _is_line, "routing_key": _is_line,
    },
}  # fmt: skip
_EVENTS = {
    "worker": {"online", "heartbeat", "offline"},
    "task": {"sent", "received", "started", "succeeded", "failed", "rejected", "revoked", "retried"},
}


def _one_event(one: Any) -> dict[str, Any]:
    """An event with the fields that we know. Others could replace the methods of what Celery keeps of a worker."""
    _require(isinstance(one, dict) and isinstance(one.get("type"), str))
    about, _, what = one["type"].partition("-")
    if what not in _EVENTS.get(about, ()):
        raise _Refused(Refusal.TASK)
    _require(one.get("hostname") and "timestamp" in one and (about == "worker" or (one.get("uuid") and "clock" in one)))
    readers = _ANY_EVENT | _FIELDS[about]
    return {"type": one["type"]} | {name: readers[name](value) for name, value in one.items() if name in readers}


# --- what all kinds share ----------------------------------------------------------------------------------


def _opened(raw: bytes, largest: int) -> tuple[dict[str, Any], Any]:
    """The headers and the decoded body of an envelope as kombu writes it."""
    if len(raw) > largest:
        raise _Refused(Refusal.SIZE)
    message = json.loads(raw.decode())
    _require(isinstance(message, dict))
    headers, properties, body = message.get("headers"), message.get("properties"), message.get("body")
    _require(isinstance(headers, dict) and isinstance(properties, dict) and isinstance(body, str))
    if headers.get("compression") is not None:
        raise _Refused(Refusal.OPTIONS)
    _require(message.get("content-type") == "application/json" and message.get("content-encoding") == "utf-8")
    _require(properties.get("body_encoding") == "base64")
    return headers, json.loads(base64.b64decode(body, validate=True).decode())


def _envelope(
    body: Any,
    *,
    headers: Mapping[str, Any] | None = None,
    routing_key: str = "",
    priority: int = 0,
    correlation_id: str | None = None,
) -> dict[str, Any]:
    return {
        "body": base64.b64encode(json.dumps(body, allow_nan=False).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": dict(headers or {}),
        "properties": {
            "body_encoding": "base64",
            "correlation_id": correlation_id,
            # Not the one that came: two messages with the same tag would count as one.
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": routing_key},
            "delivery_mode": 2,
            "priority": priority,
        },
    }


def _require(condition: object) -> None:
    if not condition:
        raise _Refused(Refusal.SHAPE)


def _whole(value: Any, *, least: int = 0) -> int:
    _require(type(value) is int and least <= value <= LARGEST_NUMBER)
    return int(value)


def _number(value: Any, *, most: float) -> float:
    _require(type(value) in (int, float) and 0 <= value <= most and math.isfinite(value))
    return value  # type: ignore[no-any-return]


def _line(value: Any, longest: int) -> str:
    """A text of one line, without control characters."""
    _require(isinstance(value, str) and len(value) <= longest and value.isprintable())
    return str(value)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether ``value`` is not deep, and has no object that kombu would turn into something else (``__type__``)."""
    if depth > DEEPEST:
        return False
    if isinstance(value, dict):
        return "__type__" not in value and all(_is_plain(one, depth + 1) for one in value.values())
    return not isinstance(value, list) or all(_is_plain(one, depth + 1) for one in value)
