"""The shapes in which people have their chunks: pairs, dicts, dataclasses, rows of a query, data frames."""

from __future__ import annotations

import dataclasses
import operator
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

ROWS_AT_ONCE = 1_000
"""How many rows of a data frame are Python objects at a time."""
LARGEST_ID = 2**64
"""The largest whole number that is taken for an id."""
EXPECTED = (
    "a chunk is a Chunk, an (id, text) pair, an (id, text, metadata) triple, or a dict, a dataclass, a named tuple or "
    "a row with the fields id and text"
)


def rows_of(items: Iterable[object]) -> Iterable[object]:
    """The rows of a data frame of pandas or Polars, or of a table of Arrow, as dicts; anything else as it is.

    An iteration over one of them would give its columns. None of these libraries is imported.
    """
    given: Any = items
    if hasattr(given, "to_batches"):  # a Table, a Dataset or another frame of Arrow
        return _rows_of_batches(given.to_batches())
    if not hasattr(given, "columns"):
        return items
    if hasattr(given, "iter_rows"):
        return _rows_of_polars(given)
    if hasattr(given, "iloc"):
        return _rows_of_pandas(given)
    return items


def _rows_of_batches(batches: Iterable[Any]) -> Iterator[object]:
    for batch in batches:
        for first in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield from batch.slice(first, ROWS_AT_ONCE).to_pylist()


def _rows_of_polars(frame: Any) -> Iterator[object]:
    rows: Iterator[object] = frame.iter_rows(named=True, buffer_size=ROWS_AT_ONCE)
    return rows


def _rows_of_pandas(frame: Any) -> Iterator[object]:
    for first in range(0, len(frame), ROWS_AT_ONCE):
        rows = frame.iloc[first : first + ROWS_AT_ONCE]
        # What is missing is a NaN in pandas, also in a column of texts.
        yield from rows.astype(object).where(rows.notna(), None).to_dict("records")


def parts_of(item: object) -> tuple[Any, Any, Any]:
    """The id, the text and the metadata of one item, unchecked.

    Fields other than ``id``, ``text`` and ``metadata`` become metadata, as they do for the records of a file. If a name
    is both such a field and a key of ``metadata``, the latter counts. A ``Document`` of LangChain has its text in
    ``page_content``. Raises ValueError, which says what the item lacks.
    """
    if type(item) is tuple and len(item) in (2, 3):  # the usual shape, without a look at all the others
        return item[0], item[1], item[2] if len(item) == 3 else {}
    fields = _fields_of(item)
    if fields is None:
        if isinstance(item, Sequence) and not isinstance(item, str | bytes | bytearray) and len(item) in (2, 3):
            return item[0], item[1], item[2] if len(item) == 3 else {}
        raise ValueError(f"{EXPECTED}, not {type(item).__name__}")
    for name in ("id", "text"):
        if name not in fields:
            shown = sorted(str(one)[:100] for one in fields)[:20]
            raise ValueError(f"a chunk needs the fields 'id' and 'text', and this one has {shown}")
    rest = {name: value for name, value in fields.items() if name not in ("id", "text", "metadata")}
    metadata = fields.get("metadata") or {}
    if rest and isinstance(metadata, Mapping):
        metadata = rest | dict(metadata)
    return fields["id"], fields["text"], metadata


def _fields_of(item: Any) -> Mapping[Any, Any] | None:
    """The fields of an item by their names; None if it has no names."""
    if isinstance(item, Mapping):
        return item
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    names = getattr(item, "_fields", None)  # of a named tuple, and of a row of SQLAlchemy
    if isinstance(names, tuple) and {"id", "text"} <= set(names) and isinstance(item, Sequence):
        of_pandas = type(item).__name__ == "Pandas" and names[0] == "Index"
        return dict(zip(names[of_pandas:], item[of_pandas:], strict=True))
    if hasattr(item, "page_content"):
        return {
            "id": getattr(item, "id", None),
            "text": item.page_content,
            "metadata": getattr(item, "metadata", None),
        }
    return None


def as_id(given: Any) -> Any:
    """A whole number, of Python or of NumPy, or a UUID as its text, because many databases have such keys."""
    if isinstance(given, uuid.UUID):
        return str(given)
    if isinstance(given, str | bool):
        return given
    try:
        number = operator.index(given)
    except TypeError:
        return given
    return str(number) if abs(number) <= LARGEST_ID else given
