"""What each key of the gateway spends on the jobs, batches and re-embeddings that it begins.

The bill names jobs. A spend says which key began them, what they were expected to cost, and what of both counts in the
key's months. Only gateways and the functions below, which a poller calls, may write it.

Revises: 0025
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None
oldest_code = "0005"

TIMESTAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "api_key_spends",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("key_id", sa.BigInteger(), nullable=False),
        sa.Column("reembedding_id", sa.BigInteger()),
        sa.Column("estimated", sa.Numeric(), nullable=False),
        sa.Column("charged", sa.Numeric(), server_default="0", nullable=False),
        sa.Column("begun_at", TIMESTAMP, server_default=sa.text("now()"), nullable=False),
        sa.Column("settled_at", TIMESTAMP),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_api_key_spends_key_id_api_keys")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key_spends")),
        sa.UniqueConstraint("reembedding_id", name=op.f("uq_api_key_spends_reembedding_id")),
    )
    op.create_index("ix_api_key_spends_open", "api_key_spends", ["id"], postgresql_where=sa.text("settled_at IS NULL"))
    op.create_index(op.f("ix_api_key_spends_begun_at"), "api_key_spends", ["begun_at"])
    op.create_table(
        "api_key_spend_jobs",
        sa.Column("job_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("spend_id", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["spend_id"], ["api_key_spends.id"], name=op.f("fk_api_key_spend_jobs_spend_id_api_key_spends")
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_api_key_spend_jobs")),
    )
    op.create_index(op.f("ix_api_key_spend_jobs_spend_id"), "api_key_spend_jobs", ["spend_id"])
    op.create_table(
        "api_key_spend_months",
        sa.Column("spend_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("charged", sa.Numeric(), nullable=False),
        sa.Column("reserved", sa.Numeric(), nullable=False),
        sa.ForeignKeyConstraint(
            ["spend_id"], ["api_key_spends.id"], name=op.f("fk_api_key_spend_months_spend_id_api_key_spends")
        ),
        sa.PrimaryKeyConstraint("spend_id", "month", name=op.f("pk_api_key_spend_months")),
    )
    op.add_column("served_batches", sa.Column("key_id", sa.BigInteger()))
    for name, takes, returns, declare, body in FUNCTIONS:
        op.execute(_create(name, takes, returns, declare, body))
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for name, *_ in reversed(FUNCTIONS):
        op.execute(f"DROP FUNCTION {name}")
    op.drop_column("served_batches", "key_id")
    # What is reserved would count for ever. What was charged was used.
    op.execute("""
        UPDATE api_key_usage u
        SET usd = u.usd - r.reserved
        FROM (
            SELECT s.key_id, m.month, sum(m.reserved) AS reserved
            FROM api_key_spend_months m
            JOIN api_key_spends s ON s.id = m.spend_id
            GROUP BY s.key_id, m.month
        ) r
        WHERE r.key_id = u.key_id AND r.month = u.month
    """)
    op.drop_table("api_key_spend_months")
    op.drop_table("api_key_spend_jobs")
    op.drop_table("api_key_spends")


def _create(name: str, takes: str, returns: str, declare: str, body: str) -> str:
    """As in migration 0014: a function of the owner's, which sees this installation, whatever its caller's search path
    is."""
    return f"""
        DO $do$
        BEGIN
            EXECUTE format($create$
                CREATE OR REPLACE FUNCTION {name}({takes}) RETURNS {returns}
                LANGUAGE plpgsql SECURITY DEFINER SET search_path = %I, pg_temp
                AS $body$
                #variable_conflict use_column
                {declare}
                BEGIN
                {body.replace("%", "%%")}
                END
                $body$
            $create$, current_schema());
        END
        $do$
    """


BILL = """
    SELECT job_id, day, usd FROM charges
    UNION ALL
    SELECT job_id, day, usd FROM adjustments
