"""The results that the client returns: frozen views of the ledger and the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from chunkmill.domain.lanes import Lane
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.printed import PrintedResult, Rows
from chunkmill.domain.states import ChunkBatchState, JobState, Priority, ProviderBatchState, Route
from chunkmill.errors import JobCancelled, JobFailed, ProviderBusy, ProviderSilent, ProviderStopped, elsewhere_codes

if TYPE_CHECKING:
    from chunkmill.domain.tables import Table


@dataclass(frozen=True, slots=True, repr=False)
class Job(PrintedResult):
    """What one ``enqueue`` asked for, and how much of it is done."""

    id: int
    state: JobState
    collection: str
    space: str
    """The fingerprint of the embedding space."""
    model: str
    route: Route
    priority: Priority
    idempotency_key: str | None
    chunks: int
    """Accepted chunks."""
    contents: int
    """Texts of these chunks, where repeated ones count once in each window (up to 5,000 chunks) of the enqueue. A text
    that comes again in a later window counts again, here and as cached or embedded, although it is embedded once.
    ``audit`` counts the distinct texts of a collection."""
    cached: int
    """Contents that had a vector when they were enqueued."""
    embedded: int
    """Contents that got a vector since."""
    remaining: int
    """Contents that still wait for a vector."""
    dead: int
    """Chunks that got no vector."""
    truncated: int
    """Contents that were longer than the model reads, and were cut."""
    tokens: int
    """Tokens that the model read for this job."""
    engine_seconds: float
    """How long the model worked on them, in seconds."""
    created_at: datetime
    finished_at: datetime | None
    """None while the job is open."""
    error: str | None
    """Why the job failed; None if it did not."""
    dead_chunks: tuple[DeadChunk, ...] = ()
    """The first of the dead chunks, with their reasons."""
    new: int | None = None
    """Chunks whose id was not in the collection. This and the next four are None if it is not known, as for a job of
    an older release."""
    replaced: int | None = None
    """Chunks whose text or metadata differ from those that were in the collection."""
    unchanged: int | None = None
    """Chunks that were in the collection already, with the same text and metadata."""
    repeated: int | None = None
    """Chunks whose id the same enqueue had given before; the last one replaced the others. One that was unchanged the
    first time may count as unchanged again."""
    refused: int | None = None
    """Chunks that the enqueue did not accept: bad ones that were skipped, and texts already known to be too long. They
    are on the dead list."""
    deleted: int | None = None
    """Chunks that were deleted because the source does not have them any more; None if the enqueue was not called with
    ``replace``, or has not come to the end of its deletions."""
    hindrance: str | None = field(default=None, compare=False)
    """What keeps the job from its end and does not pass by waiting, and what to do about it, in a sentence or a few.
    None if nothing does, and where nobody looks for it: in lists, and in what an enqueue returns."""

    def __repr__(self) -> str:
        """One line with the fields that a person looks for first."""
        return (
            f"Job(id={self.id}, state={self.state.value!r}, collection={self.collection!r}, chunks={self.chunks}, "
            f"remaining={self.remaining}, dead={self.dead})"
        )

    @property
    def progress(self) -> float:
        """The share of the job's contents that have a vector, from 0.0 to 1.0."""
        if self.state is JobState.COMPLETED:
            return 1.0
        return (self.cached + self.embedded) / self.contents if self.contents else 0.0

    @property
    def undone(self) -> int:
        """How many texts a failed or cancelled job has left without a vector. They are not ``remaining``: nobody works
        on them until the job is retried.
        """
        is_left = self.state in (JobState.CANCELLED, JobState.FAILED)
        return max(0, self.contents - self.cached - self.embedded) if is_left else 0

    @property
    def notice(self) -> str | None:
        """How many texts were cut, and what to do about it, in a sentence or two; None if none was cut."""
        if not self.truncated:
            return None
        cut = "1 text is" if self.truncated == 1 else f"{self.truncated:,} texts are"
        its = "its" if self.truncated == 1 else "their"
        return (
            f"{cut} longer than the model reads, so the vector stands only for {its} beginning. To embed all of it, "
            "enqueue documents with --chunk 200 (in Python: chunkmill.chunking), or with --on-long split: "
            "docs/documents.md"
        )


