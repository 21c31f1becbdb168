"""Jobs that a producer enqueues inside a transaction of its own, and the notification about a job's end.

The producer's transaction writes into the outbox alone, so that it holds no lock that anybody else waits for. Once it is
committed, the outbox is delivered: the job is opened under the number that it has got already.

The notification is sent by a trigger, so that the workers of the last release send it too.

Revises: 0028
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None
oldest_code = "0005"

TIMESTAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "outbox_jobs",
        sa.Column("job_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("collection", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("on_long", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("digest", sa.LargeBinary()),
        sa.Column("n_chunks", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("request", postgresql.JSONB(), nullable=False),
        sa.Column("created_at", TIMESTAMP, server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_outbox_jobs")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_outbox_jobs_idempotency_key")),
    )
    op.create_table(
        "outbox_pages",
        sa.Column("job_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("chunks", postgresql.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["outbox_jobs.job_id"], name=op.f("fk_outbox_pages_job_id_outbox_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_outbox_pages")),
    )
    # The roles of deploy/postgres-role.sql have got what all tables have. The pages are texts.
    op.execute("""
        DO $$
        DECLARE
            wanted text;
        BEGIN
            FOREACH wanted IN ARRAY ARRAY['chunkmill_workers', 'chunkmill_pollers', 'chunkmill_readers']
            LOOP
                IF EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
                    EXECUTE format('REVOKE ALL ON outbox_pages FROM %I', wanted);
                    EXECUTE format('REVOKE INSERT, UPDATE, DELETE ON outbox_jobs FROM %I', wanted);
                END IF;
            END LOOP;
        END
        $$
    """)
    op.execute("""
        CREATE FUNCTION tell_job_ended() RETURNS trigger
        LANGUAGE plpgsql
        AS $body$
        BEGIN
            PERFORM pg_catalog.pg_notify('chunkmill_ended', NEW.id::pg_catalog.text);
            RETURN NULL;
        END
        $body$
    """)
    op.execute("""
        CREATE TRIGGER tell_job_ended
        AFTER UPDATE OF state ON jobs
        FOR EACH ROW
        WHEN (OLD.state IS DISTINCT FROM NEW.state AND NEW.state IN ('completed', 'failed', 'cancelled'))
        EXECUTE FUNCTION tell_job_ended()
    """)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.execute("LOCK TABLE outbox_jobs IN ACCESS EXCLUSIVE MODE")
    op.execute("""
        DO $$
        BEGIN
            IF EXISTS (SELECT FROM outbox_jobs) THEN
                RAISE EXCEPTION 'jobs that were enqueued inside transactions are not delivered yet'
                    USING HINT = 'Let `chunkmill poller` run until the table outbox_jobs is empty, then downgrade.';
            END IF;
        END
        $$
    """)
    op.execute("DROP TRIGGER tell_job_ended ON jobs")
    op.execute("DROP FUNCTION tell_job_ended()")
    op.drop_table("outbox_pages")
    op.drop_table("outbox_jobs")
