"""What lets every ProviderBatch end: whose key made it, what the provider says that it ran, and limits it has taught.

The id that a provider gives a batch is unique only while the batch is followed, because a server that counts anew
after a restart gives the same ids again.

Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None
oldest_code = "0005"

INDEX = "uq_provider_batches_batch_id"


def upgrade() -> None:
    # Give up a lock that does not come at once.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column("provider_batches", sa.Column("key_digest", sa.Text()))
    op.add_column("provider_batches", sa.Column("n_completed", sa.BigInteger()))
    op.add_column("provider_batches", sa.Column("used_tokens", sa.BigInteger()))
    op.add_column("provider_batches", sa.Column("looks", sa.Integer(), server_default="0", nullable=False))
    op.add_column("provider_batches", sa.Column("refusals", sa.Integer(), server_default="0", nullable=False))
    op.add_column("provider_lanes", sa.Column("max_tokens", sa.BigInteger()))
    op.add_column("provider_lanes", sa.Column("max_tokens_until", sa.DateTime(timezone=True)))
    # CONCURRENTLY, so that workers go on; what an interrupted run left half built is made again.
    with op.get_context().autocommit_block():
        op.drop_index(INDEX, table_name="provider_batches", postgresql_concurrently=True, if_exists=True)
        op.create_index(
            INDEX,
            "provider_batches",
            ["server", "batch_id"],
            unique=True,
            postgresql_where=sa.text("state IN ('submitted', 'collecting')"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for name in ("max_tokens_until", "max_tokens"):
        op.drop_column("provider_lanes", name)
    for name in ("refusals", "looks", "used_tokens", "n_completed", "key_digest"):
        op.drop_column("provider_batches", name)
    # Of ProviderBatches with one id the one that is followed keeps it, or else the latest.
    op.execute("""
        UPDATE provider_batches p
        SET batch_id = NULL
        FROM (
            SELECT id, row_number() OVER (
                PARTITION BY batch_id ORDER BY state IN ('submitted', 'collecting') DESC, id DESC
            ) AS number
            FROM provider_batches
            WHERE batch_id IS NOT NULL
        ) n
        WHERE p.id = n.id AND n.number > 1
    """)
    with op.get_context().autocommit_block():
        op.drop_index(INDEX, table_name="provider_batches", postgresql_concurrently=True, if_exists=True)
        op.create_index(INDEX, "provider_batches", ["batch_id"], unique=True, postgresql_concurrently=True)
