"""What is missing by mistake never means everything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.chosen import as_changes, as_chosen
from chunkmill.errors import InvalidInput

LEAVES = st.sampled_from(
    [{}, {"a": 1}, {"a": {}}, {"a": {"$in": []}}, {"a": {"$nin": []}}, {"a": {"b": {"$nin": []}}},
     {"a": {"$in": [1]}}, {"a": {"$nin": [1]}}]
)  # fmt: skip
FILTERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda one: {"$not": one}, inner),
        st.builds(lambda some: {"$and": some}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda some: {"$or": some}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda one, more: {**one, **more}, inner, inner),
    ),
    max_leaves=6,
)
CHUNKS: list[dict[str, Any]] = [{}, {"a": 1}, {"a": 2}, {"a": {}}, {"a": {"b": 1}}, {"b": 1}]


def passes(metadata: Any, wanted: dict[str, Any]) -> bool:
    """The language of filters, as far as it is used here, in the plainest way."""
    return all(passes_key(metadata, key, value) for key, value in wanted.items())


def passes_key(metadata: Any, key: str, value: Any) -> bool:
    if key == "$and":
        return all(passes(metadata, one) for one in value)
    if key == "$or":
        return any(passes(metadata, one) for one in value)
    if key == "$not":
        return not passes(metadata, value)
    if key in ("$in", "$nin"):
        return (metadata in value) == (key == "$in")
    inner = metadata.get(key) if isinstance(metadata, dict) else None
    if isinstance(value, dict) and value:
        return passes(inner, value)
    return inner is not None and (inner == value or value == {})


@given(FILTERS)
def test_a_filter_is_refused_only_if_every_chunk_passes_it(wanted: dict[str, Any]) -> None:
    try:
        as_chosen(None, wanted, all_chunks=False, verb="delete")
    except InvalidInput as error:
        assert "every chunk passes this filter" in str(error)
        assert all(passes(metadata, wanted) for metadata in CHUNKS)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"a": {"$nin": []}},
        {"$not": {"a": {"$in": []}}},
        {"$or": [{"a": 1}, {"b": {"$nin": []}}]},
        {"$and": [{}, {"$or": [{}, {"a": 1}]}]},
        {"$not": {"$and": [{"a": 1}, {"b": {"$in": []}}]}},
    ],
    ids=str,
)
def test_what_is_empty_is_refused_however_deep_it_is(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="all_chunks=True"):
        as_chosen(None, wanted, all_chunks=False, verb="delete")


def test_exactly_one_way_to_choose_is_taken() -> None:
    for ids, wanted, everything in ((None, None, False), ([], {"a": 1}, False), (["a"], None, True), ([], None, True)):
        with pytest.raises(InvalidInput, match="all_chunks=True"):
            as_chosen(ids, wanted, all_chunks=everything, verb="delete")
    assert as_chosen([], None, all_chunks=False, verb="delete")[0] == []
    named, chosen = as_chosen(None, None, all_chunks=True, verb="delete")
    assert (named, bool(chosen)) == (None, False)
    assert as_chosen(None, {"a": {"$in": []}}, all_chunks=False, verb="delete")[1]


def test_changes_that_change_nothing_or_contradict_themselves_are_refused() -> None:
    assert as_changes({"a": 1}, ["b"], replaces=False) == ('{"a": 1}', ["b"])
    assert as_changes({}, [], replaces=True) == ("{}", [])
    for metadata, remove, replaces in ((None, [], False), ({}, [], False), (None, [], True), ({"a": 1}, ["b"], True)):
        with pytest.raises(InvalidInput, match="replace=True"):
            as_changes(metadata, remove, replaces=replaces)
    assert as_changes({"a": float("nan")}, [], replaces=False) == ('{"a": null}', [])
    for wrong in ({"a": "\x00"}, [1], {"a": "\ud800"}):
        with pytest.raises(InvalidInput, match="metadata"):
            as_changes(wrong, [], replaces=False)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="remove is a str"):
        as_changes({}, "key", replaces=False)