def require_not_failed(job: Job) -> None:
    """Raise :class:`JobFailed`, with the first dead chunks, if a job that was waited for has failed, and
    :class:`JobCancelled` if it was cancelled: whoever waits for a job goes on as if its collection were complete.
    """
    if job.state is JobState.CANCELLED:
        raise JobCancelled(cancelled(job), job_id=job.id)
    if job.state is JobState.FAILED:
        shown = "; ".join(f"{dead.chunk_id!r}: {dead.reason}" for dead in job.dead_chunks[:3])
        raise JobFailed(f"job {job.id} failed: {job.error} {shown}".rstrip(), job_id=job.id)


def cancelled(job: Job) -> str:
    """What is said of a cancelled job that somebody waited for."""
    left = f": it left {job.undone:,} of {job.contents:,} texts without a vector" if job.undone else ""
    return (
        f"job {job.id} was cancelled, so it is not complete{left}. To continue it: `chunkmill retry {job.id}`, or "
        "`retry` of the client."
    )


def still_open(job: Job, seconds: float) -> str:
    """What a wait of ``seconds`` says about a job that has not ended."""
    return (
        f"job {job.id} is {job.state} after {seconds:g} s with {job.remaining:,} of {job.contents:,} contents to go. "
        "It goes on, so you may wait again."
    )


@dataclass(frozen=True, slots=True)
class SearchHit(PrintedResult):
    """One chunk that a search found."""

    score: float
    """The cosine similarity to the query, at most 1.0."""
    chunk_id: str
    text: str
    metadata: Mapping[str, Any]
    truncated: bool
    """The vector stands only for the part of the text that the model reads."""
    keyword: float | None = None
    """How well the words of the query match, from 0.0, which is not at all; None if keywords were not asked. It can be
    compared within one search only."""
    mixed: float | None = None
    """The score from 0.0 to 1.0 by which a hybrid search ordered its hits; None if ``score`` ordered them."""
    bridge: str | None = None
    """The model that the query was embedded with, if a bridge carried it into the collection's space; else None."""
    outdated: bool = False
    """The chunk was replaced and waits for its new vector: ``text`` and ``score`` are those of its old text, and
    ``metadata`` are the new ones. Only a collection that is set so has such hits (:meth:`Client.outdated`)."""


@dataclass(frozen=True, slots=True)
class SearchCounts(PrintedResult):
    """How the searches of a collection went in one of its spaces. Searches with a ``session`` are counted."""

    space: str
    """The fingerprint of the embedding space."""
    model: str
    role: str
    """``active``; ``filling`` if the collection is on its way to it; ``previous`` if the collection left it."""
    share: int
    """Of how many percent of the sessions the space answers the searches now."""
    searches: int
    errors: int
    """How many of them no worker could answer."""
    p50_ms: float | None
    """Half of the answered searches took no longer than so many milliseconds, to 5 %; None if there were none."""
    p95_ms: float | None
    """The same for 95 % of them."""
    feedback: int
    """How many hits were what somebody wanted (:meth:`Client.feedback`), of searches with and without a session."""


@dataclass(frozen=True, slots=True)
class Keywords(PrintedResult):
    """The keywords of a collection, which hybrid searches read."""

    collection: str
    language: str
    """The text search configuration of Postgres that turns words into lexemes, with its schema."""
    is_ready: bool
    """All chunks have their keywords. Until then only searches by vectors are possible."""
    texts: int
    """About how many texts have keywords."""
    bytes: int
    """How many bytes they take on disk, with their index."""


@dataclass(frozen=True, slots=True)
class Outdated(PrintedResult):
    """Whether searches of a collection find replaced chunks by their old vectors, and how many they find so now."""

    collection: str
    is_served: bool
    waiting: int
    """Replaced chunks that have no new vector yet and are found by the old one."""


@dataclass(frozen=True, slots=True)
class GoldenLoaded(PrintedResult):
    """What was read from the files of a golden set."""

    queries: int
    """Queries that have judgements, and are stored."""
    judgements: int
    """Judgements of these queries."""
    without_judgement: int
    """Queries that no judgement names. They are not stored."""
    unknown_chunks: int
    """Judgements of chunks that the collection does not have. They are stored, and count once it has the chunk."""


