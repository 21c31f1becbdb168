"""Every metric of Chunkmill, in one table. ``counts`` counts them, and ``exposition`` serves them.

A label has few values, which are listed here. A job, a chunk, a collection or a text is never a label.
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
    """What a process is. Its roles decide which metrics it serves."""

    WORKER = "worker"
    """A worker on queue ``gpu``."""
    PROVIDER = "provider"
    """A worker on queue ``openai``."""
    POLLER = "poller"
    GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Label:
    """``values`` lists all values of the label. It is empty if each process has its own, such as its name."""

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
        """The label values of all series that the metric can have. A metric without labels has one series."""
        return list(product(*(label.values for label in self.labels)))


_WORKER = frozenset({Role.WORKER})
_PROVIDER = frozenset({Role.PROVIDER})
_WORKERS = _WORKER | _PROVIDER
_POLLER = frozenset({Role.POLLER})
_GATEWAY = frozenset({Role.GATEWAY})
_ALL = _WORKERS | _POLLER

OTHER = "other"
"""Replaces a value that its label does not list."""
LANES = (Route.LOCAL, Route.OPENAI, Route.OPENAI_SYNC)
_LANE = Label("lane", tuple(route.value for route in LANES))
LANE_STATES = ("running", "idle", "paused", "stopped", "held")
OPERATIONS = ("upload", "create", "retrieve", "cancel", "list", "download", "delete", "embed")
ODDITIES = (
    "usage",
    "other_model",
    "no_answer",
    "no_custom_id",
    "unknown_custom_id",
    "not_json",
    "too_long",
    "duplicate",
    "unanswered",
)
FAULTS = ("died", "failed", "discarded")


def _counter(name: str, text: str, roles: frozenset[Role], *labels: Label) -> Metric:
    return Metric(f"chunkmill_{name}_total", Kind.COUNTER, text, roles, labels)


def _gauge(name: str, text: str, roles: frozenset[Role], *labels: Label) -> Metric:
    return Metric(f"chunkmill_{name}", Kind.GAUGE, text, roles, labels)


INFO = _gauge(
    "process_info",
    "Always 1. The labels say what this process is: name is the owner name of its leases, device what it computes on.",
    _ALL | _GATEWAY,
    Label("role"),
    Label("name"),
    Label("label"),
    Label("device"),
    Label("version"),
)

# These are about the process itself. They are updated once for each TokenBatch, claim, commit or request.
TOKEN_BATCHES = _counter(
    "token_batches", "TokenBatches that were computed. One with texts of two ChunkBatches counts twice.", _WORKER
)
TOKENS = _counter("tokens", "Tokens that went through the model, or that the provider charged for.", _WORKERS)
PADDED_TOKENS = _counter("padded_tokens", "Tokens that the device computed, padding included.", _WORKER)
ENGINE_SECONDS = _counter("engine_seconds", "Seconds that TokenBatches spent on the device.", _WORKER)
TOKENIZE_SECONDS = _counter("tokenize_seconds", "Seconds spent in the tokenizer.", _WORKER)
URGENT_TEXTS = _counter("urgent_texts", "Texts embedded for a caller that waits, such as a search.", _WORKERS)
EMBED_REQUESTS = _counter(
    "embed_requests",
    "Requests of callers that wait, by how they ended here: answered, refused with a reason, left to other workers, or "
    "dropped because nobody waits any more.",
    _WORKER,
    Label("result", ("answered", "refused", "left", "dropped")),
)
EMBED_SLICES = _counter("embed_slices", "Calls of the engine for callers that wait.", _WORKER)
EMBED_SLICE_REQUESTS = _counter(
    "embed_slice_requests", "Requests in those calls. Per call, this is how many are embedded together.", _WORKER
)
EMBED_OPEN = _gauge("embed_requests_open", "Requests that this worker has claimed and not answered yet.", _WORKER)
CLAIMS = _counter(
    "claims",
    "Doorbells answered. result is claimed if a ChunkBatch was claimed, nothing if there was none to claim.",
    _WORKER,
    Label("result", ("claimed", "nothing")),
)
ATTEMPTS = _counter(
    "attempts",
    "Attempts at ChunkBatches, by the outcome in this process.",
    _WORKER,
    Label("outcome", ("completed", "released", "failed", "lease_lost")),
)
WRITES = _counter("writes", "Transactions that wrote vectors or completed a ChunkBatch.", _WORKER)
WRITE_SECONDS = _counter(
    "write_seconds",
    "Seconds spent in transactions that wrote vectors or completed a ChunkBatch, waiting for Postgres included.",
    _WORKER,
)
REFUSED = _counter(
    "refused_messages",
    "Messages in Redis that no process of ours writes. They were deleted and not answered. "
    "place is a queue, or control for Celery's remote control.",
    _WORKERS,
    Label("place", ("gpu", "openai", "control", "unknown")),
    Label("reason", ("size", "shape", "task", "options")),
)
CONTENTS = _counter("contents", "Contents whose vector this process committed.", _WORKERS)
RECOMPUTED = _counter("recomputed_contents", "Contents that already had a vector when theirs was written.", _WORKER)
POSTGRES_RETRIES = _counter(
    "postgres_retries", "Transactions that were run again because Postgres aborted them or was away.", _ALL
)
PROVIDER_REQUESTS = _counter(
    "provider_requests",
    "Requests to the provider. result: busy is HTTP 429, stopped a problem with key or money, silent no answer.",
    _PROVIDER,
    Label("operation", OPERATIONS),
    Label("result", ("ok", "refused", "busy", "stopped", "silent")),
)
PROVIDER_SECONDS = _counter(
    "provider_request_seconds", "Seconds spent in requests to the provider.", _PROVIDER, Label("operation", OPERATIONS)
)
PROVIDER_ODDITIES = _counter(
    "provider_oddities",
    "Odd answers of the provider. kind: usage is a count of tokens that cannot be true, other_model the answer of "
    "another model than the space has vectors of; the others are lines of result files that should not be there.",
    _PROVIDER,
    Label("kind", ODDITIES),
)
HELD = _gauge("held_chunk_batches", "ChunkBatches that this process has leased.", _WORKERS)
LAST_PROGRESS = _gauge(
    "last_progress_timestamp_seconds",
    "Unix time when this process last embedded, wrote or completed something, or was idle.",
    _WORKER,
)
GPU_BUSY = _gauge(
    "gpu_busy_ratio", "Share of about the last second in which the GPU ran a kernel, as its driver reports it.", _WORKER
)
GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "GPU memory in bytes that all processes on the GPU use.", _WORKER)
GPU_MEMORY_SIZE = _gauge("gpu_memory_size_bytes", "Size of the GPU memory in bytes.", _WORKER)

# What a key may do stands for the route, because each route is open to one of these.
_CALLED = (
    Label("scope", ("embed", "search", "jobs", "batches", "admin")),
    Label("result", ("ok", "refused", "limited", "failed", "gone")),
    Label("key", ("key",)),
)
GATEWAY_REQUESTS = _counter(
    "gateway_requests",
    "Requests to the gateway. scope is what the key must allow, or other if the request needs none; limited is HTTP "
    "429, and gone a caller who hung up. key is key for a stored key, and other for the gateway's own or none.",
    _GATEWAY,
    *_CALLED,
)
GATEWAY_SECONDS = _counter("gateway_request_seconds", "Seconds that requests to the gateway took.", _GATEWAY, *_CALLED)
GATEWAY_TEXTS = _counter("gateway_texts", "Texts in requests to the gateway.", _GATEWAY, *_CALLED)
GATEWAY_TOKENS = _counter("gateway_tokens", "Tokens that requests to the gateway used.", _GATEWAY, *_CALLED)
GATEWAY_WAITING_TEXTS = _gauge("gateway_waiting_texts", "Texts that wait in this gateway.", _GATEWAY)
GATEWAY_WAITING_TOKENS = _gauge("gateway_waiting_tokens", "Tokens that wait in this gateway, as estimated.", _GATEWAY)

ROUNDS = _counter("poller_rounds", "Rounds that this poller completed.", _POLLER)
LAST_ROUND = _gauge(
    "poller_last_round_timestamp_seconds", "Unix time when this poller last completed a round.", _POLLER
)
RUNG = _counter("doorbells_rung", "Doorbells that this poller rang.", _POLLER)
TAKEN_BACK = _counter(
    "leases_taken_back", "ChunkBatches that this poller took back from workers whose lease had ended.", _POLLER
)

# These are about the whole ledger, as this poller last read it. They are absent while it cannot read the ledger. If
# there are several pollers, all report the same.
STORE_UP = _gauge(
    "store_up",
    "1 if this poller could read the store at its last attempt, otherwise 0.",
    _POLLER,
    Label("store", ("postgres", "redis")),
)
LOOKED_AT = _gauge("look_timestamp_seconds", "Unix time when this poller last read the ledger.", _POLLER)
LOOK_SECONDS = _gauge(
    "look_seconds",
    "Seconds that reading the ledger took. part now is read every time, part tally less often if it takes long.",
    _POLLER,
    Label("part", ("now", "tally")),
)
READY = _gauge("ready_chunk_batches", "ChunkBatches that wait for a worker.", _POLLER, _LANE)
RUNNING = _gauge("running_chunk_batches", "ChunkBatches that a worker or the provider is working on.", _POLLER, _LANE)
DISCARDED = _gauge("discarded_chunk_batches", "ChunkBatches whose last permitted attempt failed.", _POLLER, _LANE)
OLDEST = _gauge(
    "oldest_waiting_seconds",
    "Age in seconds of the oldest ChunkBatch that is due and not claimed; 0 if there is none.",
    _POLLER,
    _LANE,
)
LANE_STATE = _gauge(
    "lane_state",
    "1 for the state that the lane is in, otherwise 0. idle means that no worker for the lane reports.",
    _POLLER,
    _LANE,
    Label("state", LANE_STATES),
)
JOBS = _gauge("jobs", "Jobs, by state.", _POLLER, Label("state", tuple(state.value for state in JobState)))
REMAINING = _gauge("remaining_contents", "Contents of open jobs that have no vector yet.", _POLLER)
DEAD = _gauge("dead_chunks", "Entries in the dead lists of all jobs.", _POLLER)
CACHE_HITS = _gauge(
    "cache_hit_ratio",
    "Share of chunks that needed no embedding, in jobs that are open or ended in the last day.",
    _POLLER,
)
WORKERS = _gauge(
    "workers",
    "Workers by state: live ones report, silent ones stopped reporting in the last ten minutes.",
    _POLLER,
    Label("kind", ("local", "provider")),
    Label("state", ("live", "silent")),
)
DOORBELLS = _gauge("queued_doorbells", "Doorbells that wait in Redis.", _POLLER, Label("queue", ("gpu", "openai")))
RECENT_FAULTS = _gauge(
    "recent_faults",
    "Faults in the last ten minutes: attempts that died or failed, and ChunkBatches that were discarded.",
    _POLLER,
    Label("kind", FAULTS),
)
CHARGED = _gauge(
    "charged_usd",
    "US dollars that providers charged or may have charged today and in this month (UTC), with corrections.",
    _POLLER,
    Label("period", ("today", "month")),
)
ADJUSTED = _gauge(
    "adjusted_usd",
    "The part of this month's charged_usd that no answer confirmed: charged and lost, maybe charged, corrected.",
    _POLLER,
    Label("kind", ("lost", "maybe_charged", "correction")),
)
COMMITTED = _gauge("committed_usd", "Estimated US dollars for what is in flight and not charged yet.", _POLLER)
BUDGET = _gauge("budget_usd", "OPENAI_MONTHLY_BUDGET_USD of this poller; absent if it is not set.", _POLLER)

# These are about the client of a gateway.
QUERY_CACHE_HITS = _counter("query_cache_hits", "Texts whose vector was in the query cache.", _GATEWAY)
QUERY_CACHE_MISSES = _counter("query_cache_misses", "Texts whose vector was not in the query cache.", _GATEWAY)
QUERY_CACHE_BYTES = _gauge("query_cache_bytes", "Bytes of memory that the query cache takes.", _GATEWAY)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
LEDGER = tuple(
    metric for metric in METRICS if metric.kind is Kind.GAUGE and metric.roles == _POLLER and metric is not LAST_ROUND
)
"""The gauges that a poller sets together, from one reading of the ledger."""
