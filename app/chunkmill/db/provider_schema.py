"""The tables of the paid routes as SQLAlchemy classes: ProviderBatches, what is in flight, lanes, and charges.

They exist for the same check as those of ``chunkmill.db.schema``.
"""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chunkmill.db.schema import NOW, TIMESTAMP, Base, identity, one_of
from chunkmill.domain.costs import AdjustmentKind
from chunkmill.domain.states import ProviderBatchState

MONEY = sa.Numeric()
"""US dollars, exactly: a price has as many places as the provider says, and thousands of bookings must add up."""


class ProviderLaneRow(Base):
    """What all workers of a paid lane share: its pauses, why it stopped, and its pace."""

    __tablename__ = "provider_lanes"

    route: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    paused_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    pause_reason: Mapped[str | None] = mapped_column(sa.Text)
    stopped_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """Since when it is stopped. Somebody must resume it, because what stopped it does not pass by itself."""
    stop_code: Mapped[str | None] = mapped_column(sa.Text)
    """Why it is stopped. If it is not stopped, ``unproved`` says that a probe comes before the next work."""
    stop_reason: Mapped[str | None] = mapped_column(sa.Text)
    held_reason: Mapped[str | None] = mapped_column(sa.Text)
    """Why nothing was gathered the last time although something waits, for example a budget; NULL otherwise."""
    max_inputs: Mapped[int | None] = mapped_column(sa.Integer)
    """The most inputs of a ProviderBatch, if the provider takes fewer than it documents."""
    max_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    """The most tokens that the provider queues for us, if it refused ProviderBatches because of its own limit."""
    max_tokens_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """Until when this is believed: quotas grow, and another program of the account may have taken up this one."""
    next_request_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    next_token_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the buckets of requests and of tokens are full again, by the generic cell rate algorithm."""


class ProviderBatchRow(Base):
    """A batch object at the provider. ``ledger/provider/provider_batches.py`` builds statements from this class."""

    __tablename__ = "provider_batches"

    id: Mapped[int] = identity()
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    state: Mapped[str] = mapped_column(sa.Text)
    token: Mapped[str] = mapped_column(sa.Text)
    """A random word. It is in the name of its file and in its metadata, so that we recognize an orphan as ours."""
    server: Mapped[str | None] = mapped_column(sa.Text)
    """The base URL of the server that took its file. Other servers do not know it."""
    key_digest: Mapped[str | None] = mapped_column(sa.Text)
    """A digest of the key with which it was made or last seen. With the key of another project it is not found."""
    attempt: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """The fencing number of the lease on its next step."""
    lease_owner: Mapped[str | None] = mapped_column(sa.Text)
    lease_until: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    not_before: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    rung_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    failures: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How often its present step failed since something last succeeded."""
    n_requests: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_inputs: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_contents: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_tokens: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    n_bytes: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    input_file_id: Mapped[str | None] = mapped_column(sa.Text)
    uploads: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    creates: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    resends: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How often its file was made and sent again because the provider refused it."""
    creating_since: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When the latest request to create it was about to be sent."""
    batch_id: Mapped[str | None] = mapped_column(sa.Text)
    provider_status: Mapped[str | None] = mapped_column(sa.Text)
    n_done: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How many requests the provider says it has processed."""
    n_completed: Mapped[int | None] = mapped_column(sa.BigInteger)
    """How many of them succeeded, as the provider says, and so are charged. NULL if it does not say."""
    used_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    """The tokens that the provider charges for the whole batch, from ``batch.usage``. NULL if it does not say."""
    looks: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How often the provider was asked in vain for the result files of the batch after it had ended."""
    refusals: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How often the provider refused to queue it because of the account's limits."""
    output_file_id: Mapped[str | None] = mapped_column(sa.Text)
    error_file_id: Mapped[str | None] = mapped_column(sa.Text)
    downloads: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_written: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_dead: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_returned: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How many contents came back without a vector and are sent again."""
    oddities: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=sa.text("'{}'"))
    """``kind → count`` of errors in a result file, such as duplicate, unknown and missing ids."""
    cancel_requested_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    error_code: Mapped[str | None] = mapped_column(sa.Text)
    error: Mapped[str | None] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    submitted_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    ended_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)
    """When we saw that the provider had ended it."""
    closed_at: Mapped[datetime | None] = mapped_column(TIMESTAMP)

    __table_args__ = (
        one_of("state", ProviderBatchState),
        sa.Index(
            "uq_provider_batches_gathering", "space_id", unique=True, postgresql_where=sa.text("state = 'gathering'")
        ),
        sa.Index("ix_provider_batches_open", "not_before", postgresql_where=sa.text("state <> 'closed'")),
        sa.Index("ix_provider_batches_created", "creating_since"),
        sa.Index(
            "uq_provider_batches_batch_id",
            "server",
            "batch_id",
            unique=True,
            postgresql_where=sa.text("state IN ('submitted', 'collecting')"),
        ),
    )


class AnsweringModelRow(Base):
    """The model that the provider named in its first answer for a space. Vectors of another do not enter the space."""

    __tablename__ = "answering_models"

    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"), primary_key=True, autoincrement=False)
    model: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)


class ProviderInputRow(Base):
    """A content that is at a provider or about to be sent. By the key, a space sends it only once at a time."""

    __tablename__ = "provider_inputs"

    space_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary, primary_key=True)
    provider_batch_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """NULL if it is in a plain request, which belongs to the attempt at its ChunkBatch."""
    chunk_batch_id: Mapped[int] = mapped_column(sa.BigInteger)
    attempt: Mapped[int] = mapped_column(sa.Integer)
    job_id: Mapped[int] = mapped_column(sa.BigInteger)
    request_no: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """The number of its request. In plain requests it is 1 for what was sent and is not accounted for, and else 0."""
    position: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    n_tokens: Mapped[int] = mapped_column(sa.Integer)
    """How many tokens the whole text has."""
    sent_tokens: Mapped[int] = mapped_column(sa.Integer)
    """How many tokens of it are sent and paid for."""
    truncated: Mapped[bool] = mapped_column(sa.Boolean)
    weights: Mapped[list[int] | None] = mapped_column(ARRAY(sa.Integer))
    """For a split text the weight of each part's vector. Each part is one input of the request."""

    __table_args__ = (
        sa.Index(None, "provider_batch_id", "request_no", "position"),
        sa.Index(None, "chunk_batch_id"),
    )


