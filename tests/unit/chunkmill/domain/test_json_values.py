"""Values of programs and tables as metadata: what each becomes, and what is refused by its field's name."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from chunkmill.domain.chunks import Chunk, prepare
from chunkmill.errors import InvalidChunk


class Word(StrEnum):
    A = "a"


class Number(Enum):
    ONE = 1


NaTType = type("NaTType", (datetime,), {})
NAType = type("NAType", (), {})


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        (float("nan"), None), (float("-inf"), None), ([1.5, float("nan")], [1.5, None]), (Decimal("NaN"), None),
        (np.float32("nan"), None), (np.float64(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), True),
        (np.str_("a"), "a"), (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]), (np.array([0.5, np.nan]), [0.5, None]),
        (np.datetime64("2026-01-31T12:00:00.123456789"), "2026-01-31T12:00:00.123456789"),
        (np.datetime64("NaT"), None), (np.timedelta64(1500, "ms"), 1.5),
        (date(2026, 1, 31), "2026-01-31"), (datetime(2026, 1, 31, 12, tzinfo=UTC), "2026-01-31T12:00:00+00:00"),
        (time(12, 30), "12:30:00"), (timedelta(minutes=1), 60.0), (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"), (PurePosixPath("a/b"), "a/b"),
        ("größer".encode(), "größer"), (bytearray(b"ab"), "ab"), ({"b", "a"}, ["a", "b"]), ((1, (2,)), [1, [2]]),
        (Word.A, "a"), (Number.ONE, 1), ({date(2026, 1, 31): {np.int64(1): None}}, {"2026-01-31": {"1": None}}),
        (NaTType(1, 1, 1), None), (NAType(), None), ({True: 1, None: 2, 0.5: 3}, {"true": 1, "null": 2, "0.5": 3}),
    ],
)  # fmt: skip
def test_a_value_that_json_lacks_takes_its_plain_form(value: Any, becomes: Any) -> None:
    """Beside a value that the encoder refuses, so that each goes the long way round too."""
    for metadata in ({"a": value}, {"a": value, "b": {"c": float("nan")}}):
        stored = json.loads(prepare(Chunk("a", "text", metadata), 0).metadata)
        assert stored["a"] == becomes
        assert type(stored["a"]) is type(becomes)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"a": {"secret": b"\xff\xfe"}}, "the field 'a.secret' holds bytes that are not text in UTF-8"),
        ({"a": [1, {"b": object()}]}, "the field 'a.b' is of type object, which JSON does not have"),
        ({"a": {("t",): 1}}, "a key in 'a' is of type tuple; keys of JSON are text"),
        ({("t",): 1}, "a key is of type tuple"),
        ({"a": np.array([1, object()])}, "the field 'a' is of type object"),
        ({"a": 1j}, "the field 'a' is of type complex"),
    ],
)
def test_what_has_no_plain_form_is_refused_by_the_name_of_its_field(metadata: Any, says: str) -> None:
    with pytest.raises(InvalidChunk) as refused:
        prepare(Chunk("a", "text", metadata), 3)
    assert says in str(refused.value)
    assert (refused.value.reason, refused.value.known_id) == ("bad_metadata", "a")


def test_metadata_that_contain_themselves_are_refused() -> None:
    loop: dict[str, Any] = {"n": float("nan")}
    loop["loop"] = loop
    with pytest.raises(InvalidChunk):
        prepare(Chunk("a", "text", loop), 0)
