"""What goes over a socket between a caller and a worker: frames of a header and a body. All numbers are little-endian.

The worker speaks first. Its challenge and the caller's hello hold random numbers, and each side proves that it knows
the token of this worker without sending it, so that whoever listens at the address of a worker that is gone learns
neither the token nor a text.
"""

from __future__ import annotations

import hmac
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.system.numbers import np

MAGIC: Final = b"chunkmil"
VERSION: Final = 1
NONCE_BYTES: Final = 16
PROOF_BYTES: Final = 32

MOST_STRANGE_BYTES: Final = 128
"""The largest body that is read from somebody who has proved nothing."""
MOST_ASKED_BYTES: Final = 4 * 1024 * 1024
"""The largest body of a request. Requests with more text are rows in Postgres."""
MOST_ASKED_TEXTS: Final = 64
MOST_CALLER_BYTES: Final = 1_024
MOST_ANSWERED_BYTES: Final = 64 * 1024 * 1024
"""The largest body of an answer: 64 vectors of the most dimensions that there are, and more."""

KINDS: Final = ("document", "query")

_HEADER: Final = struct.Struct("<IBI")
_HELLO: Final = struct.Struct(f"<8sH{NONCE_BYTES}s")
_ASKED: Final = struct.Struct("<I32sBBfHI")
_ANSWERED: Final = struct.Struct("<II")
TRACE_BYTES: Final = 55
_TRACE: Final = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""What is sent of a W3C trace context, https://www.w3.org/TR/trace-context/#traceparent-header."""


class FrameKind(IntEnum):
    CHALLENGE = 1
    """Worker: magic, version and a random number."""
    HELLO = 2
    """Caller: the same, and its proof."""
    WELCOME = 3
    """Worker: its proof."""
    ASK = 4
    CANCEL = 5
    """Caller: nobody waits for the request any more."""
    ANSWER = 6
    REFUSAL = 7
    """Worker: a :class:`Refusal`. There will be no answer."""
    ALIVE = 8
    """Worker, every second while requests are open: it is at work."""
    ASK_TRACED = 9
    """Caller: the ``traceparent`` of its span, and an ASK. Only a worker is asked so that has announced that it takes
    it, because others end the connection."""


class Refusal(IntEnum):
    """Why a worker does not answer a request."""

    FAILED = 1
    """A text got no vector, or nobody waited any more."""
    FULL = 2
    """It has as many requests as it takes."""
    SPACE = 3
    """The model of the space is not loaded, or the space is another one by now."""
    LEAVES = 4


class BadFrame(Exception):
    """The other side does not speak this protocol. The message holds nothing of what it sent."""


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    number: int
    """The number of the request, which the caller chose; 0 in frames that are about none."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Question:
    """The content of an ASK."""

    space_id: int
    fingerprint: str
    kind: str
    urgency: int
    seconds: float
    """How long the caller waits from now on."""
    caller: str
    texts: list[str]
    traceparent: str | None = None
    """The caller's span. It is not a part of an ASK."""


def frame(kind: FrameKind, number: int = 0, body: bytes = b"") -> bytes:
    return _HEADER.pack(len(body), kind, number) + body


def take_frames(received: bytearray, most: int) -> Iterator[Frame]:
    """The whole frames at the beginning of what was ``received``, from which they are removed.

    Raises :class:`BadFrame` if one has a body of more than ``most`` bytes, before that body has come.
    """
    while len(received) >= _HEADER.size:
        size, kind, number = _HEADER.unpack_from(received)
        if size > most:
            raise BadFrame(f"a frame of {size:,} bytes, and at most {most:,} are allowed")
        end = _HEADER.size + size
        if len(received) < end:
            return
        body = bytes(received[_HEADER.size : end])
        del received[:end]
        yield Frame(kind, number, body)


# --- who is there ----------------------------------------------------------------------------------------------------


def pack_challenge(nonce: bytes) -> bytes:
    return _HELLO.pack(MAGIC, VERSION, nonce)


def read_challenge(body: bytes) -> bytes:
    """The random number of the worker."""
    if len(body) != _HELLO.size:
        raise BadFrame("a challenge of another size")
    magic, version, nonce = _HELLO.unpack(body)
    if (magic, version) != (MAGIC, VERSION):
        raise BadFrame("another protocol or version")
    return bytes(nonce)


def pack_hello(nonce: bytes, proof: bytes) -> bytes:
    return pack_challenge(nonce) + proof


def read_hello(body: bytes) -> tuple[bytes, bytes]:
    """The random number of the caller, and its proof."""
    if len(body) != _HELLO.size + PROOF_BYTES:
        raise BadFrame("a hello of another size")
    return read_challenge(body[: _HELLO.size]), body[_HELLO.size :]


