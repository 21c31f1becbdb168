"""What a person is shown of each result: the columns of lists, and the fields of single ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from chunkmill.domain.budget import Budget
from chunkmill.domain.collections import CollectionInfo
from chunkmill.domain.costs import Adjustment, Correction, Cost, Costs, Estimate, LaneEstimate
from chunkmill.domain.lanes import Lane
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.results import (
    Attempt,
    Audit,
    DeadEntry,
    Job,
    JobProviderBatch,
    OpenWork,
    RoutingStep,
    SearchHit,
)
from chunkmill.domain.retention import Amount, CacheSpace, Pruned
from chunkmill.domain.stored import StoredChunk
from chunkmill.domain.tables import ID, PERCENT, Column, MarkedValue, Table, table_of

_FORMS = {
    "id": ID,
    "job_id": ID,
    "chunk_batch_id": ID,
    "provider_batch_id": ID,
    "progress": PERCENT,
    "hit_rate": PERCENT,
    "recent_hit_rate": PERCENT,
}
_COLUMNS: dict[type, tuple[str, ...]] = {
    SearchHit: ("score", "chunk_id", "text", "metadata", "truncated"),
    Job: (
        "id", "state", "collection", "route", "chunks", "contents", "progress", "dead", "tokens", "created_at",
        "finished_at",
    ),
    Audit: ("collection", "chunks", "contents", "embedded", "missing", "pending", "dead", "truncated", "complete"),
    DeadChunk: ("chunk_id", "code", "reason"),
    DeadEntry: ("id", "job_id", "collection", "chunk_id", "code", "reason", "standing", "created_at"),
    Attempt: (
        "chunk_batch_id", "attempt", "worker", "outcome", "contents", "recomputed", "tokens", "engine_seconds",
        "ended_at", "evidence",
    ),
    Adjustment: ("id", "day", "kind", "route", "model", "job_id", "tokens", "usd", "reason", "author"),
    Lane: ("route", "state", "paused_until", "pause_reason", "stop_reason", "held_reason", "lost_usd",
           "maybe_charged_usd"),
    LaneEstimate: ("route", "tokens", "refused", "usd", "seconds", "unknown"),
    CacheSpace: ("model", "space", "vectors", "unreferenced", "oldest", "table_bytes", "index_bytes", "hit_rate",
                 "recent_hit_rate"),
    Cost: ("key", "route", "contents", "tokens", "usd", "engine_seconds", "usd_per_million", "lost_usd",
           "maybe_charged_usd", "corrected_usd"),
    CollectionInfo: ("name", "model", "chunks", "embedded", "pending", "dead", "aliases", "last_enqueue_at"),
    StoredChunk: ("id", "text", "metadata", "state", "truncated", "job_id"),
    RoutingStep: ("at", "route", "because"),
    OpenWork: ("route", "state", "at_provider", "chunk_batches", "contents", "due_at", "because"),
    JobProviderBatch: ("id", "state", "provider_status", "requests", "done", "contents", "next_look", "error"),
}  # fmt: skip
"""The attributes that a list of a type shows. A type that is not here shows all its fields."""
_PROPERTIES: dict[type, tuple[str, ...]] = {
    Job: ("progress",),
    Audit: ("complete",),
    Budget: ("headroom",),
    Estimate: ("tokens", "usd"),
    DeadEntry: ("why_not_retried",),
    StoredChunk: ("text",),
}
"""What is shown after the fields of one result: properties, and a text that was asked for, which no repr holds."""
_PLURALS: dict[type, str] = {
    SearchHit: "hits",
    Job: "jobs",
    DeadChunk: "dead chunks",
    DeadEntry: "dead chunks",
    Attempt: "attempts",
    Adjustment: "adjustments",
    Lane: "paid lanes",
    CacheSpace: "spaces",
    CollectionInfo: "collections",
}


def plural_of(kind: type | None) -> str:
    """What a list of this type is a list of."""
    return "rows" if kind is None else _PLURALS.get(kind, "rows")


def of_rows(items: Sequence[object], title: str = "") -> Table:
    """The table of results of one type. There is at least one."""
    kind = type(items[0])
    names = _COLUMNS.get(kind) or _fields(kind)
    return table_of([Column(_head(name), name, _FORMS.get(name, "")) for name in names], items, title=title)


def of_one(result: object) -> list[Table]:
    """The fields of a result, then a table of each list that it holds."""
    if isinstance(result, Correction):
        said = "It is booked." if result.is_new else "It had been booked before."
        return [dataclasses.replace(table, title=said) for table in of_one(result.adjustment)]
    fields: list[tuple[object, object]] = []
    further: list[Table] = []
    for name, value in _values(result):
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            further.append(of_rows(value, "" if name == "rows" else _head(name)))
        elif name == "entry":
            fields += [(row[0], row[1]) for row in of_one(value)[0].rows]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type | Amount):
            further += [dataclasses.replace(table, title=_head(name)) for table in of_one(value)]
        elif isinstance(result, Pruned) and isinstance(value, Mapping):
            further.append(Table((_head(name), "rows", "bytes"), tuple((k, v.rows, v.bytes) for k, v in value.items())))
        elif not isinstance(value, tuple) or value:
            fields.append((_head(name), MarkedValue(value, _FORMS.get(name, ""))))
    if isinstance(result, Costs):
        return [*further, Table((), tuple(fields))]
    return [Table((), tuple(fields)), *further]


def _values(result: object) -> Iterator[tuple[str, object]]:
    kind = type(result)
    for name in (*_fields(kind), *_PROPERTIES.get(kind, ())):
        yield name, getattr(result, name)


def _fields(kind: type) -> tuple[str, ...]:
    if not dataclasses.is_dataclass(kind):
        return ()
    return tuple(field.name for field in dataclasses.fields(kind) if field.repr)


def _head(name: str) -> str:
    return name.replace("_", " ").replace("usd", "USD")
