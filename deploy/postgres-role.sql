-- Postgres roles for Chunkmill, one for each purpose. Run this file as a superuser (or as the database's owner with
-- CREATEROLE, always the same one), in Chunkmill's database, before the first `chunkmill migrate` and again after each.
-- It is always safe to run it again:
--
--   psql "$ADMIN_URL" -v ON_ERROR_STOP=1 --single-transaction -f deploy/postgres-role.sql
--   \password chunkmill_migrator
--
-- chunkmill_migrator owns the tables. Only `chunkmill migrate` uses it, by hand or in a deployment.
-- The others are groups, which nobody can log in as. Give each machine or program a login of its own in one of them:
--
--   CREATE ROLE gpu_7 LOGIN IN ROLE chunkmill_workers;
--   \password gpu_7
--
--   chunkmill_producers  enqueue, cancel, delete, prune and search; they read and write every row but vectors and charges
--   chunkmill_workers    compute and send: they read texts, and write vectors, charges and the state of work
--   chunkmill_pollers    ring, take back and finish: they read no text, no metadata and no vector
--   chunkmill_readers    search and look: they change nothing but their own questions,
--                       and what is counted of them
--   chunkmill_gateways   what producers do, in the name of callers whose keys they check: they read the digests of keys
--   chunkmill_key_makers create, list and revoke keys of the gateway, and nothing else; they read no digest
--   chunkmill_viewers    read the SQL views of the collections, and nothing else: docs/collections.md
--
-- A login is in several groups if its program does several things. Any role may change its own password and its own
-- settings, which Postgres cannot forbid. With a login for each machine that touches no other machine: `chunkmill doctor`
-- names such settings, and after a theft DROP ROLE gpu_7 ends everything that the thief can do with it.
--
-- If DATABASE_SCHEMA is not `chunkmill`, name it: PGOPTIONS='-c chunkmill.schema=mine' psql …
--
-- In a database that other programs use too, leave out the REVOKE on the database, which shuts out their roles, and the
-- one on large objects, and grant both to them by name first: docs/running.md.

DO $$
DECLARE
    wanted text;
    large record;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_migrator') THEN
        CREATE ROLE chunkmill_migrator LOGIN;
    END IF;
    FOREACH wanted IN ARRAY ARRAY[
        'chunkmill_producers', 'chunkmill_workers', 'chunkmill_pollers', 'chunkmill_readers', 'chunkmill_viewers',
        'chunkmill_gateways', 'chunkmill_key_makers'
    ]
    LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
        END IF;
    END LOOP;
    -- The one role of earlier versions keeps all that it could do.
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_runtime') THEN
        GRANT chunkmill_producers, chunkmill_workers, chunkmill_pollers TO chunkmill_runtime;
    END IF;
    GRANT chunkmill_producers TO chunkmill_gateways;
    -- Whoever is no superuser makes a role the owner of something only as a member of that role.
    IF NOT current_setting('is_superuser')::boolean AND current_user <> 'chunkmill_migrator' THEN
        EXECUTE format('GRANT chunkmill_migrator TO %I', current_user);
    END IF;
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    -- TEMPORARY is needed because an enqueue stages its window in a temporary table, and a worker its vectors.
    EXECUTE format(
        'GRANT CONNECT, TEMPORARY ON DATABASE %I TO '
        'chunkmill_migrator, chunkmill_producers, chunkmill_workers, chunkmill_pollers', current_database()
    );
    EXECUTE format(
        'GRANT CONNECT ON DATABASE %I TO chunkmill_readers, chunkmill_viewers, chunkmill_key_makers', current_database()
    );
    -- Chunkmill has no large objects, and with them any role could fill the disk. Only a superuser can forbid them.
    IF current_setting('is_superuser')::boolean THEN
        FOR large IN
            SELECT oid::regprocedure AS name FROM pg_proc
            WHERE pronamespace = 'pg_catalog'::regnamespace AND proname ~ '^(lo_|loread$|lowrite$)'
        LOOP
            EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', large.name);
        END LOOP;
    END IF;
