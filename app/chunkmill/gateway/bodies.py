"""Bodies of requests, read within bounds."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import orjson
from starlette.requests import Request

from chunkmill.gateway.errors import Refusal


async def read_body(request: Request, most: int) -> bytes:
    """The body, of at most ``most`` bytes. A larger one is refused before it is read, if its length is announced."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Refusal(415, "unsupported_encoding", "the body is compressed. Send it without content-encoding.")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
    return b"".join(parts)


async def read_object(request: Request, most: int) -> dict[str, Any]:
    """The body, which is a JSON object."""
    require_json(request)
    return read_object_of(await read_body(request, most))


def require_json(request: Request) -> None:
    """Raise :class:`Refusal` if the body says that it is something else. ``curl -d`` says that JSON is a form."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in ("application/json", "application/x-www-form-urlencoded") and not kind.endswith("+json"):
        message = "the body must be JSON. Send it with 'content-type: application/json'."
        raise Refusal(415, "unsupported_media_type", message)


def read_object_of(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # The message of the error is about the place alone; its ``doc`` is the body.
        raise Refusal(400, "invalid_json", f"the body is not JSON: {error.msg} at character {error.pos}.") from None
    if not isinstance(value, dict):
        raise Refusal(400, "invalid_json", "the body must be a JSON object.")
    return value


class NotJson(ValueError):
    """The bytes are not JSON. The message is a clause that says why and does not quote them."""


def exact_json(data: bytes, encoding: str = "utf-8") -> Any:
    """What the bytes are in JSON, with whole numbers of any size. orjson reads those of more than 64 bits as floats.

    Raises :class:`NotJson`.
    """
    try:
        return json.loads(data.decode(encoding), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise NotJson("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise NotJson(f"it is not JSON: {error.msg} at character {error.pos + 1}") from None
    except _Constant:
        raise NotJson("it has NaN or Infinity, which JSON does not have; give a finite number, or null") from None
    except (ValueError, RecursionError):
        raise NotJson("it has a number or a nesting that JSON readers refuse") from None


class _Constant(Exception):
    """JSON has no NaN and no Infinity, which Python's reader takes."""


def _no_constant(_: str) -> NoReturn:
    raise _Constant


def _too_large(most: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body may have {most:,} bytes; send several smaller requests.")
