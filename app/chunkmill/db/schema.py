"""The tables as SQLAlchemy classes, except the vector tables: each space has its own (``chunkmill.spaces.registry``).

They exist for one check, which compares them with what the migrations create
(``tests/integration/test_migrations.py``), and for readers, who find the meaning of the columns here. The code reads
and writes the tables with SQL text. The one class from which statements are built says so.
"""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from pgvector.sqlalchemy import VECTOR
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from chunkmill.domain.bridges import AdapterKind
from chunkmill.domain.mixing import KeywordState
from chunkmill.domain.reembedding import ReembeddingState, SpaceRole
from chunkmill.domain.served import FileKind, ServedState
from chunkmill.domain.serving import BuilderKind, SegmentKind, SegmentState
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import ChunkBatchState, JobState, Route

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

TIMESTAMP = sa.DateTime(timezone=True)
NOW = sa.text("now()")
SEQUENCES = ("deletions", "reopenings")
"""The sequences that belong to no table."""


class Base(DeclarativeBase):
    metadata = sa.MetaData(naming_convention=NAMING)


def one_of(column: str, words: type[StrEnum]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{word}'" for word in words)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


def identity() -> Mapped[int]:
    return mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)


class SchemaCompatibilityRow(Base):
    """One row, written by each migration (``alembic/env.py``) and read by ``chunkmill.db.compatibility``."""

    __tablename__ = "schema_compatibility"

    oldest_code: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    """Code may run on this schema if it knows at least this migration."""


class SpaceRow(Base):
    """An embedding space. ``spec`` is what the fingerprint is computed from; ``storage`` is the type of its vectors."""

    __tablename__ = "spaces"

    id: Mapped[int] = mapped_column(sa.Integer, sa.Identity(always=True), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(sa.Text, unique=True)
    model: Mapped[str] = mapped_column(sa.Text)
    dimensions: Mapped[int] = mapped_column(sa.Integer)
    spec: Mapped[dict[str, Any]] = mapped_column(JSONB)
    storage: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)

    __table_args__ = (sa.CheckConstraint("storage IN ('vector', 'halfvec')", name="storage"),)


class SpaceCanaryRow(Base):
    """The vectors that a space's first worker made of the golden texts (``chunkmill_workers.local.golden``).

    Every other worker compares its own vectors with these.
    """

    __tablename__ = "space_canaries"

    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"), primary_key=True)
    version: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    vectors: Mapped[bytes] = mapped_column(sa.LargeBinary)
    """Little-endian float32, C order, ``(len(n_tokens), dimensions)``."""
    n_tokens: Mapped[list[int]] = mapped_column(ARRAY(sa.Integer))
    made_by: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class CollectionRow(Base):
    """A named set of chunks, and its active space."""

    __tablename__ = "collections"

    id: Mapped[int] = mapped_column(sa.Integer, sa.Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    dropped_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When it was dropped. It has a name that nobody asks for since then, and stays until its jobs are pruned."""
    is_hidden: Mapped[bool] = mapped_column(sa.Boolean, server_default=sa.false())
    """Nobody lists or searches it, and it has no serving index and no view. It holds the chunks of a served batch."""

    __table_args__ = (sa.Index("ix_collections_dropped", "id", postgresql_where=sa.text("dropped_at IS NOT NULL")),)


class CollectionAliasRow(Base):
    """One more name of a collection. A trigger keeps collections and aliases from having the same name."""

    __tablename__ = "collection_aliases"

    name: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    collection_id: Mapped[int] = mapped_column(sa.ForeignKey("collections.id"))
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class ReembeddingRow(Base):
    """The way of a collection from one space to another. ``plan`` is what was asked for, ``report`` what was found.

    A collection has one at a time: it is open until ``finished_at``.
    """

    __tablename__ = "reembeddings"

    id: Mapped[int] = identity()
    collection_id: Mapped[int] = mapped_column(sa.ForeignKey("collections.id", ondelete="CASCADE"))
    from_space_id: Mapped[int]
    to_space_id: Mapped[int]
    """Neither is a foreign key, because a re-embedding that has ended must not keep its spaces."""
    state: Mapped[str] = mapped_column(sa.Text)
    plan: Mapped[dict[str, Any]] = mapped_column(JSONB)
    report: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=sa.text("'{}'"))
    problem: Mapped[str | None] = mapped_column(sa.Text)
    """Why it does not go on, as a sentence that says what to do."""
    job_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """The job that embeds the stored texts into the new space."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    state_since: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    flipped_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    finished_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    paused_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    cleaned_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the last was deleted that the space which the collection left had of it."""

    __table_args__ = (
        one_of("state", ReembeddingState),
        sa.Index("uq_reembeddings_open", "collection_id", unique=True, postgresql_where=sa.text("finished_at IS NULL")),
    )


class CollectionSpaceRow(Base):
    """A space of a collection besides the active one, which is ``collections.space_id``."""

    __tablename__ = "collection_spaces"

    collection_id: Mapped[int] = mapped_column(
        sa.ForeignKey("collections.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"), primary_key=True, autoincrement=False)
    role: Mapped[str] = mapped_column(sa.Text)
    on_long: Mapped[str] = mapped_column(sa.Text)
    """What happens to long texts when they are embedded into this space."""
    share: Mapped[int] = mapped_column(sa.SmallInteger, server_default="0")
    """Of how many percent of the sessions this space answers the searches. The active one answers the rest."""
    reembedding_id: Mapped[int] = mapped_column(sa.ForeignKey("reembeddings.id", ondelete="CASCADE"))
    since: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)

    __table_args__ = (
        one_of("role", SpaceRole),
        one_of("on_long", OnLong),
        sa.CheckConstraint("share BETWEEN 0 AND 100", name="share"),
        sa.Index(None, "space_id"),
    )