END
$$;

CREATE EXTENSION IF NOT EXISTS vector SCHEMA public;

REVOKE CREATE ON SCHEMA public FROM PUBLIC;

DO $$
DECLARE
    home text := coalesce(nullif(current_setting('chunkmill.schema', true), ''), 'chunkmill');
    -- The schema of pgvector's types.
    types text := (
        SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'
    );
    everybody text := 'chunkmill_producers, chunkmill_workers, chunkmill_pollers, chunkmill_readers';
    writers text := 'chunkmill_producers, chunkmill_workers, chunkmill_pollers';
    owned record;
    refused record;
    shown record;
    columns_of_keys text;
    views text;
    mark text;
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
    EXECUTE format('GRANT USAGE ON SCHEMA %I, %I TO chunkmill_migrator, %s', home, types, everybody);
    EXECUTE format('GRANT CREATE ON SCHEMA %I TO chunkmill_migrator', home);

    -- These rights cover the existing tables and those that later migrations create. What is taken away below is the
    -- exception, so a table that this file does not know yet stops nobody.
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA %I TO %s', home, everybody);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %I TO %s', home, writers);
    EXECUTE format('GRANT SELECT, USAGE ON ALL SEQUENCES IN SCHEMA %I TO %s', home, everybody);
    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA %I GRANT SELECT ON TABLES TO %s', home, everybody);
    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA %I GRANT INSERT, UPDATE, DELETE ON TABLES TO %s', home, writers);
    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA %I GRANT SELECT, USAGE ON SEQUENCES TO %s', home, everybody);
    -- The functions of the migrations build serving indexes. They take numbers and a word, and no SQL.
    EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA %I TO %s', home, writers);
    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA %I GRANT EXECUTE ON FUNCTIONS TO %s', home, writers);

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
        WHERE p.pronamespace = to_regnamespace(quote_ident(home)) AND p.proowner <> 'chunkmill_migrator'::regrole
        AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO chunkmill_migrator', owned.name);
    END LOOP;
    IF to_regclass(format('%I.deletions', home)) IS NOT NULL THEN
        EXECUTE format('ALTER SEQUENCE %I.deletions OWNER TO chunkmill_migrator', home);
    END IF;
    IF to_regclass(format('%I.reopenings', home)) IS NOT NULL THEN
        EXECUTE format('ALTER SEQUENCE %I.reopenings OWNER TO chunkmill_migrator', home);
    END IF;

    -- What a role need not write. Only the migrator may write the tables that say which code may run.
    FOR refused IN
        SELECT c.oid::regclass AS name, r.rights, r.roles
        FROM (VALUES
            ('^(alembic_version|chunkmill_alembic_version|schema_compatibility)$', 'INSERT, UPDATE, DELETE', writers),
            -- Serving indexes are written by functions of the migrator's alone, and by its triggers.
            ('^(serving_indexes|serving_tail|segments|segment_[0-9]+)$', 'INSERT, UPDATE, DELETE', writers),
            ('^segment_[0-9]+$', 'SELECT', 'chunkmill_pollers'),
            -- So are keywords, which say nearly what the texts say. Golden queries are texts too.
            ('^(keyword_indexes|keywords_[0-9]+)$', 'INSERT, UPDATE, DELETE', writers),
            ('^keywords_[0-9]+$', 'SELECT', 'chunkmill_pollers'),
            -- Outdated texts are written by triggers alone.
            ('^outdated_(chunks|collections)$', 'INSERT, UPDATE, DELETE', writers),
            -- A bridge decides what searches find.
            ('^bridges$', 'INSERT, UPDATE, DELETE', 'chunkmill_workers, chunkmill_pollers'),
            ('^(golden_queries|search_tunings)$', 'INSERT, UPDATE, DELETE', 'chunkmill_workers, chunkmill_pollers'),
            -- Whoever searches counts it, and a poller puts old counts together.
            ('^search_(counts|feedback)$', 'INSERT, UPDATE, DELETE', 'chunkmill_workers'),
            ('^search_feedback$', 'INSERT, UPDATE', 'chunkmill_pollers'),
            ('^engine_minutes$', 'INSERT, UPDATE, DELETE', 'chunkmill_producers, chunkmill_workers'),
            ('^search_(counts|feedback)$', 'DELETE', 'chunkmill_producers'),
            ('^search_feedback$', 'UPDATE', 'chunkmill_producers'),
            ('^vectors_[0-9]+$', 'INSERT, UPDATE', 'chunkmill_producers'),
            ('^vectors_[0-9]+$', 'UPDATE, DELETE', 'chunkmill_workers'),
            ('^vectors_[0-9]+$', 'INSERT, UPDATE, DELETE', 'chunkmill_pollers'),
            ('^charges$', 'INSERT, UPDATE', 'chunkmill_producers'),
            -- A person corrects the bill and lets ProviderBatches go as a producer, and takes nothing back out of it.
            ('^adjustments$', 'UPDATE', 'chunkmill_producers'),
            ('^(charges|adjustments)$', 'DELETE', 'chunkmill_workers'),
            -- What a question may cost is not its caller's to take out of the budget.
            ('^provider_questions$', 'INSERT, UPDATE, DELETE', 'chunkmill_producers, chunkmill_pollers'),
            ('^(charges|adjustments)$', 'INSERT, UPDATE, DELETE', 'chunkmill_pollers'),
            ('^(contents|collections|collection_aliases)$', 'INSERT, UPDATE, DELETE', 'chunkmill_workers, chunkmill_pollers'),
            -- A poller takes the steps of a re-embedding, and a person begins one. Workers know nothing of it.
            ('^(reembeddings|collection_spaces)$', 'INSERT, UPDATE, DELETE', 'chunkmill_workers'),
            ('^reembeddings$', 'INSERT, DELETE', 'chunkmill_pollers'),
            ('^collection_spaces$', 'INSERT', 'chunkmill_pollers'),
            ('^spaces$', 'INSERT, UPDATE, DELETE', 'chunkmill_pollers'),
            ('^spaces$', 'UPDATE, DELETE', 'chunkmill_workers'), -- a worker registers the space of its own model
            ('^chunks$', 'INSERT, UPDATE', 'chunkmill_workers, chunkmill_pollers'),
            -- A poller opens the jobs that fill spaces, and no other, by a function of the migrator's.
            ('^jobs$', 'INSERT, DELETE', 'chunkmill_workers, chunkmill_pollers'),
            ('^(reembeddings|reembedding_(fills|looks)|collection_spaces)$', 'INSERT, UPDATE, DELETE', 'chunkmill_workers'),
            ('^space_canaries$', 'INSERT, UPDATE, DELETE', 'chunkmill_pollers'),
            ('^space_canaries$', 'UPDATE, DELETE', 'chunkmill_workers'),
            ('^worker_(reports|sockets)$', 'INSERT, UPDATE', 'chunkmill_producers, chunkmill_pollers'),
            -- Gateways are producers. A poller deletes files that have expired, and reads none.
            ('^served_(files|batches|batch_lines)$', 'INSERT, UPDATE', 'chunkmill_workers, chunkmill_pollers'),
            ('^served_(files|batches|batch_lines)$', 'DELETE', 'chunkmill_workers'),
            ('^served_(batches|batch_lines)$', 'DELETE', 'chunkmill_pollers'),
            ('^served_file_pieces$', 'SELECT, INSERT, UPDATE, DELETE', 'chunkmill_workers, chunkmill_pollers, chunkmill_readers'),
            ('^served_batch_lines$', 'SELECT', 'chunkmill_workers, chunkmill_pollers'),
            -- A producer enqueues inside its own transaction. What it wrote there is delivered by a producer's role too.
            ('^outbox_pages$', 'SELECT, INSERT, UPDATE, DELETE', 'chunkmill_workers, chunkmill_pollers, chunkmill_readers'),
            ('^outbox_jobs$', 'INSERT, UPDATE, DELETE', 'chunkmill_workers, chunkmill_pollers'),
            -- Keys of the gateway are for those who make them and for gateways, which get their rights below.
            ('^api_key(s|_usage|_spends|_spend_jobs|_spend_months)$', 'SELECT, INSERT, UPDATE, DELETE', everybody)
        ) AS r (tables, rights, roles)
        JOIN pg_class c ON c.relkind = 'r' AND c.relnamespace = to_regnamespace(quote_ident(home)) AND c.relname ~ r.tables
    LOOP
        EXECUTE format('REVOKE %s ON %s FROM %s', refused.rights, refused.name, refused.roles);
    END LOOP;
    -- A reader's question goes through a table, to a worker.
    IF to_regclass(format('%I.embed_requests', home)) IS NOT NULL THEN
        EXECUTE format('GRANT INSERT, DELETE ON %I.embed_requests TO chunkmill_readers', home);
    END IF;
    -- A reader's searches are counted as those of others are.
    IF to_regclass(format('%I.search_counts', home)) IS NOT NULL THEN
        EXECUTE format('GRANT INSERT, UPDATE ON %I.search_counts TO chunkmill_readers', home);
        EXECUTE format('GRANT INSERT ON %I.search_feedback TO chunkmill_readers', home);
    END IF;
    -- A gateway cannot make a key, and whoever makes keys cannot read what others are checked with.
    IF to_regclass(format('%I.api_keys', home)) IS NOT NULL THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO chunkmill_key_makers', home);
        FOR shown IN
            SELECT c.oid::regclass AS name FROM pg_class c
            WHERE c.relnamespace = to_regnamespace(quote_ident(home)) AND c.relkind = 'r'
            AND c.relname IN ('chunkmill_alembic_version', 'alembic_version', 'schema_compatibility')
        LOOP
            EXECUTE format('GRANT SELECT ON %s TO chunkmill_key_makers', shown.name);
        END LOOP;
        EXECUTE format('GRANT SELECT, UPDATE (last_used_at) ON %I.api_keys TO chunkmill_gateways', home);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE ON %I.api_key_usage TO chunkmill_gateways', home);
        EXECUTE format('GRANT SELECT ON %I.api_key_usage TO chunkmill_key_makers', home);
        EXECUTE format('GRANT INSERT, UPDATE (revoked_at) ON %I.api_keys TO chunkmill_key_makers', home);
        -- Gateways write down what a key begins. A poller settles it by functions of the migrator's, which take a number.
        IF to_regclass(format('%I.api_key_spends', home)) IS NOT NULL THEN
            EXECUTE format(
                'GRANT SELECT, INSERT, UPDATE ON %1$I.api_key_spends, %1$I.api_key_spend_jobs, '
                '%1$I.api_key_spend_months TO chunkmill_gateways', home
            );
            EXECUTE format(
                'GRANT SELECT ON %1$I.api_key_spends, %1$I.api_key_spend_months TO chunkmill_key_makers', home
            );
        END IF;
        SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) INTO columns_of_keys
        FROM pg_attribute a
        WHERE a.attrelid = to_regclass(format('%I.api_keys', home)) AND a.attnum > 0 AND NOT a.attisdropped
        AND a.attname <> 'sha256';
        EXECUTE format('GRANT SELECT (%s) ON %I.api_keys TO chunkmill_key_makers', columns_of_keys, home);
    END IF;
    -- Pollers may read every column but these.
    FOR shown IN
        SELECT c.oid::regclass AS name, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) AS columns
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relkind = 'r' AND c.relnamespace = to_regnamespace(quote_ident(home))
        AND c.relname ~ '^(contents|chunks|outdated_chunks|embed_requests|golden_queries|worker_sockets|bridges|vectors_[0-9]+)$'
        AND a.attname NOT IN ('text', 'metadata', 'texts', 'vectors', 'embedding', 'token', 'arrays')
        GROUP BY c.oid
    LOOP
        EXECUTE format('REVOKE SELECT ON %s FROM chunkmill_pollers', shown.name);
        EXECUTE format('GRANT SELECT (%s) ON %s TO chunkmill_pollers', shown.columns, shown.name);
    END LOOP;

    -- Whether old texts are served is for producers to say.
    IF to_regprocedure(format('%I.serve_outdated_chunks(integer, boolean)', home)) IS NOT NULL THEN
        EXECUTE format(
            'REVOKE EXECUTE ON FUNCTION %I.serve_outdated_chunks(integer, boolean) '
            'FROM chunkmill_workers, chunkmill_pollers', home
        );
    END IF;

    -- The views of the collections are in a schema of their own, which the functions of the migrator fill.
    IF to_regprocedure(format('%I.view_schema_name(text)', home)) IS NOT NULL THEN
        -- Only a migration hides the views, and only `chunkmill prune` drops spaces.
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %I.hide_collection_views(integer) FROM %s', home, writers);
        EXECUTE format(
            'REVOKE EXECUTE ON FUNCTION %I.drop_unused_space(integer, timestamptz, boolean) '
            'FROM chunkmill_workers, chunkmill_pollers', home
        );
        EXECUTE format('SELECT %1$I.view_schema_name(%1$L), %1$I.view_schema_mark(%1$L)', home) INTO views, mark;
        IF to_regnamespace(quote_ident(views)) IS NULL THEN
            EXECUTE format('CREATE SCHEMA %I AUTHORIZATION chunkmill_migrator', views);
            EXECUTE format('COMMENT ON SCHEMA %I IS %L', views, mark);
        END IF;
        IF obj_description(to_regnamespace(quote_ident(views)), 'pg_namespace') = mark THEN
            EXECUTE format('ALTER SCHEMA %I OWNER TO chunkmill_migrator', views);
            FOR owned IN
                SELECT c.oid::regclass AS name FROM pg_class c
                WHERE c.relnamespace = to_regnamespace(quote_ident(views)) AND c.relkind = 'v'
                AND c.relowner <> 'chunkmill_migrator'::regrole
            LOOP
                EXECUTE format('ALTER VIEW %s OWNER TO chunkmill_migrator', owned.name);
            END LOOP;
            EXECUTE format('GRANT USAGE ON SCHEMA %I TO chunkmill_viewers, chunkmill_readers', views);
            EXECUTE format('GRANT USAGE ON SCHEMA %I TO chunkmill_viewers', types);
            EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA %I TO chunkmill_viewers, chunkmill_readers', views);
            EXECUTE format(
                'ALTER DEFAULT PRIVILEGES FOR ROLE chunkmill_migrator IN SCHEMA %I '
                'GRANT SELECT ON TABLES TO chunkmill_viewers, chunkmill_readers', views
            );
            -- A poller makes the rest, if there are more.
            EXECUTE format('SELECT %I.refresh_collection_views(500)', home);
        END IF;
    END IF;

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
            -- The same rights as above.
            EXECUTE format('REVOKE INSERT, UPDATE ON vectors_%%s FROM chunkmill_producers', wanted.id);
            EXECUTE format('REVOKE UPDATE, DELETE ON vectors_%%s FROM chunkmill_workers', wanted.id);
            EXECUTE format('REVOKE ALL ON vectors_%%s FROM chunkmill_pollers', wanted.id);
            EXECUTE format('GRANT SELECT (content_hash, n_tokens, truncated) ON vectors_%%s TO chunkmill_pollers', wanted.id);
        END
        $body$
    $create$, home, types);
    EXECUTE format('ALTER FUNCTION %I.create_vector_table(integer) OWNER TO chunkmill_migrator', home);
    -- Pollers have got it with all the functions, if this file ran before.
    EXECUTE format('REVOKE ALL ON FUNCTION %I.create_vector_table(integer) FROM PUBLIC, chunkmill_pollers', home);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %I.create_vector_table(integer) TO chunkmill_producers, chunkmill_workers', home);
END
$$;
