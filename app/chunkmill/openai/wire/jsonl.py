"""The lines of a ProviderBatch's files: writes requests and reads answers. Pure.

Answers come in any order, and failed requests have two shapes (an HTTP error, or never executed). `decode_line` reads
all of them, from either file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chunkmill.domain.providers import Encoding
from chunkmill.openai.wire.redaction import redact
from chunkmill.openai.wire.vectors import read_embeddings

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


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """A request that was answered, and therefore charged."""

    request_no: int
    vectors: NDArray[np.float32]
    """(inputs, dimensions) float32 in the order of the inputs. The rows of the positions in ``problems`` are zero."""
    problems: Mapping[int, str]
    """position → what is wrong with the vector, without its numbers."""
    prompt_tokens: int | None
    """How many tokens are billed; None if the provider does not say."""
    model: str | None
    """The name of the model that answered, as the provider gives it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that failed at the provider. ``message`` is redacted and short."""

    request_no: int
    status: int | None
    """The HTTP status; None if it was never executed."""
    code: str
    """The provider's error code; if it gives none, ``http_400`` or the like."""
    message: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A line without an answer. Its code is ``not_json``, ``no_custom_id``, ``unknown_custom_id`` or ``no_answer``."""

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


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a streamed file without their newlines; blank lines and a byte order mark are left out.

    Only ``\\n`` ends a line; the line reader of an HTTP client may split at other characters. If a download ends early,
    the last line may be incomplete. One line and one chunk are in memory at a time.
    """
    parts: list[bytes] = []
    begun = False
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            parts.append(chunk[start:end])
            start = end + 1
            line = _whole(parts, first=not begun)
            begun = True
            parts.clear()
            if line:
                yield line
        if start < len(chunk):
            parts.append(chunk[start:])
    if line := _whole(parts, first=not begun):
        yield line


def _whole(parts: Sequence[bytes], *, first: bool) -> bytes:
    line = b"".join(parts).strip()
    return line.removeprefix(_BYTE_ORDER_MARK) if first else line


def decode_line(
    line: bytes,
    *,
    batch_id: int,
    inputs: Callable[[int], int | None],
    dimensions: int,
    normalize: bool,
    secrets: Sequence[str] = (),
) -> Embedded | Refused | Unreadable:
    """Read one line of an output or error file.

    ``inputs(request_no)`` is the number of inputs that were sent in the request; None if there was no such request.
    ``dimensions`` are those of the space. ``secrets`` are removed from messages. Raises nothing for any bytes.
    """
    answer = _json(line)
    if not isinstance(answer, dict):
        return Unreadable("not_json", f"a line of {len(line)} bytes is not a JSON object")
    given = answer.get("custom_id")
    if given is None or given == "":
        return Unreadable("no_custom_id", "a line has no custom_id")
    ids = parse_custom_id(given)
    count = inputs(ids[1]) if ids and ids[0] == batch_id else None
    if ids is None or count is None:
        ours = ids[1] if ids and ids[0] == batch_id else None
        return Unreadable("unknown_custom_id", f"a line answers {redact(given, secrets)!r}, which was not sent", ours)
    response = answer.get("response")
    status = _status(response)
    body = _body(response)
    if isinstance(body, dict) and isinstance(body.get("data"), list) and (status is None or status < _HTTP_ERROR):
        vectors, problems = read_embeddings(body["data"], count, dimensions, normalize=normalize)
        model = body.get("model")
        return Embedded(
            ids[1], vectors, problems, _prompt_tokens(body), model[:200] if isinstance(model, str) else None
        )
    error = answer.get("error") or _error_in(body, status)
    if not error and (status is None or status < _HTTP_ERROR):
        return Unreadable("no_answer", "a line has neither vectors nor an error", ids[1])
    return _refused(ids[1], status, error, secrets)


def _json(data: bytes | str) -> Any:
    """The decoded JSON; None if the data is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # wrong Unicode and endless digits also raise ValueError
        return None


def _status(response: object) -> int | None:
    status = response.get("status_code") if isinstance(response, dict) else None
    if isinstance(status, str) and re.fullmatch("[0-9]{3}", status, re.ASCII):
        return int(status)
    return status if type(status) is int and status > 0 else None


def _body(response: object) -> Any:
    """The body of a response. Some servers encode it twice, so that it is a text with JSON."""
    body = response.get("body") if isinstance(response, dict) else None
    if isinstance(body, str):
        decoded = _json(body)
        return body if decoded is None else decoded
    return body


def _error_in(body: object, status: int | None) -> object:
    """The error that a body describes. Servers put it in different places."""
    if isinstance(body, dict) and body.get("error"):
        return body["error"]
    return body if status is not None and status >= _HTTP_ERROR else None


def _refused(request_no: int, status: int | None, error: object, secrets: Sequence[str]) -> Refused:
    words: list[object] = []
    message = error
    if isinstance(error, dict):
        words = [error.get("code"), error.get("type")]
        message = next((error[key] for key in ("message", "detail", "error") if error.get(key)), "no message")
    named = (redact(word, secrets) for word in words if isinstance(word, str))
    fallback = f"http_{status}" if status is not None else "unknown_error"
    code = next((word for word in named if _CODE.fullmatch(word)), fallback)
    return Refused(request_no, status, code, redact(message, secrets) or "no message")


def _prompt_tokens(body: Mapping[str, Any]) -> int | None:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    counts = (usage.get(key) for key in ("prompt_tokens", "total_tokens"))
    return next((count for count in counts if type(count) is int and count >= 0), None)