class ReembeddingFillRow(Base):
    """How far a space of a re-embedding is filled: ``chunkmill.ledger.reembedding.fill`` reads and writes it.

    A pass goes through the contents of the collection in the order of their hashes. ``added``, ``failed`` and
    ``is_there`` are those of the present pass while ``began_at`` is set, and of the last one otherwise.
    """

    __tablename__ = "reembedding_fills"

    reembedding_id: Mapped[int] = mapped_column(
        sa.ForeignKey("reembeddings.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    space_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    job_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """The job whose ChunkBatches the passes make."""
    after: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    """The last content that the present pass has looked at."""
    began_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the present pass began. NULL if there is none."""
    added: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    """How many contents it gave to the job."""
    failed: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    """How many contents it left alone, because a ChunkBatch with them was discarded, or because they have no text."""
    passes: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    """How many passes have ended."""
    passed_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    seconds: Mapped[float] = mapped_column(sa.Double, server_default="0")
    """How long the last pass took. The more it took, the longer the next one waits."""
    is_there: Mapped[bool] = mapped_column(sa.Boolean, server_default=sa.text("false"))
    """The last pass found a vector of each content, or a dead chunk, or an open ChunkBatch of an enqueue."""


class ReembeddingLookRow(Base):
    """What a flip of a re-embedding has still to look at: ``chunkmill.ledger.reembedding.flipping`` keeps it here."""

    __tablename__ = "reembedding_looks"

    reembedding_id: Mapped[int] = mapped_column(
        sa.ForeignKey("reembeddings.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    space_id: Mapped[int]
    """The space that was active when somebody looked. After a flip the look is of no use."""
    mark: Mapped[int] = mapped_column(sa.BigInteger)
    """Everything was looked at that was written up to this ChunkBatch."""
    lacking: Mapped[list[bytes]] = mapped_column(ARRAY(sa.LargeBinary))
    """The contents without a vector in the other space."""
    reopenings: Mapped[int] = mapped_column(sa.BigInteger)
    """How often enqueues had begun anew. Each deletes ChunkBatches, and so a look from before it is of no use."""
    looked_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class ContentRow(Base):
    """One distinct text. Chunks refer to it by hash, without a foreign key, because a key would lock and check every
    row of a bulk load. ``chunkmill.store.delete`` takes an advisory lock instead.
    """

    __tablename__ = "contents"

    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary, primary_key=True)
    text: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class ChunkRow(Base):
    """A chunk of a collection. ``job_id`` is the job that added or last replaced it.

    If that job rejects long texts, and a job with another policy names the same chunk with the same text, the chunk
    belongs to the latter, so that a rejection does not delete what another job has accepted.
    """

    __tablename__ = "chunks"

    collection_id: Mapped[int] = mapped_column(sa.ForeignKey("collections.id"), primary_key=True)
    chunk_id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB)
    job_id: Mapped[int] = mapped_column(sa.BigInteger)

    # Search and the dead list look up the chunks of a content.
    __table_args__ = (sa.Index(None, "content_hash", "collection_id"),)


class ServingIndexRow(Base):
    """The serving index of a collection in a space. Triggers fill its tail as soon as this row is there."""

    __tablename__ = "serving_indexes"

    collection_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    space_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    is_ready: Mapped[bool] = mapped_column(sa.Boolean, server_default=sa.text("false"))
    flushed_to: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    """The number up to which the rows of the tail may be in a segment, or in one that is being built."""
    """Its segments and its tail have all that can be found."""
    deletions: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    checked_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    """When somebody last looked for rows without a chunk; ``deletions`` is how many deletions there had been."""


class SegmentRow(Base):
    """An immutable part of a serving index, whose table is ``segment_<id>``."""

    __tablename__ = "segments"

    id: Mapped[int] = identity()
    collection_id: Mapped[int] = mapped_column(sa.Integer)
    space_id: Mapped[int] = mapped_column(sa.Integer)
    kind: Mapped[str] = mapped_column(sa.Text)
    state: Mapped[str] = mapped_column(sa.Text)
    builder: Mapped[str] = mapped_column(sa.Text)
    n_rows: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    live_since: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    retired_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        one_of("kind", SegmentKind),
        one_of("state", SegmentState),
        one_of("builder", BuilderKind),
        sa.Index(None, "collection_id", "space_id"),
    )


class ServingTailRow(Base):
    """A content that has both a chunk and a vector since the serving index began, and may be in no segment yet."""

    __tablename__ = "serving_tail"

    id: Mapped[int] = identity()
    collection_id: Mapped[int] = mapped_column(sa.Integer)
    space_id: Mapped[int] = mapped_column(sa.Integer)
    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary)

    __table_args__ = (sa.Index(None, "collection_id", "space_id", "content_hash"),)


