"""The states of a job and of a ChunkBatch, and which may follow which."""

from __future__ import annotations

from enum import StrEnum


class ChunkBatchState(StrEnum):
    """River's words; the README draws the diagram."""

    AVAILABLE = "available"
    """Waiting for a worker, from ``not_before`` on."""
    RUNNING = "running"
    """Leased: ``lease_until`` says how long, ``attempt`` to whom."""
    COMPLETED = "completed"
    """Every content in it has a vector, or a dead chunk that says why not."""
    DISCARDED = "discarded"
    """The last attempt failed; ``retry`` makes it available again."""
    CANCELLED = "cancelled"
    """Its job was cancelled; ``retry`` makes it available again."""


class JobState(StrEnum):
    ENQUEUEING = "enqueueing"
    """The producer is still adding chunks; workers already embed what is committed."""
    RUNNING = "running"
    """All chunks are in; ChunkBatches are open."""
    COMPLETED = "completed"
    """An anti-join of the job's chunks against the space's vectors came back empty."""
    FAILED = "failed"
    """Nothing is open, and chunks are left without a vector: the dead list names them."""
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


class Route(StrEnum):
    """Where a job is embedded. ``auto`` leaves the choice to Chunkmill (``chunkmill.domain.routing``)."""

    LOCAL = "local"
    OPENAI = "openai"
    """The Batch API: half price, up to a day."""
    OPENAI_SYNC = "openai-sync"
    """The plain embeddings endpoint, for what cannot wait and for servers without batches."""
    AUTO = "auto"

    @property
    def is_paid(self) -> bool:
        return self in (Route.OPENAI, Route.OPENAI_SYNC)


class ProviderBatchState(StrEnum):
    """The steps of a ProviderBatch. Each is committed before the next begins, so that a restart goes on from it."""

    GATHERING = "gathering"
    """To be filled with whatever waits for its space."""
    GATHERED = "gathered"
    """Its inputs are in flight: nobody else sends them. Nothing has left this house."""
    UPLOADED = "uploaded"
    """The provider has its file, which costs nothing yet."""
    CREATING = "creating"
    """It was asked for, or is about to be: the answer is not known, so it may exist and cost money."""
    SUBMITTED = "submitted"
    """The provider has it under ``batch_id``."""
    COLLECTING = "collecting"
    """The provider is through with it; its results are being read."""
    CLEANING = "cleaning"
    """Every input is accounted for; the provider's files are left to delete."""
    CLOSED = "closed"

    @property
    def spends(self) -> bool:
        """Whether its next steps lead to a charge. A stopped lane takes none of them, but collects what it paid."""
        state = ProviderBatchState
        return self in (state.GATHERING, state.GATHERED, state.UPLOADED, state.CREATING)

    @property
    def is_enqueued(self) -> bool:
        """Whether it counts against the account's limits: its inputs are queued at the provider, or about to be."""
        state = ProviderBatchState
        return self in (state.GATHERED, state.UPLOADED, state.CREATING, state.SUBMITTED)

    @property
    def is_committed(self) -> bool:
        """Whether it has costs that are not all charged yet."""
        return self.is_enqueued or self is ProviderBatchState.COLLECTING


class Priority(StrEnum):
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """Redis order: 0 is served first. These are three of kombu's four queue steps (0, 3, 6, 9)."""
        return {Priority.HIGH: 3, Priority.NORMAL: 6, Priority.LOW: 9}[self]
