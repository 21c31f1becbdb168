"""Every metric of Chunkmill, in one table. ``counts`` beside it counts, and ``exposition`` serves.

A label has few values, which are written here: no job, chunk or collection, and never a text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product

from chunkmill.domain.states import JobState, Route


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"


class Role(StrEnum):
    """What a process is, and so which metrics it serves."""

    WORKER = "worker"
    """On queue ``gpu``."""
    PROVIDER = "provider"
    """A worker on queue ``openai``."""
    POLLER = "poller"


@dataclass(frozen=True, slots=True)
class Label:
    """``values`` are all that it has; none: one of each process's own, such as its name."""

    name: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Kind
    help: str
    roles: frozenset[Role]
    labels: tuple[Label, ...] = field(default=())

    def combinations(self) -> list[tuple[str, ...]]:
        """All series that it can have. One without labels has one."""
        return list(product(*(label.values for label in self.labels)))


_WORKER = frozenset({Role.WORKER})
_PROVIDER = frozenset({Role.PROVIDER})
_WORKERS = _WORKER | _PROVIDER
_POLLER = frozenset({Role.POLLER})
_ALL = _WORKERS | _POLLER

OTHER = "other"
"""Takes the place of a value that its label does not have."""
LANES = (Route.LOCAL, Route.OPENAI, Route.OPENAI_SYNC)
_LANE = Label("lane", tuple(route.value for route in LANES))
LANE_STATES = ("running", "idle", "paused", "stopped", "held")
OPERATIONS = ("upload", "create", "retrieve", "cancel", "list", "download", "delete", "embed")
FAULTS = ("died", "failed", "discarded")


def _counter(name: str, text: str, roles: frozenset[Role], *labels: Label) -> Metric:
    return Metric(f"chunkmill_{name}_total", Kind.COUNTER, text, roles, labels)


def _gauge(name: str, text: str, roles: frozenset[Role], *labels: Label) -> Metric:
    return Metric(f"chunkmill_{name}", Kind.GAUGE, text, roles, labels)


INFO = _gauge(
    "process_info",
    "1. What this process is; name is that of its leases, device what it computes on.",
    _ALL,
    Label("role"),
    Label("name"),
    Label("label"),
    Label("device"),
    Label("version"),
)

# Of the process itself: updated once for each TokenBatch, claim, commit or request.
TOKEN_BATCHES = _counter(
    "token_batches", "TokenBatches; one that held texts of two ChunkBatches counts for each.", _WORKER
)
TOKENS = _counter("tokens", "Tokens that went through the model, or that the provider charged.", _WORKERS)
PADDED_TOKENS = _counter("padded_tokens", "Tokens with the padding beside them: what the device computed.", _WORKER)
ENGINE_SECONDS = _counter("engine_seconds", "Time of TokenBatches on the device.", _WORKER)
TOKENIZE_SECONDS = _counter("tokenize_seconds", "Time in the tokenizer.", _WORKER)
URGENT_TEXTS = _counter("urgent_texts", "Texts embedded for somebody who waited, such as a search.", _WORKERS)
CLAIMS = _counter(
    "claims",
    "Doorbells answered: a ChunkBatch was claimed, or there was nothing to claim.",
    _WORKER,
    Label("result", ("claimed", "nothing")),
)
ATTEMPTS = _counter(
    "attempts",
    "Attempts at ChunkBatches, by how they ended here.",
    _WORKER,
    Label("outcome", ("completed", "released", "failed", "lease_lost")),
)
WRITES = _counter("writes", "Transactions that wrote vectors or completed a ChunkBatch.", _WORKER)
WRITE_SECONDS = _counter("write_seconds", "Time in those transactions, waiting for Postgres included.", _WORKER)
CONTENTS = _counter("contents", "Contents that got their vector here, committed.", _WORKERS)
RECOMPUTED = _counter("recomputed_contents", "Contents that had a vector when theirs was to be written.", _WORKER)
POSTGRES_RETRIES = _counter("postgres_retries", "Transactions run again, because Postgres could not take them.", _ALL)
PROVIDER_REQUESTS = _counter(
    "provider_requests",
    "Requests to the provider: busy is 429, stopped is keys or money, silent no answer.",
    _PROVIDER,
    Label("operation", OPERATIONS),
    Label("result", ("ok", "refused", "busy", "stopped", "silent")),
)
PROVIDER_SECONDS = _counter(
    "provider_request_seconds", "Time in those requests.", _PROVIDER, Label("operation", OPERATIONS)
)
HELD = _gauge("held_chunk_batches", "ChunkBatches under lease in this process.", _WORKERS)
LAST_PROGRESS = _gauge(
    "last_progress_timestamp_seconds", "When it last embedded, wrote or completed something, or was idle.", _WORKER
)
GPU_BUSY = _gauge(
    "gpu_busy_ratio", "Share of the last second or so in which the GPU ran a kernel, by its driver.", _WORKER
)
GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "Of the GPU, by all processes on it.", _WORKER)
GPU_MEMORY_SIZE = _gauge("gpu_memory_size_bytes", "Of the GPU.", _WORKER)