class OutdatedCollectionRow(Base):
    """A collection whose searches find a replaced chunk by its old vector until it has its new one."""

    __tablename__ = "outdated_collections"

    collection_id: Mapped[int] = mapped_column(
        sa.ForeignKey("collections.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class OutdatedChunkRow(Base):
    """What a chunk was when it last had a vector in a space. Triggers write it; it is read while the chunk has none."""

    __tablename__ = "outdated_chunks"

    collection_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    chunk_id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    space_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(sa.Text)
    chunk_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB)
    embedding: Mapped[Any] = mapped_column(VECTOR())
    truncated: Mapped[bool] = mapped_column(sa.Boolean)


class KeywordIndexRow(Base):
    """A collection with keywords, whose table is ``keywords_<collection_id>``. Triggers fill it from this row on."""

    __tablename__ = "keyword_indexes"

    collection_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    language: Mapped[str] = mapped_column(sa.Text)
    """The text search configuration of Postgres, with its schema."""
    state: Mapped[str] = mapped_column(sa.Text)
    filled_to: Mapped[str | None] = mapped_column(sa.Text)
    """Chunks with an id up to this one were there before, and have their keywords now."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)

    __table_args__ = (one_of("state", KeywordState),)


class GoldenQueryRow(Base):
    """A query of a collection whose answers are known. ``relevant`` is ``{chunk id: grade}``."""

    __tablename__ = "golden_queries"

    collection_id: Mapped[int] = mapped_column(sa.ForeignKey("collections.id", ondelete="CASCADE"), primary_key=True)
    query_id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    text: Mapped[str] = mapped_column(sa.Text)
    relevant: Mapped[dict[str, Any]] = mapped_column(JSONB)
    is_title: Mapped[bool] = mapped_column(sa.Boolean, server_default=sa.text("false"))
    """It is the beginning of the relevant chunks, which is cut off them when they are judged."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class SearchTuningRow(Base):
    """What the golden queries of a collection chose for its searches in a space."""

    __tablename__ = "search_tunings"

    collection_id: Mapped[int] = mapped_column(sa.ForeignKey("collections.id", ondelete="CASCADE"), primary_key=True)
    space_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    alpha: Mapped[float | None] = mapped_column(sa.Double)
    """The weight of the vectors. NULL if keywords do not help."""
    report: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)

    __table_args__ = (sa.CheckConstraint("alpha BETWEEN 0 AND 1", name="alpha"),)


class SearchCountRow(Base):
    """How many searches of a collection one of its spaces answered in a minute, or in an hour, that took about as long.

    ``bucket`` is that of ``chunkmill.domain.latencies``, and -1 for searches that no worker could answer.
    """

    __tablename__ = "search_counts"

    collection_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    space_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    since: Mapped[datetime] = mapped_column(TIMESTAMP, primary_key=True)
    bucket: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True, autoincrement=False)
    n: Mapped[int] = mapped_column(sa.BigInteger)


