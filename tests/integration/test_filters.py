"""A metadata filter means in Postgres what docs/search.md says, whatever the metadata hold."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chunkmill.domain import filters

KEYS = ["a", "b", "a.b", "$a", "$$", "0", "", "é", "a'b", ":f_0"]
NUMBERS = [0, 1, -1, 1.0, 1.5, 0.1, 2**53 + 1, float(2**53), 10**40, 1e40, 1e23, 10**23, 1e308, 5e-324, -1e-9, -0.0]
TEXTS = ["", "1", "a", "b", "B", "Z", "é", "\uffff", "\U0001f600", "a b", "null", "%s", "'", "NaN", '"', "\\"]
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)
METADATA = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
ORDER = {
    "$gt": lambda left, right: left > right,
    "$gte": lambda left, right: left >= right,
    "$lt": lambda left, right: left < right,
    "$lte": lambda left, right: left <= right,
}
LACKS = object()


def escaped(value: Any) -> Any:
    """A plain value as it is written in a filter."""
    if isinstance(value, dict):
        return {"$" + key if key.startswith("$") else key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list) else value


OPERATORS = st.fixed_dictionaries(
    {},
    optional={
        "$eq": VALUES,
        "$ne": VALUES,
        **{name: st.sampled_from([*NUMBERS, *TEXTS]) for name in ORDER},
        "$in": st.lists(VALUES, max_size=3),
        "$nin": st.lists(VALUES, max_size=3),
        "$exists": st.booleans(),
    },
).filter(bool)
PLAIN_KEYS = st.sampled_from([escaped({key: 0}).popitem()[0] for key in KEYS])
FIELDS = st.recursive(
    st.dictionaries(PLAIN_KEYS, OPERATORS | VALUES.map(escaped), max_size=3),
    lambda inner: st.dictionaries(PLAIN_KEYS, inner, max_size=2),
    max_leaves=3,
)
FILTERS = st.recursive(
    FIELDS,
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "$and": st.lists(inner, min_size=1, max_size=3),
            "$or": st.lists(inner, min_size=1, max_size=3),
            "$not": inner,
            "a": OPERATORS,
        },
    ),
    max_leaves=4,
)


# The meaning of a filter, as simply as it can be written.


def exact(value: Any) -> Any:
    """A value that compares as JSON does: true is not 1, and 1 is 1.0."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return (type(value).__name__, value)
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, list) else ("number", Decimal(json.dumps(value)))


def contains(whole: Any, part: Any) -> bool:
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and contains(whole[key], item) for key, item in part.items())
    if isinstance(whole, list) and isinstance(part, list):
        return all(any(contains(mine, item) for mine in whole) for item in part)
    if isinstance(whole, dict | list) or isinstance(part, dict | list):
        return False
    return bool(exact(whole) == exact(part))


def holds(operator: str, operand: Any, value: Any) -> bool:
    if operator == "$exists":
        return (value is not LACKS) == operand
    if operator in ("$ne", "$nin"):
        return not holds({"$ne": "$eq", "$nin": "$in"}[operator], operand, value)
    if value is LACKS:
        return False
    if operator in ("$eq", "$in"):
        return any(exact(value) == exact(item) for item in (operand if operator == "$in" else [operand]))
    if isinstance(value, bool) or isinstance(value, str) != isinstance(operand, str):
        return False
    if not isinstance(value, str | int | float):
        return False
    if isinstance(value, str):
        return bool(ORDER[operator](value, operand))
    return bool(ORDER[operator](Decimal(json.dumps(value)), Decimal(json.dumps(operand))))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key[1:] if key.startswith("$$") else key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def field_passes(asked: Any, value: Any) -> bool:
    """``value`` is that of a field, or LACKS."""
    if not isinstance(asked, dict) or not asked:
        return value is not LACKS and contains(value, plain(asked))
    operators = [key for key in asked if key.startswith("$") and not key.startswith("$$")]
    if operators:
        return all(holds(operator, operand, value) for operator, operand in asked.items())
    inside = value if isinstance(value, dict) else {}
    return all(field_passes(item, inside.get(plain({key: 0}).popitem()[0], LACKS)) for key, item in asked.items())


