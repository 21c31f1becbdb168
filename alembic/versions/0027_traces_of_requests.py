"""The trace of whoever asks a worker for vectors travels with the request.

Callers and workers of older releases know nothing of it, and their requests belong to no trace.

Revises: 0026
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None
oldest_code = "0005"

COLUMNS = {"embed_requests": "traceparent", "worker_sockets": "traces_for"}


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for table, column in COLUMNS.items():
        op.add_column(table, sa.Column(column, sa.Text()))
        # A poller of deploy/postgres-role.sql may read the columns that were there when the file was run.
        op.execute(f"""
            DO $$
            BEGIN
                IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_pollers')
                    AND has_any_column_privilege('chunkmill_pollers', '{table}', 'SELECT')
                THEN
                    GRANT SELECT ({column}) ON {table} TO chunkmill_pollers;
                END IF;
            END
            $$
        """)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for table, column in COLUMNS.items():
        op.drop_column(table, column)
