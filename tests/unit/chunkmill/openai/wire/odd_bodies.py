"""Odd answers from a seed: a right one, of which something is cut, doubled, replaced, nested or poisoned."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np

DIMENSIONS = 4
INPUTS = 3

_NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 2**31, 2**63, 10**30, -(10**12), 1.5, float("nan"), float("inf"), True, False, None,
)  # fmt: skip
_WORDS = (
    "", "a", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "\x1b]0;t\x07", "\u202e", "\x9b31m", "x" * 9_000,
    "'" * 500, "é" * 50, "pb5-2", "pb5-9", "sk-a-key-of-the-test-1234", "0", "12", "400", "insufficient_quota",
    "null", "\u2028", "{}", '{"data": [',
)  # fmt: skip
_KEYS = ("custom_id", "response", "status_code", "body", "error", "data", "index", "embedding", "usage", "model",
         "prompt_tokens", "total_tokens", "code", "message", "type", "id", "status", "request_counts", "total",
         "completed", "output_file_id", "errors", "metadata", "created_at", "line", "\x00")  # fmt: skip


def plain(rng: random.Random) -> Any:
    """The body of a right answer."""
    vectors = np.array([[rng.uniform(-1, 1) for _ in range(DIMENSIONS)] for _ in range(INPUTS)], np.float32)
    as_floats = rng.random() < 0.3
    items = [
        {
            "index": n,
            "embedding": vector.tolist() if as_floats else base64.b64encode(vector.astype("<f4").tobytes()).decode(),
        }
        for n, vector in enumerate(vectors)
    ]
    tokens = rng.randrange(1, 40)
    return {"data": items, "model": "m-1", "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def plain_or_error(rng: random.Random) -> Any:
    """The body of a plain answer, which may say that it is none."""
    return {"error": {"message": "No.", "code": rng.choice(("bad", 502, None))}} if rng.random() < 0.2 else plain(rng)


def line(rng: random.Random) -> Any:
    """A line of a result file, or of an error file."""
    refused = {"message": "No.", "code": "bad", "type": "t"}
    if rng.random() < 0.2:
        return {"custom_id": "pb5-2", "response": None, "error": refused}
    failed = rng.random() < 0.2
    response = {"status_code": 400 if failed else 200, "body": {"error": refused} if failed else plain(rng)}
    return {"id": "b", "custom_id": "pb5-2", "response": response, "error": None}


def batch(rng: random.Random) -> Any:
    """A batch object."""
    return {
        "id": "batch_1", "status": rng.choice(("completed", "failed", "in_progress")), "input_file_id": "file-1",
        "output_file_id": rng.choice((None, "file-2", "")), "error_file_id": None, "created_at": 1_780_000_000,
        "expires_at": 1_780_086_400, "request_counts": {"total": 3, "completed": 2, "failed": 1},
        "usage": {"total_tokens": 9}, "metadata": {"chunkmill": "token"},
        "errors": {"data": [{"code": "bad", "message": "No.", "line": 1}]},
    }  # fmt: skip


def oddly_encoded(rng: random.Random, right: Any) -> bytes:
    """The JSON of ``right`` after up to four odd changes, some of which no JSON survives."""
    for _ in range(rng.randrange(5)):
        right = _changed(rng, right)
    encoded = json.dumps(right).encode()
    match rng.randrange(14):
        case 0:
            return encoded[: rng.randrange(len(encoded) + 1)]
        case 1:
            at = rng.randrange(len(encoded) + 1)
            return encoded[:at] + rng.randbytes(rng.randrange(6)) + encoded[at:]
        case 2:
            depth = rng.choice((10, 400, 900, 980, 2_000, 100_000))
            opened, closed = rng.choice((("[", "]"), ('{"error":', "}"), ('{"data":[', "]}")))
            deep = opened * depth + "1" + closed * depth
            return encoded.replace(b'"m-1"', deep.encode(), 1) if rng.random() < 0.6 else deep.encode()
        case 3:
            return encoded.replace(b"1", b"1" * rng.choice((20, 400, 5_000)), 1)
        case _:
            return encoded


def _changed(rng: random.Random, value: Any) -> Any:
    """``value`` with one change, somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                return {name: inner for name, inner in value.items() if name != key}
            case 1:
                return {**value, rng.choice(_KEYS): _odd(rng)}
            case _:
                return {**value, key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        match rng.randrange(6):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case 2:
                return value[::-1]
            case _:
                return [*value[:at], _changed(rng, value[at]), *value[at + 1 :]]
    return _odd(rng)


def _odd(rng: random.Random) -> Any:
    match rng.randrange(6):
        case 0 | 1:
            return rng.choice(_NUMBERS)
        case 2 | 3:
            return rng.choice(_WORDS)
        case 4:
            return [_odd(rng) for _ in range(rng.randrange(4))]
        case _:
            return {rng.choice(_KEYS): _odd(rng) for _ in range(rng.randrange(4))}
