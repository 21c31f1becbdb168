"""Chunks come in the shapes in which people have them."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections import namedtuple
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sa

from chunkmill.domain.chunks import Chunk, prepare
from chunkmill.domain.shapes import ROWS_AT_ONCE, rows_of
from chunkmill.errors import InvalidChunk

UUID = uuid.UUID(int=7)
Named = namedtuple("Named", ["id", "text", "lang"])
Odd = namedtuple("Odd", ["key", "body"])
Pandas = namedtuple("Pandas", ["Index", "id", "text", "lang"])


@dataclasses.dataclass
class Passage:
    text: str
    id: int
    lang: str = "en"
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class Document:
    """As LangChain has it."""

    def __init__(self, page_content: str, metadata: dict[str, Any], id: str | None = None) -> None:  # noqa: A002
        self.page_content, self.metadata, self.id = page_content, metadata, id


def row_of_a_query() -> object:
    with sa.create_engine("sqlite://").connect() as conn:
        return conn.execute(sa.text("SELECT 1 AS id, 'a text' AS text, 'en' AS lang")).one()


SHAPES: list[tuple[object, tuple[str, dict[str, Any]]]] = [
    (Chunk("1", "a text", {"lang": "en"}), ("1", {"lang": "en"})),
    (Chunk(1, "a text"), ("1", {})),  # type: ignore[arg-type]
    ((1, "a text"), ("1", {})),
    ([1, "a text", {"lang": "en"}], ("1", {"lang": "en"})),
    ((np.int64(1), "a text", None), ("1", {})),
    ((UUID, "a text"), (str(UUID), {})),
    ({"id": 1, "text": "a text", "lang": "en"}, ("1", {"lang": "en"})),
    ({"id": 1, "text": "a text", "lang": "en", "metadata": None}, ("1", {"lang": "en"})),
    ({"id": 1, "text": "a text", "lang": "en", "metadata": {"lang": "de", "n": 2}}, ("1", {"lang": "de", "n": 2})),
    (Passage("a text", 1), ("1", {"lang": "en"})),
    (Named(1, "a text", "en"), ("1", {"lang": "en"})),
    (Odd(1, "a text"), ("1", {})),
    (Pandas(0, 1, "a text", "en"), ("1", {"lang": "en"})),
    (Document("a text", {"lang": "en"}, "1"), ("1", {"lang": "en"})),
    (row_of_a_query(), ("1", {"lang": "en"})),
]


@pytest.mark.parametrize(("item", "expected"), SHAPES, ids=[type(item).__name__ for item, _ in SHAPES])
def test_an_id_a_text_and_all_else_as_metadata(item: object, expected: tuple[str, dict[str, Any]]) -> None:
    chunk = prepare(item, 0)
    assert (chunk.id, json.loads(chunk.metadata)) == expected
    assert chunk.text == b"a text"


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (Document("a text", {}), "the id is of type NoneType"),
        ({"key": 1, "body": "b"}, r"needs the fields 'id' and 'text', and this one has \['body', 'key'\]"),
        (Passage, "not type"),
        (("a", "b", {}, "d"), "not tuple"),
        (b"ab", "not bytes"),
    ],
)
def test_an_item_without_an_id_and_a_text_is_refused_with_what_it_has(item: object, says: str) -> None:
    with pytest.raises(InvalidChunk, match=says) as caught:
        prepare(item, 3)
    assert caught.value.position == 3
    assert "a text" not in str(caught.value)


def test_a_table_gives_its_rows_some_at_a_time() -> None:
    size = ROWS_AT_ONCE + 1
    table = pa.table({"id": range(size), "text": ["a text"] * size, "lang": ["en"] * size})
    rows = rows_of(table)
    assert next(iter(rows)) == {"id": 0, "text": "a text", "lang": "en"}
    assert [row["id"] for row in rows_of(table)] == list(range(size))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_data_frame_gives_its_rows(library: str) -> None:
    frames = pytest.importorskip(library)
    size = ROWS_AT_ONCE + 1
    frame = frames.DataFrame(
        {"id": range(size), "text": ["a text"] * size, "lang": ["en", None] * (size // 2) + ["de"]}
    )
    chunks = [prepare(row, position) for position, row in enumerate(rows_of(frame))]
    assert [chunk.id for chunk in chunks] == [str(number) for number in range(size)]
    assert [json.loads(chunk.metadata) for chunk in chunks[:2]] == [{"lang": "en"}, {"lang": None}]


def test_what_is_no_frame_is_left_alone() -> None:
    pairs = [("a", "b")]
    assert rows_of(pairs) is pairs
