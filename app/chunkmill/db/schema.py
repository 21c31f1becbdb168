"""All tables but the vector tables, of which each space has its own (``chunkmill.spaces.registry``)."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

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
    """The newest migration that the oldest code knows which may run on this schema."""


class SpaceRow(Base):
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
    """What a space's first worker made of the golden texts (``chunkmill_workers.local.golden``).

    All other workers compare theirs with it.
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
    __tablename__ = "collections"

    id: Mapped[int] = mapped_column(sa.Integer, sa.Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class ContentRow(Base):
    """One distinct text. Chunks point here by hash, without a foreign key: a key would lock and check
    every row of a bulk load, and ``chunkmill.store.delete`` takes a lock of its own instead."""

    __tablename__ = "contents"

    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary, primary_key=True)
    text: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class ChunkRow(Base):
    __tablename__ = "chunks"

    collection_id: Mapped[int] = mapped_column(sa.ForeignKey("collections.id"), primary_key=True)
    chunk_id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB)
    job_id: Mapped[int] = mapped_column(sa.BigInteger)

    # Search and the dead list go from a content to the chunks that carry it.
    __table_args__ = (sa.Index(None, "content_hash", "collection_id"),)


class JobRow(Base):
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
    """When the producer wants it; where the route is ``auto``, it may cost more by then."""
    routing: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=sa.text("'[]'"))
    """Each choice of a lane: ``{"at": ISO 8601, "route": ..., "because": ...}``, the latest last."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    sealed_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the producer's iterable ended; until then the job cannot complete."""
    finished_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        one_of("state", JobState),
        one_of("route", Route),
        one_of("on_long", OnLong),
        sa.Index("ix_jobs_open", "id", postgresql_where=sa.text("state IN ('enqueueing', 'running')")),
    )


class JobTraceRow(Base):
    """The trace context of a job whose producer traced; see ``chunkmill.telemetry.tracing``."""

    __tablename__ = "job_traces"

    job_id: Mapped[int] = mapped_column(
        sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    traceparent: Mapped[str] = mapped_column(sa.Text)


class ChunkBatchRow(Base):
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
    """Workers that ended or fell silent while they held it: ``chunkmill.domain.deaths`` says what follows."""
    lease_owner: Mapped[str | None] = mapped_column(sa.Text)
    lease_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """NULL while ProviderBatches have its contents: those may take a day."""
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
    __tablename__ = "dead_chunks"

    id: Mapped[int] = identity()
    job_id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"))
    chunk_id: Mapped[str] = mapped_column(sa.Text)
    content_hash: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    """NULL for a chunk refused at the door, which was never stored."""
    code: Mapped[str] = mapped_column(sa.Text)
    reason: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)

    __table_args__ = (
        sa.Index(None, "job_id"),
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
    """One attempt at a ChunkBatch: what it cost so far and how it ended. Every write of vectors brings it up to date,
    so an attempt whose worker was killed is booked too."""

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
    """Contents it embedded that had a vector by the time it wrote them."""
    at_risk: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """Most contents it ever had embedded or on the device and not yet written: what a kill could cost."""
    outcome: Mapped[str | None] = mapped_column(sa.Text)
    """``completed``, ``released``, ``failed`` or ``died``; NULL while it runs, or where its lease was lost."""
    evidence: Mapped[str | None] = mapped_column(sa.Text)
    """Of a death: what was seen of it."""
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    ended_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        sa.Index(None, "job_id"),
        # Few: what went wrong is found by time without passing over what went well.
        sa.Index("ix_usage_faults", "ended_at", postgresql_where=sa.text("outcome IN ('died', 'failed')")),
    )


class WorkerReportRow(Base):
    """What a worker last reported about its last minute (``chunkmill_workers.process.reporting``).

    The table is unlogged, because the worker reports again soon.
    """

    __tablename__ = "worker_reports"

    name: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    """As in its leases."""
    kind: Mapped[str] = mapped_column(sa.Text)
    label: Mapped[str] = mapped_column(sa.Text)
    """Its name in Celery and Flower."""
    device: Mapped[str | None] = mapped_column(sa.Text)
    started_at: Mapped[datetime] = mapped_column(TIMESTAMP)
    seen_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    window_seconds: Mapped[float] = mapped_column(sa.Double)
    """So long are the counts below; a minute, or since it started."""
    contents: Mapped[int] = mapped_column(sa.BigInteger)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)
    padded_tokens: Mapped[int] = mapped_column(sa.BigInteger)
    engine_seconds: Mapped[float] = mapped_column(sa.Double)
    held: Mapped[int] = mapped_column(sa.Integer)
    """ChunkBatches it holds now."""
    gpu_busy: Mapped[float | None] = mapped_column(sa.Double)
    """From 0 to 1, by the driver, over its last second or so."""
    gpu_memory_used: Mapped[int | None] = mapped_column(sa.BigInteger)
    gpu_memory_total: Mapped[int | None] = mapped_column(sa.BigInteger)

    __table_args__ = (
        sa.CheckConstraint("kind IN ('local', 'provider', 'both')", name="kind"),
        {"prefixes": ["UNLOGGED"]},
    )


class EmbedRequestRow(Base):
    """A question to the workers: embed these texts now. Unlogged: an answer nobody waits for is worth nothing."""

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

    __table_args__ = (
        sa.CheckConstraint("kind IN ('document', 'query')", name="kind"),
        {"prefixes": ["UNLOGGED"]},
    )
