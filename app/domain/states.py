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
    """Where a job is embedded. ``auto`` leaves the choice to Chunkmill."""

    LOCAL = "local"
    AUTO = "auto"


class Priority(StrEnum):
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """Redis order: 0 is served first. These are three of kombu's four queue steps (0, 3, 6, 9)."""
        return {Priority.HIGH: 3, Priority.NORMAL: 6, Priority.LOW: 9}[self]
