"""What all handlers of a gateway share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.client.aio import AsyncClient
from chunkmill.domain.embedded import EmbeddedTexts, counted, estimated_tokens
from chunkmill.domain.prices import price_on
from chunkmill.domain.providers import OPENAI, ProviderModel
from chunkmill.domain.results import Hits
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.exchange import current
from chunkmill.gateway.health import HealthCheck
from chunkmill.gateway.keys import KeyRing, StoredKeys
from chunkmill.gateway.limits.limits import Limits, Use
from chunkmill.gateway.models import Models
from chunkmill.gateway.streams import Streams
from chunkmill.openai.catalogue import model_for, provider_model
from chunkmill.settings import Settings

if TYPE_CHECKING:
    from chunkmill.gateway.batches.keeper import BatchKeeper

FEW_TEXTS, FEW_CHARACTERS = 32, 65_536
"""The event loop itself works for requests of at most so many texts, with so many characters together. It does so in
less than a millisecond. For larger ones threads work."""


@dataclass(slots=True)
class Gateway:
    """``client`` waits in the event loop and works in threads. ``db`` is its engine, for statements of the gateway.

    ``is_leaving`` is true from SIGTERM on: new requests are refused, and those under way end.
    """

    settings: Settings
    client: AsyncClient
    db: sa.Engine
    keys: KeyRing
    models: Models
    health: HealthCheck
    limits: Limits
    hosts: frozenset[str] | None = None
    """The names by which callers may call this gateway; None means any. A gateway on loopback has them, so that no page
    in a browser of this machine reaches it under a name of its own (DNS rebinding)."""
    is_leaving: bool = False
    streams: Streams = field(default_factory=Streams)
    batches: BatchKeeper | None = None
    """Takes the steps of served batches while the application runs."""

    @classmethod
    def over(cls, client: Client, db: sa.Engine, settings: Settings, keys: KeyRing) -> Gateway:
        """A gateway that takes ``client`` over, and closes it in the end."""
        models = Models(db, settings)
        health = HealthCheck(db, client._broker, settings, models)
        return cls(settings, AsyncClient(client), db, keys, models, health, Limits(db, settings))

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | None,
        kind: Literal["document", "query"],
        caller: Caller,
        timeout: float,
        dimensions: int | None = None,
        spec: SpaceSpec | None = None,
    ) -> EmbeddedTexts:
        """What every route that returns vectors calls. It raises errors of ``chunkmill.errors``, and :class:`Refusal`
        if the key's limits or the room in this gateway do not allow it.

        A text may be empty: LangChain asks for the vector of "", and other servers have one. ``spec`` is the space that
        ``model`` and ``dimensions`` say, if it is known.
        """
        async with self.embedding(caller, model or self.settings.embedding_model, texts) as use:
            if spec is not None and len(texts) <= FEW_TEXTS and sum(map(len, texts)) <= FEW_CHARACTERS:
                embedded = await self.client._embed_in_loop(
                    texts, spec, kind=kind, timeout=timeout, caller=caller.tenant
                )
            else:
                embedded = await self.client.embed_texts(
                    texts,
                    model=model,
                    kind=kind,
                    timeout=timeout,
                    dimensions=dimensions,
                    caller=caller.tenant,
                    blank=True,
                )
            use.settle(*counted(embedded, texts, estimated_tokens))
        return embedded

    async def search(self, query: Any, *, model: str, caller: Caller, **asked: Any) -> Hits | list[Hits]:
        """What a search finds, whose queries ``model`` embeds. The caller pays for those that were embedded for it,
        which are in two spaces if the collection left one, or its model is not served.
        """
        texts = [text for text in (query if isinstance(query, list) else [query]) if isinstance(text, str)]
        told: list[EmbeddedTexts] = []
        async with self.embedding(caller, model, texts) as use:
            result = await self.client._search_and_tell(told.append, query, **asked)
            use.tokens, use.usd = 0, Decimal(0)
            for embedded in told:
                tokens, paid = counted(embedded, texts, estimated_tokens)
                use.tokens += tokens
                use.usd += paid * self._price_in(embedded.spec)
        return result

    @contextlib.asynccontextmanager
    async def embedding(self, caller: Caller, model: str, texts: Sequence[str]) -> AsyncIterator[Use]:
        """Embed the texts meanwhile, within the caller's limits and the room of this gateway. ``model`` is its name.

        Who knows how many tokens it were calls ``settle`` of the result; else the estimate counts.
        """
        exchange = current()
        if exchange is not None:
            exchange.model, exchange.texts = model, exchange.texts + len(texts)
        estimate = sum(map(estimated_tokens, texts))
        async with self.limits.using(caller, texts=len(texts), tokens=estimate, price=self.price(model)) as use:
            yield use
        if exchange is not None:
            exchange.tokens += use.tokens

    def price(self, model: str) -> Decimal:
        """US dollars for a token of a plain request: 0 for a model that our own workers serve."""
        return _price_of(provider_model(self.settings, model))

    def _price_in(self, spec: SpaceSpec | None) -> Decimal:
        """US dollars for a token that was embedded in a space, which need not be that of a model that is served now."""
        return _price_of(model_for(self.settings, spec) if spec is not None and spec.provider == OPENAI else None)

    async def start(self) -> None:
        """Begin what needs the event loop."""
        self.client._live_in_loop()
        if isinstance(self.keys, StoredKeys):
            self.keys.listen()

    async def close(self) -> None:
        async with contextlib.AsyncExitStack() as closing:  # the connections go, whatever happens before
            closing.push_async_callback(self.client.close)
            closing.push_async_callback(self.limits.close)
            closing.push_async_callback(self.keys.close)


def _price_of(served: ProviderModel | None) -> Decimal:
    if served is None or served.same_as is not None:
        return Decimal(0)
    price = price_on(served.prices, datetime.now(UTC).date())
    return Decimal(0) if price is None else price.of(1, Route.OPENAI_SYNC)
