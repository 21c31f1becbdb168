"""What all handlers of a gateway share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.client.aio import AsyncClient
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.health import HealthCheck
from chunkmill.gateway.keys import KeyRing
from chunkmill.gateway.models import Models
from chunkmill.gateway.streams import Streams
from chunkmill.settings import Settings

if TYPE_CHECKING:
    from chunkmill.gateway.batches.keeper import BatchKeeper


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
    is_leaving: bool = False
    streams: Streams = field(default_factory=Streams)
    batches: BatchKeeper | None = None
    """Takes the steps of served batches while the application runs."""

    @classmethod
    def over(cls, client: Client, db: sa.Engine, settings: Settings, keys: KeyRing) -> Gateway:
        """A gateway that takes ``client`` over, and closes it in the end."""
        models = Models(db, settings)
        health = HealthCheck(db, client._broker, settings, models)
        return cls(settings, AsyncClient(client), db, keys, models, health)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | None,
        kind: Literal["document", "query"],
        caller: Caller,
        timeout: float,
        dimensions: int | None = None,
    ) -> EmbeddedTexts:
        """What every route that returns vectors calls. It raises errors of ``chunkmill.errors``.

        A text may be empty: LangChain asks for the vector of "", and other servers have one.
        """
        return await self.client.embed_texts(
            texts, model=model, kind=kind, timeout=timeout, dimensions=dimensions, caller=caller.tenant, blank=True
        )

    async def close(self) -> None:
        await self.client.close()
