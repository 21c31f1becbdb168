"""Files and batches that a gateway serves in the form of OpenAI's API, and collections that nobody lists.

A file is rows of pieces. A batch is a job whose chunks are in a hidden collection. A trigger deletes the texts of a
batch together with its result file, whoever deletes that: its owner, a poller, or a prune.

Revises: 0017
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None
oldest_code = "0005"

NOW = sa.text("now()")
TIMESTAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column("collections", sa.Column("is_hidden", sa.Boolean(), server_default=sa.false(), nullable=False))
    for function in ("show_collection(text)", "refresh_collection_views(integer)"):
        op.execute(_replaced(function, "k.dropped_at IS NULL", "(k.dropped_at IS NULL AND NOT k.is_hidden)"))
    op.create_table(
        "served_files",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), server_default="", nullable=False),
        sa.Column("n_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("is_whole", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("served_batch_id", sa.BigInteger()),
        sa.Column("created_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("touched_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("expires_at", TIMESTAMP),
        sa.CheckConstraint("kind IN ('input', 'output', 'error')", name=op.f("ck_served_files_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_served_files")),
        sa.UniqueConstraint("name", name=op.f("uq_served_files_name")),
    )
    op.create_index("ix_served_files_tenant_id", "served_files", ["tenant", "id"])
    op.create_index("ix_served_files_expires_at", "served_files", ["expires_at"])
    op.create_index("ix_served_files_served_batch_id", "served_files", ["served_batch_id"])
    op.create_index("ix_served_files_half", "served_files", ["touched_at"], postgresql_where=sa.text("NOT is_whole"))
    op.create_table(
        "served_file_pieces",
        sa.Column("served_file_id", sa.BigInteger(), nullable=False),
        sa.Column("piece", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["served_file_id"],
            ["served_files.id"],
            name=op.f("fk_served_file_pieces_served_file_id_served_files"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("served_file_id", "piece", name=op.f("pk_served_file_pieces")),
    )
    op.create_table(
        "served_batches",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("asked", JSONB(), nullable=False),
        sa.Column("models", ARRAY(sa.Text())),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("input_file", sa.Text(), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("errors", JSONB()),
        sa.Column("job_id", sa.BigInteger()),
        sa.Column("output_file", sa.Text()),
        sa.Column("error_file", sa.Text()),
        sa.Column("n_total", sa.Integer(), server_default="0", nullable=False),
        sa.Column("n_completed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("n_failed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("counted_at", TIMESTAMP),
        sa.Column("n_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_until", TIMESTAMP),
        sa.Column("not_before", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("created_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("expires_at", TIMESTAMP, nullable=False),
        *(sa.Column(f"{state}_at", TIMESTAMP) for state in ("in_progress", "finalizing", "completed", "failed")),
        *(sa.Column(f"{state}_at", TIMESTAMP) for state in ("expired", "cancelling", "cancelled")),
        sa.CheckConstraint(
            "state IN ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', "
            "'cancelled')",
            name=op.f("ck_served_batches_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_served_batches")),
        sa.UniqueConstraint("name", name=op.f("uq_served_batches_name")),
        sa.UniqueConstraint("tenant", "idempotency_key", name=op.f("uq_served_batches_tenant_idempotency_key")),
    )
    op.create_index("ix_served_batches_tenant_id", "served_batches", ["tenant", "id"])
    op.create_index(
        "ix_served_batches_open",
        "served_batches",
        ["id"],
        postgresql_where=sa.text("state IN ('validating', 'in_progress', 'finalizing', 'cancelling')"),
    )
    op.create_table(
        "served_batch_lines",
        sa.Column("served_batch_id", sa.BigInteger(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("n_inputs", sa.Integer(), nullable=False),
        sa.Column("dimensions", sa.Integer()),
        sa.Column("is_base64", sa.Boolean(), nullable=False),
        sa.Column("refuses_long", sa.Boolean(), nullable=False),
        sa.Column("status", sa.SmallInteger()),
        sa.Column("code", sa.Text()),
        sa.Column("message", sa.Text()),
        sa.Column("param", sa.Text()),
        sa.ForeignKeyConstraint(
            ["served_batch_id"],
            ["served_batches.id"],
            name=op.f("fk_served_batch_lines_served_batch_id_served_batches"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("served_batch_id", "line", name=op.f("pk_served_batch_lines")),
    )
    op.execute(_TRIGGER_FUNCTION)
    op.execute("""
        CREATE TRIGGER forget_texts AFTER DELETE ON served_files
        FOR EACH ROW WHEN (OLD.served_batch_id IS NOT NULL) EXECUTE FUNCTION forget_texts_of_served_batch()
    """)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    # What nobody could reach any more is deleted by a poller.
    op.execute("UPDATE collections SET dropped_at = now() WHERE is_hidden AND dropped_at IS NULL")
    op.drop_table("served_batch_lines")
    op.drop_table("served_batches")
    op.drop_table("served_file_pieces")
    op.drop_table("served_files")
    op.execute("DROP FUNCTION forget_texts_of_served_batch()")
    for function in ("show_collection(text)", "refresh_collection_views(integer)"):
        op.execute(_replaced(function, "(k.dropped_at IS NULL AND NOT k.is_hidden)", "k.dropped_at IS NULL"))
    op.drop_column("collections", "is_hidden")


def _replaced(function: str, old: str, new: str) -> str:
    """The function as it is, with one condition in another form."""
    return f"""
        DO $do$
        BEGIN
            EXECUTE replace(pg_get_functiondef('{function}'::regprocedure), '{old}', '{new}');
        END
        $do$
    """


# It runs as the owner of the tables, because the role of pollers may delete files, and may not change collections.
# With the output file go the chunks of the batch, with their texts and vectors, and with the last file its lines.
_TRIGGER_FUNCTION = """
DO $do$
BEGIN
    EXECUTE format($create$
        CREATE FUNCTION forget_texts_of_served_batch() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = %s, pg_temp
        AS $body$
        BEGIN
            IF OLD.kind = 'output' THEN
                UPDATE collections k
                SET dropped_at = now()
                FROM served_batches b
                WHERE b.id = OLD.served_batch_id AND k.name = b.name AND k.is_hidden AND k.dropped_at IS NULL;
            END IF;
            IF NOT EXISTS (SELECT FROM served_files f WHERE f.served_batch_id = OLD.served_batch_id) THEN
                DELETE FROM served_batch_lines l WHERE l.served_batch_id = OLD.served_batch_id;
            END IF;
            RETURN NULL;
        END
        $body$
    $create$, quote_ident(current_schema()));
END
$do$
"""
