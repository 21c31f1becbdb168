"""Keyword search: the lexemes of a collection's texts, its golden queries, and how its searches are mixed.

A collection with keywords has a table ``keywords_<id>``. Triggers fill it in the commit that writes a chunk, so that
what the last release writes is there too, and they are created with the first such table, so that nobody else pays for
them. The functions run in the name of the owner, because the roles of producers and pollers create no tables, and a
poller reads no texts.

Revises: 0015
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.create_table(
        "keyword_indexes",
        sa.Column("collection_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("language", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("filled_to", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('begun', 'filling', 'ready')", name=op.f("ck_keyword_indexes_state")),
        sa.PrimaryKeyConstraint("collection_id", name=op.f("pk_keyword_indexes")),
    )
    # A new foreign key takes a lock on the table that it refers to, for which writers of collections would queue.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "golden_queries",
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("query_id", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("relevant", JSONB(), nullable=False),
        sa.Column("is_title", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"],
            ["collections.id"],
            name=op.f("fk_golden_queries_collection_id_collections"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("collection_id", "query_id", name=op.f("pk_golden_queries")),
    )
    op.create_table(
        "search_tunings",
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("alpha", sa.Double()),
        sa.Column("report", JSONB(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("alpha BETWEEN 0 AND 1", name=op.f("ck_search_tunings_alpha")),
        sa.ForeignKeyConstraint(
            ["collection_id"],
            ["collections.id"],
            name=op.f("fk_search_tunings_collection_id_collections"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("collection_id", "space_id", name=op.f("pk_search_tunings")),
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
            collection integer;
        BEGIN
            FOR collection IN SELECT collection_id FROM keyword_indexes LOOP
                EXECUTE format('DROP TABLE IF EXISTS keywords_%s', collection);
            END LOOP;
        END
        $$
    """)
    for name, *_ in reversed(FUNCTIONS):
        # With the functions go their triggers.
        op.execute(f"DROP FUNCTION {name} CASCADE")
    for table in ("search_tunings", "golden_queries", "keyword_indexes"):
        op.drop_table(table)


def _create(name: str, takes: str, returns: str, declare: str, body: str) -> str:
    """A function of the owner's. It sees the tables of this installation, whatever its caller's search path is."""
    return f"""
        DO $do$
        BEGIN
            EXECUTE format($create$
                CREATE OR REPLACE FUNCTION {name}({takes}) RETURNS {returns}
                LANGUAGE plpgsql SECURITY DEFINER SET search_path = %I, pg_temp
                AS $body$
                {declare}
                BEGIN
                {body.replace("%", "%%")}
                END
                $body$
            $create$, current_schema());
        END
        $do$
    """


