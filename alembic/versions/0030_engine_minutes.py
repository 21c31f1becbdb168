"""How much of what the engines computed was padding, minute by minute, so that it can be drawn over time.

A poller adds a row a minute from the reports of the workers. Pollers of older releases add none, and nothing needs one.

Revises: 0029
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.create_table(
        "engine_minutes",
        sa.Column("minute", sa.DateTime(timezone=True), nullable=False),
        sa.Column("workers", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("padded_tokens", sa.BigInteger(), nullable=False),
        sa.Column("engine_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("minute", name=op.f("pk_engine_minutes")),
    )


def downgrade() -> None:
    op.drop_table("engine_minutes")
