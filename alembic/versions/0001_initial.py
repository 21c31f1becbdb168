"""The first schema: everything but the vector tables, which come with their spaces."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Under load, give up a lock that does not come at once rather than queue every query behind it.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    op.execute("CREATE SEQUENCE deletions")
    op.execute("SELECT setval('deletions', 1)")  # so that the very first deletion already changes last_value
    op.create_table(
        "contents",
        sa.Column("content_hash", sa.LargeBinary(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("content_hash", name=op.f("pk_contents")),
    )
    op.create_table(
        "spaces",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("dimensions", sa.Integer(), nullable=False),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("storage", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("storage IN ('vector', 'halfvec')", name=op.f("ck_spaces_storage")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_spaces")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_spaces_fingerprint")),
    )
    op.create_table(
        "collections",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_collections_space_id_spaces")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_collections")),
        sa.UniqueConstraint("name", name=op.f("uq_collections_name")),
    )
    op.create_table(
        "embed_requests",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("texts", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("vectors", sa.LargeBinary(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('document', 'query')", name=op.f("ck_embed_requests_kind")),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_embed_requests_space_id_spaces")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_embed_requests")),
        prefixes=["UNLOGGED"],
    )
    op.create_table(
        "chunks",
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("chunk_id", sa.Text(), nullable=False),
        sa.Column("content_hash", sa.LargeBinary(), nullable=False),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name=op.f("fk_chunks_collection_id_collections")
        ),
        sa.PrimaryKeyConstraint("collection_id", "chunk_id", name=op.f("pk_chunks")),
    )
    op.create_index(
        op.f("ix_chunks_content_hash_collection_id"),
        "chunks",
        ["content_hash", "collection_id"],
        unique=False,
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("on_long", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("n_chunks", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("sealed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("on_long IN ('truncate', 'reject', 'split')", name=op.f("ck_jobs_on_long")),
        sa.CheckConstraint("route IN ('local', 'auto')", name=op.f("ck_jobs_route")),
        sa.CheckConstraint(
            "state IN ('enqueueing', 'running', 'completed', 'failed', 'cancelled')",
            name=op.f("ck_jobs_state"),
        ),
        sa.ForeignKeyConstraint(["collection_id"], ["collections.id"], name=op.f("fk_jobs_collection_id_collections")),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_jobs_space_id_spaces")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_jobs_idempotency_key")),
    )
    op.create_index(
        "ix_jobs_open",
        "jobs",
        ["id"],
        unique=False,
        postgresql_where=sa.text("state IN ('enqueueing', 'running')"),
    )
    op.create_table(
        "chunk_batches",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("content_hashes", postgresql.ARRAY(sa.LargeBinary()), nullable=False),
        sa.Column("n_contents", sa.Integer(), nullable=False),
        sa.Column("n_cached", sa.Integer(), server_default="0", nullable=False),
        sa.Column("n_embedded", sa.Integer(), server_default="0", nullable=False),
        sa.Column("n_truncated", sa.Integer(), server_default="0", nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("rung_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("route IN ('local', 'auto')", name=op.f("ck_chunk_batches_route")),
        sa.CheckConstraint(
            "state IN ('available', 'running', 'completed', 'discarded', 'cancelled')",
            name=op.f("ck_chunk_batches_state"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_chunk_batches_job_id_jobs")),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_chunk_batches_space_id_spaces")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chunk_batches")),
    )
    op.create_index(
        "ix_chunk_batches_due",
        "chunk_batches",
        ["priority", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'available'"),
    )
    op.create_index(op.f("ix_chunk_batches_job_id_state"), "chunk_batches", ["job_id", "state"], unique=False)
    op.create_index(
        "ix_chunk_batches_leased",
        "chunk_batches",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "ix_chunk_batches_rung",
        "chunk_batches",
        ["priority", "rung_at"],
        unique=False,
        postgresql_where=sa.text("state = 'available' AND rung_at IS NOT NULL"),
    )
    op.create_table(
        "dead_chunks",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("chunk_id", sa.Text(), nullable=False),
        sa.Column("content_hash", sa.LargeBinary(), nullable=True),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_dead_chunks_job_id_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dead_chunks")),
    )
    op.create_index(op.f("ix_dead_chunks_job_id"), "dead_chunks", ["job_id"], unique=False)
    op.create_index(
        "uq_dead_chunks_once",
        "dead_chunks",
        ["job_id", "chunk_id", "content_hash"],
        unique=True,
        postgresql_where=sa.text("content_hash IS NOT NULL"),
    )
    op.create_table(
        "usage",
        sa.Column("chunk_batch_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("contents", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("engine_seconds", sa.Double(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["chunk_batch_id"], ["chunk_batches.id"], name=op.f("fk_usage_chunk_batch_id_chunk_batches")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_usage_job_id_jobs")),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_usage_space_id_spaces")),
        sa.PrimaryKeyConstraint("chunk_batch_id", "attempt", name=op.f("pk_usage")),
    )
    op.create_index(op.f("ix_usage_job_id"), "usage", ["job_id"], unique=False)
    # Hashes do not compress; spare Postgres the attempt on every ChunkBatch.
    op.execute("ALTER TABLE chunk_batches ALTER COLUMN content_hashes SET STORAGE EXTERNAL")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    # Each registered space made a vector table of its own.
    for space_id in op.get_bind().execute(sa.text("SELECT id FROM spaces")).scalars().all():
        op.execute(f"DROP TABLE IF EXISTS vectors_{space_id}")
    op.drop_index(op.f("ix_usage_job_id"), table_name="usage")
    op.drop_table("usage")
    op.drop_index("uq_dead_chunks_once", table_name="dead_chunks", postgresql_where=sa.text("content_hash IS NOT NULL"))
    op.drop_index(op.f("ix_dead_chunks_job_id"), table_name="dead_chunks")
    op.drop_table("dead_chunks")
    op.drop_index(
        "ix_chunk_batches_rung",
        table_name="chunk_batches",
        postgresql_where=sa.text("state = 'available' AND rung_at IS NOT NULL"),
    )
    op.drop_index("ix_chunk_batches_leased", table_name="chunk_batches", postgresql_where=sa.text("state = 'running'"))
    op.drop_index(op.f("ix_chunk_batches_job_id_state"), table_name="chunk_batches")
    op.drop_index("ix_chunk_batches_due", table_name="chunk_batches", postgresql_where=sa.text("state = 'available'"))
    op.drop_table("chunk_batches")
    op.drop_index("ix_jobs_open", table_name="jobs", postgresql_where=sa.text("state IN ('enqueueing', 'running')"))
    op.drop_table("jobs")
    op.drop_index(op.f("ix_chunks_content_hash_collection_id"), table_name="chunks")
    op.drop_table("chunks")
    op.drop_table("embed_requests")
    op.drop_table("collections")
    op.drop_table("spaces")
    op.drop_table("contents")
    op.execute("DROP SEQUENCE deletions")
