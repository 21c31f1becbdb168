"""What the client hands back: frozen pictures of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from chunkmill.domain.lanes import Lane
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.states import ChunkBatchState, JobState, Priority, ProviderBatchState, Route


@dataclass(frozen=True, slots=True, repr=False)
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

    def __repr__(self) -> str:
        """One line with what a person looks for first."""
        return (
            f"Job(id={self.id}, state={self.state.value!r}, collection={self.collection!r}, chunks={self.chunks}, "
            f"remaining={self.remaining}, dead={self.dead})"
        )

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


class Standing(StrEnum):
    """What a dead chunk is now: the dead list keeps what was, and the collection goes on."""

    MISSING = "missing"
    """In its collection with the same text, and without a vector."""
    EMBEDDED = "embedded"
    """Its text has a vector since."""
    REPLACED = "replaced"
    """The chunk carries another text since."""
    DELETED = "deleted"
    REFUSED = "refused"
    """It never came in: refused at the door, or longer than its job takes."""


@dataclass(frozen=True, slots=True)
class DeadEntry:
    """One entry of the dead list: a chunk that got no vector in a job, and why.

    ``content_hash`` (hexadecimal) is None for a chunk refused before it was stored. ``sealed``: the job's producer
    came to its end.
    """

    id: int
    job_id: int
    job_state: JobState
    sealed: bool
    collection: str
    chunk_id: str
    content_hash: str | None
    code: str
    reason: str
    standing: Standing
    created_at: datetime

    @property
    def why_not_retried(self) -> str | None:
        """Why ``retry_dead`` refuses it; None where it does not."""
        if self.content_hash is None:
            return "refused at the door, so the text was never stored: mend the chunk and enqueue it again"
        if self.standing is Standing.REFUSED:
            return "the job refuses texts this long: enqueue it again with on_long='truncate' or 'split'"
        if self.standing is Standing.REPLACED:
            return "stale, for the chunk carries another text since: drop takes it off the list"
        if self.standing is Standing.DELETED:
            return "stale, for the chunk was deleted since: drop takes it off the list"
        if self.job_state is JobState.CANCELLED:
            return f"job {self.job_id} was cancelled: `chunkmill retry {self.job_id}` takes all of it up again"
        if self.job_state is JobState.FAILED and not self.sealed:
            return f"job {self.job_id} was never enqueued to its end: enqueue again"
        return None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One worker's attempt at a ChunkBatch.

    ``outcome`` is ``completed``, ``released`` (given back, the worker was leaving), ``failed`` (an error), ``died``,
    ``running``, ``superseded`` (its lease was taken back and a later attempt has it) or ``interrupted`` (its lease
    was taken back, by a cancel for one, and nobody has it). ``evidence`` is what was seen of a death, or the error of
    a failure while no later attempt has gone over it.

    It embedded ``contents`` that were new and ``recomputed`` that had a vector by the time it wrote them; ``at_risk``
    is the most it ever had embedded or on the device and not written. ``first_write_at`` is None where it wrote
    nothing. The ledger books no claim, so an attempt that was given back or failed before it had its texts and its
    engine is not among them.
    """

    chunk_batch_id: int
    attempt: int
    worker: str
    outcome: str
    evidence: str | None
    contents: int
    recomputed: int
    at_risk: int
    tokens: int
    engine_seconds: float
    first_write_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class DeadDetails:
    """All that is known of one dead chunk.

    ``metadata`` is None where the chunk is not in the collection with this text, ``characters`` and ``bytes`` where
    the text is not stored. ``deaths`` are the attempts that died with it. ``text`` is there only if asked for.
    """

    entry: DeadEntry
    metadata: Mapping[str, Any] | None
    characters: int | None
    bytes: int | None
    deaths: tuple[Attempt, ...]
    text: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class RetriedDead:
    """What a retry of dead chunks did.

    ``jobs`` have work again or are judged again; ``chunks`` left the dead list, and ``contents`` distinct texts of
    them wait for a worker. ``passed_over``: how many entries were left as they are, for each reason.
    """

    jobs: tuple[int, ...]
    chunks: int
    contents: int
    passed_over: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DroppedDead:
    """What a drop of dead chunks did: ``entries`` left the dead list, ``chunks`` their collection.

    The others were not in it any more, or are there with another text or with a vector, and stay so. ``jobs`` had
    failed, and are judged again.
    """

    jobs: tuple[int, ...]
    entries: int
    chunks: int


@dataclass(frozen=True, slots=True)
class FailingChunkBatch:
    """A ChunkBatch whose last attempts went wrong: ``discarded``, or open still and to be tried again."""

    id: int
    state: ChunkBatchState
    attempt: int
    max_attempts: int
    deaths: int
    code: str
    error: str


@dataclass(frozen=True, slots=True)
class RoutingStep:
    """A choice of a lane: when, which and why."""

    at: datetime
    route: Route
    because: str


@dataclass(frozen=True, slots=True)
class OpenWork:
    """Open ChunkBatches of one lane and state. ``at_provider``: ProviderBatches have their contents."""

    route: Route
    state: ChunkBatchState
    at_provider: bool
    chunk_batches: int
    contents: int
    due_at: datetime


@dataclass(frozen=True, slots=True)
class JobProviderBatch:
    """A ProviderBatch that has contents of the job, or had.

    ``done`` of its ``requests`` are through, by the provider's word; ``next_look`` is None once it is closed.
    """

    id: int
    state: ProviderBatchState
    provider_status: str | None
    requests: int
    done: int
    contents: int
    next_look: datetime | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """``route`` was asked for, ``routing`` are the choices since, the latest last; ``waits`` says in sentences what
    the open work waits for. ``lanes`` are the paid ones, ``provider_batches`` the newest of the job.
    """

    job_id: int
    state: JobState
    route: Route
    deadline: datetime | None
    routing: tuple[RoutingStep, ...]
    open: tuple[OpenWork, ...]
    waits: tuple[str, ...]
    lanes: tuple[Lane, ...]
    provider_batches: tuple[JobProviderBatch, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """An HNSW index. ``on``: the type it holds, ``vector`` or ``halfvec``; ``valid`` once it is built."""

    name: str
    on: str
    valid: bool
