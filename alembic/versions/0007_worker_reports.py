"""What each worker says of itself every few seconds, and indexes by which the latest faults are found.

Workers of 0005 and 0006 go on; they only do not report.

Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
oldest_code = "0005"

INDEXES = (
    ("ix_usage_faults", "usage", ["ended_at"], "outcome IN ('died', 'failed')"),
    ("ix_chunk_batches_discarded", "chunk_batches", ["finished_at", "route"], "state = 'discarded'"),
)


def upgrade() -> None:
    # CONCURRENTLY, so that workers go on; what an interrupted run left half built is made again.
    with op.get_context().autocommit_block():
        for name, table, columns, where in INDEXES:
            op.drop_index(name, table_name=table, postgresql_concurrently=True, if_exists=True)
            op.create_index(name, table, columns, postgresql_where=sa.text(where), postgresql_concurrently=True)
    at = sa.DateTime(timezone=True)
    op.create_table(
        "worker_reports",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("device", sa.Text()),
        sa.Column("started_at", at, nullable=False),
        sa.Column("seen_at", at, server_default=sa.text("now()"), nullable=False),
        sa.Column("window_seconds", sa.Double(), nullable=False),
        sa.Column("contents", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("padded_tokens", sa.BigInteger(), nullable=False),
        sa.Column("engine_seconds", sa.Double(), nullable=False),
        sa.Column("held", sa.Integer(), nullable=False),
        sa.Column("gpu_busy", sa.Double()),
        sa.Column("gpu_memory_used", sa.BigInteger()),
        sa.Column("gpu_memory_total", sa.BigInteger()),
        sa.CheckConstraint("kind IN ('local', 'provider', 'both')", name=op.f("ck_worker_reports_kind")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_worker_reports")),
        prefixes=["UNLOGGED"],
    )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name, table, _, _ in INDEXES:
            op.drop_index(name, table_name=table, postgresql_concurrently=True, if_exists=True)
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("worker_reports")
