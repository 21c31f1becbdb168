-- Two Postgres roles for Chunkmill. Run this file as a superuser (or as the database's owner with CREATEROLE), in
-- Chunkmill's database, before the first `chunkmill migrate` and again after it. It is always safe to run it again:
--
--   psql "$ADMIN_URL" -v ON_ERROR_STOP=1 --single-transaction -f deploy/postgres-role.sql
--   \password chunkmill_migrator
--   \password chunkmill_runtime
--
-- chunkmill_migrator owns the tables. Only `chunkmill migrate` and `chunkmill index` use it, by hand or in a deployment.
-- chunkmill_runtime is the role of producers, workers and pollers. It reads and writes rows and creates nothing. The only
-- table that is created at run time is the vector table of a new space, and a function of the migrator's creates it.

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
GRANT USAGE ON SCHEMA public TO chunkmill_runtime;
GRANT USAGE, CREATE ON SCHEMA public TO chunkmill_migrator;

-- These rights cover the existing tables and those that later migrations create.
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO chunkmill_runtime;
GRANT SELECT, USAGE ON ALL SEQUENCES IN SCHEMA public TO chunkmill_runtime;
ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO chunkmill_runtime;
ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA public
    GRANT SELECT, USAGE ON SEQUENCES TO chunkmill_runtime;

DO $$
DECLARE
    owned record;
BEGIN
    -- If another role migrated the database, its tables become the migrator's.
    FOR owned IN
        SELECT c.oid::regclass AS name FROM pg_class c
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'
        AND c.relowner <> 'chunkmill_migrator'::regrole
        AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO chunkmill_migrator', owned.name);
    END LOOP;
    IF to_regclass('public.deletions') IS NOT NULL THEN
        ALTER SEQUENCE public.deletions OWNER TO chunkmill_migrator;
    END IF;
    -- Only the migrator may write the tables that say which code may run.
    IF to_regclass('public.alembic_version') IS NOT NULL THEN
        REVOKE INSERT, UPDATE, DELETE ON public.alembic_version FROM chunkmill_runtime;
    END IF;
    IF to_regclass('public.schema_compatibility') IS NOT NULL THEN
        REVOKE INSERT, UPDATE, DELETE ON public.schema_compatibility FROM chunkmill_runtime;
    END IF;
END
$$;

-- Creates the vector table of a registered space, exactly as app/chunkmill/spaces/registry.py does if its role may
-- create tables. The only thing it takes from its caller is the space's number.
CREATE OR REPLACE FUNCTION public.create_vector_table(space integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    wanted record;
BEGIN
    SELECT id, storage, dimensions, CASE storage WHEN 'halfvec' THEN 2 ELSE 4 END AS width
    INTO STRICT wanted FROM spaces WHERE id = space;
    EXECUTE format(
        'CREATE TABLE vectors_%s (content_hash bytea PRIMARY KEY, n_tokens integer NOT NULL, '
        'truncated boolean NOT NULL, embedding %I(%s) STORAGE %s NOT NULL)',
        wanted.id, wanted.storage, wanted.dimensions,
        CASE WHEN wanted.dimensions * wanted.width + 90 <= 4000 THEN 'PLAIN' ELSE 'EXTERNAL' END
    );
END
$$;
ALTER FUNCTION public.create_vector_table(integer) OWNER TO chunkmill_migrator;
REVOKE ALL ON FUNCTION public.create_vector_table(integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.create_vector_table(integer) TO chunkmill_runtime;
