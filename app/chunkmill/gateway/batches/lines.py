"""The lines of an input file: read one by one, and judged without a database.

What is wrong with the file, such as a line that is not JSON or another model than that of the first line, fails the
batch. What is wrong with one request alone ends as a line of the error file, and the others are executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from chunkmill.domain.served import MAX_LINE_BYTES, MAX_LINES, chunk_id
from chunkmill.gateway.embedding import EmbeddingCall, TruncationSide
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.fields import invalid
from chunkmill.gateway.inputs import TokenIds, read_input
from chunkmill.gateway.routes.openai import read_body
from chunkmill.ledger.served.lines import Line

KEYS: Final = ("custom_id", "method", "url", "body")
MOST_ERRORS: Final = 20
"""How many errors of a file are told. The rest of the file is not read."""
MAX_CUSTOM_ID: Final = 512
"""The most characters of a ``custom_id``."""


@dataclass
class FileError(Exception):
    """Why a batch fails. ``line`` is the number of the line, from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file, without their ends, and without the empty ones at the end of the file.

    No more than one line and one piece are in memory. Raises :class:`FileError` for a line that is too long.
    """
    n_empty = 0
    for line in _split(pieces):
        if not line.strip():
            n_empty += 1
            continue
        while n_empty:
            n_empty -= 1
            yield b""
        yield line


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = bytearray()
    number = 1
    for piece in pieces:
        begin = 0
        while (end := piece.find(b"\n", begin)) >= 0:
            if rest:
                rest += piece[begin:end]
                yield bytes(rest)
                rest.clear()
            else:
                yield piece[begin:end]
            begin, number = end + 1, number + 1
        rest += piece[begin:]
        if len(rest) > MAX_LINE_BYTES:
            message = f"This line has more than {MAX_LINE_BYTES:,} bytes. Spread its inputs over several lines."
            raise FileError("invalid_request", message, number)
    if rest:
        yield bytes(rest)


@dataclass(frozen=True, slots=True)
class FileModel:
    """What the lines of a file must know of their model. With ``normalize`` its vectors have the length 1."""

    dimensions: int
    normalize: bool


class LineReader:
    """Judges the lines of one file in their order.

    ``open_model`` gets the name of the file's model once, and raises :class:`FileError` if there is no such model.
    ``check_dimensions`` raises :class:`Refusal` if vectors may not have so many.
    """

    def __init__(
        self,
        endpoint: str,
        token_ids: TokenIds,
        *,
        open_model: Callable[[str], FileModel],
        check_dimensions: Callable[[int], None],
    ) -> None:
        self.model: str | None = None
        self.n_inputs = 0
        self._endpoint = endpoint
        self._token_ids = token_ids
        self._open_model = open_model
        self._check_dimensions = check_dimensions
        self._usual = FileModel(0, normalize=True)
        self._custom_ids: set[bytes] = set()

    def read(self, number: int, data: bytes) -> Line:
        """The line with this number, from 0. Raises :class:`FileError`."""
        at = number + 1
        if number >= MAX_LINES:
            raise FileError("too_many_tasks", f"The batch has too many tasks. The limit is {MAX_LINES}.")
        body = self._envelope(at, data)
        custom_id, request = body["custom_id"], body["body"]
        line = Line(number, custom_id, 0, self._usual.dimensions)
        try:
            asked = read_body(request, self._token_ids)
            self._check(asked)
        except Refusal as refusal:
            return replace(line, status=refusal.status, code=refusal.code, message=refusal.message, param=refusal.param)
        self.n_inputs += len(asked.texts)
        if self.n_inputs > MAX_LINES:
            message = f"The batch has too many embedding inputs. The limit is {MAX_LINES} across all lines."
            raise FileError("too_many_tasks", message)
        return replace(
            line,
            n_inputs=len(asked.texts),
            dimensions=asked.dimensions or self._usual.dimensions,
            is_base64=asked.base64,
            refuses_long=asked.truncation is not TruncationSide.END,
        )

    def _check(self, asked: EmbeddingCall) -> None:
        if asked.dimensions is not None:
            self._check_dimensions(asked.dimensions)
        if asked.kind == "query":
            raise invalid("kind", "must be 'document' in a batch. Send queries to POST /v1/embeddings.")
        if asked.to_unit_length and not self._usual.normalize:
            raise invalid("normalize", "must be false for this model in a batch. Send the texts to /v1/embeddings.")

    def _envelope(self, at: int, data: bytes) -> dict[str, Any]:
        read = _parse(data)
        if read is None:
            raise FileError("invalid_json_line", "This line is not parseable as valid JSON.", at)
        for name in KEYS:
            if read.get(name) is None:
                raise FileError("missing_required_parameter", f"Missing required parameter: '{name}'.", at, name)
        self._take_custom_id(read["custom_id"], at)
        if read["method"] != "POST":
            raise FileError("invalid_method", "The method must be 'POST'.", at, "method")
        if read["url"] != self._endpoint:
            message = f"The URL provided for this request does not match the batch endpoint '{self._endpoint}'."
            raise FileError("url_mismatch", message, at, "url")
        body = read["body"]
        if not isinstance(body, dict):
            raise FileError("invalid_request", "The body must be a JSON object.", at, "body")
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise FileError("missing_required_parameter", "Missing required parameter: 'model'.", at, "body.model")
        if self.model is None:
            self._usual = self._open_model(model)
            self.model = model
        if model != self.model:
            message = "The model of this line differs from that of the first. A file has one model."
            raise FileError("model_mismatch", message, at, "body.model")
        return read

    def _take_custom_id(self, custom_id: Any, at: int) -> None:
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID or "\0" in custom_id:
            message = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters without NUL."
            raise FileError("invalid_custom_id", message, at, "custom_id")
        # A digest, because 50,000 ids of 512 characters would be 100 MB.
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if digest in self._custom_ids:
            message = "The custom_id of this request is a duplicate of another request's."
            raise FileError("duplicate_custom_id", message, at, "custom_id")
        self._custom_ids.add(digest)


def texts_of(lines: Iterable[bytes], token_ids: TokenIds, *, refused: frozenset[int]) -> Iterator[tuple[str, str]]:
    """``(chunk id, text)`` of the inputs of a file that was read before, without the lines ``refused``."""
    for number, data in enumerate(lines):
        if number in refused:
            continue
        read = _parse(data)
        assert read is not None, "a line that was read before"  # noqa: S101
        for position, text in enumerate(read_input(read["body"].get("input"), token_ids)):
            yield chunk_id(number, position), text


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        read = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return read if isinstance(read, dict) else None
