"""Serving indexes: each collection is searched through segments of its own, and through the tail of what came since.

Triggers note in the tail each content of an indexed collection that has both a chunk and a vector from now on. They are
triggers, so that what the last release writes is noted too, and they are created with the first index that needs them,
so that nobody else pays for them. The other functions build, publish and drop segments in the name of the owner, because
the roles of workers and pollers create no tables, and a poller reads no vectors.

Revises: 0013
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

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
        sa.Column("flushed_to", sa.BigInteger(), server_default="0", nullable=False),
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
        _execute(_create(name, takes, returns, declare, body))
        if returns != "trigger":
            op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    # Or a builder would add a segment that stays behind, whose name the next upgrade gives to another one.
    op.execute("LOCK TABLE segments IN ACCESS EXCLUSIVE MODE")
    _execute("""
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


def _execute(statement: str) -> None:
    """As ``op.execute``, which doubles each percent sign when it writes SQL for psql."""
    if context.is_offline_mode():
        op.get_context().impl.static_output(f"{statement.strip()};")
    else:
        op.execute(statement)


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
        "watch_chunks", "", "void",
        "",
        """
        IF EXISTS (
            SELECT FROM pg_trigger t WHERE t.tgname = 'note_changed_chunks' AND t.tgrelid = to_regclass('chunks')
        ) THEN
            RETURN;
        END IF;
        LOCK TABLE chunks IN SHARE ROW EXCLUSIVE MODE;
        CREATE OR REPLACE TRIGGER note_new_chunks AFTER INSERT ON chunks REFERENCING NEW TABLE AS written
            FOR EACH STATEMENT EXECUTE FUNCTION note_chunks();
        CREATE OR REPLACE TRIGGER note_changed_chunks AFTER UPDATE ON chunks REFERENCING NEW TABLE AS written
            FOR EACH STATEMENT EXECUTE FUNCTION note_chunks();
        """,
    ),
    (
        "watch_chunk_batches", "", "void",
        "",
        """
        IF EXISTS (
            SELECT FROM pg_trigger t
            WHERE t.tgname = 'note_chunk_batch' AND t.tgrelid = to_regclass('chunk_batches')
        ) THEN
            RETURN;
        END IF;
        CREATE OR REPLACE TRIGGER note_chunk_batch AFTER UPDATE OF state ON chunk_batches
            FOR EACH ROW WHEN (OLD.state IN ('available', 'running') AND NEW.state NOT IN ('available', 'running'))
            EXECUTE FUNCTION note_chunk_batch();
        """,
    ),
    (
        "watch_vectors", "space integer", "void",
        "DECLARE vectors regclass;",
        """
        SELECT to_regclass(format('vectors_%s', s.id)) INTO STRICT vectors FROM spaces s WHERE s.id = space;
        IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = vectors AND t.tgname = 'note_vectors') THEN
            EXECUTE format(
                'CREATE OR REPLACE TRIGGER note_vectors AFTER INSERT ON %s REFERENCING NEW TABLE AS written '
                'FOR EACH STATEMENT EXECUTE FUNCTION note_vectors(%s)', vectors, space);
        END IF;
        """,
    ),
    (
        "watch_collection", "collection integer, space integer", "void",
        "",
        """
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
              -- The collection may have moved to another space, and the space that nothing refers to may be gone.
              AND to_regclass(format('vectors_%s', space_id)) IS NOT NULL
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
        "note_chunk_batch", "", "trigger",
        "DECLARE served record;",
        """
        FOR served IN
            SELECT i.collection_id, i.space_id, i.flushed_to
            FROM jobs j
            JOIN serving_indexes i ON i.collection_id = j.collection_id AND i.space_id = NEW.space_id
            WHERE j.id = NEW.job_id
        LOOP
            EXECUTE format(
                'INSERT INTO serving_tail (collection_id, space_id, content_hash) '
                'SELECT %s, %s, h.content_hash '
                'FROM unnest($1) AS h(content_hash) JOIN vectors_%s v ON v.content_hash = h.content_hash '
                'WHERE NOT EXISTS (SELECT FROM serving_tail t WHERE t.collection_id = %s AND t.space_id = %s '
                'AND t.content_hash = h.content_hash AND t.id > %s)',
                served.collection_id, served.space_id, served.space_id, served.collection_id, served.space_id,
                served.flushed_to)
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
        IF builder = 'flush' THEN
            -- What the tail has by now may leave it. Who notes a content from now on does not rely on an older row.
            UPDATE serving_indexes i
            SET flushed_to = (
                SELECT coalesce(max(t.id), 0) FROM serving_tail t
                WHERE t.collection_id = collection AND t.space_id = space)
            WHERE i.collection_id = collection AND i.space_id = space;
        END IF;
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
        "half_of", "space integer", "text",
        "",
        """
        -- Cosine asks for the direction alone. Half precision has no number beyond 65,504, and few digits for small ones.
        RETURN (SELECT CASE s.storage WHEN 'halfvec' THEN 'v.embedding' ELSE 'l2_normalize(v.embedding)::halfvec' END
                FROM spaces s WHERE s.id = space);
        """,
    ),
    (
        "fill_first_segment", "segment bigint", "bigint",
        "DECLARE s segments; filled bigint;",
        """
        SELECT * INTO STRICT s FROM segments g WHERE g.id = segment AND g.state = 'building';
        EXECUTE format(
            'INSERT INTO segment_%s (content_hash, embedding) '
            'SELECT v.content_hash, %s '
            'FROM (SELECT DISTINCT content_hash FROM chunks WHERE collection_id = %s) c '
            'JOIN vectors_%s v USING (content_hash)',
            s.id, half_of(s.space_id), s.collection_id, s.space_id);
        GET DIAGNOSTICS filled = ROW_COUNT;
        RETURN filled;
        """,
    ),
    (
        "fill_segment_from_tail", "segment bigint, most integer, OUT filled bigint, OUT useless bigint[]", "record",
        "DECLARE s segments; noted bigint;",
        """
        SELECT * INTO STRICT s FROM segments g WHERE g.id = segment AND g.state = 'building';
        noted := coalesce((
            SELECT i.flushed_to FROM serving_indexes i
            WHERE i.collection_id = s.collection_id AND i.space_id = s.space_id), 0);
        EXECUTE format(
            'INSERT INTO segment_%s (content_hash, embedding) '
            'SELECT v.content_hash, %s '
            'FROM (SELECT DISTINCT t.content_hash '
            'FROM (SELECT content_hash FROM serving_tail WHERE collection_id = %s AND space_id = %s AND id <= %s '
            'ORDER BY id LIMIT %s) t '
            'WHERE EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash AND c.collection_id = %s)) t '
            'JOIN vectors_%s v USING (content_hash)',
            s.id, half_of(s.space_id), s.collection_id, s.space_id, noted, most, s.collection_id, s.space_id);
        GET DIAGNOSTICS filled = ROW_COUNT;
        -- Of the same moment: who calls this does so in REPEATABLE READ.
        EXECUTE format(
            'SELECT array_agg(t.id) '
            'FROM (SELECT id, content_hash FROM serving_tail WHERE collection_id = %s AND space_id = %s AND id <= %s '
            'ORDER BY id LIMIT %s) t '
            'WHERE NOT EXISTS (SELECT FROM segment_%s g WHERE g.content_hash = t.content_hash)',
            s.collection_id, s.space_id, noted, most, s.id)
        INTO useless;
        """,
    ),
    (
        "fill_segment_from_others", "segment bigint, old bigint[]", "bigint",
        "DECLARE s segments; filled bigint; rows_of_all text;",
        """
        SELECT * INTO STRICT s FROM segments g WHERE g.id = segment AND g.state = 'building';
        SELECT string_agg(format('SELECT content_hash FROM segment_%s', g.id), ' UNION ')
        INTO STRICT rows_of_all
        FROM segments g
        WHERE g.id = ANY(old) AND g.collection_id = s.collection_id AND g.space_id = s.space_id;
        EXECUTE format(
            -- The vectors themselves, because one that was evicted may have come back as another one.
            'INSERT INTO segment_%s (content_hash, embedding) '
            'SELECT v.content_hash, %s '
            'FROM (%s) r JOIN vectors_%s v USING (content_hash) '
            'WHERE EXISTS (SELECT FROM chunks c WHERE c.content_hash = v.content_hash AND c.collection_id = %s)',
            s.id, half_of(s.space_id), rows_of_all, s.space_id, s.collection_id);
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
        -- Who forgets the index waits for this, or was first: then nobody would ever replace or drop the segment.
        PERFORM FROM segments g
        JOIN serving_indexes i ON i.collection_id = g.collection_id AND i.space_id = g.space_id
        WHERE g.id = segment
        FOR NO KEY UPDATE OF i;
        UPDATE segments g
        SET state = CASE WHEN FOUND THEN 'live' ELSE 'retired' END,
            live_since = CASE WHEN FOUND THEN now() END,
            retired_at = CASE WHEN FOUND THEN NULL ELSE now() END,
            n_rows = filled
        WHERE g.id = segment AND g.state = 'building'
        RETURNING * INTO STRICT s;
        UPDATE segments g SET state = 'retired', retired_at = now()
        WHERE g.id = ANY(old) AND g.collection_id = s.collection_id AND g.space_id = s.space_id AND g.state = 'live';
        IF s.builder = 'flush' AND s.state = 'live' THEN
            EXECUTE format(
                'DELETE FROM serving_tail t USING segment_%s g '
                'WHERE t.collection_id = %s AND t.space_id = %s AND t.content_hash = g.content_hash AND t.id <= ('
                'SELECT i.flushed_to FROM serving_indexes i WHERE i.collection_id = %s AND i.space_id = %s)',
                s.id, s.collection_id, s.space_id, s.collection_id, s.space_id);
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
        "DECLARE stale bigint[] := '{}'; s record; gone bigint; seen bigint := (SELECT last_value FROM deletions);",
        """
        PERFORM FROM serving_indexes i
        WHERE i.collection_id = collection AND i.space_id = space
          AND i.checked_at < now() - make_interval(secs => pause)
          AND (i.deletions <> seen
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
        -- At the end, so that a flush waits for no count; and if one is stale, not before it was written anew.
        UPDATE serving_indexes i SET checked_at = now(), deletions = seen
        WHERE i.collection_id = collection AND i.space_id = space AND stale = '{}';
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
            BEGIN
                EXECUTE format('LOCK TABLE segment_%s IN ACCESS EXCLUSIVE MODE NOWAIT', s.id);
            EXCEPTION
                WHEN lock_not_available THEN CONTINUE; -- a long search or a backup reads it
                WHEN undefined_table THEN NULL;
            END;
            EXECUTE format('DROP TABLE IF EXISTS segment_%s', s.id);
            DELETE FROM segments WHERE id = s.id;
            dropped := dropped + 1;
        END LOOP;
        IF dropped > 0 AND NOT EXISTS (SELECT FROM serving_indexes i WHERE i.collection_id = collection) THEN
            -- Who wrote while the index was forgotten may have noted something for it.
            DELETE FROM serving_tail t WHERE t.collection_id = collection;
        END IF;
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
