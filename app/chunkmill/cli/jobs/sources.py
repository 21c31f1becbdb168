"""Reads chunks from JSONL, CSV and Parquet files, folders of texts, and stdin, with one record in memory at a time."""

from __future__ import annotations

import csv
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from chunkmill.domain.chunks import MAX_TEXT_BYTES, Chunk
from chunkmill.errors import InvalidChunk, InvalidInput

MAX_RECORD_BYTES = 4 * MAX_TEXT_BYTES
"""Large enough for the longest text written with JSON's escapes, and small enough to stop a file without line ends."""
TEXT_SUFFIXES = {".txt", ".md", ".rst"}
PARQUET_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that is not a chunk. ``problem`` says why, without the record's text."""

    problem: str


Record = Chunk | Unreadable


@dataclass(frozen=True, slots=True)
class Fields:
    """The names of the fields with a record's id and text. All other fields become metadata."""

    id: str = "id"
    text: str = "text"


class Reader:
    """The chunks of several sources, one source after the other.

    ``place`` says where the last one came from, such as ``docs.jsonl:17``. With ``skip``, a record that cannot be
    read is yielded as its error, which ``Client.enqueue(on_invalid="skip")`` puts into the job's dead list with its
    place and the reason. Without ``skip``, it raises :class:`InvalidInput`.
    """

    def __init__(self, sources: Sequence[str], fields: Fields, *, skip: bool, stdin: BinaryIO) -> None:
        for source in sources:
            _require_readable(source)
        if sources.count("-") > 1:
            raise InvalidInput("stdin ('-') is given twice, but it can be read only once. Give it once.")
        self.place = ""
        self._read = -1
        self._sources = sources
        self._fields = fields
        self._skip = skip
        self._stdin = stdin

    def __iter__(self) -> Iterator[object]:
        for source in self._sources:
            for place, record in self._records(source):
                self.place = place
                self._read += 1
                if isinstance(record, Chunk):
                    yield record
                elif self._skip:
                    yield InvalidChunk(record.problem, chunk_id=place, position=self._read, reason="unreadable")
                else:
                    raise InvalidInput(
                        f"{place}: {record.problem}. Nothing was written. Fix it, or pass --on-invalid skip to put "
                        "what cannot be read into the job's dead list and enqueue the rest."
                    )

    def _records(self, source: str) -> Iterator[tuple[str, Record]]:
        path = Path(source)
        if source == "-":
            return _jsonl("stdin", self._stdin, self._fields)
        if path.is_dir():
            return _folder(path)
        if path.suffix.lower() == ".csv":
            return _csv(path, self._fields)
        if path.suffix.lower() == ".parquet":
            return _parquet(path, self._fields)
        return _jsonl_file(path, self._fields)


def _require_readable(source: str) -> None:
    path = Path(source)
    if source == "-" or path.is_dir():
        return
    if not path.exists():
        raise InvalidInput(f"there is no file or folder {source!r}. Check the path.")
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".csv", ".parquet"):
        raise InvalidInput(
            f"{source}: the format is not known from the name. A source is a .jsonl, .ndjson, .csv or .parquet "
            "file, a folder of .txt, .md and .rst files, or - for JSON lines on stdin."
        )
    if not os.access(path, os.R_OK):
        raise InvalidInput(f"{source} cannot be read: permission denied. Give this user the right to read it.")


def _jsonl_file(path: Path, fields: Fields) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as file:
        yield from _jsonl(str(path), file, fields)


def _jsonl(name: str, file: BinaryIO, fields: Fields) -> Iterator[tuple[str, Record]]:
    number = 0
    while line := file.readline(MAX_RECORD_BYTES):
        number += 1
        place = f"{name}:{number}"
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_RECORD_BYTES)
            yield place, Unreadable(f"the line is longer than {MAX_RECORD_BYTES:,} bytes")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield place, _from_line(line, fields)


def _from_line(line: bytes, fields: Fields) -> Record:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"not valid UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return Unreadable(f"not valid JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError):  # thousands of nested brackets, or a number of thousands of digits
        return Unreadable("this JSON cannot be read: it is nested too deeply, or a number is too long")
    if not isinstance(record, dict):
        return Unreadable('not a JSON object; each line must be one, such as {"id": "a", "text": "…"}')
    return _from_mapping(record, fields)


def _csv(path: Path, fields: Fields) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    # Bytes that are not UTF-8 become surrogates, which the client refuses record by record.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            heads = next(reader, [])
        except csv.Error as error:
            raise InvalidInput(
                f"{path}:1: not a CSV header: {error}. The first line has to name the columns."
            ) from None
        _require_columns(f"{path}:1", heads, fields)
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, Unreadable(f"not valid CSV: {error}")
                continue
            if not row:
                continue
            if len(row) != len(heads):
                yield place, Unreadable(f"it has {len(row)} columns, the header has {len(heads)}")
                continue
            yield place, _from_mapping(dict(zip(heads, row, strict=True)), fields)


def _parquet(path: Path, fields: Fields) -> Iterator[tuple[str, Record]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InvalidInput(f"{path}: reading Parquet needs pyarrow. Run: pip install 'chunkmill[parquet]'") from None
    arrow_error = importlib.import_module("pyarrow").ArrowException
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            _require_columns(str(path), file.schema_arrow.names, fields)
            number = 0
            for row_group in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in row_group.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", _from_mapping(_json_values(row), fields)
    except (arrow_error, OSError) as error:
        raise InvalidInput(f"{path}: this Parquet file cannot be read: {error}. Write it again.") from None


def _folder(root: Path) -> Iterator[tuple[str, Record]]:
    found = False
    for folder, names, files in os.walk(root):
        # In order, so that two runs give the same job. Hidden folders belong to tools and hold no documents.
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in TEXT_SUFFIXES and not name.startswith("."):
                found = True
                yield str(path), _from_text_file(path, path.relative_to(root).as_posix())
    if not found:
        raise InvalidInput(f"the folder {root} contains no .txt, .md or .rst file. Name another folder.")


def _from_text_file(path: Path, chunk_id: str) -> Record:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            return Unreadable(f"the file is longer than {MAX_TEXT_BYTES:,} bytes; split it into chunks")
        return Chunk(chunk_id, content.decode("utf-8-sig"), {"path": chunk_id})
    except UnicodeDecodeError as error:
        return Unreadable(f"not valid UTF-8 at byte {error.start + 1}")
    except OSError as error:
        return Unreadable(f"cannot be read: {error.strerror}")


def _require_columns(place: str, columns: Sequence[str], fields: Fields) -> None:
    for option, column in (("--id-field", fields.id), ("--text-field", fields.text)):
        if column not in columns:
            raise InvalidInput(
                f"{place}: there is no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}. "
                f"Name the right one with {option}."
            )


def _from_mapping(record: Mapping[str, Any], fields: Fields) -> Record:
    for option, field in (("--id-field", fields.id), ("--text-field", fields.text)):
        if field not in record:
            return Unreadable(f"there is no field {field!r}; name the right one with {option}")
    given = record.get("metadata")
    if given is not None and not isinstance(given, dict):
        # This column only happens to have the name `metadata`.
        given = {"metadata": given}
    rest = {k: v for k, v in record.items() if k not in (fields.id, fields.text, "metadata")}
    return Chunk(record[fields.id], record[fields.text], rest | (given or {}))


def _json_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """A Parquet row with its dates, decimals and UUIDs as text, because JSON has no such types."""
    return {name: _json_value(value) for name, value in row.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | UUID) else value
