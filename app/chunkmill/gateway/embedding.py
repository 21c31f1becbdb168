"""What every route that returns vectors does: read what is asked, let workers embed it, and shape the vectors.

The routes differ in the names of their fields and in the form of their answers. They make an :class:`EmbeddingCall` of
a body, and write the :class:`EmbeddingAnswer` that :func:`embed` returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from chunkmill.domain.providers import OPENAI
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.vectors import shorten, to_unit_length
from chunkmill.errors import WaitTimeout
from chunkmill.gateway.bodies import read_body, read_object_of, require_json
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.fields import invalid, number_field
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.inputs import count_tokens, may_be_many
from chunkmill.gateway.large_json import loads_object
from chunkmill.gateway.models import ServedModel
from chunkmill.monitor import reports

Kind = Literal["document", "query"]
Result = TypeVar("Result")

MAX_BODY: Final = 32 * 1024 * 1024
MAX_DIMENSIONS: Final = 65_536
SMALL_BODY: Final = 32 * 1024
"""The most bytes of a body that the event loop reads itself, in less than a millisecond. Larger ones take a thread."""
SECONDS: Final = 30.0
SECONDS_PER_TEXT: Final = 0.1
"""How many seconds a request waits for its vectors if it does not say so. A CPU embeds ten long texts in a second."""
MAX_SECONDS: Final = 600.0

KINDS: Final[Mapping[str, Kind]] = {
    "document": "document",
    "query": "query",
    "search_document": "document",
    "search_query": "query",
    "passage": "document",
    "classification": "document",
    "clustering": "document",
}
"""What peers call the two kinds of text. Cohere's other two are about texts alone, without a query."""


class TruncationSide(Enum):
    """What to do with a text that has more tokens than the model reads."""

    END = "its end"
    """Leave its end out, and say so."""
    NOTHING = "nothing"
    """Refuse it."""
    START = "its start"
    """Refuse it, because only ends are cut here."""


TRUNCATION_SIDES: Final[Mapping[str, TruncationSide]] = {
    "end": TruncationSide.END,
    "right": TruncationSide.END,
    "none": TruncationSide.NOTHING,
    "start": TruncationSide.START,
    "left": TruncationSide.START,
}


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """What a request asks for. ``param`` is the field that its texts came in."""

    texts: list[str]
    param: str = "input"
    model: str | None = None
    """None for the default model."""
    kind: Kind = "document"
    dimensions: int | None = None
    truncation: TruncationSide = TruncationSide.END
    to_unit_length: bool = False
    """Bring the vectors to length 1 also if the model does not."""
    seconds: float | None = None
    base64: bool = False
    return_tokens: bool = False
    """Say how many tokens each text had. ``usage`` has their sum."""


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingAnswer:
    """``model`` is the model under the name that was asked for. Everything else is in the order of the texts."""

    model: ServedModel
    vectors: NDArray[np.float32]
    """``(n, d)`` float32, contiguous."""
    tokens: int
    """Of all texts, after they were cut."""
    tokens_of_each: NDArray[np.int32]
    """``(n,)`` int32."""
    truncated: list[int]
    """The positions of the texts that were cut."""
    fingerprint: str
    """That of the space of the vectors. Only vectors with the same one may be compared."""

    @property
    def headers(self) -> dict[str, str]:
        headers = {"x-chunkmill-fingerprint": self.fingerprint}
        return headers | {"x-chunkmill-truncated": str(len(self.truncated))} if self.truncated else headers


async def read_asked(request: Request, read: Callable[[dict[str, Any]], Result]) -> Result:
    """What ``read`` makes of the JSON object in the body. It runs in a thread if the body is large."""
    require_json(request)
    body = await read_body(request, MAX_BODY)
    if len(body) <= SMALL_BODY:
        return read(read_object_of(body))
    return await asyncio.to_thread(lambda: read(loads_object(body)))


def dimensions_field(body: Mapping[str, Any], *names: str) -> int | None:
    return number_field(body, *names, least=1, most=MAX_DIMENSIONS, code="invalid_dimensions")


