"""Keys of the gateway: who may call it, and how much.

Of each key there is the SHA-256 of its secret part, and what its requests used in each month.

Revises: 0018
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None
oldest_code = "0005"

TIMESTAMP = sa.DateTime(timezone=True)
NOW = sa.text("now()")


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "api_keys",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("scopes", ARRAY(sa.Text()), nullable=False),
        sa.Column("models", ARRAY(sa.Text())),
        sa.Column("collections", ARRAY(sa.Text())),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("tokens_per_minute", sa.BigInteger()),
        sa.Column("parallel_requests", sa.Integer()),
        sa.Column("tokens_per_month", sa.BigInteger()),
        sa.Column("usd_per_month", sa.Numeric()),
        sa.Column("created_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("last_used_at", TIMESTAMP),
        sa.Column("expires_at", TIMESTAMP),
        sa.Column("revoked_at", TIMESTAMP),
        sa.CheckConstraint("length(sha256) = 32", name=op.f("ck_api_keys_sha256")),
        sa.CheckConstraint(
            "scopes <@ ARRAY['embed', 'search', 'jobs', 'batches', 'admin'] AND scopes <> '{}'",
            name=op.f("ck_api_keys_scopes"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    op.create_table(
        "api_key_usage",
        sa.Column("key_id", sa.BigInteger(), nullable=False),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("requests", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("usd", sa.Numeric(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_api_key_usage_key_id_api_keys")),
        sa.PrimaryKeyConstraint("key_id", "month", name=op.f("pk_api_key_usage")),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("api_key_usage")
    op.drop_table("api_keys")
