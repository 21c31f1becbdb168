"""Puts a ledger in order that was restored from a backup: the workers, the bells and the provider are of another time.

A backup says what was so at one moment. Whoever held a lease then does not hold it now, the bells that were rung are
in another Redis, and what was sent to a provider since then is not in it. So leases are given back uncharged, all that
waits is rung for again, and the paid lanes with open work are stopped until a person has looked.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.domain.states import JobState, Route

STOP_CODE = "restored"
"""The ``stop_code`` of a lane that a restore has stopped."""

# The tables of later migrations may be missing, so every statement about them stands behind a look. The states are
# those of chunkmill.domain.states.
PUT_IN_ORDER = """
SELECT set_config('chunkmill.taken_at', :'taken_at', true);
DO $do$
DECLARE
    taken_at timestamptz := current_setting('chunkmill.taken_at')::timestamptz;
    reason text := format(
        'this database was restored from a backup of %s UTC. What was sent to the provider after that is not in it, '
        'and would be paid for again. docs/backup.md says what to look at',
        to_char(taken_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')
    );
    paid record;
BEGIN
    -- The workers of then are gone. Nobody died, so nothing is charged and nothing is suspected. What plain requests
    -- had in flight is booked by the next attempt, as after a crash.
    WITH held AS (
        SELECT id, attempt FROM chunk_batches WHERE state = 'running' AND lease_until IS NOT NULL
    ), closed AS (
        UPDATE usage u
        SET outcome = 'released', ended_at = now()
        FROM held
        WHERE u.chunk_batch_id = held.id AND u.attempt = held.attempt AND u.outcome IS NULL
    )
    UPDATE chunk_batches b
    SET state = 'available', max_attempts = max_attempts + 1, lease_owner = NULL, lease_until = NULL, rung_at = NULL
    FROM held
    WHERE b.id = held.id;
    UPDATE chunk_batches SET rung_at = NULL WHERE state = 'available' AND rung_at IS NOT NULL;

    -- A ProviderBatch whose inputs were chosen may have been created since. As one whose creation got no answer, it is
    -- looked for at the provider by its token before it is created. One that was about to be filled has no inputs yet.
    DELETE FROM provider_batches WHERE state = 'gathering';
    UPDATE provider_batches
    SET lease_owner = NULL, lease_until = NULL, rung_at = NULL, not_before = now(), attempt = attempt + 1
    WHERE state <> 'closed';
    UPDATE provider_batches SET state = 'creating', creating_since = created_at WHERE state IN ('gathered', 'uploaded');

    FOR paid IN
        SELECT 'openai' AS route
        WHERE EXISTS (SELECT FROM provider_batches WHERE state NOT IN ('cleaning', 'closed'))
           OR EXISTS (SELECT FROM chunk_batches WHERE route = 'openai' AND state IN ('available', 'running'))
           OR EXISTS (SELECT FROM jobs WHERE route IN ('openai', 'auto') AND state = 'enqueueing')
        UNION ALL
        SELECT 'openai-sync'
        WHERE EXISTS (SELECT FROM chunk_batches WHERE route = 'openai-sync' AND state IN ('available', 'running'))
           OR EXISTS (SELECT FROM jobs WHERE route IN ('openai-sync', 'auto') AND state = 'enqueueing')
    LOOP
        INSERT INTO provider_lanes (route, stopped_at, stop_code, stop_reason)
        VALUES (paid.route, now(), 'restored', reason)
        ON CONFLICT (route) DO UPDATE SET
            stopped_at = excluded.stopped_at, stop_code = excluded.stop_code, stop_reason = excluded.stop_reason;
    END LOOP;

    -- Numbers that were given after the backup are not given again: a program would take another job for its own, and a
    -- worker that was cut off meanwhile could end another ChunkBatch.
    PERFORM setval(given.name, nextval(given.name) + given.gap)
    FROM (VALUES
        (pg_get_serial_sequence('jobs', 'id'), 1000),
        (pg_get_serial_sequence('chunk_batches', 'id'), 1000000),
        (pg_get_serial_sequence('provider_batches', 'id'), 1000)
    ) AS given (name, gap);

    -- A backup has no segments, so a poller builds the serving indexes anew. Until then searches are exact.
    IF to_regclass('serving_indexes') IS NOT NULL THEN
        DELETE FROM serving_tail;
        DELETE FROM segments;
        DELETE FROM serving_indexes;
    END IF;
    IF to_regclass('served_batches') IS NOT NULL THEN
        UPDATE served_batches SET lease_until = NULL WHERE lease_until IS NOT NULL;
    END IF;
    -- The views of collections are not in a backup either. A poller makes those that are too many for one transaction.
    IF to_regprocedure('view_schema_name(text)') IS NOT NULL THEN
        IF to_regnamespace(quote_ident(view_schema_name(current_schema()))) IS NULL
           AND has_database_privilege(current_database(), 'CREATE') THEN
            EXECUTE format('CREATE SCHEMA %I', view_schema_name(current_schema()));
            EXECUTE format(
                'COMMENT ON SCHEMA %I IS %L', view_schema_name(current_schema()), view_schema_mark(current_schema())
            );
        END IF;
        PERFORM refresh_collection_views(500);
    END IF;
END
$do$;
"""


@dataclass(frozen=True, slots=True)
class Inventory:
    """How much an installation holds."""

    collections: int
    chunks: int
    texts: int
    open_jobs: int
    stopped_lanes: tuple[Route, ...] = ()
    """The paid lanes that a restore has stopped."""


def inventory(conn: sa.Connection) -> Inventory:
    """What is in the installation of ``conn``."""
    row = conn.execute(
        sa.text("""
            SELECT (SELECT count(*) FROM collections) AS collections,
                   (SELECT count(*) FROM chunks) AS chunks,
                   (SELECT count(*) FROM contents) AS texts,
                   (SELECT count(*) FROM jobs WHERE state IN (:enqueueing, :running)) AS open_jobs,
                   (SELECT array_agg(route ORDER BY route) FROM provider_lanes
                    WHERE stopped_at IS NOT NULL AND stop_code = :restored) AS lanes
        """),
        {"restored": STOP_CODE, "enqueueing": JobState.ENQUEUEING, "running": JobState.RUNNING},
    ).one()
    lanes = tuple(Route(route) for route in row.lanes or ())
    return Inventory(row.collections, row.chunks, row.texts, row.open_jobs, lanes)


def is_empty(conn: sa.Connection) -> bool:
    """Whether the installation holds nothing that a restore would lose: no job, text, collection, key or charge."""
    tables = conn.execute(
        sa.text("""
            SELECT quote_ident(relname)
            FROM pg_class
            WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' AND relpersistence = 'p'
              AND relname NOT IN (
                  'chunkmill_alembic_version', 'alembic_version', 'schema_compatibility', 'provider_lanes'
              )
            ORDER BY 1
        """)
    )
    for table in tables.scalars().all():
        if conn.execute(sa.text(f"SELECT EXISTS (SELECT FROM {table})")).scalar_one():
            return False
    return True
