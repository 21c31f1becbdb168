"""What each enqueue was given, in a table of its own, so that code of an older schema meets no new column.

Two repairs beside it: entries of the dead list are found by their text, and the numbers of collections that enqueues
took without using them are given back.

Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
oldest_code = "0005"

INDEX = "ix_dead_chunks_content_hash"


def upgrade() -> None:
    # CONCURRENTLY, so that workers go on; what an interrupted run left half built is made again.
    with op.get_context().autocommit_block():
        op.drop_index(INDEX, table_name="dead_chunks", postgresql_concurrently=True, if_exists=True)
        op.create_index(
            INDEX,
            "dead_chunks",
            ["content_hash"],
            postgresql_where=sa.text("content_hash IS NOT NULL"),
            postgresql_concurrently=True,
        )
    # Give up a lock that does not come at once. Collections come before jobs, as in an enqueue.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.execute("LOCK TABLE collections IN SHARE ROW EXCLUSIVE MODE")
    op.execute("""
        SELECT setval(pg_get_serial_sequence('collections', 'id'), max(id))
        FROM collections
        HAVING max(id) IS NOT NULL
    """)
    op.create_table(
        "job_streams",
        sa.Column("job_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.LargeBinary()),
        sa.Column("n_new", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("n_replaced", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("n_unchanged", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("n_repeated", sa.BigInteger(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_streams_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job_streams")),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("job_streams")
    with op.get_context().autocommit_block():
        op.drop_index(INDEX, table_name="dead_chunks", postgresql_concurrently=True, if_exists=True)
