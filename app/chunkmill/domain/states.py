"""The words of the ledger: states of jobs, ChunkBatches and ProviderBatches, routes and priorities."""

from __future__ import annotations

from enum import StrEnum


class ChunkBatchState(StrEnum):
    """The state of a ChunkBatch. The words are those of River; docs/architecture.md draws the diagram."""

    AVAILABLE = "available"
    """It waits for a worker, from ``not_before`` on."""
    RUNNING = "running"
    """A worker has leased it until ``lease_until``; ``attempt`` says which claim this is."""
    COMPLETED = "completed"
    """Every content in it has a vector, or a dead chunk that says why it has none."""
    DISCARDED = "discarded"
    """The last permitted attempt failed. ``retry`` makes it available again."""
    CANCELLED = "cancelled"
    """Its job was cancelled. ``retry`` makes it available again."""


class JobState(StrEnum):
    """The state of a job."""

    ENQUEUEING = "enqueueing"
    """The producer is still adding chunks; workers already embed what is committed."""
    RUNNING = "running"
    """All chunks are committed, and some ChunkBatches are open."""
    COMPLETED = "completed"
    """Each of the job's chunks has a vector, or is on the dead list because it was refused: it was invalid and
    ``on_invalid`` is ``skip``, or too long and ``on_long`` is ``reject``. ``Job.dead`` counts those."""
    FAILED = "failed"
    """No ChunkBatch is open, and some chunks that were not refused have no vector. The dead list names them."""
    CANCELLED = "cancelled"
    """The job was cancelled. Its vectors stay."""

    @property
    def is_final(self) -> bool:
        """Whether the job is finished, unless somebody retries it."""
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


class Route(StrEnum):
    """Where a job is embedded. ``auto`` leaves the choice to Chunkmill (``chunkmill.domain.routing``)."""

    LOCAL = "local"
    """On our own GPUs and CPUs."""
    OPENAI = "openai"
    """By the Batch API, for half the price and within a day."""
    OPENAI_SYNC = "openai-sync"
    """By plain requests, for work that cannot wait and for servers without batches."""
    AUTO = "auto"
    """By the route that Chunkmill chooses."""

    @property
    def is_paid(self) -> bool:
        """Whether a provider charges for this route."""
        return self in (Route.OPENAI, Route.OPENAI_SYNC)


class ProviderBatchState(StrEnum):
    """The state of a ProviderBatch. Each is committed before the next step begins, so a restart continues there."""

    GATHERING = "gathering"
    """It is about to be filled with the work that waits for its space."""
    GATHERED = "gathered"
    """Its inputs are chosen, and nobody else sends them. Nothing was sent to the provider yet."""
    UPLOADED = "uploaded"
    """The provider has its file, which costs nothing yet."""
    CREATING = "creating"
    """The request to create it was sent, or is about to be. The answer is not known, so it may exist and cost money."""
    SUBMITTED = "submitted"
    """The provider has it under ``batch_id``."""
    COLLECTING = "collecting"
    """The provider has finished it, and its results are being read."""
    CLEANING = "cleaning"
    """Every input has a result. The provider's files have yet to be deleted."""
    CLOSED = "closed"
    """Nothing is left to do."""

    @property
    def spends(self) -> bool:
        """Whether its next steps lead to a charge. A stopped lane takes none of them, but collects what it paid."""
        state = ProviderBatchState
        return self in (state.GATHERING, state.GATHERED, state.UPLOADED, state.CREATING)

    @property
    def is_enqueued(self) -> bool:
        """Whether it counts against the account's limits: its inputs are queued at the provider, or about to be.

        One that is submitted counts no more once the provider says that it has ended.
        """
        state = ProviderBatchState
        return self in (state.GATHERED, state.UPLOADED, state.CREATING, state.SUBMITTED)

    @property
    def is_committed(self) -> bool:
        """Whether it has costs that are not all charged yet."""
        return self.is_enqueued or self is ProviderBatchState.COLLECTING


class Priority(StrEnum):
    """Which work is served first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """The priority in Redis, where 0 is served first: three of kombu's four steps (0, 3, 6, 9)."""
        return {Priority.HIGH: 3, Priority.NORMAL: 6, Priority.LOW: 9}[self]