class SearchFeedbackRow(Base):
    """A hit of a search that was what somebody wanted."""

    __tablename__ = "search_feedback"

    search_number: Mapped[bytes] = mapped_column(primary_key=True)
    """What tells the search from others."""
    chunk_id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    collection_id: Mapped[int]
    space_id: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)

    __table_args__ = (sa.Index(None, "collection_id", "created_at"),)


class BridgeRow(Base):
    """An adapter by which queries of another model are answered in the active space of a collection.

    A trigger deletes it when the collection leaves that space. ``chunkmill.store.bridges`` reads and writes it.
    """

    __tablename__ = "bridges"

    id: Mapped[int] = identity()
    """A new one for each adapter, so that a process may keep the arrays of one that it has read."""
    collection_id: Mapped[int] = mapped_column(sa.ForeignKey("collections.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(sa.Text)
    """The model of the queries."""
    query_space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    """The space that is searched."""
    kind: Mapped[str] = mapped_column(sa.Text)
    shapes: Mapped[dict[str, Any]] = mapped_column(JSONB)
    """Array → its shape."""
    arrays: Mapped[bytes] = mapped_column(sa.LargeBinary)
    """All arrays as float32, with the low byte first (``chunkmill.bridge.adapters``)."""
    report: Mapped[dict[str, Any]] = mapped_column(JSONB)
    """What was measured (``chunkmill.domain.bridges.Bridge``)."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)

    __table_args__ = (
        one_of("kind", AdapterKind),
        sa.UniqueConstraint("collection_id", "name"),
        sa.Index(None, "query_space_id"),
        sa.Index(None, "space_id"),
    )


class JobRow(Base):
    """What one call of ``enqueue`` asked for."""

    __tablename__ = "jobs"

    id: Mapped[int] = identity()
    collection_id: Mapped[int] = mapped_column(sa.ForeignKey("collections.id"))
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    state: Mapped[str] = mapped_column(sa.Text)
    route: Mapped[str] = mapped_column(sa.Text)
    priority: Mapped[int] = mapped_column(sa.SmallInteger)
    on_long: Mapped[str] = mapped_column(sa.Text)
    idempotency_key: Mapped[str | None] = mapped_column(sa.Text, unique=True)
    n_chunks: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    error: Mapped[str | None] = mapped_column(sa.Text)
    deadline: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the producer wants the vectors. A job of route ``auto`` may move to a more expensive route to meet it."""
    routing: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=sa.text("'[]'"))
    """Every choice of a route, the latest last: ``{"at": an ISO 8601 time, "route": a word, "because": a reason}``."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    sealed_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the producer's iterable ended. Until then the job cannot complete."""
    finished_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        one_of("state", JobState),
        one_of("route", Route),
        one_of("on_long", OnLong),
        sa.Index(None, "collection_id", "id"),
        sa.Index("ix_jobs_open", "id", postgresql_where=sa.text("state IN ('enqueueing', 'running')")),
    )


