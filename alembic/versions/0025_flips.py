"""A collection flips to its new space and back, and what is left of a space that it has left is deleted.

These are functions of the owner's, because a poller changes no collection and deletes no vector.

Revises: 0024
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column("reembeddings", sa.Column("paused_at", sa.DateTime(timezone=True)))
    op.add_column("reembeddings", sa.Column("cleaned_at", sa.DateTime(timezone=True)))
    for name, takes, returns, settings, declare, body in FUNCTIONS:
        op.execute(_create(name, takes, returns, settings, declare, body))
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for name, *_ in reversed(FUNCTIONS):
        op.execute(f"DROP FUNCTION {name}")
    op.drop_column("reembeddings", "cleaned_at")
    op.drop_column("reembeddings", "paused_at")


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


# The advisory lock is DELETE_LOCK of chunkmill.db.locks.
FUNCTIONS = (
    (
        # Makes the other space of an open re-embedding the active one: the new one, or the old one if `back`. The space
        # that was active becomes the previous one. Returns false if the re-embedding is in none of the states, or the
        # collection is not where it should be. Who calls it has proved, in this transaction, that nothing gets lost.
        "swap_spaces", "reembedding bigint, back boolean, from_states text[], to_state text, kept_on_long text",
        "boolean", "",
        "DECLARE r reembeddings; active integer; other integer;",
        """
        SELECT * INTO r FROM reembeddings e WHERE e.id = reembedding AND e.state = ANY(from_states) FOR UPDATE;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        active := CASE WHEN back THEN r.to_space_id ELSE r.from_space_id END;
        other := CASE WHEN back THEN r.from_space_id ELSE r.to_space_id END;
        DELETE FROM collection_spaces o
        WHERE o.collection_id = r.collection_id AND o.space_id = other AND o.reembedding_id = r.id
          AND o.role = CASE WHEN back THEN 'previous' ELSE 'filling' END;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        UPDATE collections k SET space_id = other
        WHERE k.id = r.collection_id AND k.space_id = active AND k.dropped_at IS NULL;
        IF NOT FOUND THEN
            RAISE serialization_failure USING MESSAGE = 'the collection was moved or dropped meanwhile';
        END IF;
        INSERT INTO collection_spaces (collection_id, space_id, role, on_long, share, reembedding_id)
        VALUES (r.collection_id, active, 'previous', kept_on_long, 0, r.id);
        UPDATE reembeddings e
        SET state = to_state, state_since = now(), problem = NULL, paused_at = NULL,
            flipped_at = CASE WHEN back THEN e.flipped_at ELSE now() END,
            finished_at = CASE WHEN back THEN now() END
        WHERE e.id = r.id;
        RETURN true;
        """,
    ),
    (
        # Deletes a slice of the vectors that a collection had in a space that it has left: those after `beyond`, in the
        # order of their hashes. `cleared` is how many were looked at, 0 at the end, and -1 if the collection is in the
        # space again. If no collection is in the space any more, all of its vectors go at once, and so does the space,
        # unless a job or the bill names it.
        "clear_left_space",
        "collection integer, space integer, beyond bytea, most integer, OUT cleared integer, OUT last bytea",
        "record", "SET lock_timeout = '1s'",
        "DECLARE hashes bytea[];",
        """
        PERFORM pg_advisory_xact_lock(x'63686D03'::bigint);
        cleared := 0;
        IF to_regclass(format('vectors_%s', space)) IS NULL THEN
            RETURN;
        END IF;
        IF EXISTS (SELECT FROM collections k WHERE k.id = collection AND k.space_id = space)
           OR EXISTS (SELECT FROM collection_spaces o WHERE o.collection_id = collection AND o.space_id = space) THEN
            cleared := -1;
            RETURN;
        END IF;
        PERFORM nextval('deletions');
        IF NOT EXISTS (SELECT FROM collections k WHERE k.space_id = space)
           AND NOT EXISTS (SELECT FROM collection_spaces o WHERE o.space_id = space)
           AND NOT EXISTS (SELECT FROM jobs j WHERE j.space_id = space AND j.state IN ('enqueueing', 'running')) THEN
            EXECUTE format('TRUNCATE vectors_%s', space);
            PERFORM drop_unused_space(space, 'infinity', true);
            RETURN;
        END IF;
        EXECUTE format('SELECT array_agg(v.content_hash), max(v.content_hash) FROM ('
                       'SELECT content_hash FROM vectors_%s WHERE content_hash > $1 ORDER BY content_hash LIMIT $2) v',
                       space)
        INTO hashes, last USING beyond, most;
        cleared := coalesce(cardinality(hashes), 0);
        EXECUTE format(
            'DELETE FROM vectors_%s v WHERE v.content_hash = ANY($1) '
            'AND EXISTS (SELECT FROM chunks c WHERE c.content_hash = v.content_hash AND c.collection_id = $2) '
            'AND NOT EXISTS (SELECT FROM chunks c JOIN collections k ON k.id = c.collection_id '
            'WHERE c.content_hash = v.content_hash AND ('
            'k.space_id = $3 '
            'OR EXISTS (SELECT FROM collection_spaces o WHERE o.collection_id = k.id AND o.space_id = $3) '
            'OR EXISTS (SELECT FROM jobs j WHERE j.collection_id = k.id AND j.space_id = $3 '
            'AND j.state IN (''enqueueing'', ''running''))))', space)
        USING hashes, collection, space;
        """,
    ),
)  # fmt: skip
