"""Searches of collections that have several spaces: their serving indexes, their views, and what is counted of them.

Builders of two spaces of a collection work at the same time, so that each drops only what was left half built in its
own space. A poller of the last release forgets the index of every space but the active one, which is refused from now
on.

Revises: 0022
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    # No foreign keys: each count would lock its collection, which a re-embedding may be about to flip.
    op.create_table(
        "search_counts",
        sa.Column("collection_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("space_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("bucket", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("collection_id", "space_id", "since", "bucket", name=op.f("pk_search_counts")),
    )
    op.create_table(
        "search_feedback",
        sa.Column("search_number", sa.LargeBinary(), nullable=False),
        sa.Column("chunk_id", sa.Text(), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("search_number", "chunk_id", name=op.f("pk_search_feedback")),
    )
    op.create_index(
        op.f("ix_search_feedback_collection_id_created_at"), "search_feedback", ["collection_id", "created_at"]
    )
    for name, takes, returns, settings, declare, body in NEW_FUNCTIONS:
        op.execute(_create(name, takes, returns, settings, declare, body))
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")
    for name, takes, returns, settings, declare, body in CHANGED_FUNCTIONS:
        op.execute(_create(name, takes, returns, settings, declare, body))


def downgrade() -> None:
    for name, takes, returns, settings, declare, body in EARLIER_FUNCTIONS:
        op.execute(_create(name, takes, returns, settings, declare, body))
    for name, *_ in reversed(NEW_FUNCTIONS):
        op.execute(f"DROP FUNCTION {name}")
    for table in ("search_feedback", "search_counts"):
        op.drop_table(table)


def _create(name: str, takes: str, returns: str, settings: str, declare: str, body: str) -> str:
    """As in migration 0014: a function of the owner's, which sees this installation and the types of pgvector."""
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


NEW_FUNCTIONS = (
    (
        "drop_unread_segments_of_space", "collection integer, space integer, by_builder text, grace float8", "bigint", "",
        "DECLARE s record; dropped bigint := 0;",
        """
        FOR s IN
            SELECT id FROM segments g
            WHERE g.collection_id = collection AND g.space_id = space
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
        IF dropped > 0 AND NOT EXISTS (
            SELECT FROM serving_indexes i WHERE i.collection_id = collection AND i.space_id = space
        ) THEN
            -- Who wrote while the index was forgotten may have noted something for it.
            DELETE FROM serving_tail t WHERE t.collection_id = collection AND t.space_id = space;
        END IF;
        RETURN dropped;
        """,
    ),
    (
        # Shows a collection in its new space, if nobody who reads the views keeps this waiting.
        "show_moved", "collection integer", "void", "SET lock_timeout = '20ms'",
        "DECLARE home text := view_schema(); wanted text; shown regclass;",
        """
        -- LOCK TABLE would lock the tables below the view, too.
        FOR wanted IN
            SELECT k.name FROM collections k WHERE k.id = collection
            UNION ALL
            SELECT a.name FROM collection_aliases a WHERE a.collection_id = collection
        LOOP
            shown := to_regclass(format('%I.%I', home, collection_view_name(wanted)));
            IF obj_description(shown, 'pg_class') ~ format('^collection %s in space [0-9]+$', collection) THEN
                EXECUTE format('ALTER VIEW %s SET (security_barrier = true)', shown);
            END IF;
            PERFORM show_collection(wanted);
        END LOOP;
    EXCEPTION WHEN lock_not_available THEN
        RETURN;
        """,
    ),
)  # fmt: skip
_FORGET = """
        DELETE FROM serving_indexes i WHERE i.collection_id = collection AND i.space_id = space;
        DELETE FROM serving_tail t WHERE t.collection_id = collection AND t.space_id = space;
        UPDATE segments g SET state = 'retired', retired_at = now()
        WHERE g.collection_id = collection AND g.space_id = space AND g.state = 'live';
        """