def seconds_field(body: Mapping[str, Any]) -> float | None:
    milliseconds = number_field(body, "timeout_ms", least=1, most=int(MAX_SECONDS * 1000))
    return None if milliseconds is None else milliseconds / 1000


async def embed(gateway: Gateway, caller: Caller, asked: EmbeddingCall) -> EmbeddingAnswer:
    """Let workers embed what is asked.

    Raises :class:`Refusal`, and errors of ``chunkmill.errors``.
    """
    model = await gateway.models.find(asked.model, caller)
    size = await gateway.models.dimensions_to_ask(model, asked.dimensions)
    if model.spec.provider == OPENAI:
        _require_words(asked)
    if may_be_many(asked.texts, model.spec.max_tokens):
        await asyncio.to_thread(count_tokens, asked.texts, model.spec.max_tokens, asked.param)
    seconds = SECONDS + SECONDS_PER_TEXT * len(asked.texts) if asked.seconds is None else asked.seconds
    try:
        embedded = await gateway.embed(
            asked.texts,
            model=model.target,
            kind=asked.kind,
            caller=caller,
            timeout=seconds,
            dimensions=size,
            spec=model.spec if size is None else None,
        )
    except WaitTimeout:
        raise await _late(gateway, model, seconds) from None
    truncated = np.flatnonzero(embedded.truncated).tolist()
    if truncated and asked.truncation is not TruncationSide.END:
        raise _too_long(asked, model, truncated)
    spec = embedded.spec or model.spec
    vectors = embedded.vectors
    if asked.dimensions is not None and asked.dimensions < spec.dimensions:
        vectors = shorten(vectors, asked.dimensions, normalize=spec.normalize)
        spec = replace(spec, dimensions=asked.dimensions)
    if asked.to_unit_length and not spec.normalize:
        vectors = to_unit_length(vectors)
    return EmbeddingAnswer(
        model,
        np.ascontiguousarray(vectors, "<f4"),
        int(embedded.tokens.sum()),
        embedded.tokens,
        truncated,
        _fingerprint(spec),
    )


@lru_cache(maxsize=256)
def _fingerprint(spec: SpaceSpec) -> str:
    """To compute it takes as long as a third of everything else that a gateway does for a short text."""
    return spec.fingerprint


def _require_words(asked: EmbeddingCall) -> None:
    for i, text in enumerate(asked.texts):
        if not text or text.isspace():
            raise invalid(f"{asked.param}[{i}]", "is empty, which this model's provider refuses.", "empty_input")


def _too_long(asked: EmbeddingCall, model: ServedModel, truncated: list[int]) -> Refusal:
    shown = ", ".join(f"{asked.param}[{i}]" for i in truncated[:10])
    more = f" and {len(truncated) - 10:,} more" if len(truncated) > 10 else ""
    how = (
        "texts are cut at their ends only"
        if asked.truncation is TruncationSide.START
        else "the request says not to cut texts"
    )
    return Refusal(
        400,
        "invalid_input",
        f"{shown}{more}: longer than the {model.spec.max_tokens:,} tokens that the model reads, and {how}. Split the "
        "text, or allow that its end is cut.",
        param=asked.param,
    )


async def _late(gateway: Gateway, model: ServedModel, seconds: float) -> Refusal:
    """Why there are no vectors in time: no worker lives, or all have much to do."""
    kind: Literal["provider", "local"] = "provider" if model.spec.provider == OPENAI else "local"

    def lives() -> bool:
        with gateway.db.begin() as conn:
            return any(report.serves(kind) and not report.is_silent for report in reports.read(conn))

    if await asyncio.to_thread(lives):
        return Refusal(
            504,
            "timeout",
            f"no vectors within {seconds:g} s. Send fewer texts, allow more time (timeout_ms), or start more workers.",
        )
    queue = "openai" if kind == "provider" else "gpu"
    return Refusal(
        503,
        "no_worker",
        f"no worker of the queue {queue!r} has reported in the last {reports.SILENT_SECONDS:g} s. Start one.",
        retry_after=5.0,
    )
