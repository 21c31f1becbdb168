"""Writes chunks into a Parquet file or JSON lines. The file appears under its name only once it is complete."""

from __future__ import annotations

import contextlib
import errno
import gzip
import importlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.stored import StoredChunk
from chunkmill.errors import InvalidInput, install_command
from chunkmill.system.numbers import np

GROUP_ROWS, GROUP_BYTES = 10_000, 32 * 1024 * 1024
"""A row group of a Parquet file, which is in memory until it is written, has at most so many rows and about so many
bytes."""
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET = (".parquet",)


class Writer(Protocol):
    """Writes chunks into a file that is open."""

    def write(self, chunk: StoredChunk) -> None: ...

    def close(self) -> None:
        """Write what is still in memory. The file stays open."""


def writer_for(path: Path, *, with_text: bool, with_vector: bool, space: SpaceSpec, collection: str) -> WriterFactory:
    """What makes the writer of the format that the file's name says. Raises :class:`InvalidInput`."""
    name = path.name.lower()
    if name.endswith(JSON_LINES):
        return WriterFactory(
            _JsonLines, {"with_text": with_text, "with_vector": with_vector, "zip_": name[-3:] == ".gz"}
        )
    if not name.endswith(PARQUET):
        raise InvalidInput(
            f"{path}: the format is not known from the name. Give the file a name that ends with "
            f"{', '.join((*PARQUET, *JSON_LINES[:-1]))} or {JSON_LINES[-1]}."
        )
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InvalidInput(f"{path}: writing Parquet needs pyarrow. Run: {install_command('parquet')}") from None
    about = {"collection": collection, "model": space.model, "space": space.fingerprint}
    given = {"with_text": with_text, "with_vector": with_vector, "dimensions": space.dimensions, "about": about}
    return WriterFactory(_Parquet, given)


class WriterFactory:
    """Makes a writer for a file once the file is open."""

    def __init__(self, kind: type[_JsonLines] | type[_Parquet], given: dict[str, Any]) -> None:
        self._kind, self._given = kind, given

    def __call__(self, file: BinaryIO) -> Writer:
        return self._kind(file, **self._given)


class _JsonLines:
    def __init__(self, file: BinaryIO, *, with_text: bool, with_vector: bool, zip_: bool) -> None:
        # Without a name and a time, so that the same chunks make the same file.
        self._zip = gzip.GzipFile("", "wb", 6, file, mtime=0) if zip_ else None
        self._file: Any = self._zip or file
        self._with_text, self._with_vector = with_text, with_vector

    def write(self, chunk: StoredChunk) -> None:
        head: dict[str, Any] = {"id": chunk.id}
        if self._with_text:
            head["text"] = chunk.text
        head["metadata"] = chunk.metadata
        line = json.dumps(head, ensure_ascii=False)[:-1]
        if self._with_vector:
            # Nine digits tell every float32 from every other.
            numbers = None if chunk.vector is None else ", ".join(["%.9g" % x for x in chunk.vector.tolist()])  # noqa: UP031
            line += ', "vector": ' + ("null" if numbers is None else f"[{numbers}]")
        tail = json.dumps({"truncated": chunk.truncated, "content_hash": chunk.content_hash})[1:]
        self._file.write(f"{line}, {tail}\n".encode())

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()


