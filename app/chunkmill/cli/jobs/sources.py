"""Reads chunks from JSON, CSV and Parquet files, folders of texts, and stdin, with one record in memory at a time.

What `chunkmill export` wrote is recognized, so that it comes back with the same ids and metadata.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from chunkmill.chunking.document import suffix_of
from chunkmill.chunking.reading import unpacked
from chunkmill.cli.jobs.csv_files import DELIMITERS, Row, Table, typed
from chunkmill.cli.jobs.cutting import DOCUMENT_SUFFIXES, Cutter, UncutDocument
from chunkmill.cli.jobs.decoded import document_text, in_utf8, opened, problem_in, problem_in_bytes
from chunkmill.cli.jobs.folders import TEXT_SUFFIXES, FolderFile, SkippedEntries, documents
from chunkmill.cli.jobs.json_arrays import elements
from chunkmill.domain.chunks import MAX_ID_BYTES, MAX_TEXT_BYTES, Chunk
from chunkmill.domain.json_values import NotJson, json_value
from chunkmill.domain.reasons import printable
from chunkmill.errors import InvalidChunk, InvalidInput, install_command
from chunkmill.system.files import NOT_REGULAR, open_regular

MAX_RECORD_BYTES = 4 * MAX_TEXT_BYTES
"""Large enough for the longest text written with JSON's escapes, and small enough to stop a file without line ends."""
PARQUET_ROWS = 100
"""How many rows are in memory at a time."""
FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet",
}  # fmt: skip
"""From the end of a file's name, before ``.gz``, to its format."""
AUTO_ID = "auto"
"""The name of the field with the id if no field has it: then the id is made of the record."""
NAMED_COLUMNS = 20
"""How many columns an error names."""


@dataclass(frozen=True, slots=True)
class UnreadableRecord:
    """A record that is not a chunk. ``problem`` says why, without the record's text."""

    problem: str
    id: str | None = None
    """The id that the chunk would have, or the document of which it is a part, if that is known."""


Record = Chunk | UnreadableRecord


@dataclass(frozen=True, slots=True)
class Fields:
    """The names of the fields with a record's id and text, and of those that become metadata: all others if None."""

    id: str = "id"
    text: str = "text"
    metadata: tuple[str, ...] | None = None

    @property
    def named(self) -> list[tuple[str, str]]:
        """``(option, field)`` for each field that a record needs."""
        text = [("--text-field", self.text)]
        return text if self.id == AUTO_ID else [("--id-field", self.id), *text]


@dataclass(frozen=True, slots=True)
class Form:
    """How sources are written, as far as their names do not say it, and what becomes of their ids."""

    format: str | None = None
    """One of :data:`FORMATS`, for files and for stdin; None if the names say it. Without a name it is ``jsonl``."""
    encoding: str | None = None
    """Of texts, as :func:`chunkmill.cli.jobs.decoded.encoding_named` gives it; None for UTF-8."""
    delimiter: str | None = None
    """One character that separates the columns of CSV; None if the header says it."""
    typed: bool = False
    """Numbers, truth values and empty cells of CSV become those of JSON in the metadata."""
    prefixed: bool = False
    """Each id begins with its source, as it was named, and a slash."""


Read = Callable[[str, BinaryIO, Fields, Form], Iterator[tuple[str, Record]]]
"""From the name of a source and its bytes in UTF-8 to its records with their places."""


