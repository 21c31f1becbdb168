"""The tables of the paid routes: ProviderBatches, what is in flight, the lanes' limits, and what was charged."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chunkmill.db.schema import NOW, TIMESTAMP, Base, identity, one_of
from chunkmill.domain.states import ProviderBatchState

MONEY = sa.Numeric(18, 10)


class ProviderLaneRow(Base):
    """What all workers of a paid route share: its pauses, why it stopped, and its pace."""

    __tablename__ = "provider_lanes"

    route: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    paused_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    pause_reason: Mapped[str | None] = mapped_column(sa.Text)
    stopped_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """Until somebody resumes it: what stopped it does not pass by itself."""
    stop_code: Mapped[str | None] = mapped_column(sa.Text)
    stop_reason: Mapped[str | None] = mapped_column(sa.Text)
    held_reason: Mapped[str | None] = mapped_column(sa.Text)
    """Why the latest look gathered nothing though something waits: a budget; NULL when it did."""
    max_inputs: Mapped[int | None] = mapped_column(sa.Integer)
    """Learned from a provider that takes fewer inputs in one batch than it documents."""
    next_request_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    next_token_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the bucket is full again, of requests and of tokens: the generic cell rate algorithm."""


class ProviderBatchRow(Base):
    __tablename__ = "provider_batches"

    id: Mapped[int] = identity()
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    state: Mapped[str] = mapped_column(sa.Text)
    token: Mapped[str] = mapped_column(sa.Text)
    """Random: the name of its file and a word in its metadata, by which an orphan is known as ours."""
    server: Mapped[str | None] = mapped_column(sa.Text)
    """The base URL that took its file; another server knows nothing of it."""
    attempt: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """Fencing number of the lease on its next step."""
    lease_owner: Mapped[str | None] = mapped_column(sa.Text)
    lease_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    not_before: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    rung_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    failures: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """Of the step it is at, since something last went right."""
    n_requests: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_inputs: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_contents: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_tokens: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    n_bytes: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    input_file_id: Mapped[str | None] = mapped_column(sa.Text)
    uploads: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    creates: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    resends: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How often the provider found its file bad and it was made and sent again."""
    creating_since: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the latest create was about to be sent."""
    batch_id: Mapped[str | None] = mapped_column(sa.Text)
    provider_status: Mapped[str | None] = mapped_column(sa.Text)
    n_done: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """Requests that the provider says it is through with."""
    output_file_id: Mapped[str | None] = mapped_column(sa.Text)
    error_file_id: Mapped[str | None] = mapped_column(sa.Text)
    downloads: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_written: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_dead: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_returned: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """Contents that came back without a vector, to be sent again."""
    oddities: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=sa.text("'{}'"))
    """``kind → count`` of what should not be in a result file: duplicate, unknown and missing ids and the like."""
    cancel_requested_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    error_code: Mapped[str | None] = mapped_column(sa.Text)
    error: Mapped[str | None] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    submitted_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    ended_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When we saw that the provider was through with it."""
    closed_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        one_of("state", ProviderBatchState),
        sa.Index(
            "uq_provider_batches_gathering", "space_id", unique=True, postgresql_where=sa.text("state = 'gathering'")
        ),
        sa.Index("ix_provider_batches_open", "not_before", postgresql_where=sa.text("state <> 'closed'")),
        sa.Index("ix_provider_batches_created", "creating_since"),
        sa.Index("uq_provider_batches_batch_id", "batch_id", unique=True),
    )


class ProviderInputRow(Base):
    """A content that is at a provider now, or about to be. The key is the promise: in a space it is there once."""

    __tablename__ = "provider_inputs"

    space_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary, primary_key=True)
    provider_batch_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """NULL: in a plain request of the attempt at its ChunkBatch."""
    chunk_batch_id: Mapped[int] = mapped_column(sa.BigInteger)
    attempt: Mapped[int] = mapped_column(sa.Integer)
    job_id: Mapped[int] = mapped_column(sa.BigInteger)
    request_no: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    position: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_tokens: Mapped[int] = mapped_column(sa.Integer)
    """Of the whole text."""
    sent_tokens: Mapped[int] = mapped_column(sa.Integer)
    """Of what is sent of it, and is paid for."""
    truncated: Mapped[bool] = mapped_column(sa.Boolean)
    weights: Mapped[list[int] | None] = mapped_column(ARRAY(sa.Integer))
    """Of a split text: what each window's vector counts for; its windows are as many inputs of its request."""

    __table_args__ = (
        sa.Index(None, "provider_batch_id", "request_no", "position"),
        sa.Index(None, "chunk_batch_id"),
    )


class ProviderBatchMemberRow(Base):
    """Which ChunkBatches wait for a ProviderBatch: those it was gathered from, and those that share a content."""

    __tablename__ = "provider_batch_members"

    provider_batch_id: Mapped[int] = mapped_column(sa.ForeignKey("provider_batches.id"), primary_key=True)
    chunk_batch_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)

    __table_args__ = (sa.Index(None, "chunk_batch_id"),)


class ProviderSuspectRow(Base):
    """A content that was in a refused request of several inputs: it is sent in a request of its own from now on."""

    __tablename__ = "provider_suspects"

    space_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary, primary_key=True)


class ChargeRow(Base):
    """What a provider charged, by day, route, space, job and ProviderBatch.

    ``job_id`` 0: somebody who waited, as for a search. ``provider_batch_id`` 0: plain requests.
    """

    __tablename__ = "charges"

    day: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    route: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    space_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    job_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    provider_batch_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    contents: Mapped[int] = mapped_column(sa.BigInteger)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)
    usd: Mapped[Decimal] = mapped_column(MONEY)

    __table_args__ = (sa.Index(None, "job_id"),)


class BudgetNoticeRow(Base):
    """A month's budget warning that was given. One row, one warning, whatever the number of pollers."""

    __tablename__ = "budget_notices"

    month: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    percent: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True, autoincrement=False)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
