"""The lines of a ProviderBatch's files: writes requests and reads answers. Pure.

Answers come in any order, and failed requests have two shapes (an HTTP error, or never executed). `decode_line` reads
all of them, from either file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Final

from chunkmill.domain.providers import Encoding
from chunkmill.openai.wire.answers import EmbeddedRequest, SentRequest, parse, read_answer
from chunkmill.openai.wire.bounds import TOKENS_FACTOR
from chunkmill.openai.wire.redaction import redact

URL: Final = "/v1/embeddings"

_HTTP_ERROR: Final = 400
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_CODE = re.compile(r"[\w.-]{1,64}", re.ASCII)
_CUSTOM_ID = re.compile(r"pb([1-9][0-9]{0,18})-(0|[1-9][0-9]{0,9})", re.ASCII)
# JSON allows these characters, but a reader that splits lines like Python's splitlines would split a request at them.
_LINE_BREAKS: Final = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True, slots=True)
class RequestForm:
    """What all requests of a ProviderBatch have in common. If ``dimensions`` is None, the model's own are used."""

    model: str
    dimensions: int | None = None
    encoding_format: Encoding = "base64"


@dataclass(frozen=True, slots=True)
class RefusedRequest:
    """A request that failed at the provider. ``message`` is redacted and short."""

    request_no: int
    status: int | None
    """The HTTP status; None if it was never executed."""
    code: str
    """The provider's error code; if it gives none, ``http_400`` or the like."""
    message: str


UNREADABLE: Final = ("not_json", "too_long", "no_custom_id", "unknown_custom_id", "no_answer")
TOO_LONG: Final = b""
"""Stands for a line that is longer than any answer can be. Blank lines are left out, so that no other line is empty."""


@dataclass(frozen=True, slots=True)
class UnreadableLine:
    """A line without an answer. Its code is one of ``UNREADABLE``."""

    code: str
    reason: str
    request_no: int | None = None
    """The number of the request, if the ``custom_id`` is one of this ProviderBatch."""


def custom_id(batch_id: int, request_no: int) -> str:
    return f"pb{batch_id}-{request_no}"


def parse_custom_id(given: object) -> tuple[int, int] | None:
    """``(batch_id, request_no)`` of a custom id; None for anything that `custom_id` does not return."""
    match = _CUSTOM_ID.fullmatch(given) if isinstance(given, str) else None
    return (int(match[1]), int(match[2])) if match else None


def encode_request(line_id: str, form: RequestForm, inputs: Sequence[str]) -> bytes:
    """One line of the input file, with its newline. ``line_id`` is a `custom_id`."""
    body: dict[str, Any] = {"model": form.model, "encoding_format": form.encoding_format}
    if form.dimensions is not None:
        body["dimensions"] = form.dimensions
    head = json.dumps({"custom_id": line_id, "method": "POST", "url": URL, "body": body}, separators=(",", ":"))
    texts = ",".join(map(_encode_text, inputs))
    return f'{head[:-2]},"input":[{texts}]}}}}\n'.encode()


def text_bytes(text: str) -> int:
    """How many bytes `encode_request` writes for one input, with its quotes, but without the comma between inputs."""
    return len(_encode_text(text).encode())


def _encode_text(text: str) -> str:
    """``json.dumps(text, ensure_ascii=False)``, but on one line for every reader."""
    encoded = encode_basestring(text)
    if not encoded.isascii():
        for character, escape in _LINE_BREAKS.items():
            encoded = encoded.replace(character, escape)
    return encoded