class Reader:
    """The chunks of several sources, one source after the other.

    ``place`` says where the last one came from, such as ``docs.jsonl:17``, and ``skipped`` what was left out of folders
    because it is a link, a device or the like. ``notes`` has what was guessed about a source. With ``skip``, a record
    that cannot be read is yielded as its error, which ``Client.enqueue(on_invalid="skip")`` puts into the job's dead
    list with its place and the reason. Without ``skip``, it raises :class:`InvalidInput`. With a ``cutter``, documents
    and the texts of records are cut into chunks. Unless it ``may_be_empty``, a source without a record raises
    :class:`InvalidInput`.
    """

    def __init__(
        self,
        sources: Sequence[str],
        fields: Fields,
        *,
        skip: bool,
        stdin: BinaryIO,
        form: Form | None = None,
        cutter: Cutter | None = None,
        may_be_empty: bool = True,
    ) -> None:
        self._may_be_empty = may_be_empty
        self._form = form or Form()
        for source in sources:
            _require_readable(source, self._form, cuts=cutter is not None)
        if sources.count("-") > 1:
            raise InvalidInput("stdin ('-') is given twice, but it can be read only once. Give it once.")
        self._suffixes: Set[str] = TEXT_SUFFIXES if cutter is None else cutter.suffixes
        if not self._form.prefixed:
            named = [Path(source) for source in sources if self._is_of_documents(source, cutter)]
            _require_distinct(named, self._suffixes)
        self._cutter = cutter
        self.notes: list[str] = []
        self.place = ""
        self.skipped = SkippedEntries(named={Path(os.path.normpath(source)) for source in sources})
        self._read = -1
        self._sources = sources
        self._fields = fields
        self.skips = skip
        self._stdin = stdin

    def __iter__(self) -> Iterator[object]:
        for source in self._sources:
            prefix = f"{_prefix(source)}/" if self._form.prefixed else ""
            before = self._read
            for place, record in _opened(source, self._records(source)):
                self.place = place
                self._read += 1
                if isinstance(record, Chunk):
                    yield _prefixed(record, prefix) if prefix else record
                elif self.skips:
                    known_id = None if record.id is None else prefix + _as_id(record.id)
                    yield InvalidChunk(
                        record.problem,
                        chunk_id=printable(known_id or place),
                        position=self._read,
                        reason="unreadable",
                        known_id=known_id,
                    )
                else:
                    raise InvalidInput(
                        f"{place}: {record.problem}. Nothing was written. Fix it, or pass --on-invalid skip to put "
                        "what cannot be read into the job's dead list and enqueue the rest."
                    )
            if self._read == before and not self._may_be_empty:
                raise InvalidInput(
                    f"{'stdin' if source == '-' else source} holds no record, so --sync would delete all that the "
                    "collection has of it. Nothing was written, and nothing was deleted. Check the source; if it is "
                    "meant to be empty, pass --allow-empty."
                )

    def _is_of_documents(self, source: str, cutter: Cutter | None) -> bool:
        """Whether the names of files become ids."""
        path = Path(source)
        is_document = cutter is not None and self._form.format is None and suffix_of(path.name) in DOCUMENT_SUFFIXES
        return source != "-" and (is_document or path.is_dir())

    def of_other_kinds(self) -> str:
        """What was not read in folders because of the names of the files; empty if there is nothing of it."""
        return self.skipped.of_other_kinds(DOCUMENT_SUFFIXES if self._cutter is None else (), FORMATS)

    def _records(self, source: str) -> Iterator[tuple[str, Record]]:
        form = self._form
        path = Path(source)
        if source != "-" and path.is_dir():
            return _folder(path, self.skipped, form, self._suffixes, self._cutter)
        if self._cutter is not None and form.format is None and suffix_of(path.name) in DOCUMENT_SUFFIXES:
            return _cut_at(path, self._cutter.file(path, self.skipped, form.encoding))
        return self._cut(self._uncut(source, path, form))

    def _uncut(self, source: str, path: Path, form: Form) -> Iterator[tuple[str, Record]]:
        kind = form.format or _format_of(path) or "jsonl"
        if kind == "parquet":
            return _parquet(path, self._fields)
        name = "stdin" if source == "-" else source
        read = {"jsonl": _jsonl, "json": _json, "csv": self._csv, "tsv": self._csv}[kind]
        if kind == "tsv" and form.delimiter is None:
            form = replace(form, delimiter="\t")
        if source == "-":
            return read(name, in_utf8(self._stdin, form.encoding), self._fields, form)
        return self._of_file(path, read, form)

    def _cut(self, records: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
        if self._cutter is None:
            yield from records
            return
        for place, record in records:
            if isinstance(record, Chunk):
                yield from _cut_at(place, self._cutter.record(record))
            else:
                yield place, record

    def _of_file(self, path: Path, read: Read, form: Form) -> Iterator[tuple[str, Record]]:
        with opened(path, form.encoding) as file:
            yield from read(str(path), file, self._fields, form)

    def _csv(self, name: str, file: BinaryIO, fields: Fields, form: Form) -> Iterator[tuple[str, Record]]:
        # Bytes that could not be decoded become surrogates, and their record is refused.
        with io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="") as text:
            needed = [field for _, field in fields.named]
            table = Table(name, text, delimiter=form.delimiter, needed=needed, limit=MAX_RECORD_BYTES)
            if not table.columns:
                return  # an empty file, like an empty file of JSON lines
            if problem := problem_in("".join(table.columns), form.encoding):
                raise InvalidInput(f"{name}:1: in the header, {problem}.")
            _require_columns(f"{name}:1", table.columns, fields)
            if table.is_guessed and table.delimiter != ",":
                self.notes.append(f"{name}: the columns are separated by {DELIMITERS[table.delimiter]}")
            for row in table:
                yield f"{name}:{row.line}", _from_cells(table.columns, row, fields, form)


