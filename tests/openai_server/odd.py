"""Answers that no server should give: endless, compressed, dripping, and values that are out of all bounds."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.openai_server.exchange import Answer

BLOCK = 1 << 16
NUMBERS: tuple[Any, ...] = (-1, -(10**9), 10**12, 10**30, 1.5, True, "12", [1], {"a": 1})
"""What may stand in place of a count."""
WORDS = ("a\x00b", "half \ud800 a character", "\x1b]0;title\x07", "\u202etxt.exe", "x" * 100_000, "\x85\x9b\u2028")
"""What may stand in place of words."""
IDS: tuple[Any, ...] = (*WORDS, "../../v1/files", "a b", "id?x=1", "\r\nHost: evil", 17, ["id"])
"""What may stand in place of an id."""


def drawn(given: Any, values: tuple[Any, ...], *seed: object) -> Any:
    """What the test asked for, or a value that the seed chooses."""
    return random.Random(" ".join(map(str, seed))).choice(values) if given is None else given


def put(shown: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A copy with ``value`` in a field such as ``request_counts.total``."""
    name, _, rest = field.partition(".")
    inner = shown.get(name)
    return shown | {name: put(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def send(
    handler: BaseHTTPRequestHandler,
    rest: Callable[[float], None],
    kind: str,
    wish: dict[str, Any],
    answer: Answer | None,
) -> None:
    if kind == "redirect":
        _head(handler, wish["status"], {"location": wish["location"], "content-length": "0"})
    elif kind == "drip":
        _drip(handler, rest, wish, _bytes(answer))
    elif kind == "encoded":
        headers = {"content-encoding": wish["encoding"], "content-type": "application/json"}
        pieces = _bomb(wish["bytes"]) if wish["bytes"] else iter((gzip.compress(_bytes(answer)),))
        _chunked(handler, wish["status"], headers, pieces)
    elif kind == "endless":
        piece = b"x" * BLOCK
        _chunked(handler, wish["status"], {}, (piece for _ in range(wish["bytes"] // BLOCK)))
    elif kind == "deep":
        body = b'{"data":' + b"[" * wish["levels"]
        _head(handler, 200, {"content-type": "application/json", "content-length": str(len(body))})
        handler.wfile.write(body)


def _bytes(answer: Answer | None) -> bytes:
    if answer is None:
        return b"{" + b" " * 9_000 + b"}"
    return json.dumps(answer.body).encode() if answer.file is None else answer.file.read_bytes()


def _bomb(size: int) -> Iterator[bytes]:
    """gzip of ``size`` blanks, a thousandth of that."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    for _ in range(size // BLOCK):
        yield packer.compress(b" " * BLOCK)
    yield packer.flush()


def _drip(handler: BaseHTTPRequestHandler, rest: Callable[[float], None], wish: dict[str, Any], body: bytes) -> None:
    """A byte at a time, from the first byte of the headers on if ``headers``."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    quick, slow = (b"", (head + "x: ").encode() + b"y" * 9_000) if wish["headers"] else ((head + "\r\n").encode(), body)
    handler.wfile.write(quick)
    for byte in slow:
        handler.wfile.write(bytes((byte,)))
        handler.wfile.flush()
        rest(wish["seconds"])
    handler.close_connection = True


def _head(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()


def _chunked(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], pieces: Iterator[bytes]) -> None:
    _head(handler, status, {**headers, "transfer-encoding": "chunked"})
    for piece in pieces:
        if piece:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    handler.wfile.write(b"0\r\n\r\n")
