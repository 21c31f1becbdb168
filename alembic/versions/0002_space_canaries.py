"""The canary: what a space's first worker made of the golden texts. A new table, so workers of 0001 go on.

Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Under load, give up a lock that does not come at once rather than queue every query behind it: the
    # foreign key waits for whoever is registering a space.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "space_canaries",
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("vectors", sa.LargeBinary(), nullable=False),
        sa.Column("n_tokens", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.Column("made_by", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_space_canaries_space_id_spaces")),
        sa.PrimaryKeyConstraint("space_id", "version", name=op.f("pk_space_canaries")),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("space_canaries")