@dataclass(frozen=True, slots=True)
class SearchTuning(PrintedResult):
    """What the golden queries of a collection say about hybrid search, and what was chosen.

    Each nDCG@10 is a mean over the queries, from 0.0 to 1.0.
    """

    collection: str
    space: str
    """The fingerprint of the embedding space."""
    n: int
    """How many queries were judged."""
    left_out: int
    """How many were not: the collection has none of their relevant chunks, or a chunk has another title now."""
    dense: float
    """nDCG@10 of the vectors alone."""
    keyword: float
    """nDCG@10 of the keywords alone."""
    rrf: float
    """nDCG@10 of reciprocal rank fusion."""
    mix: float
    """nDCG@10 of the convex mix. Each query was judged with an alpha that was chosen without it."""
    gain: float
    """``mix`` minus ``dense``."""
    low: float
    """The lower bound of the 95 % confidence interval of ``gain``."""
    high: float
    """The upper bound."""
    alpha: float | None
    """The weight of the cosine that searches have from now on; None if they go by the vectors alone."""
    best_alpha: float
    """The alpha with the highest nDCG@10 over all queries, whether or not it wins by its bound."""
    needed: int | None
    """About how many queries it takes to see a gain of this size; None if there is no gain."""
    curve: Mapping[float, float]
    """alpha → nDCG@10 over all queries."""
    because: str
    """A sentence that says why ``alpha`` is what it is."""


@dataclass(frozen=True, slots=True)
class SearchPlan(PrintedResult):
    """How a search was answered. It is made if the search is asked to explain itself."""

    is_exact: bool
    """All chunks that pass the filter were compared with the query. Otherwise only candidates were."""
    because: str
    """A sentence that says why."""
    candidates: int
    """How many chunks were compared by their exact distance."""
    segments: int = 0
    """How many segments gave candidates."""
    graphs: int = 0
    """How many of these have a graph. The others are read from the first row to the last."""
    tail: int = 0
    """How many rows the tail had, all of which were read."""
    beam: int | None = None
    """How many candidates the search of a graph kept (``hnsw.ef_search``); None if it read no graph, or all rows."""
    passing: int | None = None
    """How many chunks pass the filter; None if there is no filter, or if they are more than the search counted."""


class Hits(Rows[SearchHit]):
    """The hits of one query, best first: a list of :class:`SearchHit`, which prints as a table.

    ``explanation`` is a :class:`SearchPlan` that says how they were found; None unless the search was called with
    ``explain=True``. ``space`` is the fingerprint of the space whose vectors were compared, for all of the hits.
    ``instead_of`` is the fingerprint of the space that was to answer, if no worker served it and the caller had allowed
    another one; otherwise it is None. ``search_id`` is what :meth:`Client.feedback` asks for.
    """

    __slots__ = ("explanation", "instead_of", "search_id", "space")

    def __init__(
        self,
        hits: Iterable[SearchHit] = (),
        explanation: SearchPlan | None = None,
        *,
        space: str = "",
        search_id: str = "",
        instead_of: str | None = None,
    ) -> None:
        super().__init__(hits, SearchHit)
        self.explanation = explanation
        self.space = space
        self.search_id = search_id
        self.instead_of = instead_of

    def _tables(self) -> Sequence[Table]:
        plan = [] if self.explanation is None else self.explanation._tables()
        return [*super()._tables(), *(replace(table, title="how they were found") for table in plan)]


@dataclass(frozen=True, slots=True)
class Audit(PrintedResult):
    """The anti-join of a collection's chunks against its space's vectors: the chunks that have no vector."""

    collection: str
    space: str
    """The fingerprint of the embedding space."""
    model: str
    chunks: int
    """Chunks in the collection."""
    contents: int
    """Distinct texts of these chunks."""
    embedded: int
    """Chunks that have a vector."""
    missing: int
    """Chunks that have no vector."""
    pending: int
    """Missing chunks that wait in an open ChunkBatch."""
    dead: int
    """Missing chunks that are on a job's dead list."""
    truncated: int
    """Chunks whose vector stands only for the part of the text that the model reads."""
    missing_ids: tuple[str, ...]
    """The ids of the first missing chunks, in order."""

    @property
    def complete(self) -> bool:
        """Whether every chunk has a vector."""
        return self.missing == 0


class Standing(StrEnum):
    """What has become of a dead chunk. The dead list keeps its entry, while the collection may change."""

    MISSING = "missing"
    """The chunk is in its collection with the same text, and has no vector."""
    EMBEDDED = "embedded"
    """The text has got a vector since."""
    REPLACED = "replaced"
    """The chunk has got another text since."""
    DELETED = "deleted"
    """The chunk was deleted since."""
    REFUSED = "refused"
    """The chunk was not accepted: enqueue refused it, or its text is longer than its job accepts."""