def split_lines(chunks: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """The lines of a streamed file without their newlines; blank lines and a byte order mark are left out.

    ``TOO_LONG`` is in the place of a line of more than ``longest`` bytes. Only ``\\n`` ends a line; the line reader of
    an HTTP client may split at other characters. If a download ends early, the last line may be incomplete. One line
    and one chunk are in memory at a time.
    """
    parts: list[bytes] = []
    size, begun = 0, False
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            end = chunk.find(b"\n", start)
            piece = chunk[start : len(chunk) if end < 0 else end]
            size += len(piece)
            if size > longest:
                parts.clear()
            else:
                parts.append(piece)
            if end < 0:
                break
            start = end + 1
            if line := _whole(parts, first=not begun):
                yield line
            elif size > longest:
                yield TOO_LONG
            size, begun = 0, True
            parts.clear()
    if line := _whole(parts, first=not begun):
        yield line
    elif size > longest:
        yield TOO_LONG


def _whole(parts: Sequence[bytes], *, first: bool) -> bytes:
    line = b"".join(parts).strip()
    return line.removeprefix(_BYTE_ORDER_MARK) if first else line


def decode_line(
    line: bytes,
    *,
    batch_id: int,
    sent: Callable[[int], SentRequest | None],
    dimensions: int,
    normalize: bool,
    tokens_factor: float = TOKENS_FACTOR,
    secrets: Sequence[str] = (),
) -> EmbeddedRequest | RefusedRequest | UnreadableLine:
    """Read one line of an output or error file.

    ``sent(request_no)`` is what was sent in the request; None if there was no such request. ``dimensions`` are those of
    the space. ``secrets`` are removed from messages. Raises nothing for any bytes.
    """
    if line == TOO_LONG:
        return UnreadableLine("too_long", "a line is longer than the answer to any request of this ProviderBatch")
    answer = parse(line)
    if not isinstance(answer, dict):
        return UnreadableLine("not_json", f"a line of {len(line)} bytes is not a JSON object")
    given = answer.get("custom_id")
    if given is None or given == "":
        return UnreadableLine("no_custom_id", "a line has no custom_id")
    ids = parse_custom_id(given)
    request = sent(ids[1]) if ids and ids[0] == batch_id else None
    if ids is None or request is None:
        ours = ids[1] if ids and ids[0] == batch_id else None
        return UnreadableLine(
            "unknown_custom_id", f"a line answers {redact(given, secrets)!r}, which was not sent", ours
        )
    response = answer.get("response")
    status = _status(response)
    body = _body(response)
    if isinstance(body, dict) and (status is None or status < _HTTP_ERROR):
        embedded = read_answer(
            body,
            request,
            dimensions,
            normalize=normalize,
            request_no=ids[1],
            tokens_factor=tokens_factor,
            secrets=secrets,
        )
        if embedded is not None:
            return embedded
    error = answer.get("error") or _error_in(body, status)
    if not error and (status is None or status < _HTTP_ERROR):
        return UnreadableLine("no_answer", "a line has neither vectors nor an error", ids[1])
    return _refused(ids[1], status, error, secrets)


def _status(response: object) -> int | None:
    status = response.get("status_code") if isinstance(response, dict) else None
    if isinstance(status, str) and re.fullmatch("[0-9]{3}", status, re.ASCII):
        return int(status)
    return status if type(status) is int and 0 < status < 1000 else None


def _body(response: object) -> Any:
    """The body of a response. Some servers encode it twice, so that it is a text with JSON."""
    body = response.get("body") if isinstance(response, dict) else None
    if isinstance(body, str):
        decoded = parse(body)
        return body if decoded is None else decoded
    return body


def _error_in(body: object, status: int | None) -> object:
    """The error that a body describes. Servers put it in different places."""
    if isinstance(body, dict) and body.get("error"):
        return body["error"]
    return body if status is not None and status >= _HTTP_ERROR else None


def _refused(request_no: int, status: int | None, error: object, secrets: Sequence[str]) -> RefusedRequest:
    words: list[object] = []
    message = error
    if isinstance(error, dict):
        words = [error.get("code"), error.get("type")]
        message = next((error[key] for key in ("message", "detail", "error") if error.get(key)), "no message")
    named = (redact(word, secrets) for word in words if isinstance(word, str))
    fallback = f"http_{status}" if status is not None else "unknown_error"
    code = next((word for word in named if _CODE.fullmatch(word)), fallback)
    return RefusedRequest(request_no, status, code, redact(message, secrets) or "no message")