class ProviderBatchMemberRow(Base):
    """A ChunkBatch that waits for a ProviderBatch, because it was gathered from it or shares a content with it."""

    __tablename__ = "provider_batch_members"

    provider_batch_id: Mapped[int] = mapped_column(sa.ForeignKey("provider_batches.id"), primary_key=True)
    chunk_batch_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)

    __table_args__ = (sa.Index(None, "chunk_batch_id"),)


class ProviderSuspectRow(Base):
    """A content that was in a refused request of several inputs. From then on it is sent in a request of its own."""

    __tablename__ = "provider_suspects"

    space_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    content_hash: Mapped[bytes] = mapped_column(sa.LargeBinary, primary_key=True)


class ProviderQuestionRow(Base):
    """What a provider may charge for texts that somebody waits for, until it is booked or is known to be refused.

    ``key`` is random. Only workers delete a row: neither the caller nor a crash of Postgres takes it away.
    """

    __tablename__ = "provider_questions"

    key: Mapped[bytes] = mapped_column(sa.LargeBinary, primary_key=True)
    space_id: Mapped[int] = mapped_column(sa.ForeignKey("spaces.id"))
    tokens: Mapped[int] = mapped_column(sa.BigInteger)
    """How many of its tokens are not booked. The budget counts them."""
    sent_contents: Mapped[int] = mapped_column(sa.Integer, server_default="0")
    """How many contents the request has that is with the provider; 0 if none is."""
    sent_tokens: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    """How many of ``tokens`` that request has."""
    until: Mapped[datetime] = mapped_column(TIMESTAMP)
    """After this moment its worker is taken for dead, and another one books what was sent as charged perhaps."""


class ChargeRow(Base):
    """What a provider charged, by day, route, space, job and ProviderBatch.

    ``job_id`` is 0 if somebody waited for the vectors, for example in a search. ``provider_batch_id`` is 0 for plain
    requests.
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

    __table_args__ = (
        sa.Index(None, "job_id"),
        sa.CheckConstraint("contents >= 0 AND tokens >= 0 AND usd >= 0", name="nothing_is_negative"),
    )


class AdjustmentRow(Base):
    """A part of the bill that no answer confirmed. ``job_id`` and ``provider_batch_id`` are as in ``charges``."""

    __tablename__ = "adjustments"

    id: Mapped[int] = identity()
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
    day: Mapped[date] = mapped_column(sa.Date, index=True)
    """The day in UTC on which it counts."""
    kind: Mapped[str] = mapped_column(sa.Text)
    route: Mapped[str] = mapped_column(sa.Text)
    space_id: Mapped[int] = mapped_column(sa.Integer)
    job_id: Mapped[int] = mapped_column(sa.BigInteger, index=True)
    provider_batch_id: Mapped[int] = mapped_column(sa.BigInteger)
    contents: Mapped[int] = mapped_column(sa.BigInteger)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)
    usd: Mapped[Decimal] = mapped_column(MONEY)
    reason: Mapped[str] = mapped_column(sa.Text)
    author: Mapped[str | None] = mapped_column(sa.Text)
    """Who corrects. NULL if no person did it."""
    key: Mapped[str | None] = mapped_column(sa.Text)
    """What tells a correction from every other one, so that a command that runs twice corrects once."""

    __table_args__ = (
        one_of("kind", AdjustmentKind),
        sa.CheckConstraint(
            "kind = 'correction' OR (contents >= 0 AND tokens >= 0 AND usd >= 0)",
            name="only_corrections_are_negative",
        ),
        sa.Index("uq_adjustments_key", "key", unique=True),
    )


class BudgetNoticeRow(Base):
    """A budget warning of a month that was given. One row is one warning, however many pollers there are."""

    __tablename__ = "budget_notices"

    month: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    percent: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True, autoincrement=False)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP, server_default=NOW)
