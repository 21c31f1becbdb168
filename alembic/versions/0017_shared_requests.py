"""Embed requests that a worker answers many at a time: how urgent they are, whose they are, and until when they count.

An answer also says how many tokens each text had, and whether it was cut.

Revises: 0016
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column("embed_requests", sa.Column("urgency", sa.SmallInteger(), server_default="0", nullable=False))
    op.add_column("embed_requests", sa.Column("caller", sa.Text(), server_default="", nullable=False))
    op.add_column("embed_requests", sa.Column("deadline", sa.DateTime(timezone=True)))
    op.add_column("embed_requests", sa.Column("tokens", ARRAY(sa.Integer())))
    op.add_column("embed_requests", sa.Column("truncated", ARRAY(sa.Boolean())))
    # A poller of deploy/postgres-role.sql may read the columns that were there when the file was run, and deletes now
    # what is past its deadline.
    op.execute("""
        DO $$
        BEGIN
            IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_pollers')
                AND has_column_privilege('chunkmill_pollers', 'embed_requests', 'created_at', 'SELECT')
            THEN
                GRANT SELECT (urgency, caller, deadline, tokens, truncated) ON embed_requests TO chunkmill_pollers;
            END IF;
        END
        $$
    """)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for name in ("truncated", "tokens", "deadline", "caller", "urgency"):
        op.drop_column("embed_requests", name)