def passes(asked: dict[str, Any], metadata: dict[str, Any]) -> bool:
    results = []
    for key, item in asked.items():
        if key == "$and":
            results.append(all(passes(one, metadata) for one in item))
        elif key == "$or":
            results.append(any(passes(one, metadata) for one in item))
        elif key == "$not":
            results.append(not passes(item, metadata))
        else:
            results.append(field_passes({key: item}, metadata))
    return all(results)


@pytest.mark.parametrize("indexed", [False, True], ids=["row by row", "through the index"])
def test_a_filter_means_in_postgres_what_it_means_in_python(db: sa.Engine, indexed: bool) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("CREATE TEMP TABLE m (i int, metadata jsonb NOT NULL) ON COMMIT DROP"))
        if indexed:
            conn.execute(sa.text("CREATE INDEX ON m USING gin (metadata jsonb_path_ops)"))
            conn.execute(sa.text("SET LOCAL enable_seqscan = off"))

        @settings(max_examples=150, suppress_health_check=list(HealthCheck))
        @given(st.lists(METADATA, min_size=1, max_size=6), FILTERS)
        @example([{"a": "1"}, {"a": 1}, {"a": None}, {"a": []}, {"a": {}}, {}], {"a": {"$gt": 0}})
        @example([{"a": "B"}, {"a": "a"}, {"a": "\uffff"}, {"a": "\U0001f600"}], {"a": {"$gt": "a"}})
        @example([{"a": {"b": 1}}, {"a": [1]}, {"a.b": 1}, {"a": ["x", {"b": 1}]}], {"a": {"b": {"$eq": 1}}})
        @example([{"a": [7]}, {"a": {"0": 7}}], {"a": {"0": {"$lt": 8}}})
        @example([{"a": 1}, {"a": [1]}, {"b": 1}, {"a": None}], {"$not": {"a": {"$lte": 1}}})
        @example([{"a": 10**23}, {"a": 1e23}, {"a": 1e308}], {"a": {"$in": [1e23, 10**308]}})
        @example([{"a": True}, {"a": 1}], {"a": {"$ne": True}})
        @example([{"a": i} for i in range(6)], {"a": {"$in": list(range(3, 203))}})
        @example([{"a": 3}, {"a": 2}, {"b": 3}, {"a": [3]}], {"a": {"$nin": list(range(3, 203))}})
        def agrees(metadata: list[dict[str, Any]], asked: dict[str, Any]) -> None:
            conn.execute(sa.text("TRUNCATE m"))
            insert = "INSERT INTO m SELECT i, v FROM unnest(CAST(:given AS jsonb[])) WITH ORDINALITY u(v, i)"
            conn.execute(sa.text(insert), {"given": [json.dumps(one) for one in metadata]})
            condition, parameters = filters.parse(asked).sql("m.metadata")
            answer = conn.execute(sa.text(f"SELECT i FROM m WHERE {condition} ORDER BY i"), parameters).scalars().all()
            assert answer == [i for i, one in enumerate(metadata, 1) if passes(asked, one)]

        agrees()


@pytest.mark.parametrize(
    ("asked", "uses"),
    [
        ({"a": 1, "b": {"c": "x"}}, True),
        ({"a": {"$eq": 1}}, True),
        ({"a": {"b": {"$in": [1, "x", [2], {"c": 3}]}}}, True),
        ({"$or": [{"a": 1}, {"b": {"$eq": 2}}]}, True),
        ({"a": 1, "n": {"$gt": 5}}, True),
        ({"n": {"$gt": 5}}, False),
        ({"$not": {"a": 1}}, False),
    ],
)
def test_what_containment_can_decide_is_read_from_the_index(db: sa.Engine, asked: dict[str, Any], uses: bool) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("CREATE TEMP TABLE m (metadata jsonb NOT NULL) ON COMMIT DROP"))
        conn.execute(sa.text("CREATE INDEX read_here ON m USING gin (metadata jsonb_path_ops)"))
        conn.execute(sa.text("SET LOCAL enable_seqscan = off"))
        condition, parameters = filters.parse(asked).sql("m.metadata")
        plan = "\n".join(conn.execute(sa.text(f"EXPLAIN SELECT FROM m WHERE {condition}"), parameters).scalars())
        assert ("read_here" in plan) == uses, plan
