"""Files of text in any encoding, plain or compressed, as a stream of bytes in UTF-8.

What is not valid in its encoding is not lost and ends nothing: a byte that cannot be decoded comes out as three bytes
that are not valid UTF-8 either (a lone surrogate), and the record that holds it is refused by its place.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from chunkmill.errors import InvalidInput
from chunkmill.system.files import open_regular

PIECE = 64 * 1024
"""How many bytes are decoded at a time."""
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # before UTF-16, of which the first is a longer form
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_WITHOUT_MARK = ("utf-8-sig", "utf-16", "utf-32")
"""Encodings whose decoders leave the mark at the beginning out."""
_ESCAPED = re.compile("[\udc80-\udcff]")
_ESCAPED_BYTES = re.compile(rb"\xed[\xb0-\xb3][\x80-\xbf]")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """As Python's ``surrogateescape``, but for any byte: one below 0x80 may be wrong too, such as half of two."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("chunkmill.escape", _escape)


def encoding_named(name: str) -> str:
    """The encoding, if Python knows one of this name for text. Raises :class:`InvalidInput`."""
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError):
        info = None
    if info is None or not getattr(info, "_is_text_encoding", True):
        raise InvalidInput(
            f"no encoding is called {name[:100]!r}. Common ones are utf-8, cp1252 (Western Europe on Windows), "
            "iso-8859-15 (Western Europe), cp1251 (Cyrillic), shift_jis, gb18030 and utf-16."
        )
    return info.name


@contextmanager
def opened(path: Path, encoding: str | None) -> Iterator[BinaryIO]:
    """The file as bytes in UTF-8, unpacked if its name ends in ``.gz``.

    Without an ``encoding`` it is UTF-8, or what the mark at its beginning (BOM) says. Raises OSError, and
    :class:`InvalidInput` for a broken gzip file.
    """
    with open_regular(path) as file:
        if not path.name.lower().endswith(".gz"):
            yield in_utf8(file, encoding)
            return
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield in_utf8(cast("BinaryIO", unpacked), encoding)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InvalidInput(f"{path}: this gzip file is broken or not complete: {error}. Write it again.") from None


def in_utf8(file: BinaryIO, encoding: str | None) -> BinaryIO:
    """``file`` as bytes in UTF-8 without the mark at the beginning. It is read as it is used, in small pieces."""
    head = b""
    if encoding is None or encoding == "utf-8":
        # A pipe gives what it has, so that nobody waits for a fourth byte that may come much later.
        while len(head) < 4 and (more := file.read(1)):
            head += more
            if not any(mark.startswith(head) for mark in (*_BOMS, codecs.BOM_UTF8)):
                break
        encoding = next((name for mark, name in _BOMS.items() if head.startswith(mark)), None)
    if encoding is None:
        head = head.removeprefix(codecs.BOM_UTF8)
        return cast("BinaryIO", io.BufferedReader(_Chained(head, file), PIECE))
    return cast("BinaryIO", io.BufferedReader(_Recoded(head, file, encoding), PIECE))


def document_text(content: bytes, encoding: str | None) -> str:
    """The text of a whole document. What is marked as UTF-16, or is valid UTF-8, is read so whatever ``encoding`` says.

    A folder has documents in several encodings, and only one can be named. That a longer text in another encoding is
    valid UTF-8 does not happen; one of ASCII alone may be in any encoding. Raises ValueError, which names the line.
    """
    if encoding is not None and not encoding.startswith("utf-"):
        is_marked = content.startswith(tuple(_BOMS))
        encoding = None if is_marked or (not content.isascii() and _is_utf8(content)) else encoding
    text = in_utf8(io.BytesIO(content), encoding).read().decode("utf-8", "surrogateescape")
    if wrong := problem_in(text, encoding):
        raise ValueError(f"in line {1 + text.count(chr(10), 0, first_problem(text)):,}, {wrong}")
    return text


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def problem_in(text: str, encoding: str | None) -> str | None:
    """What is wrong with a text if some of its bytes could not be decoded; None if all could. It quotes one byte."""
    if (wrong := _ESCAPED.search(text)) is None:
        return None
    # As many as a byte that was decoded wrongly takes after it was encoded, see the top.
    escaped = text[wrong.start() : wrong.start() + 3].encode("utf-8", "surrogateescape")
    if (pieces := _ESCAPED_BYTES.match(escaped)) is not None:
        return _said(_byte_of(pieces[0]), encoding)
    return _said(ord(wrong[0]) - 0xDC00, encoding)


def first_problem(text: str) -> int:
    """Where the first character stands for a byte that could not be decoded; -1 if all could."""
    wrong = _ESCAPED.search(text)
    return -1 if wrong is None else wrong.start()


def problem_in_bytes(line: bytes, encoding: str | None) -> str | None:
    """As :func:`problem_in`, for the bytes of a line."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        if (wrong := _ESCAPED_BYTES.match(line, error.start)) is not None:
            return _said(_byte_of(wrong[0]), encoding)
        return f"{_said(line[error.start], encoding)} (byte {error.start + 1} of the line)"
    return None


def _byte_of(escaped: bytes) -> int:
    return ord(escaped.decode("utf-8", "surrogatepass")) - 0xDC00


def _said(byte: int, encoding: str | None) -> str:
    if encoding in (None, "utf-8"):
        return f"the byte 0x{byte:02X} is not valid UTF-8; if the file has another encoding, name it: --encoding cp1252"
    return f"the byte 0x{byte:02X} is not valid in the encoding {encoding}; name the right one with --encoding"


class _Chained(io.RawIOBase):
    """The bytes ``head``, and then a file."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head = head
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._head or _some(self._file, len(buffer))
        self._head = piece[len(buffer) :]
        piece = piece[: len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


class _Recoded(io.RawIOBase):
    """A file in another encoding, as UTF-8."""

    def __init__(self, head: bytes, file: BinaryIO, encoding: str) -> None:
        self._decoder = codecs.getincrementaldecoder(encoding)("chunkmill.escape")
        self._file = file
        self._raw = head
        self._ready = b""
        self._is_over = False
        # Anywhere else this character is a part of the text, which nobody sees and which must stay.
        self._may_have_mark = codecs.lookup(encoding).name not in _WITHOUT_MARK

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready and not self._is_over:
            more = _some(self._file, PIECE)
            self._is_over = not more
            text = self._decoder.decode(self._raw + more, final=not more)
            self._raw = b""
            if text and self._may_have_mark:
                text, self._may_have_mark = text.removeprefix("\ufeff"), False
            self._ready = text.encode("utf-8", "surrogatepass")
        piece, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _some(file: BinaryIO, most: int) -> bytes:
    """Up to ``most`` bytes, without waiting for more than the first of them."""
    read1 = getattr(file, "read1", None)
    return cast("bytes", read1(most)) if read1 is not None else file.read(most)
