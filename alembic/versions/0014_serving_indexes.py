"""Serving indexes: each collection is searched through segments of its own, and through the tail of what came since.

Triggers note in the tail each content of an indexed collection that has both a chunk and a vector from now on. They are
triggers, so that what the last release writes is noted too, and they are created with the first index that needs them,
so that nobody else pays for them. The other functions build, publish and drop segments in the name of the owner, because
the roles of workers and pollers create no tables, and a poller reads no vectors.

Revises: 0013
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
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
    for name, takes, returns, declare, body in FUNCTIONS:
        op.execute(_create(name, takes, returns, declare, body))
        if returns != "trigger":
            op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


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
    for name, *_ in reversed(FUNCTIONS):
        # With the functions go their triggers.
        op.execute(f"DROP FUNCTION {name} CASCADE")
    for table in ("serving_tail", "segments", "serving_indexes"):
        op.drop_table(table)


def _create(name: str, takes: str, returns: str, declare: str, body: str) -> str:
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
                LANGUAGE plpgsql SECURITY DEFINER SET search_path = %s, pg_temp
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
        "watch_collection", "collection integer, space integer", "void",
        "DECLARE vectors regclass;",
        """
        -- Two builders of two collections may come at once.
        PERFORM FROM spaces s WHERE s.id = space FOR UPDATE;
        SELECT to_regclass(format('vectors_%s', s.id)) INTO STRICT vectors FROM spaces s WHERE s.id = space;
        IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = vectors AND t.tgname = 'note_vectors') THEN
            EXECUTE format(
                'CREATE TRIGGER note_vectors AFTER INSERT ON %s REFERENCING NEW TABLE AS written '
                'FOR EACH STATEMENT EXECUTE FUNCTION note_vectors(%s)', vectors, space);
        END IF;
        IF NOT EXISTS (
            SELECT FROM pg_trigger t
            WHERE t.tgname = 'note_chunk_batch' AND t.tgrelid = to_regclass('chunk_batches')
        ) THEN
            LOCK TABLE chunks IN SHARE ROW EXCLUSIVE MODE;
            CREATE OR REPLACE TRIGGER note_new_chunks AFTER INSERT ON chunks REFERENCING NEW TABLE AS written
                FOR EACH STATEMENT EXECUTE FUNCTION note_chunks();
            CREATE OR REPLACE TRIGGER note_changed_chunks AFTER UPDATE ON chunks
                REFERENCING OLD TABLE AS replaced NEW TABLE AS written
                FOR EACH STATEMENT EXECUTE FUNCTION note_changed_chunks();
            CREATE OR REPLACE TRIGGER note_chunk_batch AFTER UPDATE OF state ON chunk_batches
                FOR EACH ROW WHEN (NEW.state = 'completed' AND OLD.state <> 'completed')
                EXECUTE FUNCTION note_chunk_batch();
        END IF;
        INSERT INTO serving_indexes (collection_id, space_id) VALUES (collection, space) ON CONFLICT DO NOTHING;
        """,
    ),
    (
        "note_vectors", "", "trigger",
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
        "note_chunks", "", "trigger",
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
        "note_changed_chunks", "", "trigger",
        "DECLARE served record;",
        """
        -- A chunk that keeps its text and gets other metadata is in the index already.
        FOR served IN
            SELECT collection_id, space_id
            FROM serving_indexes
            WHERE collection_id IN (SELECT collection_id FROM written)
        LOOP
            EXECUTE format(
                'INSERT INTO serving_tail (collection_id, space_id, content_hash) '
                'SELECT DISTINCT %s, %s, w.content_hash '
                'FROM written w JOIN vectors_%s USING (content_hash) '
                'WHERE w.collection_id = %s AND NOT EXISTS (SELECT FROM replaced r '
                'WHERE r.collection_id = w.collection_id AND r.chunk_id = w.chunk_id '
                'AND r.content_hash = w.content_hash)',
                served.collection_id, served.space_id, served.space_id, served.collection_id);
        END LOOP;
        RETURN NULL;
        """,
    ),
    (
        "note_chunk_batch", "", "trigger",
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
        "create_segment", "collection integer, space integer, kind text, builder text", "bigint",
        "DECLARE wanted spaces; made bigint; role name;",
        """
        SELECT * INTO STRICT wanted FROM spaces s WHERE s.id = space;
        INSERT INTO segments (collection_id, space_id, kind, state, builder)
        VALUES (collection, space, kind, 'building', builder)
        RETURNING id INTO made;
        EXECUTE format('CREATE TABLE segment_%s (content_hash bytea NOT NULL, embedding halfvec(%s) NOT NULL)',
                       made, wanted.dimensions);
        EXECUTE format('ALTER TABLE segment_%s ALTER COLUMN embedding SET STORAGE %s',
                       made, CASE WHEN wanted.dimensions * 2 + 90 <= 4000 THEN 'PLAIN' ELSE 'EXTERNAL' END);
        -- The default rights on new tables are those of rows that are written one by one.
        FOR role IN
            SELECT rolname FROM pg_roles
            WHERE rolname IN ('chunkmill_producers', 'chunkmill_workers', 'chunkmill_pollers', 'chunkmill_runtime')
        LOOP
            EXECUTE format('REVOKE INSERT, UPDATE, DELETE ON segment_%s FROM %I', made, role);
            IF role = 'chunkmill_pollers' THEN
                EXECUTE format('REVOKE SELECT ON segment_%s FROM %I', made, role);
            END IF;
        END LOOP;
        RETURN made;
        """,
    ),
    (
        "fill_first_segment", "segment bigint", "bigint",
        "DECLARE s segments; filled bigint;",
        """
        SELECT * INTO STRICT s FROM segments g WHERE g.id = segment AND g.state = 'building';
        EXECUTE format(
            'INSERT INTO segment_%s (content_hash, embedding) '
            'SELECT v.content_hash, v.embedding::halfvec '
            'FROM (SELECT DISTINCT content_hash FROM chunks WHERE collection_id = %s) c '
            'JOIN vectors_%s v USING (content_hash)',
            s.id, s.collection_id, s.space_id);
        GET DIAGNOSTICS filled = ROW_COUNT;
        RETURN filled;
        """,
    ),
    (
        "fill_segment_from_tail", "segment bigint, most integer, OUT filled bigint, OUT useless bigint[]", "record",
        "DECLARE s segments;",
        """
        SELECT * INTO STRICT s FROM segments g WHERE g.id = segment AND g.state = 'building';
        EXECUTE format(
            'INSERT INTO segment_%s (content_hash, embedding) '
            'SELECT v.content_hash, v.embedding::halfvec '
            'FROM (SELECT DISTINCT t.content_hash '
            'FROM (SELECT content_hash FROM serving_tail WHERE collection_id = %s AND space_id = %s '
            'ORDER BY id LIMIT %s) t '
            'WHERE EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash AND c.collection_id = %s)) t '
            'JOIN vectors_%s v USING (content_hash)',
            s.id, s.collection_id, s.space_id, most, s.collection_id, s.space_id);
        GET DIAGNOSTICS filled = ROW_COUNT;
        -- Of the same moment: who calls this does so in REPEATABLE READ.
        EXECUTE format(
            'SELECT array_agg(t.id) '
            'FROM (SELECT id, content_hash FROM serving_tail WHERE collection_id = %s AND space_id = %s '
            'ORDER BY id LIMIT %s) t '
            'WHERE NOT EXISTS (SELECT FROM segment_%s g WHERE g.content_hash = t.content_hash)',
            s.collection_id, s.space_id, most, s.id)
        INTO useless;
        """,
    ),
    (
        "fill_segment_from_others", "segment bigint, old bigint[]", "bigint",
        "DECLARE s segments; filled bigint; rows_of_all text;",
        """
        SELECT * INTO STRICT s FROM segments g WHERE g.id = segment AND g.state = 'building';
        SELECT string_agg(format('SELECT content_hash, embedding FROM segment_%s', g.id), ' UNION ALL ')
        INTO STRICT rows_of_all
        FROM segments g
        WHERE g.id = ANY(old) AND g.collection_id = s.collection_id AND g.space_id = s.space_id;
        EXECUTE format(
            'INSERT INTO segment_%s (content_hash, embedding) '
            'SELECT DISTINCT ON (r.content_hash) r.content_hash, r.embedding '
            'FROM (%s) r '
            'WHERE EXISTS (SELECT FROM chunks c WHERE c.content_hash = r.content_hash AND c.collection_id = %s)',
            s.id, rows_of_all, s.collection_id);
        GET DIAGNOSTICS filled = ROW_COUNT;
        RETURN filled;
        """,
    ),
    (
        "finish_segment", "segment bigint", "void",
        "DECLARE s segments;",
        """
        SELECT * INTO STRICT s FROM segments g WHERE g.id = segment AND g.state = 'building';
        IF s.kind = 'hnsw' THEN
            -- With more care than by default, so that a query that is far from everything reaches what is nearest.
            EXECUTE format('CREATE INDEX ix_segment_%s ON segment_%s USING hnsw (embedding halfvec_cosine_ops) '
                           'WITH (ef_construction = 200)', s.id, s.id);
        END IF;
        EXECUTE format('ANALYZE segment_%s (content_hash)', s.id);
        """,
    ),
    (
        "publish_segment", "segment bigint, filled bigint, old bigint[], useless bigint[]", "void",
        "DECLARE s segments;",
        """
        UPDATE segments g SET state = 'live', live_since = now(), n_rows = filled
        WHERE g.id = segment AND g.state = 'building'
        RETURNING * INTO STRICT s;
        UPDATE segments g SET state = 'retired', retired_at = now()
        WHERE g.id = ANY(old) AND g.collection_id = s.collection_id AND g.space_id = s.space_id;
        IF s.builder = 'flush' THEN
            EXECUTE format(
                'DELETE FROM serving_tail t USING segment_%s g '
                'WHERE t.collection_id = %s AND t.space_id = %s AND t.content_hash = g.content_hash',
                s.id, s.collection_id, s.space_id);
            -- By their numbers: if such a content has got what it lacked, a new row says so.
            DELETE FROM serving_tail t
            WHERE t.id = ANY(useless) AND t.collection_id = s.collection_id AND t.space_id = s.space_id;
            UPDATE serving_indexes i SET is_ready = true
            WHERE i.collection_id = s.collection_id AND i.space_id = s.space_id AND NOT i.is_ready;
        END IF;
        """,
    ),
    (
        "stale_segments", "collection integer, space integer, pause float8, share float8", "bigint[]",
        "DECLARE stale bigint[] := '{}'; s record; gone bigint;",
        """
        UPDATE serving_indexes i
        SET checked_at = now(), deletions = (SELECT last_value FROM deletions)
        WHERE i.collection_id = collection AND i.space_id = space
          AND i.checked_at < now() - make_interval(secs => pause)
          AND (i.deletions <> (SELECT last_value FROM deletions)
               OR EXISTS (
                   SELECT FROM segments g
                   WHERE g.collection_id = collection AND g.space_id = space AND g.live_since > i.checked_at));
        IF NOT FOUND THEN
            RETURN stale;
        END IF;
        FOR s IN
            SELECT id, n_rows FROM segments g
            WHERE g.collection_id = collection AND g.space_id = space AND g.state = 'live'
        LOOP
            EXECUTE format(
                'SELECT count(*) FROM segment_%s g WHERE NOT EXISTS ('
                'SELECT FROM chunks c WHERE c.content_hash = g.content_hash AND c.collection_id = %s)',
                s.id, collection)
            INTO gone;
            IF gone > share * s.n_rows THEN
                stale := stale || s.id;
            END IF;
        END LOOP;
        RETURN stale;
        """,
    ),
    (
        "drop_unread_segments", "collection integer, by_builder text, grace float8", "bigint",
        "DECLARE s record; dropped bigint := 0;",
        """
        FOR s IN
            SELECT id FROM segments g
            WHERE g.collection_id = collection
              AND (g.state = 'building' AND g.builder = by_builder
                   OR g.state = 'retired' AND g.retired_at < now() - make_interval(secs => grace))
            FOR UPDATE SKIP LOCKED
        LOOP
            EXECUTE format('DROP TABLE IF EXISTS segment_%s', s.id);
            DELETE FROM segments WHERE id = s.id;
            dropped := dropped + 1;
        END LOOP;
        RETURN dropped;
        """,
    ),
    (
        "forget_serving_index", "collection integer, space integer", "void",
        "",
        """
        DELETE FROM serving_indexes i WHERE i.collection_id = collection AND i.space_id = space;
        DELETE FROM serving_tail t WHERE t.collection_id = collection AND t.space_id = space;
        UPDATE segments g SET state = 'retired', retired_at = now()
        WHERE g.collection_id = collection AND g.space_id = space AND g.state = 'live';
        """,
    ),
)  # fmt: skip
