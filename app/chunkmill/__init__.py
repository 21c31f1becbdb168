"""Chunkmill: text chunks in, complete searchable vectors in Postgres.

``Client`` is the way in; the README has the example. This package never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chunkmill.client import Client
    from chunkmill.domain.chunks import Chunk
    from chunkmill.domain.planning import DeadChunk
    from chunkmill.domain.results import Audit, Job, SearchHit
    from chunkmill.domain.spaces import OnLong
    from chunkmill.domain.states import JobState, Priority, Route
    from chunkmill.errors import ChunkmillError, InvalidChunk, InvalidInput, JobFailed, NotFound, WaitTimeout

__all__ = [
    "Audit",
    "Chunk",
    "ChunkmillError",
    "Client",
    "DeadChunk",
    "InvalidChunk",
    "InvalidInput",
    "Job",
    "JobFailed",
    "JobState",
    "NotFound",
    "OnLong",
    "Priority",
    "Route",
    "SearchHit",
    "WaitTimeout",
]

_HOMES = {
    "chunkmill.client": ("Client",),
    "chunkmill.domain.chunks": ("Chunk",),
    "chunkmill.domain.results": ("Audit", "Job", "SearchHit"),
    "chunkmill.domain.planning": ("DeadChunk",),
    "chunkmill.domain.spaces": ("OnLong",),
    "chunkmill.domain.states": ("JobState", "Priority", "Route"),
    "chunkmill.errors": ("ChunkmillError", "InvalidChunk", "InvalidInput", "JobFailed", "NotFound", "WaitTimeout"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: the client brings SQLAlchemy, Celery and Alembic along,
    a second of start-up that ``chunkmill --help`` and the engine have no use for."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'app' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
