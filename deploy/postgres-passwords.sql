-- For psql 15 or later: gives the two roles of postgres-role.sql the passwords of these environment variables.
\getenv migrator POSTGRES_MIGRATOR_PASSWORD
\getenv runtime POSTGRES_RUNTIME_PASSWORD
ALTER ROLE chunkmill_migrator PASSWORD :'migrator';
ALTER ROLE chunkmill_runtime PASSWORD :'runtime';
