-- Two Postgres roles for Chunkmill. Run this file as a superuser (or as the database's owner with CREATEROLE), in
-- Chunkmill's database, before the first `chunkmill migrate` and again after it. It is always safe to run it again:
--
--   psql "$ADMIN_URL" -v ON_ERROR_STOP=1 --single-transaction -f deploy/postgres-role.sql
--   \password chunkmill_migrator
--   \password chunkmill_runtime
--
-- If DATABASE_SCHEMA is not `chunkmill`, name it: PGOPTIONS='-c chunkmill.schema=mine' psql …
--
-- chunkmill_migrator owns the tables. Only `chunkmill migrate` uses it, by hand or in a deployment.
-- chunkmill_runtime is the role of producers, workers and pollers. It reads and writes rows and creates nothing. The only
-- table that is created at run time is the vector table of a new space, and a function of the migrator's creates it.
--
-- In a database that other programs use too, leave out the REVOKE on the database, which shuts out their roles, and
-- grant it to them by name first: docs/running.md.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_migrator') THEN
        CREATE ROLE chunkmill_migrator LOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_runtime') THEN
        CREATE ROLE chunkmill_runtime LOGIN;
    END IF;
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    -- TEMPORARY is needed because an enqueue stages its window in a temporary table.
    EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO chunkmill_runtime, chunkmill_migrator', current_database());
END
$$;

CREATE EXTENSION IF NOT EXISTS vector SCHEMA public;

REVOKE CREATE ON SCHEMA public FROM PUBLIC, chunkmill_runtime;

DO $$
DECLARE
    home text := coalesce(nullif(current_setting('chunkmill.schema', true), ''), 'chunkmill');
    -- The schema of pgvector's types.
    types text := (
        SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'
    );
    owned record;
BEGIN
    -- Tables that a release before the schema `chunkmill` created stay in `public`.
    IF home = 'chunkmill' AND to_regclass('chunkmill.chunk_batches') IS NULL AND EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = to_regclass('public.chunk_batches') AND attname = 'content_hashes'
    ) THEN
        home := 'public';
    END IF;
    IF to_regnamespace(quote_ident(home)) IS NULL THEN
        EXECUTE format('CREATE SCHEMA %I AUTHORIZATION chunkmill_migrator', home);
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA %I, %I TO chunkmill_runtime, chunkmill_migrator', home, types);
    EXECUTE format('GRANT CREATE ON SCHEMA %I TO chunkmill_migrator', home);

    -- These rights cover the existing tables and those that later migrations create.
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %I TO chunkmill_runtime', home);
    EXECUTE format('GRANT SELECT, USAGE ON ALL SEQUENCES IN SCHEMA %I TO chunkmill_runtime', home);
    EXECUTE format(
        'ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA %I '
        'GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO chunkmill_runtime', home
    );
    EXECUTE format(
        'ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA %I '
        'GRANT SELECT, USAGE ON SEQUENCES TO chunkmill_runtime', home
    );
    -- The functions of a migration take a number, and make or drop the table of that segment and nothing else.
    EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA %I TO chunkmill_runtime', home);
    EXECUTE format(
        'ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA %I '
        'GRANT EXECUTE ON FUNCTIONS TO chunkmill_runtime', home
    );

    -- If another role migrated the database, its tables become the migrator's.
    FOR owned IN
        SELECT c.oid::regclass AS name FROM pg_class c
        WHERE c.relnamespace = to_regnamespace(quote_ident(home)) AND c.relkind = 'r'
        AND c.relowner <> 'chunkmill_migrator'::regrole
        AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO chunkmill_migrator', owned.name);
    END LOOP;
    FOR owned IN
        SELECT p.oid::regprocedure AS name FROM pg_proc p
        WHERE p.pronamespace = to_regnamespace(quote_ident(home))
        AND p.proname IN ('create_segment', 'finish_segment', 'drop_segment', 'watch_collection', 'note_vectors',
                          'note_chunks', 'note_chunk_batch')
    LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO chunkmill_migrator', owned.name);
    END LOOP;
    IF to_regclass(format('%I.deletions', home)) IS NOT NULL THEN
        EXECUTE format('ALTER SEQUENCE %I.deletions OWNER TO chunkmill_migrator', home);
    END IF;
    -- Only the migrator may write the tables that say which code may run.
    FOR owned IN
        SELECT c.oid::regclass AS name FROM pg_class c
        WHERE c.relnamespace = to_regnamespace(quote_ident(home))
        AND c.relname IN ('alembic_version', 'chunkmill_alembic_version', 'schema_compatibility')
    LOOP
        EXECUTE format('REVOKE INSERT, UPDATE, DELETE ON %s FROM chunkmill_runtime', owned.name);
    END LOOP;

    -- Creates the vector table of a registered space, exactly as app/chunkmill/spaces/registry.py does if its role may
    -- create tables. The only thing it takes from its caller is the space's number.
    EXECUTE format($create$
        CREATE OR REPLACE FUNCTION %1$I.create_vector_table(space integer) RETURNS void
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = %1$I, %2$I, pg_temp
        AS $body$
        DECLARE
            wanted record;
        BEGIN
            SELECT id, storage, dimensions, CASE storage WHEN 'halfvec' THEN 2 ELSE 4 END AS width
            INTO STRICT wanted FROM spaces WHERE id = space;
            EXECUTE format(
                'CREATE TABLE vectors_%%s (content_hash bytea PRIMARY KEY, n_tokens integer NOT NULL, '
                'truncated boolean NOT NULL, embedding %%I(%%s) NOT NULL)',
                wanted.id, wanted.storage, wanted.dimensions
            );
            EXECUTE format(
                'ALTER TABLE vectors_%%s ALTER COLUMN embedding SET STORAGE %%s',
                wanted.id, CASE WHEN wanted.dimensions * wanted.width + 90 <= 4000 THEN 'PLAIN' ELSE 'EXTERNAL' END
            );
        END
        $body$
    $create$, home, types);
    EXECUTE format('ALTER FUNCTION %I.create_vector_table(integer) OWNER TO chunkmill_migrator', home);
    EXECUTE format('REVOKE ALL ON FUNCTION %I.create_vector_table(integer) FROM PUBLIC', home);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %I.create_vector_table(integer) TO chunkmill_runtime', home);
END
$$;
