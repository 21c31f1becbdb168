"""Reads the body of an embeddings answer, be it a plain answer or in a line of a ProviderBatch. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from chunkmill.errors import ProviderSilent
from chunkmill.openai.wire.bounds import TOKENS_FACTOR, believed_tokens
from chunkmill.openai.wire.redaction import clean, redact
from chunkmill.openai.wire.vectors import read_embeddings
from chunkmill.system.numbers import NDArray, np

NUMBER_BYTES: Final = 32
"""Bytes that a number of a vector takes at most, as a decimal on a line of its own."""
DIMENSIONS: Final = 4_096
"""A vector of another model is read up to so many dimensions, and then refused for them and not for its length."""
SLACK_BYTES: Final = 1024 * 1024
"""Bytes of an answer that are not vectors."""
LINE_BYTES: Final = 8 * 1024
"""Bytes of each line that are not vectors, on average, such as its ids or an error."""
_MODEL_CHARACTERS: Final = 200


@dataclass(frozen=True, slots=True)
class SentRequest:
    """What was sent in one request: how many inputs, and how many tokens by our own count."""

    inputs: int
    tokens: int


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """How many bytes a line and a whole file can have."""

    line: int
    file: int


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedRequest:
    """A request that was answered, and therefore charged."""

    request_no: int
    vectors: NDArray[np.float32]
    """(inputs, dimensions) float32 in the order of the inputs. The rows of the positions in ``problems`` are zero."""
    problems: Mapping[int, str]
    """position → what is wrong with the vector, without its numbers."""
    prompt_tokens: int | None
    """How many tokens are billed; None if the provider does not say, or says what cannot be true."""
    model: str | None
    """The name of the model that answered, as the provider gives it."""
    oddities: tuple[str, ...] = ()
    """What is odd besides the vectors: ``usage`` if the tokens cannot be true."""


def longest_answer(inputs: int, dimensions: int) -> int:
    """How many bytes the answer to a request can have."""
    return inputs * max(dimensions, DIMENSIONS) * NUMBER_BYTES + SLACK_BYTES


def longest_file(requests: int, inputs: int, widest: int, dimensions: int) -> LengthLimits:
    """How many bytes a result file, and each of its lines, can have. Any line may come twice.

    ``inputs`` are those of all ``requests`` of the file, and ``widest`` those of the largest.
    """
    whole = longest_answer(inputs, dimensions) + requests * LINE_BYTES
    return LengthLimits(longest_answer(widest, dimensions), 2 * whole)


def read_answer(
    body: Mapping[str, Any],
    sent: SentRequest,
    dimensions: int,
    *,
    normalize: bool,
    request_no: int = 0,
    tokens_factor: float = TOKENS_FACTOR,
    secrets: Sequence[str] = (),
) -> EmbeddedRequest | None:
    """The answer in a body; None if it has no ``data``. ``dimensions`` are those of the space."""
    data = body.get("data")
    if not isinstance(data, list):
        return None
    vectors, problems = read_embeddings(data, sent.inputs, dimensions, normalize=normalize)
    tokens, odd = believed_tokens(body.get("usage"), sent.tokens, tokens_factor)
    model = body.get("model")
    return EmbeddedRequest(
        request_no,
        vectors,
        problems,
        tokens,
        redact(model, secrets)[:_MODEL_CHARACTERS] or None if isinstance(model, str) else None,
        ("usage",) if odd else (),
    )


def read_plain(
    body: Mapping[str, Any],
    sent: SentRequest,
    dimensions: int,
    *,
    normalize: bool,
    tokens_factor: float = TOKENS_FACTOR,
    secrets: Sequence[str] = (),
) -> EmbeddedRequest:
    """The answer to a plain request. Raises :class:`ProviderSilent` if it has no ``data``."""
    answer = read_answer(body, sent, dimensions, normalize=normalize, tokens_factor=tokens_factor, secrets=secrets)
    if answer is None:
        raise ProviderSilent("the provider answered an embeddings request without data", answered=True)
    return answer


def parse(data: bytes | str) -> Any:
    """The decoded JSON; None if the data is not JSON, or is nested more deeply than Python reads."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # wrong Unicode and endless digits also raise ValueError
        return None


def parse_object(data: bytes, server: str) -> dict[str, Any]:
    """The object of a plain answer. Raises :class:`ProviderSilent`, because the request was computed and is lost."""
    parsed = parse(data)
    if isinstance(parsed, dict):
        return parsed
    kind = "JSON that can be read" if parsed is None else "an object"
    raise ProviderSilent(f"{server} answered an embeddings request with something that is not {kind}.", answered=True)


def error_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The error that a successful answer holds in place of vectors: its ``message``, ``code`` and ``type``."""
    error = body.get("error")
    if not error or isinstance(body.get("data"), list):
        return None
    given = error if isinstance(error, dict) else {"message": error}
    code = given.get("code")
    if isinstance(code, str) and re.fullmatch("[45][0-9]{2}", code, re.ASCII):
        code = int(code)
    if type(code) is int and not 400 <= code <= 599:
        code = None
    words = next((given[key] for key in ("message", "detail", "error") if given.get(key)), "no message")
    return {"message": clean(words), "code": code if isinstance(code, str | int) else None, "type": given.get("type")}
