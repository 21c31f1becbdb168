"""Where Chunkmill's tables are: in a schema of their own, so that the database may hold other programs' tables.

A new installation lives in the schema that DATABASE_SCHEMA names, by default ``chunkmill``. An installation of a
release that had no such schema stays where it is, and its migration is copied into a version table of its own, because
another program that uses Alembic has an ``alembic_version`` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import sqlalchemy as sa

DEFAULT_SCHEMA = "chunkmill"
VERSION_TABLE = "chunkmill_alembic_version"
OLD_VERSION_TABLE = "alembic_version"
KEPT_FOR_OLD_CODE = (
    "Chunkmill reads chunkmill_alembic_version. It keeps this table up to date for its releases before that table, "
    "until you drop it."
)


@dataclass(frozen=True, slots=True)
class Home:
    """The schema that holds an installation, and the table in it that holds the migration."""

    schema: str
    version_table: str

    @property
    def is_old(self) -> bool:
        """Whether its migration is still in the table that other programs use too."""
        return self.version_table == OLD_VERSION_TABLE


def split_schema(url: str) -> tuple[sa.URL, str]:
    """The address without ``?schema=…``, and that schema. ``Settings`` adds it for a schema other than the default."""
    parsed = sa.make_url(url)
    named = parsed.query.get("schema", DEFAULT_SCHEMA)
    return parsed.difference_update_query(["schema"]), named if isinstance(named, str) else named[-1]


def enter(connection: psycopg.Connection[Any], schema: str) -> None:
    """Prepare a new session: its search path begins with the schema of the installation, and its notices are off.

    The schema of pgvector's types ends the path. Between them stands the server's own path. This is not a start-up
    option, because that would replace the options in the URL, and because poolers refuse it.
    """
    # Staging tables are created with IF NOT EXISTS, whose notices would fill the log.
    connection.execute(
        "SELECT set_config('client_min_messages', 'warning', false), set_config('chunkmill.schema', %(schema)s, false)",
        {"schema": schema},
    )
    home = find_home(connection)
    set_path(connection, home.schema if home else schema)
    connection.commit()


def set_path(connection: psycopg.Connection[Any], schema: str) -> None:
    """Let the session's search path begin with ``schema``."""
    connection.execute(
        """
        SELECT set_config(
            'search_path',
            concat_ws(
                ', ',
                quote_ident(%(schema)s),
                nullif(current_setting('search_path'), ''),
                (
                    SELECT quote_ident(n.nspname)
                    FROM pg_extension e
                    JOIN pg_namespace n ON n.oid = e.extnamespace
                    WHERE e.extname = 'vector'
                )
            ),
            false
        )
        """,
        {"schema": schema},
    )


def find_home(connection: psycopg.Connection[Any]) -> Home | None:
    """The installation that a session of ``enter`` works on; None if there is none yet.

    It is in the schema of the setting. If that is the default one and holds none, it is one that an earlier release put
    into a schema of the server's own path. Tables of other programs are not taken for it, whatever their names are.
    """
    row = connection.execute(
        """
        SELECT n.nspname, v.relname
        FROM unnest(
            current_setting('chunkmill.schema')::name
            || CASE WHEN current_setting('chunkmill.schema') = 'chunkmill' THEN current_schemas(false) END
        ) WITH ORDINALITY AS s(name, place)
        JOIN pg_namespace n ON n.nspname = s.name
        JOIN pg_class v ON v.relnamespace = n.oid
        WHERE v.relname = 'chunkmill_alembic_version'
           OR v.relname = 'alembic_version'
              AND EXISTS (
                  SELECT FROM pg_class b
                  JOIN pg_attribute a ON a.attrelid = b.oid
                  WHERE b.relnamespace = n.oid AND b.relname = 'chunk_batches' AND a.attname = 'content_hashes'
              )
        ORDER BY s.place, v.relname = 'chunkmill_alembic_version' DESC
        LIMIT 1
        """
    ).fetchone()
    return Home(str(row[0]), str(row[1])) if row else None


def read_revision(conn: sa.Connection, home: Home, known: Sequence[str]) -> str | None:
    """The migration of an installation; None if all of them were taken back. ``known`` are this code's."""
    table = f"{quoted(home.schema)}.{home.version_table}"
    rows = conn.execute(sa.text(f"SELECT version_num FROM {table} ORDER BY version_num")).scalars().all()
    return own_revision(rows, known)


def own_revision(rows: Sequence[str], known: Sequence[str]) -> str | None:
    """Chunkmill's migration among the rows of a version table, which an old installation may share."""
    return next((row for row in rows if row in known), rows[0] if rows else None)


def take_over(conn: sa.Connection, home: Home, known: Sequence[str]) -> Home:
    """Copy the migration of an old installation into a version table of our own. Returns where it is now.

    The old row stays, because code of the last release reads it. It is marked as ours: ``follow_old_table`` must not
    touch a table that another program makes later under this name.
    """
    revision = read_revision(conn, home, known)
    schema = quoted(home.schema)
    conn.execute(
        sa.text(
            f"""
            CREATE TABLE {schema}.{VERSION_TABLE} (
                version_num varchar(32) NOT NULL,
                CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num)
            )
            """
        )
    )
    conn.execute(sa.text(f"INSERT INTO {schema}.{VERSION_TABLE} VALUES (:revision)"), {"revision": revision})
    conn.execute(sa.text(f"COMMENT ON TABLE {schema}.{OLD_VERSION_TABLE} IS '{KEPT_FOR_OLD_CODE}'"))
    return Home(home.schema, VERSION_TABLE)


def follow_old_table(conn: sa.Connection, home: Home, revision: str) -> None:
    """Write the migration into the old version table too, if it is still kept for code of the last release."""
    is_kept = conn.execute(
        sa.text(
            """
            SELECT obj_description(c.oid, 'pg_class') = :mark
            FROM pg_class c
            JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = :schema AND c.relname = :table
            """
        ),
        {"mark": KEPT_FOR_OLD_CODE, "schema": home.schema, "table": OLD_VERSION_TABLE},
    ).scalar_one_or_none()
    if is_kept:
        update = f"UPDATE {quoted(home.schema)}.{OLD_VERSION_TABLE} SET version_num = :revision"
        conn.execute(sa.text(update), {"revision": revision})


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
