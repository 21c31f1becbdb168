"""Chunks as producers give them, and their checks before anything is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from chunkmill.domain.json_values import json_value
from chunkmill.domain.shapes import as_id, parts_of
from chunkmill.errors import InvalidChunk

MAX_ID_BYTES = 1024
"""The most bytes of a chunk id. It is part of a B-tree key; Postgres refuses keys of more than about 2,700 bytes."""

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""The most bytes of a text. A chunk is a passage: if it is larger, something went wrong before."""

MAX_METADATA_BYTES = 1024 * 1024
"""The most bytes of a chunk's metadata as JSON. It is what a search filters by, and bounds a window with the text."""

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # an escaped NUL, not an escaped backslash before "u0000"
# Made once, because json.dumps with any option makes a new encoder in each call.
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of text."""

    id: str
    """The producer's own id, which is unique in the collection."""
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """A JSON object, by which a search can filter. Dates and times become text in ISO 8601, and NaN becomes null; so
    do other values that have one plain form in JSON (:func:`chunkmill.domain.json_values.json_value`)."""


@dataclass(frozen=True, slots=True)
class PreparedChunk:
    """A valid chunk in the form in which it is stored."""

    id: str
    text: bytes
    """UTF-8."""
    metadata: str
    """JSON."""
    content_hash: bytes
    """32 bytes, see `content_hash`."""


def content_hash(text: str) -> bytes:
    """32 bytes: the SHA-256 of the text's exact UTF-8 bytes. The text is not normalised first."""
    return hashlib.sha256(text.encode()).digest()


def prepare(item: object, position: int) -> PreparedChunk:
    """The chunk of one item of an ``enqueue`` iterable. Raises :class:`InvalidChunk`, which says what is wrong with it.

    An item is a :class:`Chunk` or one of the shapes that :func:`parts_of` takes. An id that is a whole number or a UUID
    becomes its text. A :class:`PreparedChunk` is returned as it is. An :class:`InvalidChunk` stands for an item that
    its source could not read; it is raised as it is. ``position`` counts the items from 0.
    """
    if isinstance(item, PreparedChunk):
        return item
    if isinstance(item, InvalidChunk):
        raise item
    chunk = _as_chunk(item, position)
    known_id: str | None = None

    def refuse(reason: str, problem: str) -> InvalidChunk:
        return InvalidChunk(problem, chunk_id=_shown(chunk.id), position=position, reason=reason, known_id=known_id)

    if not isinstance(chunk.id, str):
        raise refuse("id_not_text", f"the id is of type {type(chunk.id).__name__}; it must be a str")
    if not chunk.id:
        raise refuse("empty_id", "the id is empty; give every chunk an id that is unique in its collection")
    if "\x00" in chunk.id:
        raise refuse("nul_in_id", "the id contains a NUL character, which Postgres cannot store")
    if (id_bytes := _utf8(chunk.id)) is None:
        raise refuse("surrogate_in_id", "the id contains a lone surrogate, which is not valid Unicode")
    if len(id_bytes) > MAX_ID_BYTES:
        raise refuse("id_too_long", f"the id has {len(id_bytes)} bytes; the limit is {MAX_ID_BYTES}")
    known_id = chunk.id
    if not isinstance(chunk.text, str):
        raise refuse("text_not_text", f"the text is of type {type(chunk.text).__name__}; it must be a str")
    if not chunk.text or chunk.text.isspace():
        raise refuse("empty_text", "the text is empty or only white space; there is nothing to embed")
    if "\x00" in chunk.text:
        raise refuse("nul_in_text", "the text contains a NUL character; remove it: text.replace('\\0', '')")
    if (text := _utf8(chunk.text)) is None:
        raise refuse(
            "surrogate_in_text",
            "the text contains a lone surrogate, so it was decoded wrongly; "
            "clean it: text.encode('utf-8', 'replace').decode()",
        )
    if len(text) > MAX_TEXT_BYTES:
        raise refuse("text_too_long", f"the text has {len(text):,} bytes; the limit is {MAX_TEXT_BYTES:,}")
    try:
        metadata = metadata_json(chunk.metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise refuse("bad_metadata", f"the metadata is not a JSON object that jsonb can hold: {error}") from None
    if (size := len(metadata.encode())) > MAX_METADATA_BYTES:
        raise refuse(
            "metadata_too_long",
            f"the metadata has {size:,} bytes as JSON; the limit is {MAX_METADATA_BYTES:,}: keep what searches filter "
            "by, and the rest where the id leads",
        )
    return PreparedChunk(chunk.id, text, metadata, hashlib.sha256(text).digest())


class StreamDigest:
    """The digest of a stream of chunks: the same for the same ids, texts and metadata in any order.

    A source without an order of its own, such as a query, may give its chunks in another one the next time.
    """

    def __init__(self) -> None:
        self._sum = 0

    def add(self, chunk: PreparedChunk) -> None:
        metadata = chunk.metadata
        if metadata != "{}":
            metadata = json.dumps(json.loads(metadata), sort_keys=True)
        head = chunk.id.encode()
        one = hashlib.sha256(len(head).to_bytes(4, "big") + head + chunk.content_hash + metadata.encode())
        self._sum = (self._sum + int.from_bytes(one.digest(), "big")) % 2**256

    def digest(self) -> bytes:
        """32 bytes."""
        return self._sum.to_bytes(32, "big")


def prepare_all(items: Iterable[object]) -> Iterator[PreparedChunk]:
    """The chunks of a stream. Raises :class:`InvalidChunk` at the first invalid one."""
    return (prepare(item, position) for position, item in enumerate(items))


def prepare_or_skip(items: Iterable[object]) -> Iterator[PreparedChunk | InvalidChunk]:
    """The chunks of a stream. In place of an invalid chunk comes its error, and the stream goes on."""
    for position, item in enumerate(items):
        try:
            yield prepare(item, position)
        except InvalidChunk as error:
            yield error.with_traceback(None)  # the frames would keep the text in memory


def _as_chunk(item: object, position: int) -> Chunk:
    if type(item) is Chunk and isinstance(item.id, str):
        return item
    try:
        chunk_id, text, metadata = parts_of(item)
    except ValueError as problem:
        shown = item.get("id", "") if isinstance(item, Mapping) else ""
        raise InvalidChunk(str(problem), chunk_id=_shown(shown), position=position, reason="bad_shape") from None
    return Chunk(as_id(chunk_id), text, metadata)


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def _shown(chunk_id: object) -> str:
    """The id in a form that any message, log and text column can hold: at most 200 characters without NUL."""
    shown = chunk_id if isinstance(chunk_id, str) else repr(chunk_id)
    return shown.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()[:200]


def metadata_json(metadata: object) -> str:
    """The JSON of a metadata object, with its values as :func:`json_value` has them.

    Raises TypeError, ValueError or RecursionError if jsonb cannot hold it.
    """
    if not metadata:
        if metadata is None or isinstance(metadata, Mapping):
            return "{}"
        raise TypeError(f"it is of type {type(metadata).__name__}")
    if not isinstance(metadata, Mapping):
        raise TypeError(f"it is of type {type(metadata).__name__}")
    try:
        dumped = _encode_json(dict(metadata))
    except (TypeError, ValueError):
        # Most metadata are JSON as they are, and the encoder in C is ten times as fast as a look at each value.
        dumped = _encode_json(json_value(metadata))
    if _NUL.search(dumped):
        raise ValueError("it contains a NUL character")
    if _utf8(dumped) is None:
        raise ValueError("it contains a lone surrogate")
    return dumped