def _as_id(name: str) -> str:
    """The name of a refused document in a form that an id may have. Only a name that is no id changes."""
    return printable(name).encode()[:MAX_ID_BYTES].decode(errors="ignore")


def _prefix(source: str) -> str:
    return "stdin" if source == "-" else os.path.normpath(source)


def _prefixed(chunk: Chunk, prefix: str) -> Chunk:
    return Chunk(f"{prefix}{chunk.id}", chunk.text, chunk.metadata) if isinstance(chunk.id, str | int) else chunk


def _format_of(path: Path) -> str | None:
    name = path.name.lower()
    kind = FORMATS.get(Path(name.removesuffix(".gz")).suffix)
    return None if kind == "parquet" and name.endswith(".gz") else kind


def _require_readable(source: str, form: Form, *, cuts: bool) -> None:
    path = Path(source)
    if source == "-" and form.format == "parquet":
        raise InvalidInput("Parquet cannot be read from stdin, because its directory is at the end. Name the file.")
    if source == "-" or path.is_dir():
        return
    if not path.exists():
        raise InvalidInput(f"there is no file or folder {source!r}. Check the path.")
    is_document = form.format is None and suffix_of(path.name) in DOCUMENT_SUFFIXES
    if is_document and not cuts:
        raise InvalidInput(
            f"{source}: this is one document. To cut it into chunks of their own, pass --chunk, such as --chunk 200."
        )
    if form.format is None and not is_document and _format_of(path) is None:
        raise InvalidInput(
            f"{source}: the format is not known from the name. A source is a .jsonl, .ndjson, .json, .csv, .tsv or "
            ".parquet file, all but the last also with .gz, a folder of .txt, .md and .rst files, or - for stdin. "
            "--format says what a file of another name is."
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


def _jsonl(name: str, file: BinaryIO, fields: Fields, form: Form) -> Iterator[tuple[str, Record]]:
    number = 0
    is_first = True
    while line := file.readline(MAX_RECORD_BYTES):
        number += 1
        place = f"{name}:{number}"
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_RECORD_BYTES)
            yield place, UnreadableRecord(f"the line is longer than {MAX_RECORD_BYTES:,} bytes")
            continue
        if not line.strip():
            continue
        if is_first and line.strip() in (b"[", b"[{"):
            raise InvalidInput(
                f"{place}: this is one JSON array, and not an object on each line. Name the file .json, or pass "
                "--format json."
            )
        is_first = False
        yield place, _from_line(line, fields, form)


