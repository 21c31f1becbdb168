"""Money is exact, a correction has an author and a key, and the budget knows which searches are at a provider.

numeric(18, 10) rounded each booking; without a limit of digits nothing is rounded. That changes no row, so the tables
are not written anew. Old code books into the new columns as before.

Revises: 0012
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column("embed_requests", sa.Column("committed_tokens", sa.BigInteger(), server_default="0", nullable=False))
    op.alter_column("charges", "usd", type_=sa.Numeric())
    op.alter_column("adjustments", "usd", type_=sa.Numeric())
    op.add_column("adjustments", sa.Column("author", sa.Text()))
    op.add_column("adjustments", sa.Column("key", sa.Text()))
    # No release could book a correction before, so no row has a key.
    op.create_index("uq_adjustments_key", "adjustments", ["key"], unique=True)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_index("uq_adjustments_key", table_name="adjustments")
    op.drop_column("adjustments", "key")
    op.drop_column("adjustments", "author")
    op.alter_column("adjustments", "usd", type_=sa.Numeric(18, 10))
    op.alter_column("charges", "usd", type_=sa.Numeric(18, 10))
    op.drop_column("embed_requests", "committed_tokens")
