"""Where workers listen for callers on the same machine.

Workers and callers of older releases know nothing of it, and go on with rows.

Revises: 0019
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "worker_sockets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("token", sa.LargeBinary(), nullable=False),
        sa.Column("spaces", ARRAY(sa.Integer()), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_worker_sockets")),
        prefixes=["UNLOGGED"],
    )
    # By default every role of deploy/postgres-role.sql may read a new table, until the file is run again.
    op.execute("""
        DO $$
        BEGIN
            IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_pollers')
                AND has_table_privilege('chunkmill_pollers', 'worker_sockets', 'SELECT')
            THEN
                REVOKE SELECT, INSERT, UPDATE ON worker_sockets FROM chunkmill_pollers;
                GRANT SELECT (name, machine, address, spaces, seen_at) ON worker_sockets TO chunkmill_pollers;
            END IF;
        END
        $$
    """)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("worker_sockets")
