"""What no answer confirmed: money that was charged and lost, or may have been charged, and a person's corrections.

It is in a table of its own, so that code of an older schema meets no new column. A charge is never negative: a server
that says so would buy itself a larger budget.

Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "adjustments",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("provider_batch_id", sa.BigInteger(), nullable=False),
        sa.Column("contents", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("usd", sa.Numeric(18, 10), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.CheckConstraint("kind IN ('lost', 'maybe_charged', 'correction')", name=op.f("ck_adjustments_kind")),
        sa.CheckConstraint(
            "kind = 'correction' OR (contents >= 0 AND tokens >= 0 AND usd >= 0)",
            name=op.f("ck_adjustments_only_corrections_are_negative"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adjustments")),
    )
    op.create_index(op.f("ix_adjustments_day"), "adjustments", ["day"])
    op.create_index(op.f("ix_adjustments_job_id"), "adjustments", ["job_id"])
    # An older release believed a server that said so. The table has a row for each job and day, so that reading it under
    # the lock takes less than a second.
    op.execute("LOCK TABLE charges IN ACCESS EXCLUSIVE MODE")
    op.execute("""
        UPDATE charges
        SET contents = greatest(0, contents), tokens = greatest(0, tokens), usd = greatest(0, usd)
        WHERE contents < 0 OR tokens < 0 OR usd < 0
    """)
    op.create_check_constraint(
        op.f("ck_charges_nothing_is_negative"), "charges", "contents >= 0 AND tokens >= 0 AND usd >= 0"
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.execute("ALTER TABLE charges DROP CONSTRAINT ck_charges_nothing_is_negative")
    op.drop_table("adjustments")
