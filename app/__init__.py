"""Chunkmill: text chunks in, complete searchable vectors in Postgres.

``Client`` is the way in; the README has the example. This package never imports torch.
"""

from app.client import Client
from app.domain.chunks import Chunk
from app.domain.jobs import Audit, Job, SearchHit
from app.domain.planning import DeadChunk
from app.domain.spaces import OnLong
from app.domain.states import JobState, Priority, Route
from app.errors import ChunkmillError, InvalidChunk, InvalidInput, JobFailed, NotFound, WaitTimeout

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
