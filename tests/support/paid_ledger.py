"""Rows of the paid routes' tables, for tests of single queries. A scene would need several jobs to make them."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from chunkmill.db.provider_schema import ProviderBatchRow, ProviderInputRow
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Route
from chunkmill.settings import Settings
from chunkmill.spaces import registry

SMALL, LARGE = "text-embedding-3-small", "text-embedding-3-large"


def register(db: sa.Engine, settings: Settings, model: str = SMALL, dimensions: int | None = None) -> registry.Space:
    """Register the space of a provider's model and return it."""
    with db.begin() as conn:
        return registry.register(conn, settings.provider_models[model].space(OnLong.TRUNCATE, dimensions))


def add_provider_batch(conn: sa.Connection, space: registry.Space, state: str = "submitted", **columns: Any) -> int:
    """Add a ProviderBatch and return its id. ``columns`` are more columns."""
    values = {"space_id": space.id, "state": state, "token": "token", **columns}
    made: int = conn.execute(sa.insert(ProviderBatchRow).values(values).returning(ProviderBatchRow.id)).scalar_one()
    return made


def add_inputs(
    conn: sa.Connection, space: registry.Space, provider_batch_id: int | None, hashes: Iterable[bytes], **columns: Any
) -> None:
    """Add contents in flight, each in its own request. The requests are plain if ``provider_batch_id`` is None."""
    for number, content_hash in enumerate(hashes):
        values = {
            "space_id": space.id, "content_hash": content_hash, "provider_batch_id": provider_batch_id,
            "chunk_batch_id": 1, "attempt": 1, "job_id": 1, "request_no": number, "position": 0, "n_tokens": 10,
            "sent_tokens": 10, "truncated": False, **columns,
        }  # fmt: skip
        conn.execute(sa.insert(ProviderInputRow).values(values))


def add_charge(
    conn: sa.Connection, space: registry.Space, usd: str, *, on: str, tokens: int = 1000, job: int = 7, batch: int = 0
) -> None:
    """Add a charge of the day ``on``; ``charges.book`` always books on the present day."""
    conn.execute(
        sa.text(
            "INSERT INTO charges (day, route, space_id, job_id, provider_batch_id, contents, tokens, usd) "
            "VALUES (CAST(:day AS date), :route, :space, :job, :batch, 1, :tokens, :usd)"
        ),
        {
            "day": on, "route": Route.OPENAI if batch else Route.OPENAI_SYNC, "space": space.id, "job": job,
            "batch": batch, "tokens": tokens, "usd": Decimal(usd),
        },
    )  # fmt: skip


def set_time_zone(db: sa.Engine, zone: str) -> None:
    """Set the time zone of all sessions of this test's database that begin from now on."""
    with db.begin() as conn:
        name = conn.execute(sa.text("SELECT current_database()")).scalar_one()
        conn.execute(sa.text(f"ALTER DATABASE {name} SET timezone = '{zone}'"))
    db.dispose()
