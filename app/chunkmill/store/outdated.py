"""What replaced chunks were: their old texts and vectors, by which they are found until they have their new vectors.

Triggers of migration 0033 copy them in the commit that replaces a chunk, in collections that are set so. From the
commit that writes the new vector on, a copy is not read any more, and a poller deletes it.
"""

from __future__ import annotations

import time
from weakref import WeakSet

import psycopg
import sqlalchemy as sa

from chunkmill.db.locks import be_patient
from chunkmill.domain.filters import Filter
from chunkmill.domain.results import SearchHit
from chunkmill.errors import StoreUnavailable
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space
from chunkmill.system.numbers import NDArray, np

TRIES = 10
"""How often the creation of the triggers is tried."""
PATIENCE_S = 0.5
"""How many seconds one try waits, if that is long enough to end an autovacuum. Writers wait meanwhile."""
PAUSE_S = 0.5
"""How many seconds pass between two tries, in which writers go on."""
SLICE = 5_000
"""How many copies of a collection a poller deletes in one transaction."""

_with_outdated: WeakSet[sa.Engine] = WeakSet()
"""The databases whose schema is known to have the tables."""


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of an earlier release, on which this code runs too during an upgrade."""
    query = "SELECT to_regclass(quote_ident(current_schema()) || '.outdated_chunks') IS NOT NULL"
    return bool(conn.execute(sa.text(query)).scalar_one())


def serve(conn: sa.Connection, collection_id: int, *, wanted: bool) -> None:
    """From this commit on keep what chunks were when they are replaced, or forget it.

    Raises :class:`StoreUnavailable` on the schema of an earlier release, and if others held the table of chunks in each
    try, so that the triggers could not be created.
    """
    if not are_kept(conn):
        raise StoreUnavailable("the database has no tables for outdated chunks yet. Run: chunkmill migrate")
    for _ in range(TRIES):
        try:
            with conn.begin_nested():
                be_patient(conn, PATIENCE_S)
                call = "SELECT serve_outdated_chunks(:collection, :wanted)"
                conn.execute(sa.text(call), {"collection": collection_id, "wanted": wanted})
        except sa.exc.OperationalError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            time.sleep(PAUSE_S)
        else:
            return
    raise StoreUnavailable(
        f"the table of chunks was held in each of {TRIES} tries, by writers, a VACUUM or the building of an index, so "
        "nothing was changed. Make the call again."
    )


def is_served(conn: sa.Connection, collection_id: int) -> bool:
    """Whether searches of the collection find replaced chunks by their old vectors."""
    try:
        query = f"SELECT {condition(conn) or 'false'}"
        return bool(conn.execute(sa.text(query), {"collection": collection_id}).scalar_one())
    except sa.exc.ProgrammingError as error:
        forget_schema(conn, error)
        raise


def condition(conn: sa.Connection) -> str | None:
    """What :func:`is_served` says, as a condition in SQL on ``:collection``; None on the schema of an earlier
    release."""
    if conn.engine not in _with_outdated:
        if not are_kept(conn):
            return None
        _with_outdated.add(conn.engine)
    return "EXISTS (SELECT FROM outdated_collections o WHERE o.collection_id = :collection)"


def forget_schema(conn: sa.Connection, error: sa.exc.ProgrammingError) -> None:
    """After an error of a statement with :func:`condition`: the schema may have been downgraded since."""
    if isinstance(error.orig, psycopg.errors.UndefinedTable):
        _with_outdated.discard(conn.engine)


def count(conn: sa.Connection, space: Space, collection_id: int) -> int:
    """How many chunks are found by their old vectors now."""
    query = f"SELECT count(*) FROM {_waiting(space)}"
    n: int = conn.execute(sa.text(query), {"collection": collection_id, "space": space.id}).scalar_one()
    return n


def nearest(
    conn: sa.Connection,
    space: Space,
    *,
    query: str,
    collection_id: int,
    k: int,
    where: Filter | None,
) -> list[SearchHit]:
    """The ``k`` chunks whose old vectors are nearest to ``query``, a vector as a text of Postgres; best first.

    Only chunks without a vector are among them. Both the metadata that a chunk had with its old text and those that it
    has now must pass the filter ``where``, because a filter may say who may see a chunk. The hits have the new ones.
    """
    new, parameters = (where or Filter()).sql("o.metadata")
    old, _ = (where or Filter()).sql("o.old_metadata")
    distance = f"CAST(o.embedding AS {space.vector_type}) <=> CAST(:query AS {space.vector_type})"
    statement = f"""
        SELECT 1 - ({distance}) AS score, o.chunk_id, o.text, o.metadata, o.truncated
        FROM {_waiting(space)}
        WHERE ({new}) AND ({old})
        ORDER BY {distance}, o.chunk_id
        LIMIT :k
    """
    given = parameters | {"query": query, "collection": collection_id, "space": space.id, "k": k}
    rows = conn.execute(sa.text(statement), given)
    return [SearchHit(float(r.score), r.chunk_id, r.text, r.metadata, r.truncated, outdated=True) for r in rows]


def vector_of(conn: sa.Connection, space: Space, collection: Collection, chunk_id: str) -> NDArray[np.float32] | None:
    """The old vector of a chunk that has no new one yet, ``(d,)`` float32; None if there is none."""
    if not is_served(conn, collection.id):
        return None
    query = f"SELECT CAST(o.embedding AS real[]) FROM {_waiting(space)} WHERE o.chunk_id = :id"
    parameters = {"collection": collection.id, "space": space.id, "id": chunk_id}
    values = conn.execute(sa.text(query), parameters).scalar_one_or_none()
    return None if values is None else np.array(values, np.float32)


def tidy(conn: sa.Connection) -> int:
    """Delete copies that no search reads any more, some thousand of each collection. Returns how many were deleted."""
    if not are_kept(conn):
        return 0
    n: int = conn.execute(sa.text("SELECT tidy_outdated_chunks(:most)"), {"most": SLICE}).scalar_one()
    return n


def _waiting(space: Space) -> str:
    """The copies ``o`` of the collection's chunks that have no vector, with the metadata of then and of now."""
    return f"""(
            SELECT o.chunk_id, o.text, o.metadata AS old_metadata, c.metadata, o.truncated, o.embedding
            FROM outdated_chunks o
            JOIN chunks c ON c.collection_id = o.collection_id AND c.chunk_id = o.chunk_id
            WHERE o.collection_id = :collection AND o.space_id = :space
              AND NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = c.content_hash)
        ) o"""
