"""How far the filling of a collection's other spaces is, and what of it only the owner of the tables may do.

Code of the last release does not know the tables. It writes into the active space alone, and the next pass finds what
that left out.

Revises: 0021
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "reembedding_fills",
        sa.Column("reembedding_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("space_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("job_id", sa.BigInteger()),
        sa.Column("after", sa.LargeBinary()),
        sa.Column("began_at", sa.DateTime(timezone=True)),
        sa.Column("added", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("passes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("passed_at", sa.DateTime(timezone=True)),
        sa.Column("seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("is_there", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.ForeignKeyConstraint(
            ["reembedding_id"], ["reembeddings.id"], ondelete="CASCADE",
            name=op.f("fk_reembedding_fills_reembedding_id_reembeddings"),
        ),
        sa.PrimaryKeyConstraint("reembedding_id", "space_id", name=op.f("pk_reembedding_fills")),
    )  # fmt: skip
    # A re-embedding that has ended is history, and must not keep its spaces.
    op.drop_constraint("fk_reembeddings_from_space_id_spaces", "reembeddings", type_="foreignkey")
    op.drop_constraint("fk_reembeddings_to_space_id_spaces", "reembeddings", type_="foreignkey")
    for name, takes, returns, settings, declare, body in FUNCTIONS:
        op.execute(_create(name, takes, returns, settings, declare, body))
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for name, _, _, settings, declare, body in FUNCTIONS:
        if name != "drop_unused_space":
            op.execute(f"DROP FUNCTION {name}")
            continue
        for condition in LIVES:
            body = body.replace(condition, "")
        op.execute(
            _create(name, "space integer, before timestamptz, with_vectors boolean", "boolean", settings, declare, body)
        )
    op.execute("""
        DELETE FROM reembeddings e
        WHERE NOT EXISTS (SELECT FROM spaces s WHERE s.id = e.from_space_id)
           OR NOT EXISTS (SELECT FROM spaces s WHERE s.id = e.to_space_id)
    """)
    for column in ("from_space_id", "to_space_id"):
        op.create_foreign_key(f"fk_reembeddings_{column}_spaces", "reembeddings", "spaces", [column], ["id"])
    op.drop_table("reembedding_fills")


def _create(name: str, takes: str, returns: str, settings: str, declare: str, body: str) -> str:
    """A function of the owner's. It sees the tables of this installation and the types of pgvector, whatever its
    caller's search path is."""
    return f"""
        DO $do$
        DECLARE
            places text;
        BEGIN
            SELECT string_agg(quote_ident(name), ', ' ORDER BY name <> current_schema())
            INTO places
            FROM (
                SELECT current_schema() AS name
                UNION
                SELECT n.nspname
                FROM pg_extension e
                JOIN pg_namespace n ON n.oid = e.extnamespace
                WHERE e.extname = 'vector'
            ) names;
            EXECUTE format($create$
                CREATE OR REPLACE FUNCTION {name}({takes}) RETURNS {returns}
                LANGUAGE plpgsql SECURITY DEFINER SET search_path = %s, pg_temp {settings}
                AS $body$
                {declare}
                BEGIN
                {body.replace("%", "%%")}
                END
                $body$
            $create$, places);
        END
        $do$
    """


LIVES = (
    "OR EXISTS (SELECT FROM collection_spaces o WHERE o.space_id = space)",
    "OR EXISTS (SELECT FROM reembeddings e WHERE e.finished_at IS NULL AND space IN (e.from_space_id, e.to_space_id))",
)
FUNCTIONS = (
    (
        # How many bytes texts have. Pollers fill spaces, and may not read a text.
        "content_bytes", "hashes bytea[]", "TABLE (content_hash bytea, bytes integer)", "",
        "#variable_conflict use_column",
        """
        RETURN QUERY
        SELECT t.content_hash, octet_length(t.text)
        FROM contents t
        WHERE t.content_hash = ANY(hashes);
        """,
    ),
    (
        # Opens the job that fills a space of a collection from its stored texts. Pollers may open no other job.
        "open_fill_job",
        (
            "reembedding bigint, space integer, wanted_route text, wanted_priority smallint, wanted_on_long text, "
            "wanted_key text, steps jsonb"
        ),
        "bigint", "",
        "DECLARE target integer; opened bigint;",
        """
        SELECT e.collection_id INTO target
        FROM reembeddings e
        JOIN collections k ON k.id = e.collection_id
        WHERE e.id = reembedding AND e.finished_at IS NULL AND space IN (e.from_space_id, e.to_space_id)
          AND k.dropped_at IS NULL;
        IF NOT FOUND THEN
            RAISE invalid_parameter_value
            USING MESSAGE = format('re-embedding %s is not open, or does not concern space %s', reembedding, space);
        END IF;
        INSERT INTO jobs (
            collection_id, space_id, state, route, priority, on_long, idempotency_key, routing, sealed_at
        )
        VALUES (
            target, space, 'running', wanted_route, wanted_priority, wanted_on_long, wanted_key, steps, now()
        )
        ON CONFLICT (idempotency_key) DO NOTHING
        RETURNING id INTO opened;
        RETURN opened;
        """,
    ),
    (
        # As migration 0015 made it, and it also asks for the other spaces of collections.
        "drop_unused_space", "space integer, before timestamptz, with_vectors boolean", "boolean",
        "SET lock_timeout = '1s'",
        "DECLARE vectors regclass; filled boolean := false;",
        f"""
        IF NOT pg_try_advisory_xact_lock(x'63686D0A'::bigint) THEN
            RETURN false;
        END IF;
        PERFORM FROM spaces s WHERE s.id = space AND s.created_at < before FOR UPDATE;
        IF NOT FOUND
           OR EXISTS (SELECT FROM collections k WHERE k.space_id = space)
           {LIVES[0]}
           {LIVES[1]}
           OR EXISTS (SELECT FROM jobs j WHERE j.space_id = space)
           OR EXISTS (SELECT FROM provider_batches p WHERE p.space_id = space)
           OR EXISTS (SELECT FROM provider_inputs i WHERE i.space_id = space)
           OR EXISTS (SELECT FROM embed_requests r WHERE r.space_id = space)
           OR EXISTS (SELECT FROM segments g WHERE g.space_id = space)
           OR EXISTS (SELECT FROM serving_indexes i WHERE i.space_id = space)
           OR EXISTS (SELECT FROM charges h WHERE h.space_id = space)
           OR EXISTS (SELECT FROM adjustments a WHERE a.space_id = space) THEN
            RETURN false;
        END IF;
        vectors := to_regclass(format('vectors_%s', space));
        IF vectors IS NOT NULL THEN
            EXECUTE format('SELECT EXISTS (SELECT FROM %s)', vectors) INTO filled;
            IF filled AND NOT with_vectors THEN
                RETURN false;
            END IF;
            EXECUTE format('DROP TABLE %s', vectors);
        END IF;
        DELETE FROM space_canaries c WHERE c.space_id = space;
        DELETE FROM answering_models m WHERE m.space_id = space;
        DELETE FROM provider_suspects p WHERE p.space_id = space;
        DELETE FROM spaces s WHERE s.id = space;
        RETURN true;
    EXCEPTION WHEN lock_not_available OR dependent_objects_still_exist OR foreign_key_violation THEN
        RETURN false;
        """,
    ),
)  # fmt: skip
