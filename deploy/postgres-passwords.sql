-- For psql 15 or later: gives the logins of docker-compose.yml the passwords of these environment variables.
\getenv migrator POSTGRES_MIGRATOR_PASSWORD
\getenv producer POSTGRES_PRODUCER_PASSWORD
\getenv worker POSTGRES_WORKER_PASSWORD
\getenv poller POSTGRES_POLLER_PASSWORD
\getenv reader POSTGRES_READER_PASSWORD
\getenv gateway POSTGRES_GATEWAY_PASSWORD
\getenv key_maker POSTGRES_KEY_MAKER_PASSWORD
DO $$
DECLARE
    purpose text;
BEGIN
    FOREACH purpose IN ARRAY ARRAY['producer', 'worker', 'poller', 'reader', 'gateway', 'key_maker'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_' || purpose) THEN
            EXECUTE format('CREATE ROLE %I', 'chunkmill_' || purpose);
        END IF;
        EXECUTE format('ALTER ROLE %I LOGIN', 'chunkmill_' || purpose);
        -- Whatever somebody who had the password before set for this login.
        EXECUTE format('ALTER ROLE %I RESET ALL', 'chunkmill_' || purpose);
        EXECUTE format('GRANT %I TO %I', 'chunkmill_' || purpose || 's', 'chunkmill_' || purpose);
    END LOOP;
END
$$;
ALTER ROLE chunkmill_migrator PASSWORD :'migrator';
ALTER ROLE chunkmill_producer PASSWORD :'producer';
ALTER ROLE chunkmill_worker PASSWORD :'worker';
ALTER ROLE chunkmill_poller PASSWORD :'poller';
ALTER ROLE chunkmill_reader PASSWORD :'reader';
ALTER ROLE chunkmill_gateway PASSWORD :'gateway';
ALTER ROLE chunkmill_key_maker PASSWORD :'key_maker';
