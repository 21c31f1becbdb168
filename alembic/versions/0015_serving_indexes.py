"""Serving indexes: each collection is searched through segments of its own, and through the tail of what came since.

Triggers note in the tail each content of an indexed collection that has both a chunk and a vector from now on. They are
triggers, so that what the last release writes is noted too, and they are created with the first index that needs them,
so that nobody else pays for them. The other functions make and drop the tables of segments in the name of the owner,
because the role of workers and pollers may create no tables.

Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0010"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.create_table(
        "serving_indexes",
        sa.Column("collection_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("space_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("is_ready", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("deletions", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("collection_id", "space_id", name=op.f("pk_serving_indexes")),
    )
    op.create_table(
        "segments",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("builder", sa.Text(), nullable=False),
        sa.Column("n_rows", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("live_since", sa.DateTime(timezone=True)),
        sa.Column("retired_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint("kind IN ('flat', 'hnsw')", name=op.f("ck_segments_kind")),
        sa.CheckConstraint("state IN ('building', 'live', 'retired')", name=op.f("ck_segments_state")),
        sa.CheckConstraint("builder IN ('flush', 'merge')", name=op.f("ck_segments_builder")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segments")),
    )
    op.create_index(op.f("ix_segments_collection_id_space_id"), "segments", ["collection_id", "space_id"])
    op.create_table(
        "serving_tail",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("content_hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_serving_tail")),
    )
    op.create_index(
        op.f("ix_serving_tail_collection_id_space_id_content_hash"),
        "serving_tail",
        ["collection_id", "space_id", "content_hash"],
    )
    for name, takes, returns, security, declare, body in FUNCTIONS:
        op.execute(_create(name, takes, returns, security, declare, body))
        if security == "DEFINER":
            op.execute(f"REVOKE ALL ON FUNCTION {name}({takes}) FROM PUBLIC")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.execute("""
        DO $$
        DECLARE
            segment bigint;
        BEGIN
            FOR segment IN SELECT id FROM segments LOOP
                EXECUTE format('DROP TABLE IF EXISTS segment_%s', segment);
            END LOOP;
        END
        $$
    """)
    for name, takes, *_ in reversed(FUNCTIONS):
        # With the functions go their triggers.
        op.execute(f"DROP FUNCTION {name}({takes}) CASCADE")
    for table in ("serving_tail", "segments", "serving_indexes"):
        op.drop_table(table)


def _create(name: str, takes: str, returns: str, security: str, declare: str, body: str) -> str:
    """A function that sees the tables of this installation and the types of pgvector, whatever its caller's path is."""
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
                LANGUAGE plpgsql SECURITY {security} SET search_path = %s, pg_temp
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


