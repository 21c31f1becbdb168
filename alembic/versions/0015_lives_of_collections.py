"""Collections are dropped whole, renamed, given aliases, and shown as SQL views.

A dropped collection gives its name away at once. Its row stays until nothing refers to it any more. The views are made
by triggers in the name of the owner, so that those of collections which the last release creates are made too, and
because the roles of producers create nothing.

Revises: 0014
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    # First, because this cannot be in the transaction of the rest. What an interrupted run left is made again.
    with op.get_context().autocommit_block():
        op.drop_index("ix_jobs_collection_id_id", table_name="jobs", postgresql_concurrently=True, if_exists=True)
        op.create_index("ix_jobs_collection_id_id", "jobs", ["collection_id", "id"], postgresql_concurrently=True)
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column("collections", sa.Column("dropped_at", sa.DateTime(timezone=True)))
    op.create_index("ix_collections_dropped", "collections", ["id"], postgresql_where=sa.text("dropped_at IS NOT NULL"))
    op.create_table(
        "collection_aliases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name=op.f("fk_collection_aliases_collection_id_collections")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_collection_aliases")),
    )
    for name, takes, returns, settings, declare, body in FUNCTIONS:
        op.execute(_create(name, takes, returns, settings, declare, body))
        if returns != "trigger":
            op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")
    for table in ("collections", "collection_aliases"):
        op.execute(f"""
            CREATE TRIGGER guard_name BEFORE INSERT OR UPDATE OF name ON {table}
            FOR EACH ROW EXECUTE FUNCTION guard_name()
        """)
    op.execute("""
        CREATE TRIGGER show_collection AFTER INSERT OR UPDATE OF name, space_id, dropped_at OR DELETE ON collections
        FOR EACH ROW EXECUTE FUNCTION show_named()
    """)
    op.execute("""
        CREATE TRIGGER show_collection AFTER INSERT OR UPDATE OR DELETE ON collection_aliases
        FOR EACH ROW EXECUTE FUNCTION show_named()
    """)
    # Under the roles of deploy/postgres-role.sql the migrator creates no schema, and that file does it.
    op.execute("""
        DO $$
        DECLARE
            wanted text := view_schema_name(current_schema());
        BEGIN
            IF to_regnamespace(quote_ident(wanted)) IS NULL
               AND has_database_privilege(current_database(), 'CREATE') THEN
                EXECUTE format('CREATE SCHEMA %I', wanted);
                EXECUTE format('COMMENT ON SCHEMA %I IS %L', wanted, view_schema_mark(current_schema()));
            END IF;
        END
        $$
    """)
    # The poller makes the rest, because a transaction can hold only so many locks.
    op.execute(f"SELECT refresh_collection_views({SLICE})")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute(f"DO $$ BEGIN WHILE hide_collection_views({SLICE}) > 0 LOOP COMMIT; END LOOP; END $$")
        op.drop_index("ix_jobs_collection_id_id", table_name="jobs", postgresql_concurrently=True, if_exists=True)
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.execute(f"SELECT hide_collection_views({SLICE})")
    op.execute("""
        DO $$
        BEGIN
            IF view_schema() IS NOT NULL THEN
                EXECUTE format('DROP SCHEMA %I', view_schema());
            END IF;
        EXCEPTION WHEN dependent_objects_still_exist THEN
            NULL; -- Somebody else has put something of their own into it.
        END
        $$
    """)
    for name, *_ in reversed(FUNCTIONS):
        # With the functions go their triggers.
        op.execute(f"DROP FUNCTION {name} CASCADE")
    op.drop_table("collection_aliases")
    op.drop_index("ix_collections_dropped", table_name="collections")
    op.drop_column("collections", "dropped_at")


SLICE = 500


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


# The advisory locks are those of chunkmill.db.locks, and 0x63686D00 is that of alembic/env.py.
FUNCTIONS = (
    (
        # No two installations of a database have the same name here, because none is the schema of another.
        "view_schema_name", "home text", "text", "",
        "",
        """
        IF octet_length(home) <= 51 THEN
            RETURN home || '_collections';
        END IF;
        RETURN left(home, 42) || '_' || left(encode(sha256(convert_to(home, 'UTF8')), 'hex'), 8) || '_collections';
        """,
    ),
    (
        "view_schema_mark", "home text", "text", "",
        "",
        """
        RETURN format('The collections of Chunkmill in the schema %s, each as a view. They come and go with it.', home);
        """,
    ),
    (
        # NULL if there is none, or if it is somebody else's: then no views are made.
        "view_schema", "", "text", "",
        "",
        """
        RETURN (
            SELECT n.nspname
            FROM pg_namespace n
            WHERE n.nspname = view_schema_name(current_schema())
              AND n.nspowner = (SELECT r.oid FROM pg_roles r WHERE r.rolname = current_user)
              AND obj_description(n.oid, 'pg_namespace') = view_schema_mark(current_schema())
        );
        """,
    ),
    (
        # Postgres cuts identifiers after 63 bytes, so that two long names would be one.
        "collection_view_name", "collection text", "text", "",
        "DECLARE beginning text := left(collection, 46);",
        """
        IF octet_length(collection) <= 63 THEN
            RETURN collection;
        END IF;
        WHILE octet_length(beginning) > 46 LOOP
            beginning := left(beginning, -1);
        END LOOP;
        RETURN beginning || '_' || left(encode(sha256(convert_to(collection, 'UTF8')), 'hex'), 16);
        """,
    ),
    (
        # Makes, replaces or drops the view of a name, as there is a collection or an alias of this name or not. Who
        # reads the view for longer than a second, or has built a view of their own upon it, hinders it; a poller tries
        # again. Nothing is done while a migration is running, because a view would hinder it.
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
        WHERE k.dropped_at IS NULL
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
        # Returns how many views were made, replaced or dropped, at most `most` of either kind.
        "refresh_collection_views", "most integer", "integer", "",
        "DECLARE home regnamespace; wanted text; changed integer := 0;",
        """
        IF view_schema() IS NULL THEN
            RETURN 0;
        END IF;
        home := to_regnamespace(quote_ident(view_schema()));
        FOR wanted IN
            SELECT n.name
            FROM (
                SELECT k.name, k.id, k.space_id FROM collections k WHERE k.dropped_at IS NULL
                UNION ALL
                SELECT a.name, k.id, k.space_id FROM collection_aliases a JOIN collections k ON k.id = a.collection_id
            ) n
            LEFT JOIN pg_class c ON c.relnamespace = home AND c.relname = collection_view_name(n.name)::name
            WHERE c.oid IS NULL
               OR obj_description(c.oid, 'pg_class') <> format('collection %s in space %s', n.id, n.space_id)
            LIMIT most
        LOOP
            changed := changed + show_collection(wanted)::integer;
        END LOOP;
        FOR wanted IN
            SELECT c.relname
            FROM pg_class c
            WHERE c.relnamespace = home AND c.relkind = 'v'
              AND obj_description(c.oid, 'pg_class') ~ '^collection [0-9]+ in space [0-9]+$'
              AND NOT EXISTS (
                  SELECT FROM collections k WHERE collection_view_name(k.name) = c.relname AND k.dropped_at IS NULL)
              AND NOT EXISTS (SELECT FROM collection_aliases a WHERE collection_view_name(a.name) = c.relname)
            LIMIT most
        LOOP
            changed := changed + show_collection(wanted)::integer;
        END LOOP;
        RETURN changed;
        """,
    ),
    (
        # For a migration that changes a table below the views: it calls this until it returns 0, changes the table,
        # and calls refresh_collection_views until that returns 0.
        "hide_collection_views", "most integer", "integer", "",
        "DECLARE home text := view_schema(); shown text; dropped integer := 0;",
        """
        FOR shown IN
            SELECT c.relname
            FROM pg_class c
            WHERE c.relnamespace = to_regnamespace(quote_ident(home)) AND c.relkind = 'v'
              AND obj_description(c.oid, 'pg_class') ~ '^collection [0-9]+ in space [0-9]+$'
            LIMIT most
        LOOP
            EXECUTE format('DROP VIEW %I.%I', home, shown);
            dropped := dropped + 1;
        END LOOP;
        RETURN dropped;
        """,
    ),
    (
        # A name is that of a collection or of an alias. One transaction at a time gives or takes one.
        "guard_name", "", "trigger", "",
        "",
        """
        IF TG_OP = 'UPDATE' AND NEW.name = OLD.name THEN
            RETURN NEW;
        END IF;
        PERFORM pg_advisory_xact_lock(x'63686D09'::bigint);
        IF TG_TABLE_NAME = 'collections' AND EXISTS (SELECT FROM collection_aliases a WHERE a.name = NEW.name)
           OR TG_TABLE_NAME = 'collection_aliases' AND EXISTS (SELECT FROM collections k WHERE k.name = NEW.name) THEN
            RAISE unique_violation USING MESSAGE = 'another collection or an alias has this name already';
        END IF;
        RETURN NEW;
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
    (
        # Deletes up to `most` chunks of a dropped collection, those after the id `beyond`, with the texts and vectors
        # that no other chunk needs. `cleared` is -1 while a job of the collection is open.
        "clear_dropped_collection", "collection integer, beyond text, most integer, OUT cleared integer, OUT last text",
        "record", "",
        "DECLARE hashes bytea[]; space integer;",
        """
        IF NOT EXISTS (SELECT FROM collections k WHERE k.id = collection AND k.dropped_at IS NOT NULL) THEN
            RAISE invalid_parameter_value USING MESSAGE = format('collection %s is not dropped', collection);
        END IF;
        cleared := -1;
        IF EXISTS (SELECT FROM jobs j WHERE j.collection_id = collection AND j.state IN ('enqueueing', 'running')) THEN
            RETURN;
        END IF;
        PERFORM pg_advisory_xact_lock(x'63686D03'::bigint);
        PERFORM nextval('deletions');
        PERFORM pg_advisory_xact_lock_shared(x'63686D0A'::bigint);
        WITH slice AS (
            SELECT c.chunk_id
            FROM chunks c
            WHERE c.collection_id = collection AND c.chunk_id > beyond
            ORDER BY c.chunk_id
            LIMIT most
        ),
        gone AS (
            DELETE FROM chunks c
            USING slice
            WHERE c.collection_id = collection AND c.chunk_id = slice.chunk_id
            RETURNING c.chunk_id, c.content_hash
        )
        SELECT count(*), max(chunk_id), array_agg(DISTINCT content_hash)
        INTO cleared, last, hashes
        FROM gone;
        IF cleared = 0 THEN
            RETURN;
        END IF;
        FOR space IN SELECT s.id FROM spaces s ORDER BY s.id LOOP
            EXECUTE format(
                'DELETE FROM vectors_%s v WHERE v.content_hash = ANY($1) '
                'AND NOT EXISTS (SELECT FROM chunks c WHERE c.content_hash = v.content_hash)', space)
            USING hashes;
        END LOOP;
        DELETE FROM contents t
        WHERE t.content_hash = ANY(hashes)
          AND NOT EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash);
        """,
    ),
    (
        # Gives the name of a dropped collection away. The row keeps one under which its jobs are listed.
        "free_dropped_name", "collection integer", "void", "",
        "DECLARE name_before text; free text;",
        """
        PERFORM pg_advisory_xact_lock(x'63686D09'::bigint);
        SELECT k.name INTO name_before
        FROM collections k
        WHERE k.id = collection AND k.dropped_at IS NOT NULL
          AND position(format(' (dropped %s)', k.id) IN k.name) = 0;
        IF NOT FOUND THEN
            RETURN;
        END IF;
        free := format('%s (dropped %s)', name_before, collection);
        WHILE EXISTS (SELECT FROM collections k WHERE k.name = free)
              OR EXISTS (SELECT FROM collection_aliases a WHERE a.name = free) LOOP
            free := free || '.';
        END LOOP;
        UPDATE collections k SET name = free WHERE k.id = collection;
        """,
    ),
    (
        "forget_dropped_collection", "collection integer", "boolean", "",
        "",
        """
        DELETE FROM collections k
        WHERE k.id = collection AND k.dropped_at IS NOT NULL
          AND NOT EXISTS (SELECT FROM chunks c WHERE c.collection_id = collection)
          AND NOT EXISTS (SELECT FROM jobs j WHERE j.collection_id = collection)
          AND NOT EXISTS (SELECT FROM segments g WHERE g.collection_id = collection)
          AND NOT EXISTS (SELECT FROM serving_indexes i WHERE i.collection_id = collection);
        RETURN FOUND;
        """,
    ),
    (
        # Nothing may refer to the space: no collection, no job, nothing at a provider, nobody who waits for an answer,
        # and no line of the bill, which names its model. Who is about to refer to it holds its row, and who reads all
        # vector tables holds the lock.
        "drop_unused_space", "space integer, before timestamptz, with_vectors boolean", "boolean",
        "SET lock_timeout = '1s'",
        "DECLARE vectors regclass; filled boolean := false;",
        """
        IF NOT pg_try_advisory_xact_lock(x'63686D0A'::bigint) THEN
            RETURN false;
        END IF;
        PERFORM FROM spaces s WHERE s.id = space AND s.created_at < before FOR UPDATE;
        IF NOT FOUND
           OR EXISTS (SELECT FROM collections k WHERE k.space_id = space)
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
