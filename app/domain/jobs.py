"""What the client hands back: frozen pictures of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.domain.planning import DeadChunk
from app.domain.states import JobState, Priority, Route


@dataclass(frozen=True, slots=True)
class Job:
    """What one ``enqueue`` asked for and how far it is.

    ``chunks`` counts accepted chunks; ``contents`` their distinct texts (a text that comes back in a later
    window of the same enqueue counts again, and is embedded once), of which ``cached`` had a vector already,
    ``embedded`` got one since and ``remaining`` still wait. ``dead`` counts the chunks without a vector
    (``dead_chunks`` holds the first of them), ``truncated`` the contents that were cut. ``tokens`` are those
    the model saw in this job, ``engine_seconds`` the time it took for them.
    """

    id: int
    state: JobState
    collection: str
    space: str
    model: str
    route: Route
    priority: Priority
    idempotency_key: str | None
    chunks: int
    contents: int
    cached: int
    embedded: int
    remaining: int
    dead: int
    truncated: int
    tokens: int
    engine_seconds: float
    created_at: datetime
    finished_at: datetime | None
    error: str | None
    dead_chunks: tuple[DeadChunk, ...] = ()

    @property
    def progress(self) -> float:
        """0.0 to 1.0: the share of the job's contents that have a vector."""
        if self.state is JobState.COMPLETED:
            return 1.0
        return (self.cached + self.embedded) / self.contents if self.contents else 0.0


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One chunk found. ``score`` is the cosine similarity to the query, 1.0 at best."""

    score: float
    chunk_id: str
    text: str
    metadata: Mapping[str, Any]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Audit:
    """A collection's chunks anti-joined with its space's vectors.

    ``missing`` chunks have no vector; ``pending`` of them wait in an open ChunkBatch and ``dead`` are named
    in a job's dead list. ``missing_ids`` holds the first of them, in order.
    """

    collection: str
    space: str
    model: str
    chunks: int
    contents: int
    embedded: int
    missing: int
    pending: int
    dead: int
    truncated: int
    missing_ids: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return self.missing == 0
