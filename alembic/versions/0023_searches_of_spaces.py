"""Searches of collections that have several spaces: their serving indexes, their views, and what is counted of them.

Builders of two spaces of a collection work at the same time, so that each drops only what was left half built in its
own space. A poller of the last release forgets the index of every space but the active one, which is refused from now
on.

Revises: 0022
"""

from __future__ import annotations

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    for name, takes, returns, declare, body in NEW_FUNCTIONS:
        op.execute(_create(name, takes, returns, declare, body))
        op.execute(f"REVOKE ALL ON FUNCTION {name}({_types(takes)}) FROM PUBLIC")
    for name, takes, returns, declare, body in CHANGED_FUNCTIONS:
        op.execute(_create(name, takes, returns, declare, body))


def downgrade() -> None:
    for name, takes, returns, declare, body in EARLIER_FUNCTIONS:
        op.execute(_create(name, takes, returns, declare, body))
    for name, takes, *_ in reversed(NEW_FUNCTIONS):
        op.execute(f"DROP FUNCTION {name}({_types(takes)})")


def _types(takes: str) -> str:
    """The types of the arguments alone, which tell functions of one name apart."""
    return ", ".join(argument.split()[-1] for argument in takes.split(",") if argument)


def _create(name: str, takes: str, returns: str, declare: str, body: str) -> str:
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
                LANGUAGE plpgsql SECURITY DEFINER SET search_path = %s, pg_temp
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
        "drop_unread_segments", "collection integer, space integer, by_builder text, grace float8", "bigint",
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
)  # fmt: skip
_FORGET = """
        DELETE FROM serving_indexes i WHERE i.collection_id = collection AND i.space_id = space;
        DELETE FROM serving_tail t WHERE t.collection_id = collection AND t.space_id = space;
        UPDATE segments g SET state = 'retired', retired_at = now()
        WHERE g.collection_id = collection AND g.space_id = space AND g.state = 'live';
        """
CHANGED_FUNCTIONS = (
    (
        "forget_serving_index", "collection integer, space integer", "void",
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
)  # fmt: skip
EARLIER_FUNCTIONS = (("forget_serving_index", "collection integer, space integer", "void", "", _FORGET),)