def proof(token: bytes, role: bytes, challenge: bytes, hello: bytes) -> bytes:
    """What only somebody who knows the token can compute. ``role`` is ``b"caller"`` or ``b"worker"``, so that neither
    side can send the other's proof back."""
    return hmac.digest(token, role + b"\0" + challenge + hello, "sha256")


def is_proof(given: bytes, expected: bytes) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(given, expected)


# --- requests and answers --------------------------------------------------------------------------------------------


def pack_question(question: Question) -> bytes | None:
    """The body of an ASK, or None if the request is too large to be sent."""
    caller, texts = question.caller.encode(), [text.encode() for text in question.texts]
    if not 0 < len(texts) <= MOST_ASKED_TEXTS or len(caller) > MOST_CALLER_BYTES:
        return None
    head = _ASKED.pack(
        question.space_id,
        bytes.fromhex(question.fingerprint),
        KINDS.index(question.kind),
        question.urgency,
        question.seconds,
        len(caller),
        len(texts),
    )
    body = b"".join((head, np.array([len(text) for text in texts], "<u4").tobytes(), caller, *texts))
    return body if len(body) <= MOST_ASKED_BYTES else None


def read_question(body: bytes) -> Question:
    if len(body) < _ASKED.size:
        raise BadFrame("a request that ends too early")
    space_id, fingerprint, kind, urgency, seconds, caller_size, n_texts = _ASKED.unpack_from(body)
    if not 0 < n_texts <= MOST_ASKED_TEXTS or caller_size > MOST_CALLER_BYTES:
        raise BadFrame("a request of too many texts, or of none")
    if kind >= len(KINDS) or urgency > 1 or not (math.isfinite(seconds) and seconds >= 0):
        raise BadFrame("a request that is no request")
    at = _ASKED.size + 4 * n_texts
    if len(body) < at:
        raise BadFrame("a request that ends too early")
    sizes: Sequence[int] = np.frombuffer(body, "<u4", n_texts, _ASKED.size).tolist()
    if at + caller_size + sum(sizes) != len(body):
        raise BadFrame("a request whose sizes are not those of its texts")
    pieces: list[str] = []
    for size in (caller_size, *sizes):
        try:
            pieces.append(body[at : at + size].decode())
        except UnicodeDecodeError:
            raise BadFrame("a text that is not UTF-8") from None
        at += size
    return Question(space_id, fingerprint.hex(), KINDS[kind], urgency, seconds, pieces[0], pieces[1:])


def trace_of(question: Question, body: bytes) -> bytes:
    """What goes before the ``body`` of an ASK to make it that of an ASK_TRACED; nothing if it cannot be one."""
    trace = (question.traceparent or "").encode()
    return trace if _TRACE.fullmatch(trace) and len(trace) + len(body) <= MOST_ASKED_BYTES else b""


def read_traced_question(body: bytes) -> Question:
    trace = body[:TRACE_BYTES]
    if not _TRACE.fullmatch(trace):
        raise BadFrame("a trace that is no trace")
    return replace(read_question(body[TRACE_BYTES:]), traceparent=trace.decode())


def pack_answer(answer: EmbeddedTexts) -> bytes:
    """The body of an ANSWER: ``(n, d)`` float32, ``(n,)`` int32 tokens, and ``(n,)`` bytes that say what was cut."""
    n, dimensions = answer.vectors.shape
    return b"".join(
        (
            _ANSWERED.pack(n, dimensions),
            answer.vectors.astype("<f4", copy=False).tobytes(),
            answer.tokens.astype("<i4", copy=False).tobytes(),
            answer.truncated.astype(np.uint8, copy=False).tobytes(),
        )
    )


def read_answer(body: bytes, n: int, dimensions: int) -> EmbeddedTexts:
    """The vectors of ``n`` texts. Raises :class:`BadFrame` if the answer is not of this shape."""
    if len(body) != _ANSWERED.size + n * (4 * dimensions + 5) or _ANSWERED.unpack_from(body) != (n, dimensions):
        raise BadFrame("an answer of another shape")
    at = _ANSWERED.size
    vectors = np.frombuffer(body, "<f4", n * dimensions, at).reshape(n, dimensions)
    tokens = np.frombuffer(body, "<i4", n, at + vectors.nbytes)
    truncated = np.frombuffer(body, np.uint8, n, at + vectors.nbytes + tokens.nbytes)
    if (tokens < 0).any() or (truncated > 1).any():
        raise BadFrame("an answer that is no answer")
    return EmbeddedTexts(vectors.astype(np.float32), tokens.astype(np.int32), truncated.astype(np.bool_))


def read_refusal(body: bytes) -> Refusal:
    try:
        return Refusal(body[0]) if len(body) == 1 else Refusal(0)
    except ValueError:
        raise BadFrame("a refusal without a known reason") from None
