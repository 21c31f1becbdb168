"""Reads documents: from a file's bytes to one text with its blocks."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import tokenize
import zlib
from typing import BinaryIO, Final, cast

from chunkmill.chunking.document import Block, Document, Kind, paragraphs, trimmed
from chunkmill.chunking.html import read_html
from chunkmill.chunking.libraries import library
from chunkmill.chunking.pdf import read_pdf

MAX_DOCUMENT_BYTES: Final = 64 * 1024 * 1024
"""The most bytes of a document other than a PDF, which is read page by page. It is in memory while it is cut."""

_FRONT_MATTER: Final = re.compile(r"\A---[ \t]*\n.*?\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_META_CHARSET: Final = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_HEAD_BYTES: Final = 4096
_MARKUP: Final = re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)|[`*]+|</?[A-Za-z][^>\n]*>")


class UnreadableDocument(ValueError):
    """A document that cannot be read. The message says why, without its text."""


def read(file: BinaryIO, kind: Kind, name: str) -> Document:
    """The document in ``file``, which is open for reading in binary.

    ``name`` says whether it is compressed with gzip, and how code states its encoding. Raises
    :class:`UnreadableDocument`, OSError, and :class:`InvalidInput` if a library is not installed.
    """
    file, name = unpacked(file, name)
    if kind is Kind.PDF:
        try:
            return read_pdf(file)
        except ValueError as error:
            raise UnreadableDocument(str(error)) from None
    return read_text(_decoded(content_of(file), kind, name), kind)


def unpacked(file: BinaryIO, name: str) -> tuple[BinaryIO, str]:
    """A file and its name without ``.gz`` at the end, if that is there. Otherwise both are returned as they are.

    Raises :class:`UnreadableDocument` if it cannot be unpacked, or has more than :data:`MAX_DOCUMENT_BYTES` then.
    """
    if not name.lower().endswith(".gz"):
        return file, name
    try:
        with gzip.GzipFile(fileobj=file) as packed:
            content = content_of(cast("BinaryIO", packed))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UnreadableDocument("the gzip file is damaged or incomplete; write it again") from None
    return io.BytesIO(content), name[:-3]


def content_of(file: BinaryIO) -> bytes:
    """What is in the file. Raises :class:`UnreadableDocument` if that is more than :data:`MAX_DOCUMENT_BYTES`."""
    content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise UnreadableDocument(f"the file is longer than {MAX_DOCUMENT_BYTES:,} bytes; split it into several files")
    return content


def read_text(text: str, kind: Kind) -> Document:
    """The document of a text. Ends of lines become ``\\n``, so positions are those in the document's own text.

    Raises :class:`UnreadableDocument` for a page that nests too deeply.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if kind is Kind.HTML:
        try:
            return read_html(text)
        except ValueError as error:
            raise UnreadableDocument(str(error)) from None
    return _markdown(text) if kind is Kind.MARKDOWN else Document(text, paragraphs(text, 0, len(text)))


def _decoded(content: bytes, kind: Kind, name: str) -> str:
    encoding = "utf-8-sig"
    if kind is Kind.HTML:
        encoding = _html_encoding(content)
    elif name.lower().endswith((".py", ".pyi")):
        try:
            encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0]
        except SyntaxError:
            raise UnreadableDocument(
                "the encoding that its first lines state is not known, or it is not valid UTF-8"
            ) from None
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        known = "UTF-8" if encoding.startswith("utf-8") else encoding
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableDocument(f"not valid {known} at byte {error.start + 1:,}, in line {line:,}") from None


def _html_encoding(content: bytes) -> str:
    """What a byte order mark or a meta element states, as browsers read it; otherwise UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    stated = _META_CHARSET.search(content[:_HEAD_BYTES])
    if stated is None or content.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    try:
        encoding = codecs.lookup(stated[1].decode("ascii")).name
    except LookupError:
        return "utf-8-sig"
    if encoding.startswith(("utf-8", "utf-16")):  # a page that can be searched for this word is not UTF-16
        return "utf-8-sig"
    return "cp1252" if encoding in ("iso8859-1", "ascii") else encoding


def _markdown(text: str) -> Document:
    """The blocks that CommonMark sees, with tables. What stands before the first line of text may be front matter."""
    parser = library("markdown_it").MarkdownIt("commonmark").enable("table").disable("inline")
    front = _FRONT_MATTER.match(text)
    begin = front.end() if front else 0
    blocks = paragraphs(text, 0, begin)
    body = text[begin:]
    lines = [begin]  # where each line begins
    lines += (begin + match.end() for match in re.finditer(r"\n", body))
    if lines[-1] != len(text):
        lines.append(len(text))
    tokens = parser.parse(body)
    for index, token in enumerate(tokens):
        if token.level or token.nesting < 0 or token.map is None:
            continue
        first, after = token.map
        block = trimmed(text, lines[first], lines[min(after, len(lines) - 1)])
        if block is None:
            continue
        if token.type == "heading_open":
            title = " ".join(_MARKUP.sub(r"\1", tokens[index + 1].content).split())
            block = Block(block.start, block.end, int(token.tag[1:]), title)
        blocks.append(block)
    return Document(text, _with_gaps(text, blocks))


def _with_gaps(text: str, blocks: list[Block]) -> list[Block]:
    """The blocks, and what stands between them: CommonMark gives definitions of links no block."""
    complete: list[Block] = []
    at = 0
    for block in blocks:
        if block.start > at:
            complete += paragraphs(text, at, block.start)
        complete.append(block)
        at = max(at, block.end)
    return complete + paragraphs(text, at, len(text))
