"""Spaces that nothing refers to: they are dropped with their tables, by the function ``drop_unused_space``.

That function checks and drops in one statement, as the owner of the tables. A space is kept for a collection, a job,
anything at a provider, a question that waits for its answer, and for a line of the bill, which names its model.
"""

from __future__ import annotations

import shlex
from datetime import datetime

import sqlalchemy as sa

from chunkmill.errors import InvalidInput
from chunkmill.spaces import bridges, collections, others
from chunkmill.spaces.registry import Space


def drop_all(db: sa.Engine, *, before: datetime, dry_run: bool) -> list[str]:
    """Drop the spaces that nothing refers to, that have no vector, and that were registered before a time.

    Each is dropped in a transaction of its own, which a ``dry_run`` rolls back. Returns their fingerprints.
    """
    with db.connect() as conn:
        with conn.begin():
            if not collections.have_lives(conn):
                return []
            query = "SELECT id, fingerprint FROM spaces WHERE created_at < :before ORDER BY id"
            old = conn.execute(sa.text(query), {"before": before}).all()
        dropped = []
        for row in old:
            with conn.begin() as transaction:
                if _drop(conn, row.id, before=before, with_vectors=False):
                    dropped.append(row.fingerprint)
                if dry_run:
                    transaction.rollback()
    return dropped


def drop(conn: sa.Connection, space: Space) -> None:
    """Drop a space with the vectors that it has. Raises :class:`InvalidInput` if something refers to it."""
    if not _drop(conn, space.id, before=None, with_vectors=True):
        raise InvalidInput(
            f"space {space.spec.fingerprint[:12]} ({space.spec.model!r}) is not dropped, because {_user(conn, space)}."
        )


def _drop(conn: sa.Connection, space_id: int, *, before: datetime | None, with_vectors: bool) -> bool:
    call = "SELECT drop_unused_space(:space, coalesce(CAST(:before AS timestamptz), 'infinity'), :with_vectors)"
    parameters = {"space": space_id, "before": before, "with_vectors": with_vectors}
    return bool(conn.execute(sa.text(call), parameters).scalar_one())


def _user(conn: sa.Connection, space: Space) -> str:
    """What refers to a space, as the end of a sentence that also says what to do."""
    query = "SELECT name FROM collections WHERE space_id = :space ORDER BY dropped_at DESC NULLS FIRST, name LIMIT 1"
    name = conn.execute(sa.text(query), {"space": space.id}).scalar_one_or_none()
    if name is not None:
        return f"collection {name!r} is in it. Drop the collection first; one that is dropped goes with its last job"
    name = _beside(conn, space)
    if name is not None:
        return (
            f"collection {name!r} is being re-embedded into it or out of it. Cancel or finish the re-embedding first: "
            f"chunkmill reembed show {shlex.quote(name)}"
        )
    query = "SELECT max(id) FROM jobs WHERE space_id = :space"
    job = conn.execute(sa.text(query), {"space": space.id}).scalar_one()
    if job is not None:
        return f"job {job} embedded into it. `chunkmill prune` deletes old jobs"
    if bridges.are_kept(conn) and (bridged := bridges.user_of(conn, space.id)) is not None:
        return (
            f"a bridge of collection {bridged!r} uses it. `chunkmill bridge drop {shlex.quote(bridged)} NAME` deletes "
            "it"
        )
    query = """
        SELECT EXISTS (SELECT FROM charges WHERE space_id = :space)
            OR EXISTS (SELECT FROM adjustments WHERE space_id = :space)
    """
    if conn.execute(sa.text(query), {"space": space.id}).scalar_one():
        return "the bill names its model. It stays, and without vectors it takes next to no space"
    return "somebody is using it at this moment, or a view of yours is built upon it. Try again later"


def _beside(conn: sa.Connection, space: Space) -> str | None:
    """The name of a collection that has the space beside its active one, or is on its way to it or from it."""
    if not others.are_kept(conn):
        return None
    query = """
        SELECT k.name
        FROM reembeddings e
        JOIN collections k ON k.id = e.collection_id
        WHERE e.finished_at IS NULL AND :space IN (e.from_space_id, e.to_space_id)
        UNION
        SELECT k.name
        FROM collection_spaces o
        JOIN collections k ON k.id = o.collection_id
        WHERE o.space_id = :space
        ORDER BY name
        LIMIT 1
    """
    name: str | None = conn.execute(sa.text(query), {"space": space.id}).scalar_one_or_none()
    return name
