"""An embedder for programs that know four methods: ``initialize``, ``embed``, ``get_dimension`` and ``close``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from chunkmill.errors import InvalidInput
from chunkmill.remote.client import AsyncRemoteClient


class RemoteEmbedder:
    """``embed`` returns lists of floats. ``key`` is ``CHUNKMILL_API_KEY`` if it is not given.

    ``timeout`` is in seconds, for each call. The other arguments are those of :class:`AsyncRemoteClient`.
    ``batch_size`` is taken for the sake of programs that give one: the gateway says how many texts a request may have.
    """

    def __init__(
        self,
        base_url: str,
        batch_size: int = 64,
        *,
        key: str | None = None,
        model: str | None = None,
        timeout: float = 300.0,
        **arguments: Any,
    ) -> None:
        self.batch_size = batch_size
        self._model = model
        self._timeout = timeout
        given = os.environ.get("CHUNKMILL_API_KEY", "") if key is None else key
        self._client = AsyncRemoteClient(base_url, given, timeout=timeout, **arguments)
        self._dimensions: int | None = None

    def __repr__(self) -> str:
        return f"RemoteEmbedder({self._client!r})"

    async def initialize(self) -> None:
        """Ask the gateway for the vector of a word, so that a wrong address, key or model is noticed now."""
        if self._dimensions is None:
            await self.embed(["word"])

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One list of floats for each text, in their order."""
        vectors = await self._client.embed(texts, model=self._model, timeout=self._timeout)
        self._dimensions = int(vectors.shape[1])
        rows: list[list[float]] = vectors.tolist()
        return rows

    def get_dimension(self) -> int:
        """How many numbers a vector has.

        Raises :class:`InvalidInput` before ``initialize`` or ``embed`` was awaited.
        """
        if self._dimensions is None:
            raise InvalidInput("the dimension is known once `await initialize()` or `await embed(…)` has returned.")
        return self._dimensions

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
