"""What a gateway writes is read back as it was, and whatever else comes is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
import types
import typing
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from chunkmill.domain.bridges import Bridge, BridgeQuote
from chunkmill.domain.budget import Budget
from chunkmill.domain.collections import CollectionInfo, DroppedCollection
from chunkmill.domain.comparing import Comparison, ComparisonQuote
from chunkmill.domain.costs import Cost
from chunkmill.domain.results import (
    Attempt,
    Audit,
    DeadDetails,
    DeadEntry,
    DroppedDead,
    Index,
    Job,
    Keywords,
    RetriedDead,
    SearchCounts,
    SearchHit,
    SearchPlan,
    SearchTuning,
)
from chunkmill.domain.stored import StoredChunk
from chunkmill.errors import GatewayUnavailable
from chunkmill.gateway.shapes import dumped, plain
from chunkmill.remote.collections import LONGEST_HEADER
from chunkmill.remote.reading import UnreadableAnswer, parse, read, read_vector
from tests.support.remotes import Asked, Said, remote, scripted

OF_UPKEEP = [RetriedDead, DroppedDead, DroppedCollection, DeadDetails, Attempt]
OF_INDEXES = [Index, Keywords, SearchCounts, SearchTuning, Comparison, ComparisonQuote, Bridge, BridgeQuote]
KINDS = [Job, SearchHit, SearchPlan, Audit, CollectionInfo, DeadEntry, StoredChunk, Budget, *OF_UPKEEP, *OF_INDEXES]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=5)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | TEXT, lambda s: st.lists(s, max_size=2))


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(values_of, arguments))
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=2).map(tuple)
    if origin is np.ndarray:
        numbers = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=3)
        return numbers.map(lambda row: np.array(row, np.float32))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return st.dictionaries(
            values_of(arguments[0]), JSON if arguments[1] is Any else values_of(arguments[1]), max_size=2
        )
    if hint is datetime:
        return st.datetimes(timezones=st.just(UTC))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(hint)})
    if hint is date:
        return st.dates()
    if hint is Decimal:
        return st.decimals(allow_nan=False, allow_infinity=False)
    simple = {str: TEXT, int: st.integers(-(2**60), 2**60), bool: st.booleans(), types.NoneType: st.none()}
    return simple.get(hint, st.floats(allow_nan=False, allow_infinity=False))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_gateway_writes_is_read_back_as_it_was(kind: type) -> None:
    @settings(max_examples=15)
    @given(values_of(kind))
    def check(value: Any) -> None:
        again: Any = read(kind, parse(dumped(plain(value))))
        assert again == value
        if isinstance(value, StoredChunk) and value.vector is not None:
            assert (again.vector == value.vector).all() and again.vector.dtype == np.float32

    check()


def test_money_is_read_exactly() -> None:
    hints = typing.get_type_hints(Cost)
    amounts = [name for name, hint in hints.items() if Decimal in (hint, *typing.get_args(hint))]
    assert amounts
    assert read(Decimal, parse(dumped(plain(Decimal("0.1000000000000000001"))))) == Decimal("0.1000000000000000001")


HIT = {"score": 0.5, "chunk_id": "c", "text": "t", "metadata": {}, "truncated": False}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"score": "high"}, "SearchHit.score"),
        ({"score": True}, "SearchHit.score"),
        ({"score": None}, "SearchHit.score"),
        ({"chunk_id": 3}, "SearchHit.chunk_id"),
        ({"metadata": []}, "SearchHit.metadata"),
        ({"truncated": 1}, "SearchHit.truncated"),
        ({"keyword": {}}, "SearchHit.keyword"),
    ],
)
def test_a_field_that_is_wrong_is_named_and_not_quoted(change: dict[str, Any], place: str) -> None:
    with pytest.raises(UnreadableAnswer, match=place) as raised:
        read(SearchHit, HIT | change)
    assert "high" not in str(raised.value)
    for name in HIT:
        with pytest.raises(UnreadableAnswer, match=f"has no {name}"):
            read(SearchHit, {key: value for key, value in HIT.items() if key != name})
    assert read(SearchHit, HIT | {"of a later release": 1}) == read(SearchHit, HIT)


@pytest.mark.parametrize("given", ["", "AAA", "not base64!", "AAAAAAA=", [], [[1.0]], ["a"], None, {}, 7, [1e300]])
def test_what_is_no_vector_is_refused(given: Any) -> None:
    with pytest.raises(UnreadableAnswer):
        read_vector(given, "v")


def block(ids: list[Any], dimensions: Any, body: bytes) -> bytes:
    header = json.dumps({"ids": ids, "dimensions": dimensions}).encode()
    return struct.pack("<I", len(header)) + header + body


FLOATS = np.ones((2, 3), "<f4").tobytes()


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<I", LONGEST_HEADER + 1),
        struct.pack("<I", 3) + b"[[[",
        block(["a", "b"], 2**40, b""),
        block(["a", "b"], 0, b""),
        block(["a", "b"], -3, FLOATS),
        block([], 3, b""),
        block([1, 2], 3, FLOATS),
        block(["a", "b"], "3", FLOATS),
        block(["a", "b"], 3, np.full((2, 3), np.nan, "<f4").tobytes()),
        block(["a", "b"], 3, FLOATS) + block(["c"], 6, FLOATS) + bytes(4),
    ],
)
def test_a_stream_that_is_not_one_of_vectors_is_refused(kind: str, body: bytes) -> None:
    with (
        scripted(lambda _: Said(body=body)) as server,
        remote(kind, server.url) as client,
        pytest.raises(GatewayUnavailable, match="unexpected kind"),
    ):
        client.iter_vectors("docs")


@pytest.mark.parametrize("share", range(0, 80, 13))
def test_a_stream_is_read_in_pieces_of_any_size(kind: str, share: int) -> None:
    whole = block(["a", "b"], 3, FLOATS) + block(["c", "d"], 3, FLOATS) + bytes(4)

    def answer(_: Asked) -> Said:
        pieces = [whole[:share], whole[share:]]
        chunked = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces if piece)
        return Said(raw=b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n")

    with scripted(answer) as server, remote(kind, server.url) as client:
        batches = client.iter_vectors("docs", batch_size=3)
    assert [ids for ids, _ in batches] == [["a", "b", "c"], ["d"]]
    assert all(rows.shape == (len(ids), 3) for ids, rows in batches)


@pytest.mark.parametrize(
    ("call", "body"),
    [
        (lambda c: c.search(["a", "b"], collection="docs"), {"results": [{"hits": []}]}),
        (lambda c: c.search(["a", "b"], collection="docs"), {"hits": []}),
        (lambda c: c.search("a", collection="docs"), {"results": []}),
        (lambda c: c.job(1), []),
        (lambda c: c.jobs(), {"jobs": 3}),
        (lambda c: c.count("docs"), {"count": "3"}),
        (lambda c: c.collections(), {}),
        (lambda c: c.chunks("docs"), {"chunks": [], "next": 3}),
    ],
)
def test_an_answer_of_another_kind_is_refused(kind: str, call: Any, body: Any) -> None:
    with (
        scripted(lambda _: Said(body=json.dumps(body).encode())) as server,
        remote(kind, server.url) as client,
        pytest.raises(GatewayUnavailable, match="unexpected kind"),
    ):
        call(client)