@dataclass(frozen=True, slots=True)
class DeadEntry(PrintedResult):
    """One entry of the dead list: a chunk that got no vector in a job, and the reason."""

    id: int
    """The number of the entry."""
    job_id: int
    job_state: JobState
    sealed: bool
    """The job's producer has enqueued all of its chunks."""
    collection: str
    chunk_id: str
    content_hash: str | None
    """64 hexadecimal digits; None for a chunk that was refused before it was stored."""
    code: str
    """A stable word for the reason."""
    reason: str
    """A sentence that says why there is no vector. It does not hold the text."""
    standing: Standing
    created_at: datetime

    @property
    def why_not_retried(self) -> str | None:
        """The reason why ``retry_dead`` passes over this entry; None if it does not."""
        if self.content_hash is None:
            return "refused by enqueue, so the text was never stored: fix the chunk and enqueue it again"
        if self.standing is Standing.REFUSED:
            return "the job refuses texts of this length: enqueue the chunk again with on_long='truncate' or 'split'"
        if self.standing is Standing.REPLACED:
            return "the entry is stale, because the chunk has another text now: `drop` removes it from the dead list"
        if self.standing is Standing.DELETED:
            return "the entry is stale, because the chunk was deleted: `drop` removes it from the dead list"
        if self.job_state is JobState.CANCELLED:
            return f"job {self.job_id} was cancelled: `chunkmill retry {self.job_id}` starts all of it again"
        if self.job_state is JobState.FAILED and not self.sealed:
            return f"job {self.job_id} was never enqueued to its end: enqueue again"
        return None


@dataclass(frozen=True, slots=True)
class Attempt(PrintedResult):
    """One worker's attempt at a ChunkBatch.

    An attempt is recorded when the worker has its texts and its engine. One that failed or was given back earlier is
    not in the list.
    """

    chunk_batch_id: int
    attempt: int
    """The number of the attempt at its ChunkBatch, from 1."""
    worker: str
    outcome: str
    """``completed``; ``released`` (the worker gave it back); ``failed`` (an error); ``died`` (the worker ended);
    ``running``; ``superseded`` (its lease was taken back, and a later attempt has the ChunkBatch); or ``interrupted``
    (its lease was taken back, for example by a cancel, and nobody has the ChunkBatch)."""
    evidence: str | None
    """What was seen of a death, or the error of a failure. The error is kept until a later attempt ends."""
    contents: int
    """Contents that it embedded and wrote."""
    recomputed: int
    """Contents that it embedded although they had a vector when it wrote them."""
    at_risk: int
    """The most contents that were ever embedded, or on the device, and not written yet."""
    tokens: int
    engine_seconds: float
    first_write_at: datetime | None
    """When it wrote its first vectors; None if it wrote none."""
    ended_at: datetime | None
    """None while it is running."""


@dataclass(frozen=True, slots=True)
class DeadDetails(PrintedResult):
    """Everything that is known about one dead chunk."""

    entry: DeadEntry
    metadata: Mapping[str, Any] | None
    """None if the chunk is not in the collection with this text."""
    characters: int | None
    """Length of the text in characters; None if the text is not stored."""
    bytes: int | None
    """Length of the text in bytes of UTF-8; None if the text is not stored."""
    deaths: tuple[Attempt, ...]
    """The attempts that died while they had this chunk."""
    text: str | None = field(default=None, repr=False)
    """None unless it was asked for."""


@dataclass(frozen=True, slots=True)
class RetriedDead(PrintedResult):
    """What a retry of dead chunks did."""

    jobs: tuple[int, ...]
    """The jobs that have work again, or whose state is decided again."""
    chunks: int
    """Chunks that were taken off the dead list."""
    contents: int
    """Distinct texts of these chunks, which now wait for a worker."""
    passed_over: Mapping[str, int]
    """How many entries were left as they are, for each reason."""


@dataclass(frozen=True, slots=True)
class DroppedDead(PrintedResult):
    """What a drop of dead chunks did."""

    jobs: tuple[int, ...]
    """The jobs that had failed, and whose state is decided again."""
    entries: int
    """Entries that were deleted from the dead list."""
    chunks: int
    """Chunks that were deleted from their collection. Chunks that have another text or a vector now were kept, and some
    were no longer in the collection."""