FUNCTIONS = (
    (
        "create_segment", "segment bigint", "void", "DEFINER",
        "DECLARE wanted record;",
        """
        SELECT g.id, s.dimensions INTO STRICT wanted
        FROM segments g JOIN spaces s ON s.id = g.space_id
        WHERE g.id = segment AND g.state = 'building';
        EXECUTE format('CREATE TABLE segment_%s (content_hash bytea NOT NULL, embedding halfvec(%s) NOT NULL)',
                       wanted.id, wanted.dimensions);
        EXECUTE format('ALTER TABLE segment_%s ALTER COLUMN embedding SET STORAGE %s',
                       wanted.id, CASE WHEN wanted.dimensions * 2 + 90 <= 4000 THEN 'PLAIN' ELSE 'EXTERNAL' END);
        """,
    ),
    (
        "finish_segment", "segment bigint", "void", "DEFINER",
        "DECLARE wanted record;",
        """
        SELECT id, kind INTO STRICT wanted FROM segments WHERE id = segment AND state = 'building';
        IF wanted.kind = 'hnsw' THEN
            -- With more care than by default, so that a query that is far from everything still reaches what is nearest.
            EXECUTE format('CREATE INDEX ix_segment_%s ON segment_%s USING hnsw (embedding halfvec_cosine_ops) '
                           'WITH (ef_construction = 200)', wanted.id, wanted.id);
        END IF;
        EXECUTE format('ANALYZE segment_%s (content_hash)', wanted.id);
        """,
    ),
    (
        "drop_segment", "segment bigint", "void", "DEFINER",
        "DECLARE wanted record;",
        """
        SELECT id INTO STRICT wanted FROM segments WHERE id = segment AND state <> 'live';
        EXECUTE format('DROP TABLE IF EXISTS segment_%s', wanted.id);
        DELETE FROM segments WHERE id = wanted.id;
        """,
    ),
    (
        "note_vectors", "", "trigger", "INVOKER",
        "",
        """
        INSERT INTO serving_tail (collection_id, space_id, content_hash)
        SELECT DISTINCT i.collection_id, i.space_id, c.content_hash
        FROM written w
        JOIN chunks c ON c.content_hash = w.content_hash
        JOIN serving_indexes i ON i.collection_id = c.collection_id AND i.space_id = TG_ARGV[0]::integer;
        RETURN NULL;
        """,
    ),
    (
        "note_chunks", "", "trigger", "INVOKER",
        "DECLARE served record;",
        """
        FOR served IN
            SELECT collection_id, space_id
            FROM serving_indexes
            WHERE collection_id IN (SELECT collection_id FROM written)
        LOOP
            EXECUTE format(
                'INSERT INTO serving_tail (collection_id, space_id, content_hash) '
                'SELECT DISTINCT %s, %s, w.content_hash '
                'FROM written w JOIN vectors_%s v ON v.content_hash = w.content_hash '
                'WHERE w.collection_id = %s',
                served.collection_id, served.space_id, served.space_id, served.collection_id);
        END LOOP;
        RETURN NULL;
        """,
    ),
    (
        "note_chunk_batch", "", "trigger", "INVOKER",
        "DECLARE served record;",
        """
        FOR served IN
            SELECT i.collection_id, i.space_id
            FROM jobs j
            JOIN serving_indexes i ON i.collection_id = j.collection_id AND i.space_id = NEW.space_id
            WHERE j.id = NEW.job_id
        LOOP
            EXECUTE format(
                'INSERT INTO serving_tail (collection_id, space_id, content_hash) '
                'SELECT %s, %s, h.content_hash '
                'FROM unnest($1) AS h(content_hash) JOIN vectors_%s v ON v.content_hash = h.content_hash '
                'WHERE NOT EXISTS (SELECT FROM serving_tail t WHERE t.collection_id = %s AND t.space_id = %s '
                'AND t.content_hash = h.content_hash)',
                served.collection_id, served.space_id, served.space_id, served.collection_id, served.space_id)
            USING NEW.content_hashes;
        END LOOP;
        RETURN NULL;
        """,
    ),
    (
        "watch_collection", "collection integer, space integer", "void", "DEFINER",
        "DECLARE vectors regclass;",
        """
        SELECT to_regclass(format('vectors_%s', s.id)) INTO STRICT vectors FROM spaces s WHERE s.id = space;
        -- Two builders of two collections may come at once.
        PERFORM FROM spaces s WHERE s.id = space FOR UPDATE;
        IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = vectors AND t.tgname = 'note_vectors') THEN
            EXECUTE format(
                'CREATE TRIGGER note_vectors AFTER INSERT ON %s REFERENCING NEW TABLE AS written '
                'FOR EACH STATEMENT EXECUTE FUNCTION note_vectors(%s)', vectors, space);
        END IF;
        IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgname = 'note_chunk_batch'
                       AND t.tgrelid = to_regclass('chunk_batches')) THEN
            LOCK TABLE chunks IN SHARE ROW EXCLUSIVE MODE;
            CREATE OR REPLACE TRIGGER note_new_chunks AFTER INSERT ON chunks REFERENCING NEW TABLE AS written
                FOR EACH STATEMENT EXECUTE FUNCTION note_chunks();
            CREATE OR REPLACE TRIGGER note_changed_chunks AFTER UPDATE ON chunks REFERENCING NEW TABLE AS written
                FOR EACH STATEMENT EXECUTE FUNCTION note_chunks();
            CREATE OR REPLACE TRIGGER note_chunk_batch AFTER UPDATE OF state ON chunk_batches
                FOR EACH ROW WHEN (NEW.state = 'completed' AND OLD.state <> 'completed')
                EXECUTE FUNCTION note_chunk_batch();
        END IF;
        INSERT INTO serving_indexes (collection_id, space_id) VALUES (collection, space) ON CONFLICT DO NOTHING;
        """,
    ),
)  # fmt: skip
