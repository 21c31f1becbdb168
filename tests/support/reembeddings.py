"""Re-embeddings as rows, for tests of what other code does while one is under way."""

from __future__ import annotations

from dataclasses import replace

import sqlalchemy as sa

from chunkmill.domain.reembedding import ReembeddingState
from chunkmill.domain.spaces import LongText
from chunkmill.spaces import collections, others, registry
from chunkmill.spaces.registry import Space
from tests.support import several_spaces


def second_space(db: sa.Engine, collection: str, **changes: object) -> Space:
    """A space that differs from that of a collection; without ``changes``, in how it represents long texts."""
    with db.begin() as conn:
        space = registry.get(conn, collections.find(conn, collection).space_id)
        return registry.register(conn, replace(space.spec, **(changes or {"long_text": LongText.SPLIT})))  # type: ignore[arg-type]


def begin(db: sa.Engine, collection: str, to: Space, **plan: object) -> int:
    """Begin to re-embed a collection into ``to``. Returns the id."""
    with db.begin() as conn:
        state = ReembeddingState.FILLING
        return several_spaces.begin(conn, collection, to, state=state, on_long=to.spec.long_text.policy, plan=plan)


def swap(db: sa.Engine, collection: str) -> None:
    """Let the active space and the one beside it change places, as a flip or a rollback does, without any proof."""
    with db.begin() as conn:
        swap_in(conn, collections.find(conn, collection).id)


def swap_in(conn: sa.Connection, collection_id: int) -> None:
    lives = others.lock_for_change(conn, collection_id)
    (other,) = lives.others.values()
    active = registry.get(conn, lives.active or 0)
    update = "UPDATE collections SET space_id = :new WHERE id = :id"
    conn.execute(sa.text(update), {"new": other.id, "id": collection_id})
    beside = """
        UPDATE collection_spaces
        SET space_id = :old, role = 'previous', on_long = :on_long
        WHERE collection_id = :id AND space_id = :new
    """
    parameters = {"old": active.id, "new": other.id, "id": collection_id, "on_long": active.spec.long_text.policy}
    conn.execute(sa.text(beside), parameters)
    flipped = "UPDATE reembeddings SET state = 'flipped', flipped_at = coalesce(flipped_at, now()) WHERE id = :id"
    conn.execute(sa.text(flipped), {"id": other.reembedding_id})


def end(db: sa.Engine, collection: str) -> None:
    """Let the collection have its active space alone again."""
    with db.begin() as conn:
        collection_id = collections.find(conn, collection).id
        others.lock_for_change(conn, collection_id)
        conn.execute(sa.text("DELETE FROM collection_spaces WHERE collection_id = :id"), {"id": collection_id})
        update = """
            UPDATE reembeddings SET state = 'finished', finished_at = now()
            WHERE collection_id = :id AND finished_at IS NULL
        """
        conn.execute(sa.text(update), {"id": collection_id})