"""

FUNCTIONS = (
    (
        # The spends that have to be settled: the open ones, and with `again` also those of the last hundred days whose
        # bill has changed since, because a person corrected it or a provider answered late.
        "due_api_key_spends", "again boolean", "SETOF bigint", "",
        f"""
        RETURN QUERY
        SELECT s.id
        FROM api_key_spends s
        WHERE s.settled_at IS NULL
        ORDER BY s.id;
        IF again THEN
            RETURN QUERY
            SELECT s.id
            FROM api_key_spends s
            WHERE s.settled_at IS NOT NULL AND s.begun_at > now() - interval '100 days'
              AND s.charged <> (
                  SELECT coalesce(sum(c.usd), 0)
                  FROM api_key_spend_jobs o
                  JOIN ({BILL}) c ON c.job_id = o.job_id
                  WHERE o.spend_id = s.id)
            ORDER BY s.id;
        END IF;
        """,
    ),
    (
        # Makes the months of a spend what the bill says: each charge counts in the month of its day (UTC), and what is
        # still expected counts in the present month until the jobs have ended and nothing of them is at a provider.
        # It may run at any time and as often as anybody likes. Returns whether the spend has come to its end; false
        # also if another transaction is at it.
        "settle_api_key_spend", "spend bigint", "boolean",
        """
        DECLARE
            s api_key_spends;
            present date := date_trunc('month', now() AT TIME ZONE 'UTC')::date;
            is_open boolean;
            expects boolean;
            total numeric;
            changed record;
        """,
        f"""
        SELECT * INTO s FROM api_key_spends p WHERE p.id = spend FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        IF s.reembedding_id IS NOT NULL THEN
            INSERT INTO api_key_spend_jobs (job_id, spend_id)
            SELECT f.job_id, s.id
            FROM reembedding_fills f
            WHERE f.reembedding_id = s.reembedding_id AND f.job_id IS NOT NULL
            ON CONFLICT DO NOTHING;
        END IF;
        -- Before the bill is read: what leaves a provider is charged in the same transaction.
        SELECT EXISTS (
                SELECT FROM api_key_spend_jobs o
                JOIN jobs j ON j.id = o.job_id
                WHERE o.spend_id = s.id AND j.state IN ('enqueueing', 'running'))
            OR EXISTS (
                SELECT FROM api_key_spend_jobs o
                JOIN provider_inputs i ON i.job_id = o.job_id
                WHERE o.spend_id = s.id)
            OR EXISTS (
                SELECT FROM api_key_spend_jobs o
                JOIN chunk_batches b ON b.job_id = o.job_id
                JOIN provider_batch_members m ON m.chunk_batch_id = b.id
                JOIN provider_batches p ON p.id = m.provider_batch_id
                WHERE o.spend_id = s.id AND p.state <> 'closed')
        INTO is_open;
        expects := is_open;
        IF s.reembedding_id IS NOT NULL THEN
            SELECT coalesce(bool_or(e.finished_at IS NULL AND e.state IN ('planned', 'filling')), false),
                   is_open OR coalesce(bool_or(e.finished_at IS NULL), false)
            INTO expects, is_open
            FROM reembeddings e
            WHERE e.id = s.reembedding_id;
        END IF;
        SELECT coalesce(sum(c.usd), 0)
        INTO total
        FROM api_key_spend_jobs o
        JOIN ({BILL}) c ON c.job_id = o.job_id
        WHERE o.spend_id = s.id;
        FOR changed IN
            SELECT w.month, w.charged, w.reserved,
                   w.charged + w.reserved - coalesce(k.charged + k.reserved, 0) AS more
            FROM (
                SELECT u.month, sum(u.charged) AS charged, sum(u.reserved) AS reserved
                FROM (
                    SELECT date_trunc('month', c.day)::date AS month, c.usd AS charged, 0::numeric AS reserved
                    FROM api_key_spend_jobs o
                    JOIN ({BILL}) c ON c.job_id = o.job_id
                    WHERE o.spend_id = s.id
                    UNION ALL
                    SELECT present, 0, CASE WHEN expects THEN greatest(s.estimated - total, 0) ELSE 0 END
                    UNION ALL
                    SELECT k.month, 0, 0 FROM api_key_spend_months k WHERE k.spend_id = s.id
                ) u
                GROUP BY u.month
            ) w
            LEFT JOIN api_key_spend_months k ON k.spend_id = s.id AND k.month = w.month
            WHERE (w.charged, w.reserved) IS DISTINCT FROM (coalesce(k.charged, 0), coalesce(k.reserved, 0))
            ORDER BY w.month
        LOOP
            INSERT INTO api_key_usage AS u (key_id, month, usd)
            VALUES (s.key_id, changed.month, changed.more)
            ON CONFLICT (key_id, month) DO UPDATE
            SET usd = u.usd + excluded.usd;
            INSERT INTO api_key_spend_months (spend_id, month, charged, reserved)
            VALUES (s.id, changed.month, changed.charged, changed.reserved)
            ON CONFLICT (spend_id, month) DO UPDATE
            SET charged = excluded.charged, reserved = excluded.reserved;
        END LOOP;
        UPDATE api_key_spends p
        SET charged = total, settled_at = CASE WHEN NOT is_open THEN coalesce(p.settled_at, now()) END
        WHERE p.id = s.id AND (p.charged, p.settled_at IS NULL) IS DISTINCT FROM (total, is_open);
        RETURN NOT is_open;
        """,
    ),
)  # fmt: skip