ROUNDS = _counter("poller_rounds", "Rounds of the poller that went through.", _POLLER)
LAST_ROUND = _gauge("poller_last_round_timestamp_seconds", "When the last round went through.", _POLLER)
RUNG = _counter("doorbells_rung", "Doorbells that this poller rang.", _POLLER)
TAKEN_BACK = _counter("leases_taken_back", "ChunkBatches this poller took back from silent workers.", _POLLER)

# Of the whole ledger, as this poller last saw it; absent while it cannot look. Several pollers say the same.
STORE_UP = _gauge(
    "store_up", "1 if this poller's last look at it succeeded.", _POLLER, Label("store", ("postgres", "redis"))
)
LOOKED_AT = _gauge("look_timestamp_seconds", "When this poller last looked at the ledger.", _POLLER)
LOOK_SECONDS = _gauge(
    "look_seconds",
    "What the look cost: now is taken each time, tally seldom where it is dear.",
    _POLLER,
    Label("part", ("now", "tally")),
)
READY = _gauge("ready_chunk_batches", "ChunkBatches that wait for a worker.", _POLLER, _LANE)
RUNNING = _gauge("running_chunk_batches", "ChunkBatches that a worker or the provider has.", _POLLER, _LANE)
DISCARDED = _gauge("discarded_chunk_batches", "ChunkBatches given up after their last attempt.", _POLLER, _LANE)
OLDEST = _gauge(
    "oldest_waiting_seconds", "So long has the oldest waiting ChunkBatch been due; 0: none waits.", _POLLER, _LANE
)
LANE_STATE = _gauge(
    "lane_state",
    "1 for the state that a lane is in; idle: no worker for it reports.",
    _POLLER,
    _LANE,
    Label("state", LANE_STATES),
)
JOBS = _gauge("jobs", "Jobs.", _POLLER, Label("state", tuple(state.value for state in JobState)))
REMAINING = _gauge("remaining_contents", "Contents of open jobs that have no vector yet.", _POLLER)
DEAD = _gauge("dead_chunks", "Entries of all jobs' dead lists.", _POLLER)
CACHE_HITS = _gauge(
    "cache_hit_ratio", "Share of chunks that needed no embedding, in jobs that are open or ended within a day.", _POLLER
)
WORKERS = _gauge(
    "workers",
    "Workers that report, and those that fell silent within ten minutes.",
    _POLLER,
    Label("kind", ("local", "provider")),
    Label("state", ("live", "silent")),
)
DOORBELLS = _gauge("queued_doorbells", "Doorbells in Redis.", _POLLER, Label("queue", ("gpu", "openai")))
RECENT_FAULTS = _gauge(
    "recent_faults",
    "Within ten minutes: attempts whose worker died or that failed, ChunkBatches given up.",
    _POLLER,
    Label("kind", FAULTS),
)
CHARGED = _gauge(
    "charged_usd", "US dollars that providers charged, by UTC.", _POLLER, Label("period", ("today", "month"))
)
COMMITTED = _gauge("committed_usd", "Estimate for what is at a provider and not charged yet.", _POLLER)
BUDGET = _gauge("budget_usd", "OPENAI_MONTHLY_BUDGET_USD of this poller; absent: none.", _POLLER)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
LEDGER = tuple(
    metric for metric in METRICS if metric.kind is Kind.GAUGE and metric.roles == _POLLER and metric is not LAST_ROUND
)
"""What a poller takes from one look, all together."""
