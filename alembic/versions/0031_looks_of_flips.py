"""What a flip has to look at is kept, so that a flip of a large collection, and its rollback, read what is new alone.

A poller of an older release keeps no look, and none is needed. The sequence counts the enqueues that began anew, which
delete ChunkBatches.

Revises: 0030
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.execute("CREATE SEQUENCE reopenings")
    op.create_table(
        "reembedding_looks",
        sa.Column("reembedding_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("mark", sa.BigInteger(), nullable=False),
        sa.Column("lacking", ARRAY(sa.LargeBinary()), nullable=False),
        sa.Column("reopenings", sa.BigInteger(), nullable=False),
        sa.Column("looked_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["reembedding_id"], ["reembeddings.id"], ondelete="CASCADE",
            name=op.f("fk_reembedding_looks_reembedding_id_reembeddings"),
        ),
        sa.PrimaryKeyConstraint("reembedding_id", name=op.f("pk_reembedding_looks")),
    )  # fmt: skip


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("reembedding_looks")
    op.execute("DROP SEQUENCE reopenings")