PROVIDER_WAITS = frozenset(kind.code for kind in (ProviderBusy, ProviderSilent, ProviderStopped))
"""The codes of errors for which the lane waits, and not the ChunkBatch alone."""


@dataclass(frozen=True, slots=True)
class FailingChunkBatch(PrintedResult):
    """A ChunkBatch whose last attempt failed: it is ``discarded``, or it is open and will be tried again."""

    id: int
    state: ChunkBatchState
    attempt: int
    """The number of its last attempt."""
    max_attempts: int
    """The number of the last attempt that it may have."""
    deaths: int
    """How many workers died while they held it."""
    code: str
    """A stable word for the error."""
    error: str

    @property
    def sentence(self) -> str:
        """What is wrong, and what becomes of the ChunkBatch. It ends with the error, whose last full stop is left out.

        An attempt that was given back counts for nothing, so its number would mean nothing to a reader.
        """
        if self.state is not ChunkBatchState.DISCARDED and self.code in elsewhere_codes():
            fate = "waits for a worker that can embed it"
        elif self.state is not ChunkBatchState.DISCARDED and self.code in PROVIDER_WAITS:
            fate = "waits for the provider"
        else:
            fates = {ChunkBatchState.RUNNING: "is tried again now", ChunkBatchState.DISCARDED: "was discarded"}
            tries = f"attempt {self.attempt} of {self.max_attempts}"
            fate = f"{fates.get(self.state, 'will be tried again')}, because {tries} failed"
        return f"ChunkBatch {self.id} {fate}: {self.error}".removesuffix(".")


@dataclass(frozen=True, slots=True)
class RoutingStep(PrintedResult):
    """One choice of a route for a job: when it was made, and why."""

    at: datetime
    route: Route
    because: str


@dataclass(frozen=True, slots=True)
class OpenWork(PrintedResult):
    """The open ChunkBatches of one route and state."""

    route: Route
    state: ChunkBatchState
    at_provider: bool
    """ProviderBatches hold their contents."""
    chunk_batches: int
    contents: int
    due_at: datetime
    """When the first of them is due."""
    because: str | None = None
    """Why the latest try of the first of them came to nothing; None if none was tried."""


@dataclass(frozen=True, slots=True)
class JobProviderBatch(PrintedResult):
    """A ProviderBatch that has, or had, contents of the job."""

    id: int
    state: ProviderBatchState
    provider_status: str | None
    """The provider's word for its state; None if it was not asked yet."""
    requests: int
    done: int
    """How many of the requests are finished, as the provider says."""
    contents: int
    next_look: datetime | None
    """When the provider is asked next; None if the ProviderBatch is closed."""
    error: str | None


@dataclass(frozen=True, slots=True)
class Abandoned(PrintedResult):
    """What was done to let go of a ProviderBatch."""

    provider_batch_id: int
    contents: int
    """Contents that are in flight no more. Jobs that wait for them send them again."""
    may_be_charged: bool
    """Whether they may have been sent. Then they are booked as lost or as maybe charged."""


@dataclass(frozen=True, slots=True)
class Explanation(PrintedResult):
    """Where a job's work is, and what it waits for."""

    job_id: int
    state: JobState
    route: Route
    """The route that the enqueue asked for."""
    deadline: datetime | None
    routing: tuple[RoutingStep, ...]
    """The choices that were made since, oldest first."""
    open: tuple[OpenWork, ...]
    waits: tuple[str, ...]
    """Sentences that say what the open work waits for."""
    lanes: tuple[Lane, ...]
    """The paid lanes."""
    provider_batches: tuple[JobProviderBatch, ...]
    """The newest ProviderBatches of the job."""


@dataclass(frozen=True, slots=True)
class Index(PrintedResult):
    """What serves the searches of a collection: segments, and a tail of what came since they were built."""

    is_ready: bool
    """Searches go through it. Otherwise they are exact, as they are in a collection of fewer than 1,000 chunks."""
    segments: int
    rows: int
    """How many rows its segments have, deleted ones among them."""
    graph_rows: int
    """How many of them are in segments with an HNSW graph. The others are read from the first to the last."""
    tail: int
    """How many rows wait for the next segment. Searches read them all."""
    bytes: int
    """How many bytes its segments take on disk, with their graphs."""
