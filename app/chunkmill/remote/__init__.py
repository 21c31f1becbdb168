"""Clients of a gateway over HTTP, for programs that have neither Postgres nor Redis.

They need httpx2 and NumPy. Nothing here imports SQLAlchemy, Celery or Redis.
"""

from __future__ import annotations

from chunkmill.remote.client import AsyncRemoteClient, RemoteClient
from chunkmill.remote.comparing import compare_searches
from chunkmill.remote.embedder import RemoteEmbedder

__all__ = ["RemoteClient", "AsyncRemoteClient", "RemoteEmbedder", "compare_searches"]  # noqa: RUF022 - the order of docs/api.md
