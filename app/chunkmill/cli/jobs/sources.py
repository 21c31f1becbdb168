"""Reads chunks from JSONL, CSV and Parquet files, folders of texts, and stdin, with one record in memory at a time.

What `chunkmill export` wrote is recognized, so that it comes back with the same ids and metadata.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Self, TextIO
from uuid import UUID

from chunkmill.cli.jobs.cutting import DOCUMENT_SUFFIXES, Cutter
from chunkmill.cli.jobs.folders import TEXT_SUFFIXES, Document, Skipped, documents
from chunkmill.domain.chunks import MAX_TEXT_BYTES, Chunk
from chunkmill.domain.reasons import printable
from chunkmill.domain.stored import EXPORTED
from chunkmill.errors import InvalidChunk, InvalidInput, install_command
from chunkmill.files import NOT_REGULAR, open_regular

MAX_RECORD_BYTES = 4 * MAX_TEXT_BYTES
"""Large enough for the longest text written with JSON's escapes, and small enough to stop a file without line ends."""
PARQUET_ROWS = 100
"""How many rows are in memory at a time."""
ZIPPED = (".jsonl.gz", ".ndjson.gz")
NAMED_COLUMNS = 20
"""How many columns an error names."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that is not a chunk. ``problem`` says why, without the record's text."""

    problem: str


Record = Chunk | Unreadable


@dataclass(frozen=True, slots=True)
class Fields:
    """The names of the fields with a record's id and text, and of those that become metadata: all others if None."""

    id: str = "id"
    text: str = "text"
    metadata: tuple[str, ...] | None = None

    @property
    def named(self) -> list[tuple[str, str]]:
        """``(option, field)`` for each field that a record needs."""
        return [("--id-field", self.id), ("--text-field", self.text)]


