"""Results as JSON: stable names, exact numbers, and schemas that say what comes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import pytest

from chunkmill.domain.budget import Budget
from chunkmill.domain.collections import CollectionInfo
from chunkmill.domain.costs import Cost, Costs, CostsBy
from chunkmill.domain.lanes import Lane
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.results import Hits, Index, Job, SearchHit, SearchPlan
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.domain.stored import ChunkState, StoredChunk
from chunkmill.gateway.shapes import components, dumped, plain, schema_of

NOON = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
JOB = Job(
    301, JobState.RUNNING, "docs", "f" * 64, "m", Route.OPENAI_SYNC, Priority.HIGH, None, 4, 4, 1, 1, 2, 1, 0, 9, 0.5,
    NOON, None, None, (DeadChunk("c", "too_long", "why"),), 4, 0, 0, 0,
)  # fmt: skip
INDEX = Index(is_ready=True, segments=1, rows=2, graph_rows=0, tail=0, bytes=8192)
VALUES = [
    JOB,
    SearchHit(0.5, "c", "text", {"a": [1, None]}, truncated=False),
    SearchPlan(is_exact=True, because="why", candidates=3),
    StoredChunk("c", {}, ChunkState.DEAD, None, "0" * 64, 301, "text", np.ones(3, np.float32)),
    CollectionInfo("docs", ("d",), "f" * 64, "m", 4, 4, True, 0, 0, INDEX, None, NOON, None),
    Lane(Route.OPENAI, paused_until=NOON, open={"gathering": 1}, lost_usd=Decimal("0.10")),
    Costs(
        CostsBy.DAY,
        date(2026, 1, 1),
        (Cost("2026-01-01", Route.LOCAL, 1, 2, None, 0.5),),
        Budget(date(2026, 1, 1), Decimal("1.10"), Decimal(0), Decimal(5)),
    ),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_result_is_what_its_schema_says(value: Any) -> None:
    schema = schema_of(type(value))
    document = {**schema, "components": {"schemas": components()}}
    jsonschema.Draft202012Validator.check_schema(document)
    jsonschema.validate(json.loads(dumped(plain(value))), document)


def test_fields_and_properties_keep_their_names() -> None:
    shown = plain(JOB)
    assert shown["progress"] == JOB.progress == 0.5
    assert (shown["state"], shown["route"], shown["priority"]) == ("running", "openai-sync", "high")
    assert shown["created_at"] == "2026-01-31T07:00:00.123456Z"
    assert shown["dead_chunks"] == [{"chunk_id": "c", "code": "too_long", "reason": "why"}]
    assert plain(VALUES[5])["state"] == "paused"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("1E-10"), "0.0000000001"),
        (Decimal(100), "100"),
        (Decimal("1.50"), "1.5"),
        (date(2026, 1, 2), "2026-01-02"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        (Hits([SearchHit(1.0, "c", "t", {}, truncated=False)])[:0], []),
        ({0.5: Priority.LOW}, {"0.5": "low"}),
    ],
)
def test_values_have_one_form(value: Any, text: Any) -> None:
    assert plain(value) == text


def test_what_orjson_cannot_write_is_written() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    value = {"large": 2**64, "deep": deep, "vector": np.ones(2, np.float32)}
    assert json.loads(dumped(value)) == {"large": 2**64, "deep": deep, "vector": [1.0, 1.0]}


def test_a_type_without_a_form_is_an_error() -> None:
    @dataclass
    class Odd:
        value: complex

    with pytest.raises(TypeError, match="complex"):
        plain(Odd(1j))
    with pytest.raises(TypeError, match="complex"):
        schema_of(complex)
