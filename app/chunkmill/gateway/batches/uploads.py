"""Uploads: the body of ``POST /v1/files``, streamed into pieces in Postgres. One piece is in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import sqlalchemy as sa
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from chunkmill.client.base import store_errors
from chunkmill.domain.served import FILE_SECONDS, MAX_FILE_BYTES
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.fields import invalid
from chunkmill.ledger.served import files
from chunkmill.ledger.served.files import PIECE_BYTES, ServedFile

MAX_FIELD_BYTES: Final = 4_096
"""The most bytes of a field that is not the file."""
MAX_FORM_BYTES: Final = 64 * 1024
"""Bytes of a form beside those of its file."""
MAX_FILENAME: Final = 255
LEAST_SECONDS, MOST_SECONDS = 3_600, 2_592_000
"""OpenAI's bounds of ``expires_after.seconds``."""

T = TypeVar("T")


@dataclass(slots=True)
class _Form:
    """What the parser has seen of a form. ``waiting`` are bytes of the file that are not written yet."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    waiting: bytearray = field(default_factory=bytearray)
    n_bytes: int = 0
    is_whole: bool = False
    _name: str = ""
    _is_file: bool = False
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._add_header,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_part_data": self._add_data,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def _begin(self) -> None:
        self._name, self._is_file = "", False
        self._header.clear()
        self._value.clear()

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            filename = options.get(b"filename")
            if self._name == "file":
                if self.filename is not None:
                    raise invalid("file", "is given twice. Upload one file at a time.")
                self._is_file = True
                self.filename = (filename or b"").decode("utf-8", "replace")
        self._header.clear()
        self._value.clear()

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.n_bytes += end - start
            if self.n_bytes > MAX_FILE_BYTES:
                raise _too_large()
            self.waiting += data[start:end]
        else:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise invalid("body", f"has a field of more than {MAX_FIELD_BYTES:,} bytes that is not 'file'.")

    def _end(self) -> None:
        if not self._is_file:
            if len(self.fields) == 16:
                raise invalid("body", "has more than 16 fields.")
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _finish(self) -> None:
        self.is_whole = True


async def receive(db: sa.Engine, request: Request, tenant: str) -> ServedFile:
    """Take a file in. Nobody sees it before all of it is committed. Raises :class:`Refusal`.

    If the upload ends early its pieces are deleted at once; if this process dies, a poller deletes them.
    """
    form = _Form()
    parser = form.parser(_boundary(request))
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_FILE_BYTES + MAX_FORM_BYTES:
        raise _too_large()
    file_id = await _write(db, lambda conn: files.begin(conn, tenant))
    try:
        n_pieces = n_bytes = 0
        async for data in request.stream():
            n_bytes += len(data)
            try:
                parser.write(data)
            except FormParserError:
                raise invalid("body", "is not a multipart form that can be read.", "invalid_multipart") from None
            _require_size(n_bytes - form.n_bytes)
            while len(form.waiting) >= PIECE_BYTES:
                await _take_piece(db, form, file_id, n_pieces)
                n_pieces += 1
        filename, seconds = _checked(form)
        if form.waiting:
            await _take_piece(db, form, file_id, n_pieces)
        return await _write(
            db,
            lambda conn: files.finish(conn, file_id, filename=filename, n_bytes=form.n_bytes, seconds=seconds),
        )
    except ClientDisconnect:
        await _discard(db, file_id)
        raise Refusal(499, "client_closed", "the client went away.") from None
    except BaseException:
        await _discard(db, file_id)
        raise


def _require_size(n_bytes: int) -> None:
    """Raise :class:`Refusal` if a form has too much beside its file, announced or not."""
    if n_bytes > MAX_FORM_BYTES:
        raise invalid("body", f"has more than {MAX_FORM_BYTES:,} bytes beside those of its file.")


async def _take_piece(db: sa.Engine, form: _Form, file_id: int, number: int) -> None:
    piece = bytes(form.waiting[:PIECE_BYTES])
    del form.waiting[:PIECE_BYTES]
    await _write(db, lambda conn: files.add_piece(conn, file_id, number, piece))


async def _discard(db: sa.Engine, file_id: int) -> None:
    # A poller deletes it otherwise. The caller is told why the upload failed, and not why this did.
    with contextlib.suppress(Exception):
        await asyncio.shield(_write(db, lambda conn: files.discard(conn, file_id)))


async def _write(db: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
    def run() -> T:
        with store_errors(db), db.begin() as conn:
            return work(conn)

    return await asyncio.to_thread(run)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Refusal(
            415, "unsupported_media_type", "the body must be multipart/form-data with the fields file and purpose."
        )
    return boundary


def _checked(form: _Form) -> tuple[str, int]:
    """The name of the file, and the seconds for which it is kept. Raises :class:`Refusal`."""
    if not form.is_whole:
        raise invalid("body", "ends before its form does.", "invalid_multipart")
    purpose = form.fields.get("purpose")
    if form.filename is None:
        raise invalid("file", "is missing.", "missing_required_parameter")
    if purpose is None:
        raise invalid("purpose", "is missing.", "missing_required_parameter")
    if purpose != "batch":
        raise invalid("purpose", "must be 'batch'. This server keeps no other files.", "invalid_value")
    filename = form.filename.replace("\0", "").replace("\\", "/").rpartition("/")[2]
    if not filename.endswith(".jsonl"):
        message = "Invalid file format for Batch API. Must be .jsonl"
        raise Refusal(400, "invalid_file_format", message, param="file")
    if len(filename) > MAX_FILENAME:
        raise invalid("file", f"has a name of more than {MAX_FILENAME} characters.")
    anchor, seconds = form.fields.get("expires_after[anchor]"), form.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return filename, FILE_SECONDS
    whole = int(seconds) if seconds is not None and seconds.isascii() and seconds.isdecimal() else None
    return filename, expiry("expires_after", {"anchor": anchor, "seconds": whole})


def expiry(param: str, given: object) -> int:
    """The seconds of an ``expires_after`` object. Raises :class:`Refusal`."""
    if not isinstance(given, dict):
        raise invalid(param, "must be an object with 'anchor' and 'seconds'.")
    if given.get("anchor") != "created_at":
        raise invalid(f"{param}.anchor", "must be 'created_at'.", "invalid_value")
    seconds = given.get("seconds")
    if type(seconds) is not int or not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise invalid(
            f"{param}.seconds", f"must be a whole number from {LEAST_SECONDS} to {MOST_SECONDS}.", "invalid_value"
        )
    return seconds


def _too_large() -> Refusal:
    return Refusal(
        413, "file_too_large", f"File is too large. It may have {MAX_FILE_BYTES:,} bytes; upload several.", param="file"
    )