class _Parquet:
    def __init__(
        self, file: BinaryIO, *, with_text: bool, with_vector: bool, dimensions: int, about: dict[str, str]
    ) -> None:
        self._arrow = importlib.import_module("pyarrow")
        self._with_text, self._with_vector, self._dimensions = with_text, with_vector, dimensions
        arrow = self._arrow
        fields = [("id", arrow.string()), ("metadata", arrow.string())]
        if with_text:
            fields.insert(1, ("text", arrow.string()))
        if with_vector:
            fields.append(("vector", arrow.list_(arrow.float32(), dimensions)))
        fields += [("truncated", arrow.bool_()), ("content_hash", arrow.string())]
        self._schema = arrow.schema(fields, metadata={"chunkmill": json.dumps(about)})
        # A dictionary of vectors or texts would only cost memory, because they are all different.
        self._writer = importlib.import_module("pyarrow.parquet").ParquetWriter(
            file, self._schema, use_dictionary=False, write_statistics=["id", "truncated"]
        )
        self._rows: list[StoredChunk] = []
        self._metadata: list[str] = []
        self._bytes = 0

    def write(self, chunk: StoredChunk) -> None:
        metadata = json.dumps(chunk.metadata, ensure_ascii=False)
        self._rows.append(chunk)
        self._metadata.append(metadata)
        self._bytes += len(chunk.text or "") + len(metadata) + (4 * self._dimensions if self._with_vector else 0)
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        try:
            if self._rows:
                self._flush()
            self._writer.close()
        finally:
            self._writer.is_open = False  # otherwise it would write its end again when it is garbage-collected

    def _flush(self) -> None:
        rows, arrow = self._rows, self._arrow
        columns: dict[str, Any] = {
            "id": [chunk.id for chunk in rows],
            "metadata": self._metadata,
            "truncated": [chunk.truncated for chunk in rows],
            "content_hash": [chunk.content_hash for chunk in rows],
        }
        if self._with_text:
            columns["text"] = [chunk.text for chunk in rows]
        if self._with_vector:
            columns["vector"] = self._vectors(rows)
        arrays = [
            arrow.array(columns[field.name], field.type) if isinstance(columns[field.name], list) else columns["vector"]
            for field in self._schema
        ]
        self._writer.write_batch(arrow.record_batch(arrays, schema=self._schema))
        self._rows, self._metadata, self._bytes = [], [], 0

    def _vectors(self, rows: Sequence[StoredChunk]) -> Any:
        numbers = np.zeros((len(rows), self._dimensions), np.float32)
        is_missing = np.zeros(len(rows), np.bool_)
        for i, chunk in enumerate(rows):
            if chunk.vector is None:
                is_missing[i] = True
            else:
                numbers[i] = chunk.vector
        return self._arrow.FixedSizeListArray.from_arrays(
            self._arrow.array(numbers.ravel()),
            type=self._schema.field("vector").type,
            mask=self._arrow.array(is_missing),
        )


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raise :class:`InvalidInput` if there is a file that may not be overwritten, or something that is not a file."""
    with told(path):
        if not path.parent.is_dir():
            raise InvalidInput(f"{path} cannot be written: there is no folder {str(path.parent)!r}.")
        if not os.path.lexists(path):
            return
        if not path.is_file() and not path.is_symlink():
            raise InvalidInput(f"{path} cannot be written: it is not a regular file.")
    if not overwrite:
        raise _exists(path)


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file that gets its name ``path`` when the block ends. If the block raises, nothing is left.

    Raises :class:`InvalidInput` if it cannot be written, or if another file has taken the name meanwhile and may not be
    overwritten.
    """
    with told(path):
        part = path.with_name(f".chunkmill-{secrets.token_hex(8)}.part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb", buffering=1 << 20) as file:
            yield file
            with told(path):
                file.flush()
                os.fsync(file.fileno())
        with told(path):
            if overwrite:
                part.replace(path)
            else:
                _name(part, path)
    finally:
        part.unlink(missing_ok=True)


def _name(part: Path, path: Path) -> None:
    """Give the file its name, unless another file has it."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links, such as exFAT.
        if os.path.lexists(path):
            raise _exists(path) from None
        part.rename(path)


def _exists(path: Path) -> InvalidInput:
    return InvalidInput(
        f"{path} exists already. Give another name, or --force (in Python: overwrite=True) to replace the file."
    )


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Raise :class:`InvalidInput` for an error of the operating system about the file."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be written: {error.strerror or error}. Nothing is left of it. Check the folder, its rights "
            "and the room on its disk."
        ) from error
