"""The other spaces of a collection: one that is being filled, and one that it left and may come back to.

``collections.space_id`` goes on naming the active space, which is the only one that the last release knows. It writes
into that one alone, and the poller finds by an anti-join what is missing in the others.

Revises: 0020
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None
oldest_code = "0005"

STATES = (
    "planned", "filling", "indexing", "judging", "ramping", "flipped", "finished", "cancelled", "rolled_back",
)  # fmt: skip


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "reembeddings",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("from_space_id", sa.Integer(), nullable=False),
        sa.Column("to_space_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("plan", JSONB(), nullable=False),
        sa.Column("report", JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("problem", sa.Text()),
        sa.Column("job_id", sa.BigInteger()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("state_since", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("flipped_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint(
            "state IN ({})".format(", ".join(f"'{state}'" for state in STATES)), name=op.f("ck_reembeddings_state")
        ),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], ondelete="CASCADE",
            name=op.f("fk_reembeddings_collection_id_collections"),
        ),
        sa.ForeignKeyConstraint(
            ["from_space_id"], ["spaces.id"], name=op.f("fk_reembeddings_from_space_id_spaces")
        ),
        sa.ForeignKeyConstraint(["to_space_id"], ["spaces.id"], name=op.f("fk_reembeddings_to_space_id_spaces")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reembeddings")),
    )  # fmt: skip
    op.create_index(
        "uq_reembeddings_open",
        "reembeddings",
        ["collection_id"],
        unique=True,
        postgresql_where=sa.text("finished_at IS NULL"),
    )
    op.create_table(
        "collection_spaces",
        sa.Column("collection_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("space_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("on_long", sa.Text(), nullable=False),
        sa.Column("share", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("reembedding_id", sa.BigInteger(), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("role IN ('filling', 'previous')", name=op.f("ck_collection_spaces_role")),
        sa.CheckConstraint("on_long IN ('truncate', 'reject', 'split')", name=op.f("ck_collection_spaces_on_long")),
        sa.CheckConstraint("share BETWEEN 0 AND 100", name=op.f("ck_collection_spaces_share")),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], ondelete="CASCADE",
            name=op.f("fk_collection_spaces_collection_id_collections"),
        ),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_collection_spaces_space_id_spaces")),
        sa.ForeignKeyConstraint(
            ["reembedding_id"], ["reembeddings.id"], ondelete="CASCADE",
            name=op.f("fk_collection_spaces_reembedding_id_reembeddings"),
        ),
        sa.PrimaryKeyConstraint("collection_id", "space_id", name=op.f("pk_collection_spaces")),
    )  # fmt: skip
    op.create_index(op.f("ix_collection_spaces_space_id"), "collection_spaces", ["space_id"])


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_table("collection_spaces")
    op.drop_table("reembeddings")
