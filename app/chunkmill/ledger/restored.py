"""Puts a ledger in order that was restored from a backup, because workers, Redis and the provider have gone on since.

A backup is the state of one moment. The workers that held leases then do not hold them now, the bells that were rung
are in another Redis, and what was sent to a provider since then is not in the backup. So leases are given back
uncharged, all that waits is rung for again, and the paid lanes to which a poller would bring work are stopped until a
person has looked.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.db import (
    home,
    provider_schema,  # noqa: F401 - it adds its tables to Base
)
from chunkmill.db.schema import SEQUENCES, Base
from chunkmill.domain.states import JobState, Route

STOP_CODE = "restored"
"""The ``stop_code`` of a lane that a restore has stopped."""

# The tables of later migrations may be missing, so every statement about them first checks that they exist. The states
# are those of chunkmill.domain.states.
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
    routes text[];
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

    -- The routes of all that is open. What may choose its lane may come to either paid one: a poller moves a job from
    -- a lane that is stopped to the other, and enqueues what is in the outbox, in a re-embedding or in a served batch.
    routes := ARRAY(
        SELECT 'openai' FROM provider_batches WHERE state NOT IN ('cleaning', 'closed')
        UNION
        SELECT route FROM chunk_batches WHERE state IN ('available', 'running')
        UNION
        SELECT route
        FROM jobs j
        WHERE state = 'enqueueing' OR state = 'running' AND (route <> 'auto' OR EXISTS (
            SELECT
            FROM jsonb_array_elements(j.routing) choice
            WHERE choice ->> 'route' <> 'local' OR choice ->> 'instead_of' <> 'local'
        ))
    );
    IF to_regclass('outbox_jobs') IS NOT NULL THEN
        routes := routes || ARRAY(
            SELECT request ->> 'route'
            FROM outbox_jobs
            WHERE request ->> 'route' <> 'auto' OR CAST(request ->> 'may_cost' AS boolean)
        );
    END IF;
    IF to_regclass('served_batches') IS NOT NULL THEN
        routes := routes || ARRAY(
            SELECT DISTINCT served.asked ->> 'route'
            FROM served_batches served
            WHERE served.state IN ('validating', 'in_progress')
        );
    END IF;
    -- The plan names the route into the new space. That back into the old one, which is kept after the flip, is 'auto'.
    IF to_regclass('reembeddings') IS NOT NULL THEN
        routes := routes || ARRAY(
            SELECT CASE WHEN flipped_at IS NULL THEN coalesce(plan ->> 'route', 'auto') ELSE 'auto' END
            FROM reembeddings
            WHERE finished_at IS NULL
        );
    END IF;
    INSERT INTO provider_lanes (route, stopped_at, stop_code, stop_reason)
    SELECT lane.route, now(), 'restored', reason
    FROM (VALUES ('openai'), ('openai-sync')) AS lane (route)
    WHERE lane.route = ANY(routes) OR 'auto' = ANY(routes)
    ON CONFLICT (route) DO UPDATE SET
        stopped_at = excluded.stopped_at, stop_code = excluded.stop_code, stop_reason = excluded.stop_reason;

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


def of_others(conn: sa.Connection, schema: str, there: home.Home | None) -> list[str]:
    """What a restore into ``schema`` would delete although no release up to this one has made it: tables, views,
    sequences and functions in it, and views and foreign keys of other schemas that depend on its tables.

    ``there`` is the installation of the database, if it has one.
    """
    known = sorted({*Base.metadata.tables, *SEQUENCES, home.VERSION_TABLE})
    rows = conn.execute(
        sa.text("""
            WITH place AS (
                SELECT oid, :has_installation AND nspname = :home AS is_home
                FROM pg_namespace
                WHERE nspname = :schema
            ),
            -- With the views of collections, which are in a schema of their own.
            ours AS (
                SELECT n.oid
                FROM pg_namespace n
                WHERE n.nspname = :schema OR starts_with(
                    obj_description(n.oid, 'pg_namespace'),
                    format('The collections of Chunkmill in the schema %s, ', CAST(:schema AS text))
                )
            ),
            extended AS (
                SELECT objid FROM pg_depend WHERE deptype IN ('a', 'i', 'e')
            )
            SELECT CAST(c.relname AS text)
            FROM pg_class c
            JOIN place ON place.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND c.oid NOT IN (SELECT objid FROM extended)
              AND NOT (place.is_home AND (
                  c.relname = ANY(:known) OR c.relname ~ '^(vectors|segment|keywords)_[0-9]+$'
                  OR c.relname = :old_table
                     AND (:is_old OR obj_description(c.oid, 'pg_class') IS NOT DISTINCT FROM :kept)
              ))
            UNION
            SELECT p.oid::regprocedure::text
            FROM pg_proc p
            JOIN place ON place.oid = p.pronamespace
            WHERE NOT place.is_home AND p.oid NOT IN (SELECT objid FROM extended)
            UNION
            SELECT format('%I.%I', n.nspname, v.relname)
            FROM pg_depend d
            JOIN pg_class used ON used.oid = d.refobjid
            JOIN pg_rewrite r ON r.oid = d.objid
            JOIN pg_class v ON v.oid = r.ev_class
            JOIN pg_namespace n ON n.oid = v.relnamespace
            WHERE d.refclassid = CAST('pg_class' AS regclass) AND d.classid = CAST('pg_rewrite' AS regclass)
              AND used.relnamespace IN (SELECT oid FROM ours) AND v.relnamespace NOT IN (SELECT oid FROM ours)
            UNION
            SELECT format('%s of %s', k.conname, CAST(k.conrelid AS regclass))
            FROM pg_constraint k
            JOIN pg_class used ON used.oid = k.confrelid
            WHERE used.relnamespace IN (SELECT oid FROM ours) AND k.connamespace NOT IN (SELECT oid FROM ours)
            ORDER BY 1
        """),
        {
            "schema": schema,
            "has_installation": there is not None,
            "home": there.schema if there else "",
            "known": known,
            "old_table": home.OLD_VERSION_TABLE,
            "is_old": there is not None and there.is_old,
            "kept": home.KEPT_FOR_OLD_CODE,
        },
    )
    return list(rows.scalars())
