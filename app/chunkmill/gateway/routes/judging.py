"""Searches and models judged by golden queries. Workers embed these queries and texts, which counts for the key."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.domain.arguments import as_usd
from chunkmill.domain.bridges import BridgeQuote
from chunkmill.domain.comparing import Comparison, ComparisonQuote
from chunkmill.domain.costs import Spent
from chunkmill.domain.embedded import estimated_tokens
from chunkmill.domain.golden import MAX_JUDGED
from chunkmill.domain.results import SearchTuning
from chunkmill.domain.spaces import Precision
from chunkmill.gateway import seen
from chunkmill.gateway.asked import read_optional, wrong
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.lasting import lasting, timeout_in, timeout_schema
from chunkmill.gateway.shapes import schema_of
from chunkmill.store import golden

BODY_BYTES = 64 << 10
TUNE_S, COMPARE_S = 600.0, 3_600.0
TUNE: Schema = {
    "type": "object",
    "properties": {
        "space": {"type": "string", "description": "Another space of the collection than the active one."},
        "timeout_s": timeout_schema(TUNE_S),
    },
    "additionalProperties": False,
}
COMPARE: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "description": "The model that is judged, such as `org/model@revision`."},
        "dry_run": {
            "type": "boolean",
            "default": False,
            "description": "Only say what would be embedded, and its cost.",
        },
        "against": {"type": ["string", "null"], "description": "Another model than that of the collection."},
        "sample": {"type": "integer", "minimum": 1, "default": 20_000},
        "queries": {"type": "integer", "minimum": 1, "default": MAX_JUDGED},
        "dimensions": {"type": ["integer", "null"], "minimum": 1},
        "precision": {"enum": [*(word.value for word in Precision), None]},
        "max_usd": {"type": ["string", "null"], "description": "The most US dollars that it may cost."},
        "timeout_s": timeout_schema(COMPARE_S),
    },
    "required": ["model"],
    "additionalProperties": False,
}


async def tune(gateway: Gateway, request: Request, caller: Caller) -> Response:
    named = await seen.collection_in_path(gateway, request, caller)
    body = await read_optional(request, BODY_BYTES, TUNE["properties"])
    seconds, space = timeout_in(body, TUNE_S), body.get("space")
    if space is not None and not isinstance(space, str):
        raise wrong("space", "it must be a text")

    async def tuned() -> SearchTuning:
        tokens = await golden_tokens(gateway, named.id)
        usd = tokens * gateway.price(named.model_for(session=None, space=space))
        async with paid_by(gateway, caller, tokens=tokens, usd=usd) as spent:
            return await gateway.client.tune_search(named.name, timeout=seconds, space=space, on_spent=spent)

    return await lasting(gateway, tuned())


async def compare(gateway: Gateway, request: Request, caller: Caller) -> Response:
    asked = await read_quotable(gateway, request, caller, COMPARE, COMPARE_S)
    name = asked.collection.name

    async def compared() -> Comparison | ComparisonQuote:
        quote = await gateway.client.quote_comparison(name, **asked.body)
        if asked.is_quote:
            return quote
        async with paid_by(gateway, caller, tokens=quote.tokens, usd=quote.known_usd) as spent:
            return await gateway.client.compare(
                name, **asked.body, max_usd=asked.limit(caller, quote), timeout=asked.seconds, on_spent=spent
            )

    return await lasting(gateway, compared())


@dataclass(frozen=True, slots=True)
class QuotableRequest:
    """A request for something that is quoted before it is begun. ``body`` has the arguments that both have."""

    collection: seen.VisibleCollection
    body: dict[str, Any]
    is_quote: bool
    max_usd: Decimal | None
    seconds: float

    def limit(self, caller: Caller, quote: BridgeQuote | ComparisonQuote) -> Decimal | None:
        """How many US dollars it may cost: no more than the caller says. If the dollars of the key are limited, it is
        no more than was quoted either, because that is what is reserved, and the collection may have grown since."""
        reserved = None if caller.limits.usd_per_month is None else quote.usd
        return min((usd for usd in (self.max_usd, reserved) if usd), default=None)


async def read_quotable(
    gateway: Gateway, request: Request, caller: Caller, schema: Schema, default_s: float
) -> QuotableRequest:
    """Raises :class:`Refusal`, also if the caller may not use a model that the body names."""
    named = await seen.collection_in_path(gateway, request, caller)
    body = await read_optional(request, BODY_BYTES, schema["properties"])
    if "model" not in body:
        raise wrong("model", "it is required")
    is_quote = body.pop("dry_run", False)
    if not isinstance(is_quote, bool):
        raise wrong("dry_run", "it must be true or false")
    seconds = timeout_in(body, default_s)
    given = body.pop("max_usd", None)
    most = None if given is None else as_usd("max_usd", given)
    body.pop("timeout_s", None)
    for model in (body["model"], body.get("against")):
        await gateway.models.require_usable(model, caller)
    return QuotableRequest(named, body, is_quote, most, seconds)


@contextlib.asynccontextmanager
async def paid_by(
    gateway: Gateway, caller: Caller, *, tokens: int, usd: Decimal
) -> AsyncIterator[Callable[[Spent], None]]:
    """Reserve what is expected for the key meanwhile, and book what the call says that it has spent.

    Raises :class:`Refusal` if the key's limits do not allow what is expected.
    """
    async with gateway.limits.spending(caller, tokens=tokens, usd=usd) as use:

        def spent(so_far: Spent) -> None:
            use.tokens, use.usd = so_far.tokens, so_far.known_usd

        use.settle(0)  # nothing is spent before the first request to workers, which `spent` hears of
        yield spent


async def golden_tokens(gateway: Gateway, collection_id: int) -> int:
    """About how many tokens the golden queries of a collection have that are judged, with the texts under titles."""

    def count(conn: sa.Connection) -> int:
        judged = golden.judgeable(conn, collection_id, golden.read(conn, collection_id, most=MAX_JUDGED))
        return sum(estimated_tokens(text) for one in judged for text in (one.text, one.rest) if text is not None)

    return await seen.read(gateway, count)


_PATH = "/v1/collections/{collection}"
ENDPOINTS = [
    Endpoint(
        "POST",
        _PATH + "/tune-search",
        tune,
        Scope.ADMIN,
        "Judge searches by vectors, by keywords and by both with the golden queries, and choose.",
        body=TUNE,
        answer=schema_of(SearchTuning),
    ),
    Endpoint(
        "POST",
        _PATH + "/compare",
        compare,
        Scope.ADMIN,
        "Judge another model on a sample of the collection, or say what that would cost.",
        body=COMPARE,
        answer={"anyOf": [dict(schema_of(Comparison)), dict(schema_of(ComparisonQuote))]},
    ),
]
