"""What a worker's death leaves in the ledger: deaths per ChunkBatch, and how each attempt went.

Columns with defaults only, so workers of 0002 go on.

Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Under load, give up a lock that does not come at once rather than queue every query behind it.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column("chunk_batches", sa.Column("deaths", sa.SmallInteger(), server_default="0", nullable=False))
    op.add_column("usage", sa.Column("recomputed", sa.Integer(), server_default="0", nullable=False))
    op.add_column("usage", sa.Column("at_risk", sa.Integer(), server_default="0", nullable=False))
    op.add_column("usage", sa.Column("outcome", sa.Text(), nullable=True))
    op.add_column("usage", sa.Column("evidence", sa.Text(), nullable=True))
    op.add_column("usage", sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for column in ("ended_at", "evidence", "outcome", "at_risk", "recomputed"):
        op.drop_column("usage", column)
    op.drop_column("chunk_batches", "deaths")
