"""What somebody waits for on a paid route is in a table of its own, which neither its caller nor a crash empties.

Paid workers of an older release go on writing ``embed_requests.committed_tokens``, which the budget counts as well. The
next release drops that column.

Revises: 0031
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "provider_questions",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("sent_contents", sa.Integer(), server_default="0", nullable=False),
        sa.Column("sent_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_provider_questions_space_id_spaces")),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_provider_questions")),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("provider_questions")
