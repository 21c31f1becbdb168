"""What a metadata filter may say, and what an error says of one that is wrong."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from chunkmill.domain import filters
from chunkmill.errors import InvalidInput

DEEP: dict[str, Any] = {}
for _ in range(filters.MAX_DEPTH + 1):
    DEEP = {"a": DEEP}
LOOP: dict[str, Any] = {}
LOOP["a"] = LOOP


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_filters_nothing(nothing: dict[str, Any] | None) -> None:
    parsed = filters.parse(nothing)
    assert not parsed
    assert parsed.sql("c.metadata") == ("true", {})


def test_plain_keys_are_one_containment() -> None:
    condition, parameters = filters.parse({"lang": "en", "a": {"b": [1, {"c": None}]}, "n": {}}).sql("c.metadata")
    assert condition == "c.metadata @> CAST(:f_0 AS jsonb)"
    assert parameters == {"f_0": '{"lang": "en", "a": {"b": [1, {"c": null}]}, "n": {}}'}


def test_keys_and_values_are_parameters() -> None:
    hostile = "'); DROP TABLE chunks; -- :f_0 %s"
    given = {hostile: {"$gt": hostile}, "$or": [{"a": {hostile: {"$exists": True}}}, {"b": {"$in": [hostile]}}]}
    condition, parameters = filters.parse(given).sql("c.metadata")
    assert "DROP" not in condition
    assert hostile in parameters.values()


def test_a_value_of_an_enum_is_its_text() -> None:
    class Language(str, Enum):  # noqa: UP042 - of Python 3.10, whose str() is the member's name
        GERMAN = "de"

    assert filters.parse({"lang": Language.GERMAN}).sql("m")[1] == {"f_0": '{"lang": "de"}'}
    assert filters.parse({"lang": {"$gt": Language.GERMAN}}).sql("m")[1]["f_1"] == "de"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["a"], "metadata is of type list; it must be a dict."),
        ({"year": {"$gt": None}}, "metadata at year.$gt: it is null; give a number or a string."),
        ({"year": {"$gt": True}}, "at year.$gt: it is true or false; give a number or a string."),
        ({"a": {"b.c": {"$lte": [1]}}}, 'at a."b.c".$lte: it is a list; give a number or a string.'),
        ({"year": {"$in": 5}}, "at year.$in: it is a number; give a list of values."),
        ({"year": {"$exists": 1}}, "at year.$exists: it is a number; give true or false."),
        ({"year": {"$above": 1}}, "at year.$above: there is no such operator; the operators are $eq, $ne, $gt"),
        ({"$nor": []}, "at $nor: there is no such operator; the operators are $and, $or, $not, $eq"),
        ({"$price": 1}, "A key that begins with $ is written $$price."),
        ({"$gt": 1}, 'at $gt: $gt stands outside a field; write it below a field, as in {"year": {"$gt": ...}}.'),
        ({"a": {"$not": {"$gt": 1}}}, 'at a.$not: $not stands inside a field; write it around a filter: {"$not": ...}'),
        ({"a": {"$gt": 1, "b": 2}}, "at a: $gt stands beside a plain key"),
        ({"a": [1, {"$gt": 1}]}, "at a[1].$gt: an operator cannot stand inside a list"),
        ({"$and": []}, "at $and: it is an empty list; give a list with one filter or more."),
        ({"$or": {"a": 1}}, "at $or: it is an object; give a list with one filter or more."),
        ({"$or": [{"a": 1}, 5]}, "at $or[1]: it is a number; give a filter, which is an object."),
        ({"$not": [{"a": 1}]}, "at $not: it is a list; give a filter, which is an object."),
        ({"a": {"b": float("nan")}}, "at a.b: it is NaN or infinite"),
        ({"a": {"$gt": float("inf")}}, "at a.$gt: it is NaN or infinite"),
        ({"a": ["x", "b\x00"]}, "at a[1]: it contains a NUL character"),
        ({"a\x00": 1}, "metadata: it contains a NUL character"),
        ({"a": {"$in": ["\ud800"]}}, "at a.$in[0]: it contains a lone surrogate"),
        ({"a": {1: 2}}, "at a: a key is of type int; give a string."),
        ({"a": b"x"}, "at a: it is of type bytes"),
        ({"a": 10**5000}, "at a: the number has too many digits"),
        ({"x" * 200: {"$gt": None}}, f'at "{"x" * 60}...".$gt: it is null'),
        (DEEP, "at a.a.a: it is nested more than 50 levels deep"),
        (LOOP, "at a.a.a: it is nested more than 50 levels deep"),
        ({"$or": [{"a": i} for i in range(501)]}, "the filter has more than 500 conditions"),
        ({"a": {"$in": list(range(10_001))}}, "at a.$in: the lists have more than 10,000 values in all"),
        ({"a": "x" * (1 << 20)}, "metadata has 1,048,585 bytes as JSON; the limit is 1,048,576."),
    ],
)
def test_what_is_wrong_is_said_with_its_place(wrong: Any, said: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        filters.parse(wrong)
    assert said in str(refused.value)
    assert str(refused.value).startswith("metadata")
    assert len(str(refused.value)) < 400


def test_an_error_shows_no_value() -> None:
    with pytest.raises(InvalidInput) as refused:
        filters.parse({"key": {"$in": "a secret"}}, "where")
    assert str(refused.value) == "where at key.$in: it is a string; give a list of values."


def test_the_most_that_is_allowed_is_allowed() -> None:
    assert filters.parse({"$or": [{"a": i} for i in range(498)], "b": {"$in": list(range(10_000))}})
