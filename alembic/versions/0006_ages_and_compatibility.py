"""Contents have an age, by which the cache is evicted; and the schema says which older code may still run on it.

``now()`` is taken once, when the column is added, so no row is rewritten: texts that are there count as new today.
Code of 0005 names its columns and goes on.

Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    # Under load, give up a lock that does not come at once rather than queue every query behind it.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column(
        "contents",
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
    )
    op.create_table(
        "schema_compatibility",
        sa.Column("oldest_code", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("oldest_code", name=op.f("pk_schema_compatibility")),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("schema_compatibility")
    op.drop_column("contents", "created_at")
