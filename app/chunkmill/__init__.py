"""Chunkmill turns text chunks into complete, searchable vectors in Postgres.

Begin with ``Client``; the README has an example. This package never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunkmill.domain.budget import Budget
from chunkmill.domain.chunks import Chunk
from chunkmill.domain.costs import (
    Adjustment,
    AdjustmentKind,
    Correction,
    Cost,
    Costs,
    CostsBy,
    Estimate,
    LaneEstimate,
)
from chunkmill.domain.lanes import Lane
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.results import (
    Abandoned,
    Attempt,
    Audit,
    DeadDetails,
    DeadEntry,
    DroppedDead,
    Explanation,
    FailingChunkBatch,
    Hits,
    Index,
    Job,
    JobProviderBatch,
    OpenWork,
    RetriedDead,
    RoutingStep,
    SearchHit,
    SearchPlan,
    Standing,
)
from chunkmill.domain.retention import Amount, CacheSpace, Pruned
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import ChunkBatchState, JobState, Priority, ProviderBatchState, Route
from chunkmill.errors import (
    BudgetExceeded,
    ChunkmillError,
    EmbeddedStackError,
    EngineError,
    InvalidChunk,
    InvalidInput,
    InvalidSetting,
    JobFailed,
    NewerSpace,
    NotFound,
    ProviderError,
    SpaceMismatch,
    StoreLimit,
    StoreUnavailable,
    UnknownModel,
    UnknownRoute,
    WaitTimeout,
)

if TYPE_CHECKING:
    from chunkmill.client import Client
else:

    def __getattr__(name: str) -> object:
        """The client, which is imported when it is first used.

        It imports SQLAlchemy, Celery and Alembic, which takes about a second. ``chunkmill --help`` and the engine do
        not need them.
        """
        if name != "Client":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from chunkmill.client import Client

        return Client


def __dir__() -> list[str]:
    """The public names."""
    return __all__


__all__ = [
    "Abandoned",
    "Adjustment",
    "AdjustmentKind",
    "Amount",
    "Attempt",
    "Audit",
    "Budget",
    "BudgetExceeded",
    "CacheSpace",
    "Chunk",
    "ChunkBatchState",
    "ChunkmillError",
    "Client",
    "Correction",
    "Cost",
    "Costs",
    "CostsBy",
    "DeadChunk",
    "DeadDetails",
    "DeadEntry",
    "DroppedDead",
    "EmbeddedStackError",
    "EngineError",
    "Estimate",
    "Explanation",
    "FailingChunkBatch",
    "Hits",
    "Index",
    "InvalidChunk",
    "InvalidInput",
    "InvalidSetting",
    "Job",
    "JobFailed",
    "JobProviderBatch",
    "JobState",
    "Lane",
    "LaneEstimate",
    "NewerSpace",
    "NotFound",
    "OnLong",
    "OpenWork",
    "Precision",
    "Priority",
    "ProviderBatchState",
    "ProviderError",
    "Pruned",
    "RetriedDead",
    "Route",
    "RoutingStep",
    "SearchHit",
    "SearchPlan",
    "SpaceMismatch",
    "Standing",
    "StoreLimit",
    "StoreUnavailable",
    "UnknownModel",
    "UnknownRoute",
    "WaitTimeout",
]
