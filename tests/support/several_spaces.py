"""Collections with two spaces, and vectors that depend on the text and on the space, in the place of workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.chunks import content_hash
from chunkmill.domain.reembedding import ReembeddingState, SpaceRole
from chunkmill.domain.spaces import OnLong, long_text_for
from chunkmill.ledger import embed_requests
from chunkmill.spaces import collections, others, registry
from chunkmill.spaces.registry import Space
from chunkmill.store.write import write_vectors
from tests.support.gateways import StandInWorker


def vector_of(space: Space, text: str) -> NDArray[np.float32]:
    """The vector of a text in a space, ``(d,)`` float32. No two spaces agree about what is near."""
    seed = int.from_bytes(hashlib.sha256(f"{space.spec.fingerprint} {text}".encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(space.spec.dimensions).astype(np.float32)


def write(conn: sa.Connection, space: Space, texts: Iterable[str]) -> None:
    """Give texts their vectors in a space."""
    texts = list(texts)
    write_vectors(
        conn,
        space,
        space.spec.fingerprint,
        [content_hash(text) for text in texts],
        np.full(len(texts), 3, np.int32),
        np.zeros(len(texts), np.bool_),
        np.stack([vector_of(space, text) for text in texts]),
    )


def other_space(conn: sa.Connection, space: Space, *, storage: str | None = None) -> Space:
    """A space of the same model, in which long texts are split. ``storage`` is the type of its column, if another."""
    spec = replace(space.spec, long_text=long_text_for(OnLong.SPLIT))
    return registry.register(conn, spec, storage=storage or space.storage)


def begin(
    conn: sa.Connection,
    name: str,
    to: Space,
    *,
    state: ReembeddingState = ReembeddingState.RAMPING,
    share: int = 0,
    on_long: OnLong = OnLong.TRUNCATE,
    plan: Mapping[str, object] | None = None,
) -> int:
    """Let a collection have ``to`` as a second space. Returns the id of the re-embedding."""
    row = collections.find(conn, name)
    others.lock_for_change(conn, row.id)
    insert = """
        INSERT INTO reembeddings (collection_id, from_space_id, to_space_id, state, plan)
        VALUES (:collection, :active, :space, :state, CAST(:plan AS jsonb))
        RETURNING id
    """
    parameters = {
        "collection": row.id,
        "active": row.space_id,
        "space": to.id,
        "state": state,
        "share": share,
        "on_long": on_long,
        "plan": json.dumps(plan or {}),
    }
    number: int = conn.execute(sa.text(insert), parameters).scalar_one()
    add = """
        INSERT INTO collection_spaces (collection_id, space_id, role, on_long, share, reembedding_id)
        VALUES (:collection, :space, :role, :on_long, :share, :reembedding)
    """
    conn.execute(sa.text(add), {**parameters, "role": SpaceRole.FILLING, "reembedding": number})
    return number


def go_on(conn: sa.Connection, reembedding_id: int, *, state: ReembeddingState) -> None:
    update = "UPDATE reembeddings SET state = :state WHERE id = :id"
    conn.execute(sa.text(update), {"state": state, "id": reembedding_id})


def set_share(conn: sa.Connection, name: str, share: int) -> None:
    """Of how many percent of the sessions the space that is being filled answers."""
    update = """
        UPDATE collection_spaces SET share = :share
        WHERE collection_id = :collection AND role = :role
    """
    parameters = {"collection": collections.find(conn, name).id, "role": SpaceRole.FILLING, "share": share}
    conn.execute(sa.text(update), parameters)


def swap(conn: sa.Connection, name: str) -> None:
    """Let the other space of a collection be the active one, and the active one the previous."""
    row = collections.find(conn, name)
    parameters = {"collection": row.id, "role": SpaceRole.PREVIOUS}
    lock = "SELECT space_id FROM collections WHERE id = :collection FOR UPDATE"
    active = conn.execute(sa.text(lock), parameters).scalar_one()
    change = """
        UPDATE collection_spaces o
        SET space_id = :active, role = :role, share = 0
        FROM collection_spaces before
        WHERE o.collection_id = :collection AND before.collection_id = o.collection_id AND before.space_id = o.space_id
        RETURNING before.space_id
    """
    other = conn.execute(sa.text(change), {**parameters, "active": active}).scalar_one()
    move = "UPDATE collections SET space_id = :other WHERE id = :collection"
    conn.execute(sa.text(move), {**parameters, "other": other})


class TwoSpaceWorker(StandInWorker):
    """Embeds a query like a stored text. It refuses the spaces in ``unserved``, as a worker that cannot load them."""

    def __init__(self, db: sa.Engine) -> None:
        super().__init__(db)
        self.unserved: set[int] = set()

    def _answer_next(self) -> bool:
        with self._db.begin() as conn:
            request = embed_requests.claim_next(conn)
            if request is None:
                return False
            self.asked.append(request.texts)
            if request.space_id in self.unserved:
                embed_requests.refuse(conn, request, "no worker has the model of this space")
                return True
            space = registry.get(conn, request.space_id)
            n = len(request.texts)
            vectors = np.stack([vector_of(space, text) for text in request.texts])
            embed_requests.answer(conn, request.id, vectors, np.full(n, 3, np.int32), np.zeros(n, np.bool_))
        return True


@contextlib.contextmanager
def two_space_worker(db: sa.Engine) -> Iterator[TwoSpaceWorker]:
    """It ends with the block."""
    worker = TwoSpaceWorker(db)
    worker.start()
    try:
        yield worker
    finally:
        worker.end()