def _from_line(line: bytes, fields: Fields, form: Form) -> Record:
    if problem := problem_in_bytes(line, form.encoding):
        return UnreadableRecord(problem)
    try:
        # NaN and the infinities are no JSON, but Python writes them; they say that there is no number.
        record = json.loads(line.decode(), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            return UnreadableRecord(
                f"not valid JSON: the line ends inside the string that begins at column {error.colno}"
            )
        return UnreadableRecord(f"not valid JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError):  # thousands of nested brackets, or a number of thousands of digits
        return UnreadableRecord("this JSON cannot be read: it is nested too deeply, or a number is too long")
    if not isinstance(record, dict):
        return UnreadableRecord('not a JSON object; each line must be one, such as {"id": "a", "text": "…"}')
    return _from_mapping(record, fields)


def _json(name: str, file: BinaryIO, fields: Fields, form: Form) -> Iterator[tuple[str, Record]]:
    with io.TextIOWrapper(file, "utf-8", "surrogateescape") as text:
        for line, source, record in elements(name, text, MAX_RECORD_BYTES):
            place = f"{name}:{line}"
            if problem := problem_in(source, form.encoding):
                yield place, UnreadableRecord(problem)
            elif not isinstance(record, dict):
                yield (
                    place,
                    UnreadableRecord('not a JSON object; each element must be one, such as {"id": "a", "text": "…"}'),
                )
            else:
                yield place, _from_mapping(record, fields)


def _from_cells(columns: Sequence[str], row: Row, fields: Fields, form: Form) -> Record:
    if row.problem is not None:
        return UnreadableRecord(row.problem)
    for column, cell in zip(columns, row.cells, strict=True):
        if wrong := problem_in(cell, form.encoding):
            return UnreadableRecord(f"in column {column!r}, {wrong}")
    record: dict[str, Any] = dict(zip(columns, row.cells, strict=True))
    if form.typed:
        needed = (fields.id, fields.text)
        record = {column: cell if column in needed else typed(cell) for column, cell in record.items()}
    return _from_mapping(record, fields)


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
            columns = None
            if fields.metadata is not None:
                columns = [*(field for _, field in fields.named), *fields.metadata]
            if is_export:
                columns = ["id", "text", "metadata"]
            number = 0
            for row_group in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                read = [_in_microseconds(arrow, column) for column in row_group.columns]
                for row in _rows(arrow.table(read, names=row_group.schema.names)):
                    number += 1
                    place = f"{path}:row {number}"
                    if isinstance(row, UnreadableRecord):
                        yield place, row
                    else:
                        yield place, _from_export(row) if is_export else _from_row(row, fields)
    except (arrow_error, OSError) as error:
        raise InvalidInput(f"{path}: this Parquet file cannot be read: {error}. Write it again.") from None


_NOT_PYTHON = (ValueError, ArithmeticError, LookupError)
"""What Arrow raises for a value that Python cannot hold: bytes that are no UTF-8, the year 10000, an unknown zone."""


def _rows(table: Any) -> list[dict[str, Any] | UnreadableRecord]:
    """The rows of an Arrow table. If one cannot be read, the others can."""
    try:
        rows: list[dict[str, Any] | UnreadableRecord] = table.to_pylist()
    except _NOT_PYTHON:
        return [_row(table, number) for number in range(table.num_rows)]
    return rows


def _row(table: Any, number: int) -> dict[str, Any] | UnreadableRecord:
    row: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            row[name] = column[number].as_py()
        except _NOT_PYTHON:
            return UnreadableRecord(
                f"the field {name!r} holds a value that cannot be read, such as text that is not valid UTF-8 or a time "
                "after the year 9999: choose the columns to keep with --metadata-field"
            )
    return row


def _cut_at(place: object, chunks: Iterator[Chunk | UncutDocument]) -> Iterator[tuple[str, Record]]:
    for chunk in chunks:
        yield str(place), UnreadableRecord(chunk.problem, chunk.name) if isinstance(chunk, UncutDocument) else chunk


def _folder(
    root: Path, skipped: SkippedEntries, form: Form, suffixes: Set[str], cutter: Cutter | None
) -> Iterator[tuple[str, Record]]:
    is_empty = True
    for document in documents(root, skipped, suffixes):
        is_empty = False
        path = root / document.name
        if cutter is None:
            yield str(path), _from_document(document, form)
        else:
            yield from _cut_at(path, cutter.document(document, path, skipped, form.encoding))
    if is_empty:
        others = skipped.of_other_kinds(DOCUMENT_SUFFIXES if cutter is None else ())
        reasons = "; ".join(filter(None, [str(skipped) if skipped.count else "", others]))
        why = f" ({reasons})" if reasons else ""
        kinds = ".txt, .md or .rst" if cutter is None else "text, Markdown, HTML, PDF or source"
        if cutter is not None and cutter.suffixes is not DOCUMENT_SUFFIXES:
            kinds = " or ".join(sorted(cutter.suffixes))
        raise InvalidInput(f"the folder {root} contains no {kinds} file{why}. Name another folder.")


def _require_distinct(sources: Sequence[Path], suffixes: Set[str]) -> None:
    """Raise :class:`InvalidInput` if files of two sources would have the same id, so that one would replace the other.

    The id of a file is its path inside its folder, and its name if it is a source itself. A file that is named twice,
    or beside its own folder, is the same document.
    """
    if len(sources) < 2:
        return
    roots: dict[str, tuple[int, Path]] = {}
    for number, source in enumerate(sources):
        is_folder = source.is_dir()
        names = (file.name for file in documents(source, SkippedEntries(), suffixes)) if is_folder else [source.name]
        for name in names:
            path = source / name if is_folder else source
            first, other = roots.setdefault(name, (number, path))
            are_folders = is_folder and sources[first].is_dir()
            if first == number or (not are_folders and other.resolve() == path.resolve()):
                continue
            raise InvalidInput(
                f"{other} and {path} would have the same id {name!r}, and one would replace the other. Pass "
                "--prefix-ids, so that each id begins with its source, or name the folder above both, so that their "
                "ids begin with their folders, or use two collections."
            )


def _from_document(document: FolderFile, form: Form) -> Record:
    if document.problem is not None:
        return UnreadableRecord(document.problem, document.name if document.has_no_id else None)
    try:
        with document.open() as file:
            content = unpacked(file, document.name)[0].read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            problem = f"the file is longer than {MAX_TEXT_BYTES:,} bytes; split it into chunks"
            return UnreadableRecord(problem, document.name)
        text = document_text(content, form.encoding)
    except OSError as error:
        return UnreadableRecord(f"cannot be read: {error.strerror}", document.name)
    except ValueError as error:
        return UnreadableRecord(str(error), document.name)
    return Chunk(document.name, text, {"path": document.name})


def _require_columns(place: str, columns: Sequence[str], fields: Fields) -> None:
    for option, column in [*fields.named, *(("--metadata-field", name) for name in fields.metadata or ())]:
        if column not in columns:
            if _is_without_texts(columns, fields):
                raise InvalidInput(f"{place}: {_WITHOUT_TEXTS}.")
            raise InvalidInput(
                f"{place}: there is no column {column!r}; it has {_listed(columns)}. Name the right one with {option}"
                f"{_HINTS.get(option, '')}.{_ONE_COLUMN if len(columns) == 1 else ''}"
            )
    if twice := [column for column, n in Counter(columns).items() if n > 1]:
        raise InvalidInput(f"{place}: several columns are called {twice[0]!r}. Give each a name of its own.")


_HINTS = {"--id-field": f", or pass --id-field {AUTO_ID} to make ids of what the rows hold"}
_ONE_COLUMN = " If something else than a comma separates the columns, name it with --delimiter."


def _listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - NAMED_COLUMNS:,} more" if len(columns) > NAMED_COLUMNS else ""
    return (", ".join(repr(column[:100]) for column in columns[:NAMED_COLUMNS]) or "none") + more


def _from_mapping(record: Mapping[str, Any], fields: Fields) -> Record:
    if _is_exported(record, fields):
        return _from_export(record)
    for option, field in fields.named:
        if field not in record:
            if _is_without_texts(record, fields):
                return UnreadableRecord(_WITHOUT_TEXTS)
            none = f", or give every record an id made of what it holds: {option} {AUTO_ID}"
            return UnreadableRecord(
                f"there is no field {field!r}; name the right one with {option}{none if option == '--id-field' else ''}"
            )
    if fields.metadata is not None:
        kept = {*(field for _, field in fields.named), *fields.metadata}
        record = {name: value for name, value in record.items() if name in kept}
    given = record.get("metadata")
    if given is not None and not isinstance(given, dict):
        # This column only happens to have the name `metadata`.
        given = {"metadata": given}
    named = {field for _, field in fields.named}
    rest = {name: value for name, value in record.items() if name not in named and name != "metadata"}
    metadata = rest | (given or {})
    text = record[fields.text]
    return Chunk(_id_of(text, metadata) if fields.id == AUTO_ID else record[fields.id], text, metadata)


def _id_of(text: object, metadata: Mapping[str, Any]) -> str:
    """An id made of what the record holds: the first 128 bits of a hash, as 32 hexadecimal digits.

    It stays as it is if other records come, go or move. Two records that hold the same are one chunk.
    """
    written = json.dumps([text, json_value(metadata)], sort_keys=True, default=repr)
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def _is_exported(names: Collection[str], fields: Fields) -> bool:
    """Whether a record with fields of these names was written by `chunkmill export`, with its text."""
    from chunkmill.domain.stored import EXPORTED  # it imports numpy, which `enqueue --help` does not need

    return fields == Fields() and {*names, "vector"} == EXPORTED


_WITHOUT_TEXTS = "the chunks were exported without their texts; export them again, without --no-text"


def _is_without_texts(names: Collection[str], fields: Fields) -> bool:
    """Whether a record with fields of these names was written by `chunkmill export --no-text`."""
    return "text" not in names and _is_exported([*names, "text"], fields)


def _from_export(record: Mapping[str, Any]) -> Record:
    """The chunk as it was exported. Its vector is looked up by its text, or made again."""
    metadata = record["metadata"]
    if isinstance(metadata, str):  # as Parquet has it
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError):
            metadata = None
    if not isinstance(metadata, dict):
        return UnreadableRecord("the field 'metadata' of an exported chunk must be a JSON object")
    return Chunk(record["id"], record["text"], metadata)


def _from_row(row: Mapping[str, Any], fields: Fields) -> Record:
    """The chunk of a Parquet row, with its values as JSON has them."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        try:
            values[name] = json_value(_maps(value), name)
        except NotJson as error:
            return UnreadableRecord(f"{error}: choose the columns to keep with --metadata-field")
    return _from_mapping(values, fields)


def _maps(value: Any) -> Any:
    """The value with Arrow's maps, which come as lists of pairs, as objects."""
    if isinstance(value, dict):
        return {name: _maps(inner) for name, inner in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(pair, tuple) and isinstance(pair[0], str) for pair in value):
            return {name: _maps(inner) for name, inner in value}
        return [_maps(inner) for inner in value]
    return value


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
