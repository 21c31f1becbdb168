"""Chunkmill turns text chunks into complete, searchable vectors in Postgres.

Begin with ``Client``; the README has an example. This package never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunkmill.domain.bridges import AdapterKind, Bridge, BridgeQuote, BridgeTrial
from chunkmill.domain.budget import Budget
from chunkmill.domain.chunks import Chunk
from chunkmill.domain.collections import CollectionInfo, DroppedCollection
from chunkmill.domain.costs import (
    Adjustment,
    AdjustmentKind,
    Correction,
    Cost,
    Costs,
    CostsBy,
    Estimate,
    LaneEstimate,
    Spent,
)
from chunkmill.domain.golden import GoldenQuery
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
    GoldenLoaded,
    Hits,
    Index,
    Job,
    JobProviderBatch,
    Keywords,
    OpenWork,
    Outdated,
    RetriedDead,
    RoutingStep,
    SearchCounts,
    SearchHit,
    SearchPlan,
    SearchTuning,
    Standing,
)
from chunkmill.domain.retention import Amount, CacheSpace, Pruned, QueryCache
from chunkmill.domain.spaces import Concatenated, LongText, OnLong, Pooling, Precision, SpaceSpec
from chunkmill.domain.states import ChunkBatchState, JobState, Priority, ProviderBatchState, Route
from chunkmill.errors import (
    AccessDenied,
    BudgetExceeded,
    CanaryFailed,
    ChunkmillError,
    ClientClosed,
    DeviceFailed,
    DeviceTaken,
    DeviceUnavailable,
    EmbeddedStackError,
    EngineError,
    GatewayUnavailable,
    InvalidChunk,
    InvalidInput,
    InvalidSetting,
    JobCancelled,
    JobFailed,
    LeaseLost,
    ModelLoadError,
    NewerSpace,
    NotFound,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
    SpaceMismatch,
    StoreLimit,
    StoreUnavailable,
    TokenizerMismatch,
    TooManyRefused,
    UnknownModel,
    UnknownRoute,
    WaitTimeout,
)

if TYPE_CHECKING:
    from chunkmill.client import Client, GoldenQueries
    from chunkmill.client.aio import AsyncBatcher, AsyncClient, AsyncGoldenQueries
    from chunkmill.client.batcher import Batcher
    from chunkmill.domain.comparing import Change, Changes, Comparison, ComparisonQuote, Contender, LosingQuery
    from chunkmill.domain.embedded import EmbeddedTexts
    from chunkmill.domain.gates import GateResult, Gates
    from chunkmill.domain.maps import CollectionMap, Legend, MapMethod
    from chunkmill.domain.reembedding import Coverage, Quote, Reembedding, ReembeddingState, ServedBy
    from chunkmill.domain.stored import ChunkState, Exported, StoredChunk
else:
    _LATER = {
        "AsyncBatcher": "chunkmill.client.aio",
        "AsyncClient": "chunkmill.client.aio",
        "AsyncGoldenQueries": "chunkmill.client.aio",
        "Batcher": "chunkmill.client.batcher",
        "Change": "chunkmill.domain.comparing",
        "Changes": "chunkmill.domain.comparing",
        "ChunkState": "chunkmill.domain.stored",
        "Client": "chunkmill.client",
        "CollectionMap": "chunkmill.domain.maps",
        "Comparison": "chunkmill.domain.comparing",
        "ComparisonQuote": "chunkmill.domain.comparing",
        "Contender": "chunkmill.domain.comparing",
        "Coverage": "chunkmill.domain.reembedding",
        "EmbeddedTexts": "chunkmill.domain.embedded",
        "Exported": "chunkmill.domain.stored",
        "GateResult": "chunkmill.domain.gates",
        "Gates": "chunkmill.domain.gates",
        "GoldenQueries": "chunkmill.client",
        "Legend": "chunkmill.domain.maps",
        "LosingQuery": "chunkmill.domain.comparing",
        "MapMethod": "chunkmill.domain.maps",
        "Quote": "chunkmill.domain.reembedding",
        "Reembedding": "chunkmill.domain.reembedding",
        "ReembeddingState": "chunkmill.domain.reembedding",
        "ServedBy": "chunkmill.domain.reembedding",
        "StoredChunk": "chunkmill.domain.stored",
    }

    def __getattr__(name: str) -> object:
        """The clients and what needs NumPy, which are imported when they are first used.

        A client imports SQLAlchemy, Celery and Alembic, which takes about a second. ``chunkmill --help`` and the
        engine do not need them.
        """
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__


__all__ = [
    "Abandoned",
    "AccessDenied",
    "AdapterKind",
    "Adjustment",
    "AdjustmentKind",
    "Amount",
    "AsyncBatcher",
    "AsyncClient",
    "AsyncGoldenQueries",
    "Attempt",
    "Audit",
    "Batcher",
    "Bridge",
    "BridgeQuote",
    "BridgeTrial",
    "Budget",
    "BudgetExceeded",
    "CacheSpace",
    "CanaryFailed",
    "Change",
    "Changes",
    "Chunk",
    "ChunkBatchState",
    "ChunkState",
    "ChunkmillError",
    "Client",
    "ClientClosed",
    "CollectionInfo",
    "CollectionMap",
    "Comparison",
    "ComparisonQuote",
    "Concatenated",
    "Contender",
    "Correction",
    "Cost",
    "Costs",
    "CostsBy",
    "Coverage",
    "DeadChunk",
    "DeadDetails",
    "DeadEntry",
    "DeviceFailed",
    "DeviceTaken",
    "DeviceUnavailable",
    "DroppedCollection",
    "DroppedDead",
    "EmbeddedStackError",
    "EmbeddedTexts",
    "EngineError",
    "Estimate",
    "Explanation",
    "Exported",
    "FailingChunkBatch",
    "GateResult",
    "Gates",
    "GatewayUnavailable",
    "GoldenLoaded",
    "GoldenQueries",
    "GoldenQuery",
    "Hits",
    "Index",
    "InvalidChunk",
    "InvalidInput",
    "InvalidSetting",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobProviderBatch",
    "JobState",
    "Keywords",
    "Lane",
    "LaneEstimate",
    "LeaseLost",
    "Legend",
    "LongText",
    "LosingQuery",
    "MapMethod",
    "ModelLoadError",
    "NewerSpace",
    "NotFound",
    "OnLong",
    "OpenWork",
    "Outdated",
    "Pooling",
    "Precision",
    "Priority",
    "ProviderBatchState",
    "ProviderBusy",
    "ProviderError",
    "ProviderRefused",
    "ProviderSilent",
    "ProviderStopped",
    "Pruned",
    "QueryCache",
    "Quote",
    "Reembedding",
    "ReembeddingState",
    "RetriedDead",
    "Route",
    "RoutingStep",
    "SearchCounts",
    "SearchHit",
    "SearchPlan",
    "SearchTuning",
    "ServedBy",
    "SpaceMismatch",
    "SpaceSpec",
    "Spent",
    "Standing",
    "StoreLimit",
    "StoreUnavailable",
    "StoredChunk",
    "TokenizerMismatch",
    "TooManyRefused",
    "UnknownModel",
    "UnknownRoute",
    "WaitTimeout",
]
