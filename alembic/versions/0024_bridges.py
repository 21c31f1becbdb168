"""Bridges: queries of a new model that are answered in the space that a collection has now.

A trigger ends the bridges of a collection when it leaves the space that they lead into, whichever release moves it,
and when it is dropped. It runs in the name of the owner, because a poller writes no bridge. A bridge keeps its two
spaces from being dropped.

Revises: 0023
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    # A foreign key and a trigger take a lock on the table, for which writers of collections would queue.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "bridges",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("query_space_id", sa.Integer(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("shapes", JSONB(), nullable=False),
        sa.Column("arrays", sa.LargeBinary(), nullable=False),
        sa.Column("report", JSONB(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('rotation', 'low_rank', 'network')", name=op.f("ck_bridges_kind")),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name=op.f("fk_bridges_collection_id_collections"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["query_space_id"], ["spaces.id"], name=op.f("fk_bridges_query_space_id_spaces")),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_bridges_space_id_spaces")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bridges")),
        sa.UniqueConstraint("collection_id", "name", name=op.f("uq_bridges_collection_id_name")),
    )
    # The numbers are as random as the vectors, and Postgres would try in vain to compress them.
    op.execute("ALTER TABLE bridges ALTER COLUMN arrays SET STORAGE EXTERNAL")
    for column in ("query_space_id", "space_id"):
        op.create_index(op.f(f"ix_bridges_{column}"), "bridges", [column])
    op.execute("""
        DO $do$
        BEGIN
            EXECUTE format($create$
                CREATE FUNCTION end_bridges() RETURNS trigger
                LANGUAGE plpgsql SECURITY DEFINER SET search_path = %I, pg_temp
                AS $body$
                BEGIN
                    DELETE FROM bridges b
                    WHERE b.collection_id = NEW.id AND (b.space_id <> NEW.space_id OR NEW.dropped_at IS NOT NULL);
                    RETURN NULL;
                END
                $body$
            $create$, current_schema());
        END
        $do$
    """)
    op.execute("""
        CREATE TRIGGER end_bridges
        AFTER UPDATE OF space_id, dropped_at ON collections
        FOR EACH ROW EXECUTE FUNCTION end_bridges()
    """)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.execute("DROP FUNCTION end_bridges CASCADE")
    op.drop_table("bridges")