class JobTraceRow(Base):
    """The trace context of a job whose producer sent traces; see ``chunkmill.telemetry.tracing``."""

    __tablename__ = "job_traces"

    job_id: Mapped[int] = mapped_column(
        sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    traceparent: Mapped[str] = mapped_column(sa.Text)


class JobStreamRow(Base):
    """What a job's producer handed in. ``digest`` is that of the whole stream (``chunkmill.domain.chunks``), written
    when it has ended, and only if the job has a key. Until a replacing job has deleted all, more stands behind it (see
    ``chunkmill.ledger.jobs.streams``). The counts are those of ``chunkmill.domain.planning.Merged``.
    """

    __tablename__ = "job_streams"

    job_id: Mapped[int] = mapped_column(
        sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    digest: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    n_new: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    n_replaced: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    n_unchanged: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    n_repeated: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    n_refused: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    n_deleted: Mapped[int | None] = mapped_column(sa.BigInteger)
    """None until all was deleted that the source does not have, and if the enqueue was not to delete."""


class OutboxJobRow(Base):
    """A job that was enqueued inside its producer's own transaction and is not delivered yet. It is deleted when the
    job is sealed (``chunkmill.client.outbox``).
    """

    __tablename__ = "outbox_jobs"

    job_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    """The number that the job has, or will have, in ``jobs``."""
    collection: Mapped[str] = mapped_column(sa.Text)
    fingerprint: Mapped[str] = mapped_column(sa.Text)
    on_long: Mapped[str] = mapped_column(sa.Text)
    idempotency_key: Mapped[str | None] = mapped_column(sa.Text, unique=True)
    digest: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    """As in ``job_streams``."""
    n_chunks: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    request: Mapped[dict[str, Any]] = mapped_column(JSONB)
    """What else the producer asked for, and the lane that was chosen: ``chunkmill.ledger.jobs.outbox``."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class OutboxPageRow(Base):
    """Some of the chunks of such a job."""

    __tablename__ = "outbox_pages"

    job_id: Mapped[int] = mapped_column(
        sa.ForeignKey("outbox_jobs.job_id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    number: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    chunks: Mapped[list[Any]] = mapped_column(sa.JSON)
    """A list of ``[id, text, metadata]``, and of ``[problem, id, position, reason]`` for a chunk that was refused."""


class ChunkBatchRow(Base):
    """The contents that one worker leases and embeds together."""

    __tablename__ = "chunk_batches"

    id: Mapped[int] = identity()
    job_id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"))
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    state: Mapped[str] = mapped_column(sa.Text)
    route: Mapped[str] = mapped_column(sa.Text)
    priority: Mapped[int] = mapped_column(sa.SmallInteger)
    content_hashes: Mapped[list[bytes]] = mapped_column(ARRAY(sa.LargeBinary))
    n_contents: Mapped[int] = mapped_column(sa.Integer)
    n_cached: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_embedded: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_truncated: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    attempt: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    max_attempts: Mapped[int] = mapped_column(sa.Integer)
    deaths: Mapped[int] = mapped_column(sa.SmallInteger, server_default="0")
    """How many workers ended or fell silent while they held it. ``chunkmill.domain.deaths`` says what follows."""
    lease_owner: Mapped[str | None] = mapped_column(sa.Text)
    lease_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """NULL while ProviderBatches have its contents, which may take a day."""
    not_before: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    rung_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    error_code: Mapped[str | None] = mapped_column(sa.Text)
    error: Mapped[str | None] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    finished_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        one_of("state", ChunkBatchState),
        one_of("route", Route),
        sa.Index(None, "job_id", "state"),
        sa.Index(
            "ix_chunk_batches_unrung_by_route",
            "route",
            "priority",
            "job_id",
            "id",
            "not_before",
            postgresql_where=sa.text("state = 'available' AND rung_at IS NULL"),
        ),
        sa.Index(
            "ix_chunk_batches_rung_by_route",
            "route",
            "priority",
            "rung_at",
            postgresql_where=sa.text("state = 'available' AND rung_at IS NOT NULL"),
        ),
        sa.Index("ix_chunk_batches_leased", "lease_until", postgresql_where=sa.text("state = 'running'")),
        sa.Index("ix_chunk_batches_discarded", "finished_at", "route", postgresql_where=sa.text("state = 'discarded'")),
    )


class DeadChunkRow(Base):
    """An entry of a dead list."""

    __tablename__ = "dead_chunks"

    id: Mapped[int] = identity()
    job_id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"))
    chunk_id: Mapped[str] = mapped_column(sa.Text)
    content_hash: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    """NULL for a chunk that enqueue refused, because its text was never stored."""
    code: Mapped[str] = mapped_column(sa.Text)
    reason: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)

    __table_args__ = (
        sa.Index(None, "job_id"),
        sa.Index(None, "content_hash", postgresql_where=sa.text("content_hash IS NOT NULL")),
        sa.Index(
            "uq_dead_chunks_once",
            "job_id",
            "chunk_id",
            "content_hash",
            unique=True,
            postgresql_where=sa.text("content_hash IS NOT NULL"),
        ),
    )


class UsageRow(Base):
    """One attempt at a ChunkBatch: what it has cost so far and how it ended. Every write of vectors updates the row, so
    an attempt whose worker was killed is counted too.
    """

    __tablename__ = "usage"

    chunk_batch_id: Mapped[int] = mapped_column(sa.ForeignKey("chunk_batches.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    job_id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"))
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    provider: Mapped[str] = mapped_column(sa.Text)
    worker: Mapped[str] = mapped_column(sa.Text)
    contents: Mapped[int] = mapped_column(sa.Integer)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)
    engine_seconds: Mapped[float] = mapped_column(sa.Double)
    recomputed: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How many contents it embedded that had a vector by the time it wrote them."""
    at_risk: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """The most contents it ever had embedded or on the device but not yet written, which a kill could cost."""
    outcome: Mapped[str | None] = mapped_column(sa.Text)
    """``completed``, ``released``, ``failed`` or ``died``; NULL while it runs, or if its lease was lost."""
    evidence: Mapped[str | None] = mapped_column(sa.Text)
    """If its worker died: what was seen of the death."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    ended_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        sa.Index(None, "job_id"),
        # Small, so that failures are found by time without reading the many attempts that succeeded.
        sa.Index("ix_usage_faults", "ended_at", postgresql_where=sa.text("outcome IN ('died', 'failed')")),
    )


class WorkerReportRow(Base):
    """What a worker last reported about its last minute (``chunkmill_workers.process.reporting``).

    The table is unlogged, because the worker reports again soon.
    """

    __tablename__ = "worker_reports"

    name: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    """The name in its leases."""
    kind: Mapped[str] = mapped_column(sa.Text)
    label: Mapped[str] = mapped_column(sa.Text)
    """Its name in Celery and Flower."""
    device: Mapped[str | None] = mapped_column(sa.Text)
    started_at: Mapped[datetime] = mapped_column(TIMESTAMP)
    seen_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    window_seconds: Mapped[float] = mapped_column(sa.Double)
    """The seconds that the counts below cover: a minute, or the time since it started."""
    contents: Mapped[int] = mapped_column(sa.BigInteger)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)
    padded_tokens: Mapped[int] = mapped_column(sa.BigInteger)
    engine_seconds: Mapped[float] = mapped_column(sa.Double)
    held: Mapped[int] = mapped_column(sa.Integer)
    """How many ChunkBatches it holds now."""
    gpu_busy: Mapped[float | None] = mapped_column(sa.Double)
    """The share of the last second, from 0 to 1, during which the GPU was busy, as the driver reports it."""
    gpu_memory_used: Mapped[int | None] = mapped_column(sa.BigInteger)
    gpu_memory_total: Mapped[int | None] = mapped_column(sa.BigInteger)

    __table_args__ = (
        sa.CheckConstraint("kind IN ('local', 'provider', 'both')", name="kind"),
        {"prefixes": ["UNLOGGED"]},
    )


class EngineMinuteRow(Base):
    """What the engines of all workers did in a minute, by their reports. A poller writes it, and keeps 35 days."""

    __tablename__ = "engine_minutes"

    minute: Mapped[datetime] = mapped_column(TIMESTAMP, primary_key=True)
    workers: Mapped[int] = mapped_column(sa.Integer)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)
    padded_tokens: Mapped[int] = mapped_column(sa.BigInteger)
    """Tokens that the devices computed, padding included."""
    engine_seconds: Mapped[float] = mapped_column(sa.Double)


class WorkerSocketRow(Base):
    """Where a worker listens for callers on its machine (``chunkmill_workers.local.sockets``).

    The table is unlogged, because the worker writes its row again soon.
    """

    __tablename__ = "worker_sockets"

    name: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    """The name in its leases."""
    machine: Mapped[str] = mapped_column(sa.Text)
    """The run of the machine that the address is on: ``chunkmill.machine.this_boot``."""
    address: Mapped[str] = mapped_column(sa.Text)
    token: Mapped[bytes] = mapped_column(sa.LargeBinary)
    """Whoever knows it may ask the worker."""
    spaces: Mapped[list[int]] = mapped_column(ARRAY(sa.Integer))
    """The ids of the spaces whose models are loaded."""
    seen_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    traces_for: Mapped[str | None] = mapped_column(sa.Text)
    """The digest of its token if it takes requests with a trace. Who writes another token without it takes none."""

    __table_args__ = ({"prefixes": ["UNLOGGED"]},)


class EmbedRequestRow(Base):
    """A request to the workers to embed these texts now.

    The table is unlogged, because nobody waits for the answer after a crash.
    """

    __tablename__ = "embed_requests"

    id: Mapped[int] = identity()
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    kind: Mapped[str] = mapped_column(sa.Text)
    texts: Mapped[list[str]] = mapped_column(ARRAY(sa.Text))
    vectors: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    """Little-endian float32, C order, ``(len(texts), dimensions)``."""
    error: Mapped[str | None] = mapped_column(sa.Text)
    lease_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    attempts: Mapped[int] = mapped_column(sa.SmallInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    committed_tokens: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    """Only paid workers of an older release write it. ``provider_questions`` is in its place."""
    urgency: Mapped[int] = mapped_column(sa.SmallInteger, server_default="0")
    """0 for a few short texts, which go first; 1 for larger requests."""
    caller: Mapped[str] = mapped_column(sa.Text, server_default="")
    """Who asks. The requests of one urgency are shared out between callers."""
    deadline: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """Nobody waits for the answer after this moment."""
    tokens: Mapped[list[int] | None] = mapped_column(ARRAY(sa.Integer))
    """How many tokens of each text the model read. None in the answer of an older release."""
    truncated: Mapped[list[bool] | None] = mapped_column(ARRAY(sa.Boolean))
    """Whether each text was cut."""
    traceparent: Mapped[str | None] = mapped_column(sa.Text)
    """The span of whoever asks; None if nothing is traced."""

    __table_args__ = (
        sa.CheckConstraint("kind IN ('document', 'query')", name="kind"),
        {"prefixes": ["UNLOGGED"]},
    )


class ServedFileRow(Base):
    """A file of the Batch API that gateways serve. Nobody sees it before it is whole."""

    __tablename__ = "served_files"

    id: Mapped[int] = identity()
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    """Its id in the API."""
    tenant: Mapped[str] = mapped_column(sa.Text)
    kind: Mapped[str] = mapped_column(sa.Text)
    """An input file has pieces. Output and error files are written when they are downloaded."""
    filename: Mapped[str] = mapped_column(sa.Text, server_default="")
    n_bytes: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    is_whole: Mapped[bool] = mapped_column(sa.Boolean, server_default=sa.false())
    served_batch_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Whose output or errors it has. A trigger deletes the batch's texts with its output file."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    touched_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    """When its last piece came."""
    expires_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        one_of("kind", FileKind),
        sa.Index(None, "tenant", "id"),
        sa.Index(None, "expires_at"),
        sa.Index(None, "served_batch_id"),
        sa.Index("ix_served_files_half", "touched_at", postgresql_where=sa.text("NOT is_whole")),
    )


class ServedFilePieceRow(Base):
    """A part of an uploaded file, of a mebibyte except the last."""

    __tablename__ = "served_file_pieces"

    served_file_id: Mapped[int] = mapped_column(
        sa.ForeignKey("served_files.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    piece: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    """Its number, from 0."""
    data: Mapped[bytes] = mapped_column(sa.LargeBinary)


class ServedBatchRow(Base):
    """A batch of the Batch API that gateways serve. Its lines are the chunks of the hidden collection ``name``."""

    __tablename__ = "served_batches"

    id: Mapped[int] = identity()
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    """Its id in the API, and the name of its collection."""
    tenant: Mapped[str] = mapped_column(sa.Text)
    idempotency_key: Mapped[str | None] = mapped_column(sa.Text)
    asked: Mapped[dict[str, Any]] = mapped_column(JSONB)
    """What the request asked for (``chunkmill.domain.served.Asked``)."""
    models: Mapped[list[str] | None] = mapped_column(ARRAY(sa.Text))
    """The models that its creator may use; NULL for all."""
    state: Mapped[str] = mapped_column(sa.Text)
    input_file: Mapped[str] = mapped_column(sa.Text)
    """The id of a file that may have been deleted since."""
    model: Mapped[str | None] = mapped_column(sa.Text)
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONB)
    """Why it failed: ``[{"code", "line", "message", "param"}]``."""
    job_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    output_file: Mapped[str | None] = mapped_column(sa.Text)
    error_file: Mapped[str | None] = mapped_column(sa.Text)
    n_total: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_completed: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_failed: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    counted_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the two counts were last taken of a batch in progress."""
    n_tokens: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    attempt: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """The fencing number of its steps: a gateway whose attempt is not the current one changes nothing."""
    lease_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    not_before: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    expires_at: Mapped[datetime] = mapped_column(TIMESTAMP)
    in_progress_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    finalizing_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    completed_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    failed_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    expired_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    cancelling_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    cancelled_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    key_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """The key of the gateway that made it, and pays for it."""

    __table_args__ = (
        one_of("state", ServedState),
        sa.UniqueConstraint("tenant", "idempotency_key"),
        sa.Index(None, "tenant", "id"),
        sa.Index(
            "ix_served_batches_open",
            "id",
            postgresql_where=sa.text("state IN ('validating', 'in_progress', 'finalizing', 'cancelling')"),
        ),
    )


class ServedBatchLineRow(Base):
    """A line of a served batch: how its answer is to be written, and how it ended. Its texts are chunks."""

    __tablename__ = "served_batch_lines"

    served_batch_id: Mapped[int] = mapped_column(
        sa.ForeignKey("served_batches.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    line: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    """Its number, from 0."""
    custom_id: Mapped[str] = mapped_column(sa.Text)
    n_inputs: Mapped[int] = mapped_column(sa.Integer)
    dimensions: Mapped[int | None] = mapped_column(sa.Integer)
    is_base64: Mapped[bool] = mapped_column(sa.Boolean)
    refuses_long: Mapped[bool] = mapped_column(sa.Boolean)
    """It asked that no text be cut."""
    status: Mapped[int | None] = mapped_column(sa.SmallInteger)
    """An HTTP status; 0 if it was never executed, and NULL while it is not known."""
    code: Mapped[str | None] = mapped_column(sa.Text)
    message: Mapped[str | None] = mapped_column(sa.Text)
    param: Mapped[str | None] = mapped_column(sa.Text)


class ApiKeyRow(Base):
    """A key of the gateway, which is ``cmk_<id>_<secret>``. ``chunkmill.ledger.access.keys`` reads and writes it."""

    __tablename__ = "api_keys"
    __table_args__ = (
        sa.CheckConstraint("length(sha256) = 32", name="sha256"),
        sa.CheckConstraint(
            "scopes <@ ARRAY['embed', 'search', 'jobs', 'batches', 'admin'] AND scopes <> '{}'", name="scopes"
        ),
    )

    id: Mapped[int] = identity()
    prefix: Mapped[str] = mapped_column(sa.Text)
    """The first characters of the secret, by which a person tells keys apart."""
    sha256: Mapped[bytes] = mapped_column(sa.LargeBinary)
    """Of the secret, which is 32 random bytes. Nobody can guess these, so no slower hash is needed."""
    name: Mapped[str] = mapped_column(sa.Text)
    tenant: Mapped[str] = mapped_column(sa.Text)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(sa.Text))
    models: Mapped[list[str] | None] = mapped_column(ARRAY(sa.Text))
    """The models that the key may use. None means all of them."""
    collections: Mapped[list[str] | None] = mapped_column(ARRAY(sa.Text))
    """The collections that the key may see. None means all of them."""
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None] = mapped_column(sa.BigInteger)
    parallel_requests: Mapped[int | None]
    tokens_per_month: Mapped[int | None] = mapped_column(sa.BigInteger)
    usd_per_month: Mapped[Decimal | None] = mapped_column(sa.Numeric)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    last_used_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """Within a minute or so: it is written rarely."""
    expires_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    revoked_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)


class ApiKeyUsageRow(Base):
    """What a key used in a month (UTC), and what its requests and spends under way have reserved."""

    __tablename__ = "api_key_usage"

    key_id: Mapped[int] = mapped_column(sa.ForeignKey("api_keys.id"), primary_key=True)
    month: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    requests: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    tokens: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    usd: Mapped[Decimal] = mapped_column(sa.Numeric, server_default="0")


class ApiKeySpendRow(Base):
    """A beginning of a key's that may cost money: a job, a served batch, or a re-embedding.

    ``chunkmill.ledger.access.spends`` opens it, and the function ``settle_api_key_spend`` settles it.
    """

    __tablename__ = "api_key_spends"

    id: Mapped[int] = identity()
    key_id: Mapped[int] = mapped_column(sa.ForeignKey("api_keys.id"))
    reembedding_id: Mapped[int | None] = mapped_column(sa.BigInteger, unique=True)
    """Whose jobs become those of the spend as a poller opens them. It may have been deleted since."""
    estimated: Mapped[Decimal] = mapped_column(sa.Numeric)
    """US dollars that it was expected to cost. 0 for a key without a limit, or for a route that costs nothing."""
    charged: Mapped[Decimal] = mapped_column(sa.Numeric, server_default="0")
    """US dollars of the bill that are in its months."""
    begun_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW, index=True)
    settled_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When its jobs had ended and nothing of them was at a provider any more."""

    __table_args__ = (sa.Index("ix_api_key_spends_open", "id", postgresql_where=sa.text("settled_at IS NULL")),)


class ApiKeySpendJobRow(Base):
    """A job of a spend. Jobs are pruned; their charges are kept, and so is this."""

    __tablename__ = "api_key_spend_jobs"

    job_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    spend_id: Mapped[int] = mapped_column(sa.ForeignKey("api_key_spends.id"), index=True)


class ApiKeySpendMonthRow(Base):
    """What of a spend counts in a month (UTC) of its key, in US dollars. It is a part of ``api_key_usage.usd``."""

    __tablename__ = "api_key_spend_months"

    spend_id: Mapped[int] = mapped_column(sa.ForeignKey("api_key_spends.id"), primary_key=True)
    month: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    charged: Mapped[Decimal] = mapped_column(sa.Numeric)
    reserved: Mapped[Decimal] = mapped_column(sa.Numeric)
