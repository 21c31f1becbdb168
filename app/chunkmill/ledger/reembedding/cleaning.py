"""What is left to delete when a re-embedding has ended: the job that filled a space, its serving index and its vectors.

A client begins it and a poller goes on. It may be interrupted at any point and done by several processes at once,
because each step looks for what is left.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from chunkmill.domain.reembedding import ReembeddingState
from chunkmill.domain.states import JobState
from chunkmill.ledger.jobs import cancel
from chunkmill.ledger.reembedding import lives
from chunkmill.ledger.reembedding.lives import Life
from chunkmill.store import segments

SLICE = 2_000
"""How many vectors one transaction looks at. It keeps writers waiting while it runs."""


def clean_up(db: sa.Engine, reembedding_id: int, *, is_stopping: Callable[[], bool] = lambda: False) -> bool:
    """Delete what a re-embedding that has ended left behind. Returns whether all of it is gone.

    It is not if the space is still kept, if a job still writes into it, or if ``is_stopping`` says so. The vectors of a
    re-embedding that was cancelled stay, because they may be needed again; `prune` deletes them later.
    """
    with db.begin() as conn:
        life = lives.get(conn, reembedding_id)
    if life.finished_at is None or life.kept_since is not None:
        return False
    left = life.from_space_id if life.state is ReembeddingState.FINISHED else life.to_space_id
    if life.state is not ReembeddingState.FINISHED:
        _cancel_filling(db, life)
    with db.begin() as conn:
        is_left = not _is_of(conn, life.collection_id, left)
        if is_left and segments.are_kept(conn):
            segments.forget(conn, life.collection_id, left)
    if is_left and life.state is not ReembeddingState.CANCELLED and not _clear(db, life, left, is_stopping):
        return False
    with db.begin() as conn:
        lives.note_cleaned(conn, life)
    return True


def _cancel_filling(db: sa.Engine, life: Life) -> None:
    with db.begin() as conn:
        job_ids = _filling_jobs(conn, life)
    for job_id in job_ids:
        with db.begin() as conn:
            cancel.cancel_if_open(conn, job_id)
        while True:
            with db.begin() as conn:
                if not cancel.cancel_some(conn, job_id):
                    break


def _filling_jobs(conn: sa.Connection, life: Life) -> list[int]:
    query = """
        SELECT id
        FROM jobs
        WHERE idempotency_key IN (:to, :back) AND collection_id = :collection
          AND state IN (:enqueueing, :running, :cancelled)
    """
    parameters = {
        "to": f"reembed:{life.id}",
        "back": f"reembed:{life.id}:back",
        "collection": life.collection_id,
        "enqueueing": JobState.ENQUEUEING,
        "running": JobState.RUNNING,
        "cancelled": JobState.CANCELLED,
    }
    return list(conn.execute(sa.text(query), parameters).scalars())


def _is_of(conn: sa.Connection, collection_id: int, space_id: int) -> bool:
    """Whether the space is one of the collection's, active or not."""
    query = """
        SELECT EXISTS (SELECT FROM collections k WHERE k.id = :collection AND k.space_id = :space)
            OR EXISTS (SELECT FROM collection_spaces o WHERE o.collection_id = :collection AND o.space_id = :space)
    """
    return bool(conn.execute(sa.text(query), {"collection": collection_id, "space": space_id}).scalar_one())


def _clear(db: sa.Engine, life: Life, space_id: int, is_stopping: Callable[[], bool]) -> bool:
    """Delete the vectors, once no job writes any more. False if some are left."""
    is_open = """
        SELECT EXISTS (
            SELECT FROM jobs
            WHERE collection_id = :collection AND space_id = :space AND state IN (:enqueueing, :running))
    """
    states = {"enqueueing": JobState.ENQUEUEING, "running": JobState.RUNNING}
    clear = "SELECT cleared, last FROM clear_left_space(:collection, :space, :beyond, :most)"
    parameters = {"collection": life.collection_id, "space": space_id, "most": SLICE}
    with db.begin() as conn:
        if conn.execute(sa.text(is_open), {**parameters, **states}).scalar_one():
            return False
    beyond = b""
    while not is_stopping():
        with db.begin() as conn:
            row = conn.execute(sa.text(clear), {**parameters, "beyond": beyond}).one()
        if row.cleared <= 0:
            return True
        beyond = row.last
    return False