class Reader:
    """The chunks of several sources, one source after the other.

    ``place`` says where the last one came from, such as ``docs.jsonl:17``, and ``skipped`` what was left out of folders
    because it is no file of the folder's own. With ``skip``, a record that cannot be
    read is yielded as its error, which ``Client.enqueue(on_invalid="skip")`` puts into the job's dead list with its
    place and the reason. Without ``skip``, it raises :class:`InvalidInput`. With a ``cutter``, documents and the texts
    of records are cut into chunks.
    """

    def __init__(
        self,
        sources: Sequence[str],
        fields: Fields,
        *,
        skip: bool,
        stdin: BinaryIO,
        cutter: Cutter | None = None,
    ) -> None:
        for source in sources:
            _require_readable(source, cuts=cutter is not None)
        if sources.count("-") > 1:
            raise InvalidInput("stdin ('-') is given twice, but it can be read only once. Give it once.")
        self._suffixes: Collection[str] = TEXT_SUFFIXES if cutter is None else cutter.suffixes
        _require_distinct(
            [Path(source) for source in sources if source != "-" and Path(source).is_dir()], self._suffixes
        )
        if cutter is not None:
            _require_distinct_names(sources)
        self._cutter = cutter
        self.place = ""
        self.skipped = Skipped()
        self._read = -1
        self._sources = sources
        self._fields = fields
        self._skip = skip
        self._stdin = stdin

    def __iter__(self) -> Iterator[object]:
        for source in self._sources:
            for place, record in _opened(source, self._records(source)):
                self.place = place
                self._read += 1
                if isinstance(record, Chunk):
                    yield record
                elif self._skip:
                    yield InvalidChunk(
                        record.problem, chunk_id=printable(place), position=self._read, reason="unreadable"
                    )
                else:
                    raise InvalidInput(
                        f"{place}: {record.problem}. Nothing was written. Fix it, or pass --on-invalid skip to put "
                        "what cannot be read into the job's dead list and enqueue the rest."
                    )

    def _records(self, source: str) -> Iterator[tuple[str, Record]]:
        path = Path(source)
        if source == "-":
            return self._cut(_jsonl("stdin", self._stdin, self._fields))
        if path.is_dir():
            return _folder(path, self.skipped, self._suffixes, self._cutter)
        if self._cutter is not None and path.suffix.lower() in DOCUMENT_SUFFIXES:
            return _cut_at(path, self._cutter.file(path, self.skipped))
        if path.suffix.lower() == ".csv":
            return self._cut(_csv(path, self._fields))
        if path.suffix.lower() == ".parquet":
            return self._cut(_parquet(path, self._fields))
        return self._cut(_jsonl_file(path, self._fields))

    def _cut(self, records: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
        if self._cutter is None:
            yield from records
            return
        for place, record in records:
            if isinstance(record, Chunk):
                yield from _cut_at(place, self._cutter.record(record))
            else:
                yield place, record


def _require_readable(source: str, *, cuts: bool) -> None:
    path = Path(source)
    if source == "-" or path.is_dir():
        return
    if not path.exists():
        raise InvalidInput(f"there is no file or folder {source!r}. Check the path.")
    is_document = path.suffix.lower() in DOCUMENT_SUFFIXES
    if is_document and not cuts:
        raise InvalidInput(
            f"{source}: this is one document. To cut it into chunks of their own, pass --chunk, such as --chunk 200."
        )
    if not is_document and not path.name.lower().endswith((".jsonl", ".ndjson", ".csv", ".parquet", *ZIPPED)):
        raise InvalidInput(
            f"{source}: the format is not known from the name. A source is a .jsonl, .ndjson, .csv or .parquet "
            "file, a .jsonl.gz or .ndjson.gz file, a folder of .txt, .md and .rst files, or - for JSON lines on stdin."
        )
    if not path.is_file():
        raise InvalidInput(f"{source}: {NOT_REGULAR}. To read from a pipe, name - and pipe it into stdin.")
    if not os.access(path, os.R_OK):
        raise InvalidInput(f"{source} cannot be read: permission denied. Give this user the right to read it.")


def _opened(source: str, records: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """The records, with an error of the operating system said in words."""
    try:
        yield from records
    except OSError as error:
        raise InvalidInput(f"{source} cannot be read: {error.strerror or error}. Check it, and try again.") from None


def _jsonl_file(path: Path, fields: Fields) -> Iterator[tuple[str, Record]]:
    with open_regular(path) as file:
        if not path.name.lower().endswith(ZIPPED):
            yield from _jsonl(str(path), file, fields)
            return
        try:
            with gzip.GzipFile(fileobj=file) as lines:
                yield from _jsonl(str(path), lines, fields)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InvalidInput(f"{path}: this is no whole gzip file: {error}. Write it again.") from None


def _jsonl(name: str, file: BinaryIO | gzip.GzipFile, fields: Fields) -> Iterator[tuple[str, Record]]:
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
        # NaN and the infinities are no JSON, but Python writes them; they say that there is no number.
        record = json.loads(line.decode(), parse_constant=lambda _: None)
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
    with io.TextIOWrapper(open_regular(path), "utf-8-sig", "surrogateescape", newline="") as file:
        # Strict, because otherwise a quote that is never closed silently takes the rest of the file into one text.
        lines = _BoundedLines(file)
        reader = csv.reader(lines, strict=True)
        try:
            heads = next(reader, [])
        except csv.Error as error:
            raise InvalidInput(
                f"{path}:1: not a CSV header: {error}. The first line has to name the columns."
            ) from None
        _require_columns(f"{path}:1", heads, fields)
        while True:
            first = lines.begin_record()
            place = f"{path}:{first}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                several = f"; lines {first} to {lines.number} were read as one record: is a quote not closed?"
                yield place, Unreadable(f"not valid CSV: {error}{several if lines.number > first else ''}")
                continue
            if not row:
                continue
            if len(row) != len(heads):
                yield place, Unreadable(f"it has {len(row)} columns, the header has {len(heads)}")
                continue
            yield place, _from_mapping(dict(zip(heads, row, strict=True)), fields)


class _BoundedLines:
    """The lines of a text file. A record of more than MAX_RECORD_BYTES characters raises `csv.Error`.

    The limit of the module `csv` is for one field, and a record may have any number of them.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._left = MAX_RECORD_BYTES
        self.number = 0
        """Of the line that was read last, from 1 on."""

    def begin_record(self) -> int:
        """Allow another record, and return the number of its first line."""
        self._left = MAX_RECORD_BYTES
        return self.number + 1

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._left)
        if not line:
            if not self._left:
                raise csv.Error(f"the record is longer than {MAX_RECORD_BYTES:,} characters")
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if not self._left and not line.endswith(("\r", "\n")):
            while (rest := self._file.readline(MAX_RECORD_BYTES)) and not rest.endswith(("\r", "\n")):
                pass
            raise csv.Error(f"the record is longer than {MAX_RECORD_BYTES:,} characters")
        return line


def _parquet(path: Path, fields: Fields) -> Iterator[tuple[str, Record]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InvalidInput(f"{path}: reading Parquet needs pyarrow. Run: {install_command('parquet')}") from None
    arrow = importlib.import_module("pyarrow")
    arrow_error = arrow.ArrowException
    try:
        with open_regular(path) as opened, parquet.ParquetFile(opened, pre_buffer=False) as file:
            _require_columns(str(path), file.schema_arrow.names, fields)
            is_export = _is_exported(file.schema_arrow.names, fields)
            columns = None if fields.metadata is None else [fields.id, fields.text, *fields.metadata]
            if is_export:
                columns = ["id", "text", "metadata"]
            number = 0
            for row_group in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for row in arrow.table(
                    [_in_microseconds(arrow, column) for column in row_group.columns], names=row_group.schema.names
                ).to_pylist():
                    number += 1
                    yield f"{path}:row {number}", _from_export(row) if is_export else _from_row(row, fields)
    except (arrow_error, OSError) as error:
        raise InvalidInput(f"{path}: this Parquet file cannot be read: {error}. Write it again.") from None


def _cut_at(place: object, chunks: Iterator[Chunk | str]) -> Iterator[tuple[str, Record]]:
    for chunk in chunks:
        yield str(place), Unreadable(chunk) if isinstance(chunk, str) else chunk


def _folder(
    root: Path, skipped: Skipped, suffixes: Collection[str], cutter: Cutter | None
) -> Iterator[tuple[str, Record]]:
    is_empty = True
    for document in documents(root, skipped, suffixes):
        is_empty = False
        path = root / document.name
        if cutter is None:
            yield str(path), _from_document(document)
        else:
            yield from _cut_at(path, cutter.document(document, path, skipped))
    if is_empty:
        why = f" ({skipped})" if skipped.count else ""
        kinds = ".txt, .md or .rst" if cutter is None else "text, Markdown, HTML, PDF or source"
        if cutter is not None and cutter.suffixes is not DOCUMENT_SUFFIXES:
            kinds = " or ".join(sorted(cutter.suffixes))
        raise InvalidInput(f"the folder {root} contains no {kinds} file{why}. Name another folder.")


def _require_distinct_names(sources: Sequence[str]) -> None:
    """Raise :class:`InvalidInput` if two documents that are named themselves would have the same id."""
    named: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        if path.suffix.lower() not in DOCUMENT_SUFFIXES or path.is_dir():
            continue
        if (other := named.setdefault(path.name, source)) != source:
            raise InvalidInput(
                f"{other} and {source} would have the same id {path.name!r}, and one would replace the other. Name the "
                "folder above both, or use two collections."
            )


def _require_distinct(folders: Sequence[Path], suffixes: Collection[str]) -> None:
    """Raise :class:`InvalidInput` if files of two folders would have the same id, so that one would replace the other.

    The id of a file is its path inside its folder.
    """
    if len(folders) < 2:
        return
    roots: dict[str, Path] = {}
    for root in folders:
        for document in documents(root, Skipped(), suffixes):
            if (other := roots.setdefault(document.name, root)) is not root:
                raise InvalidInput(
                    f"{other / document.name} and {root / document.name} would have the same id {document.name!r}, "
                    "and one would replace the other. Name the folder above both, so that their ids begin with their "
                    "folders, or use two collections."
                )


def _from_document(document: Document) -> Record:
    if document.problem is not None:
        return Unreadable(document.problem)
    try:
        with document.open() as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            return Unreadable(f"the file is longer than {MAX_TEXT_BYTES:,} bytes; split it into chunks")
        return Chunk(document.name, content.decode("utf-8-sig"), {"path": document.name})
    except UnicodeDecodeError as error:
        return Unreadable(f"not valid UTF-8 at byte {error.start + 1}")
    except OSError as error:
        return Unreadable(f"cannot be read: {error.strerror}")


def _require_columns(place: str, columns: Sequence[str], fields: Fields) -> None:
    for option, column in [*fields.named, *(("--metadata-field", name) for name in fields.metadata or ())]:
        if column not in columns:
            raise InvalidInput(
                f"{place}: there is no column {column!r}; it has {_listed(columns)}. Name the right one with {option}."
            )
    if twice := [column for column, n in Counter(columns).items() if n > 1]:
        raise InvalidInput(f"{place}: several columns are called {twice[0]!r}. Give each a name of its own.")


def _listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - NAMED_COLUMNS:,} more" if len(columns) > NAMED_COLUMNS else ""
    return (", ".join(repr(column[:100]) for column in columns[:NAMED_COLUMNS]) or "none") + more


def _from_mapping(record: Mapping[str, Any], fields: Fields) -> Record:
    if _is_exported(record, fields):
        return _from_export(record)
    for option, field in fields.named:
        if field not in record:
            return Unreadable(f"there is no field {field!r}; name the right one with {option}")
    if fields.metadata is not None:
        record = {name: record[name] for name in (fields.id, fields.text, *fields.metadata) if name in record}
    given = record.get("metadata")
    if given is not None and not isinstance(given, dict):
        # This column only happens to have the name `metadata`.
        given = {"metadata": given}
    rest = {k: v for k, v in record.items() if k not in (fields.id, fields.text, "metadata")}
    return Chunk(record[fields.id], record[fields.text], rest | (given or {}))


def _is_exported(names: Collection[str], fields: Fields) -> bool:
    """Whether a record with fields of these names was written by `chunkmill export`, with its text."""
    return fields == Fields() and {*names, "vector"} == EXPORTED


def _from_export(record: Mapping[str, Any]) -> Record:
    """The chunk as it was exported. Its vector is looked up by its text, or made again."""
    metadata = record["metadata"]
    if isinstance(metadata, str):  # as Parquet has it
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError):
            metadata = None
    if not isinstance(metadata, dict):
        return Unreadable("the field 'metadata' of an exported chunk must be a JSON object")
    return Chunk(record["id"], record["text"], metadata)


def _from_row(row: Mapping[str, Any], fields: Fields) -> Record:
    """The chunk of a Parquet row, with its values as JSON has them."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        try:
            values[name] = _json_value(value)
        except UnicodeDecodeError:
            return Unreadable(
                f"column {name!r} holds bytes that are no UTF-8 text, and JSON has no bytes: choose the columns to "
                "keep with --metadata-field"
            )
    return _from_mapping(values, fields)


def _json_value(value: Any) -> Any:
    """A value as JSON has it: dates, times, decimals and UUIDs as text, a time span as seconds, and no number as null.

    Raises UnicodeDecodeError for bytes that are no text.
    """
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _json_value(inner) for name, inner in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(pair, tuple) and isinstance(pair[0], str) for pair in value):  # a map
            return {name: _json_value(inner) for name, inner in value}
        return [_json_value(inner) for inner in value]
    return [_json_value(inner) for inner in value] if isinstance(value, tuple) else value


def _in_microseconds(arrow: Any, column: Any) -> Any:
    """The column with times of microseconds in place of nanoseconds, which Python does not have."""
    kind = _microseconds(arrow, column.type)
    return column if kind == column.type else column.cast(kind, safe=False)


def _microseconds(arrow: Any, kind: Any) -> Any:
    types = arrow.types
    if types.is_timestamp(kind):
        return arrow.timestamp("us", kind.tz) if kind.unit == "ns" else kind
    if types.is_duration(kind):
        return arrow.duration("us") if kind.unit == "ns" else kind
    if types.is_time64(kind):
        return arrow.time64("us")
    if types.is_list(kind):
        return arrow.list_(kind.value_field.with_type(_microseconds(arrow, kind.value_type)))
    if types.is_struct(kind):
        return arrow.struct([field.with_type(_microseconds(arrow, field.type)) for field in kind])
    return kind