# The rows of keyword_indexes are read FOR KEY SHARE by whoever writes into a table of keywords, so that nobody drops it
# meanwhile. 65,536 characters of a text are indexed: a tsvector takes at most 1 MB, and a larger one is an error, which
# would refuse the chunk.
FUNCTIONS = (
    (
        "keep_keywords_of_chunks", "", "trigger",
        "DECLARE kept record;",
        """
        FOR kept IN
            SELECT k.collection_id, k.language
            FROM keyword_indexes k
            WHERE k.collection_id IN (SELECT w.collection_id FROM written w)
            FOR KEY SHARE
        LOOP
            -- OFFSET 0 makes the planner probe the keys row by row, as it does in merge_chunks.
            EXECUTE format(
                'INSERT INTO keywords_%s (content_hash, terms) '
                'SELECT w.content_hash, to_tsvector(%L::regconfig, left(t.text, 65536)) '
                'FROM (SELECT DISTINCT content_hash FROM written WHERE collection_id = %s) w '
                'CROSS JOIN LATERAL '
                '(SELECT x.text FROM contents x WHERE x.content_hash = w.content_hash OFFSET 0) t '
                'WHERE NOT EXISTS (SELECT FROM keywords_%s k WHERE k.content_hash = w.content_hash OFFSET 0) '
                'ORDER BY w.content_hash ON CONFLICT DO NOTHING',
                kept.collection_id, kept.language, kept.collection_id, kept.collection_id);
        END LOOP;
        RETURN NULL;
        """,
    ),
    (
        "keep_keywords_of_contents", "", "trigger",
        "DECLARE kept record;",
        """
        -- A text changes only if it was damaged and comes again whole.
        FOR kept IN SELECT k.collection_id, k.language FROM keyword_indexes k FOR KEY SHARE LOOP
            EXECUTE format(
                'UPDATE keywords_%s k SET terms = to_tsvector(%L::regconfig, left(w.text, 65536)) '
                'FROM written w WHERE k.content_hash = w.content_hash',
                kept.collection_id, kept.language);
        END LOOP;
        RETURN NULL;
        """,
    ),
    (
        "drop_keywords_of_contents", "", "trigger",
        "DECLARE kept record;",
        """
        FOR kept IN SELECT k.collection_id FROM keyword_indexes k FOR KEY SHARE LOOP
            EXECUTE format(
                'DELETE FROM keywords_%s k USING gone g WHERE k.content_hash = g.content_hash', kept.collection_id);
        END LOOP;
        RETURN NULL;
        """,
    ),
    (
        "create_keywords", "collection integer, wanted text", "text",
        "DECLARE configuration text; role name;",
        """
        SELECT format('%I.%I', n.nspname, c.cfgname)
        INTO STRICT configuration
        FROM pg_ts_config c
        JOIN pg_namespace n ON n.oid = c.cfgnamespace
        WHERE c.oid = wanted::regconfig;
        PERFORM FROM collections k WHERE k.id = collection FOR KEY SHARE;
        IF NOT FOUND THEN
            RAISE no_data_found;
        END IF;
        INSERT INTO keyword_indexes (collection_id, language, state)
        VALUES (collection, configuration, 'begun')
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            RETURN (SELECT k.language FROM keyword_indexes k WHERE k.collection_id = collection);
        END IF;
        -- Rows of a usual chunk stay in one place: reading them from beside the table takes several times as long.
        EXECUTE format(
            'CREATE TABLE keywords_%s (content_hash bytea PRIMARY KEY, terms tsvector NOT NULL) '
            'WITH (toast_tuple_target = 8160)', collection);
        EXECUTE format('ALTER TABLE keywords_%s ALTER COLUMN content_hash SET STORAGE PLAIN, '
                       'ALTER COLUMN terms SET STORAGE EXTERNAL', collection);
        EXECUTE format('CREATE INDEX ix_keywords_%s ON keywords_%s USING gin (terms)', collection, collection);
        -- The default rights on new tables are those of rows that are written one by one.
        FOR role IN
            SELECT rolname FROM pg_roles
            WHERE rolname IN ('chunkmill_producers', 'chunkmill_workers', 'chunkmill_pollers', 'chunkmill_runtime')
        LOOP
            EXECUTE format('REVOKE INSERT, UPDATE, DELETE ON keywords_%s FROM %I', collection, role);
            IF role = 'chunkmill_pollers' THEN
                EXECUTE format('REVOKE SELECT ON keywords_%s FROM %I', collection, role);
            END IF;
        END LOOP;
        IF NOT EXISTS (
            SELECT FROM pg_trigger t
            WHERE t.tgname = 'drop_keywords_of_contents' AND t.tgrelid = to_regclass('contents')
        ) THEN
            LOCK TABLE chunks, contents IN SHARE ROW EXCLUSIVE MODE;
            CREATE OR REPLACE TRIGGER keep_keywords_of_new_chunks AFTER INSERT ON chunks
                REFERENCING NEW TABLE AS written
                FOR EACH STATEMENT EXECUTE FUNCTION keep_keywords_of_chunks();
            CREATE OR REPLACE TRIGGER keep_keywords_of_changed_chunks AFTER UPDATE ON chunks
                REFERENCING NEW TABLE AS written
                FOR EACH STATEMENT EXECUTE FUNCTION keep_keywords_of_chunks();
            CREATE OR REPLACE TRIGGER keep_keywords_of_contents AFTER UPDATE ON contents
                REFERENCING NEW TABLE AS written
                FOR EACH STATEMENT EXECUTE FUNCTION keep_keywords_of_contents();
            CREATE OR REPLACE TRIGGER drop_keywords_of_contents AFTER DELETE ON contents
                REFERENCING OLD TABLE AS gone
                FOR EACH STATEMENT EXECUTE FUNCTION drop_keywords_of_contents();
        END IF;
        RETURN configuration;
        """,
    ),
    (
        "begin_filling_keywords", "collection integer", "boolean",
        "",
        """
        -- Everyone who writes chunks holds the shared side of this lock (DELETE_LOCK) until the end of the transaction.
        -- So whoever has not seen the new table has committed, and everybody else fills it.
        PERFORM pg_advisory_xact_lock(x'63686D03'::bigint);
        UPDATE keyword_indexes k SET state = 'filling' WHERE k.collection_id = collection AND k.state = 'begun';
        RETURN FOUND;
        """,
    ),
    (
        "fill_keywords", "collection integer, most integer", "bigint",
        "DECLARE kept keyword_indexes; last text; n_chunks bigint;",
        """
        -- The next window of chunks by their ids. Returns how many it has; 0 if there is none, or if somebody else is
        -- at it.
        SELECT * INTO kept
        FROM keyword_indexes k
        WHERE k.collection_id = collection AND k.state = 'filling'
        FOR NO KEY UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN 0;
        END IF;
        -- No content is deleted between the look at it and the commit of its keywords.
        PERFORM pg_advisory_xact_lock_shared(x'63686D03'::bigint);
        EXECUTE format(
            'WITH next AS MATERIALIZED ('
            'SELECT chunk_id, content_hash FROM chunks '
            'WHERE collection_id = %s AND chunk_id > $1 ORDER BY chunk_id LIMIT $2), '
            'stored AS ('
            'INSERT INTO keywords_%s (content_hash, terms) '
            'SELECT w.content_hash, to_tsvector(%L::regconfig, left(t.text, 65536)) '
            'FROM (SELECT DISTINCT content_hash FROM next) w '
            'CROSS JOIN LATERAL '
            '(SELECT x.text FROM contents x WHERE x.content_hash = w.content_hash OFFSET 0) t '
            'WHERE NOT EXISTS (SELECT FROM keywords_%s k WHERE k.content_hash = w.content_hash OFFSET 0) '
            'ORDER BY w.content_hash ON CONFLICT DO NOTHING) '
            'SELECT max(chunk_id), count(*) FROM next',
            collection, collection, kept.language, collection)
        INTO last, n_chunks
        USING coalesce(kept.filled_to, ''), most;
        IF n_chunks < most THEN
            -- The commonest lexemes are known from now on; autovacuum keeps that up to date.
            EXECUTE format('ANALYZE keywords_%s', collection);
        END IF;
        UPDATE keyword_indexes k
        SET filled_to = coalesce(last, k.filled_to), state = CASE WHEN n_chunks < most THEN 'ready' ELSE k.state END
        WHERE k.collection_id = collection;
        RETURN n_chunks;
        """,
    ),
    (
        "drop_keywords", "collection integer", "boolean",
        "DECLARE dropped boolean;",
        """
        -- This waits for all who write into the table, and whoever comes later does not see it.
        DELETE FROM keyword_indexes k WHERE k.collection_id = collection;
        dropped := FOUND;
        EXECUTE format('DROP TABLE IF EXISTS keywords_%s', collection);
        DELETE FROM search_tunings t WHERE t.collection_id = collection;
        RETURN dropped;
        """,
    ),
    (
        "forget_dropped_keywords", "collection integer", "void",
        "",
        """
        IF NOT EXISTS (SELECT FROM collections k WHERE k.id = collection AND k.dropped_at IS NOT NULL) THEN
            RAISE invalid_parameter_value USING MESSAGE = format('collection %s is not dropped', collection);
        END IF;
        PERFORM drop_keywords(collection);
        DELETE FROM golden_queries g WHERE g.collection_id = collection;
        """,
    ),
)  # fmt: skip
