"""Where a job's trace context travels: in a table of its own, so that code of an older schema meets no new column.

Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    # The foreign key locks jobs for a moment: give up a lock that does not come at once.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "job_traces",
        sa.Column("job_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("traceparent", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_traces_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job_traces")),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("job_traces")