CHANGED_FUNCTIONS = (
    (
        "forget_serving_index", "collection integer, space integer", "void", "",
        "",
        f"""
        -- A poller of the last release asks for it because the space is not the active one. An index that has lost a
        -- segment is forgotten, and so is that of a collection that was dropped.
        IF EXISTS (
            SELECT FROM collection_spaces o
            JOIN collections k ON k.id = o.collection_id
            WHERE o.collection_id = collection AND o.space_id = space AND k.dropped_at IS NULL
        ) AND NOT EXISTS (
            SELECT FROM segments g
            WHERE g.collection_id = collection AND g.space_id = space AND g.state = 'live'
              AND to_regclass(format('segment_%s', g.id)) IS NULL
        ) THEN
            RETURN;
        END IF;
        {_FORGET}
        """,
    ),
    (
        "show_collection", "wanted text", "boolean", "SET lock_timeout = '1s'",
        """
        DECLARE
            home text := view_schema();
            shown text := collection_view_name(wanted);
            target record;
            mark text;
            existing record;
            definition text;
            keeps boolean;
            replaced boolean := false;
            grants text[];
            granted text;
        """,
        """
        IF home IS NULL OR NOT pg_try_advisory_xact_lock_shared(x'63686D00'::bigint) THEN
            RETURN false;
        END IF;
        SELECT k.id, k.space_id INTO target
        FROM collections k
        WHERE (k.dropped_at IS NULL AND NOT k.is_hidden)
          AND (k.name = wanted
               OR k.id = (SELECT a.collection_id FROM collection_aliases a WHERE a.name = wanted));
        IF FOUND THEN
            IF to_regclass(format('vectors_%s', target.space_id)) IS NULL OR shown <> wanted AND (
                EXISTS (SELECT FROM collections k WHERE k.name = shown)
                OR EXISTS (SELECT FROM collection_aliases a WHERE a.name = shown)
            ) THEN
                RETURN false;
            END IF;
            mark := format('collection %s in space %s', target.id, target.space_id);
        END IF;
        SELECT c.oid, c.relkind, obj_description(c.oid, 'pg_class') AS mark INTO existing
        FROM pg_class c
        WHERE c.relnamespace = to_regnamespace(quote_ident(home)) AND c.relname = shown::name;
        IF existing.oid IS NOT NULL AND (
            existing.relkind <> 'v' OR coalesce(existing.mark, '') !~ '^collection [0-9]+ in space [0-9]+$'
        ) OR existing.mark IS NOT DISTINCT FROM mark THEN
            RETURN false; -- It is somebody else's, or as it should be.
        END IF;
        BEGIN
            IF mark IS NOT NULL THEN
                -- A barrier, or a function in a condition of the reader's would see the rows of other collections.
                definition := format(
                    'VIEW %I.%I WITH (security_barrier) AS '
                    'SELECT c.chunk_id, t.text, c.metadata, v.embedding, v.truncated '
                    'FROM chunks c '
                    'LEFT JOIN contents t ON t.content_hash = c.content_hash '
                    'LEFT JOIN vectors_%s v ON v.content_hash = c.content_hash '
                    'WHERE c.collection_id = %s',
                    home, shown, target.space_id, target.id);
            END IF;
            -- A view that keeps its collection keeps what was granted on it, and what others have built upon it.
            keeps := mark IS NOT NULL AND existing.oid IS NOT NULL
                     AND split_part(existing.mark, ' in ', 1) = split_part(mark, ' in ', 1);
            IF keeps THEN
                BEGIN
                    EXECUTE 'CREATE OR REPLACE ' || definition;
                    replaced := true;
                EXCEPTION WHEN invalid_table_definition THEN
                    NULL; -- Vectors of the new space are of another type.
                END;
            END IF;
            IF existing.oid IS NOT NULL AND NOT replaced THEN
                SELECT array_agg(format(
                    'GRANT %s ON %I.%I TO %s%s', a.privilege_type, home, shown,
                    CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END,
                    CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END))
                INTO grants
                FROM pg_class c, aclexplode(c.relacl) a
                WHERE c.oid = existing.oid AND keeps AND a.grantee <> c.relowner;
                EXECUTE format('DROP VIEW %I.%I', home, shown);
            END IF;
            IF mark IS NOT NULL THEN
                IF NOT replaced THEN
                    EXECUTE 'CREATE ' || definition;
                END IF;
                EXECUTE format('COMMENT ON VIEW %I.%I IS %L', home, shown, mark);
                FOREACH granted IN ARRAY coalesce(grants, '{}') LOOP
                    EXECUTE granted;
                END LOOP;
            END IF;
        EXCEPTION WHEN lock_not_available OR dependent_objects_still_exist THEN
            RETURN false;
        END;
        RETURN true;
        """,
    ),
    (
        "show_named", "", "trigger", "SET lock_timeout = '1s'",
        "DECLARE home text; shown_before regclass;",
        """
        IF TG_TABLE_NAME = 'collections' THEN
            IF TG_OP = 'UPDATE' AND NEW.name <> OLD.name AND NEW.dropped_at IS NULL
               AND pg_try_advisory_xact_lock_shared(x'63686D00'::bigint) THEN
                -- A view that keeps its collection keeps what was granted on it, too.
                home := view_schema();
                IF home IS NOT NULL THEN
                    shown_before := to_regclass(format('%I.%I', home, collection_view_name(OLD.name)));
                END IF;
                IF shown_before IS NOT NULL
                   AND to_regclass(format('%I.%I', home, collection_view_name(NEW.name))) IS NULL
                   AND obj_description(shown_before, 'pg_class')
                       = format('collection %s in space %s', NEW.id, NEW.space_id) THEN
                    BEGIN
                        EXECUTE format('ALTER VIEW %s RENAME TO %I', shown_before, collection_view_name(NEW.name));
                    EXCEPTION WHEN lock_not_available THEN
                        NULL;
                    END;
                END IF;
            END IF;
        END IF;
        IF TG_TABLE_NAME = 'collections' THEN
            IF TG_OP = 'UPDATE' AND NEW.space_id <> OLD.space_id AND NEW.name = OLD.name
               AND NEW.dropped_at IS NOT DISTINCT FROM OLD.dropped_at THEN
                -- Writers wait for this transaction. A view that somebody reads is left to a poller.
                PERFORM show_moved(NEW.id);
                RETURN NULL;
            END IF;
        END IF;
        IF TG_OP <> 'INSERT' THEN
            PERFORM show_collection(OLD.name);
        END IF;
        IF TG_OP <> 'DELETE' THEN
            PERFORM show_collection(NEW.name);
        END IF;
        IF TG_TABLE_NAME = 'collections' THEN
            IF TG_OP = 'UPDATE' AND NEW.space_id <> OLD.space_id THEN
                PERFORM show_collection(a.name) FROM collection_aliases a WHERE a.collection_id = NEW.id;
            END IF;
        END IF;
        RETURN NULL;
        """,
    ),
)  # fmt: skip
EARLIER_FUNCTIONS = (
    ("forget_serving_index", "collection integer, space integer", "void", "", "", _FORGET),
    (
        "show_collection", "wanted text", "boolean", "SET lock_timeout = '1s'",
        """
        DECLARE
            home text := view_schema();
            shown text := collection_view_name(wanted);
            target record;
            mark text;
            existing record;
        """,
        """
        IF home IS NULL OR NOT pg_try_advisory_xact_lock_shared(x'63686D00'::bigint) THEN
            RETURN false;
        END IF;
        SELECT k.id, k.space_id INTO target
        FROM collections k
        WHERE (k.dropped_at IS NULL AND NOT k.is_hidden)
          AND (k.name = wanted
               OR k.id = (SELECT a.collection_id FROM collection_aliases a WHERE a.name = wanted));
        IF FOUND THEN
            IF to_regclass(format('vectors_%s', target.space_id)) IS NULL OR shown <> wanted AND (
                EXISTS (SELECT FROM collections k WHERE k.name = shown)
                OR EXISTS (SELECT FROM collection_aliases a WHERE a.name = shown)
            ) THEN
                RETURN false;
            END IF;
            mark := format('collection %s in space %s', target.id, target.space_id);
        END IF;
        SELECT c.oid, c.relkind, obj_description(c.oid, 'pg_class') AS mark INTO existing
        FROM pg_class c
        WHERE c.relnamespace = to_regnamespace(quote_ident(home)) AND c.relname = shown::name;
        IF existing.oid IS NOT NULL AND (
            existing.relkind <> 'v' OR coalesce(existing.mark, '') !~ '^collection [0-9]+ in space [0-9]+$'
        ) OR existing.mark IS NOT DISTINCT FROM mark THEN
            RETURN false; -- It is somebody else's, or as it should be.
        END IF;
        BEGIN
            IF existing.oid IS NOT NULL THEN
                EXECUTE format('DROP VIEW %I.%I', home, shown);
            END IF;
            IF mark IS NOT NULL THEN
                -- A barrier, or a function in a condition of the reader's would see the rows of other collections.
                EXECUTE format(
                    'CREATE VIEW %I.%I WITH (security_barrier) AS '
                    'SELECT c.chunk_id, t.text, c.metadata, v.embedding, v.truncated '
                    'FROM chunks c '
                    'LEFT JOIN contents t ON t.content_hash = c.content_hash '
                    'LEFT JOIN vectors_%s v ON v.content_hash = c.content_hash '
                    'WHERE c.collection_id = %s',
                    home, shown, target.space_id, target.id);
                EXECUTE format('COMMENT ON VIEW %I.%I IS %L', home, shown, mark);
            END IF;
        EXCEPTION WHEN lock_not_available OR dependent_objects_still_exist THEN
            RETURN false;
        END;
        RETURN true;
        """,
    ),
    (
        "show_named", "", "trigger", "SET lock_timeout = '1s'",
        "DECLARE home text; shown_before regclass;",
        """
        IF TG_TABLE_NAME = 'collections' THEN
            IF TG_OP = 'UPDATE' AND NEW.name <> OLD.name AND NEW.dropped_at IS NULL
               AND pg_try_advisory_xact_lock_shared(x'63686D00'::bigint) THEN
                -- A view that keeps its collection keeps what was granted on it, too.
                home := view_schema();
                IF home IS NOT NULL THEN
                    shown_before := to_regclass(format('%I.%I', home, collection_view_name(OLD.name)));
                END IF;
                IF shown_before IS NOT NULL
                   AND to_regclass(format('%I.%I', home, collection_view_name(NEW.name))) IS NULL
                   AND obj_description(shown_before, 'pg_class')
                       = format('collection %s in space %s', NEW.id, NEW.space_id) THEN
                    BEGIN
                        EXECUTE format('ALTER VIEW %s RENAME TO %I', shown_before, collection_view_name(NEW.name));
                    EXCEPTION WHEN lock_not_available THEN
                        NULL;
                    END;
                END IF;
            END IF;
        END IF;
        IF TG_OP <> 'INSERT' THEN
            PERFORM show_collection(OLD.name);
        END IF;
        IF TG_OP <> 'DELETE' THEN
            PERFORM show_collection(NEW.name);
        END IF;
        IF TG_TABLE_NAME = 'collections' THEN
            IF TG_OP = 'UPDATE' AND NEW.space_id <> OLD.space_id THEN
                PERFORM show_collection(a.name) FROM collection_aliases a WHERE a.collection_id = NEW.id;
            END IF;
        END IF;
        RETURN NULL;
        """,
    ),
)  # fmt: skip
