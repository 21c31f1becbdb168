"""A stand-in for the workers that answer embed requests. It needs no model, and a vector says what its text was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import ANSWERS_CHANNEL, EmbedRequest
from tests.support.waiting import PATIENCE

DIMENSIONS = 384


def vector_of(text: str) -> NDArray[np.float32]:
    """The unit vector 7 for ``text 7``."""
    return np.eye(1, DIMENSIONS, int(text.split()[-1]), dtype=np.float32)[0]


def claim(db: sa.Engine) -> EmbedRequest | None:
    with db.begin() as conn:
        return embed_requests.claim_next(conn, lease_seconds=3600)


_ANSWER = sa.text("UPDATE embed_requests SET vectors = :vectors WHERE id = :id")
_COUNT = sa.text("UPDATE embed_requests SET tokens = :tokens, truncated = :truncated WHERE id = :id")


def answer(db: sa.Engine, *requests: EmbedRequest, tells: bool = True) -> None:
    """Answer all of them in one transaction, with one notification. A text has as many tokens as characters."""
    with db.begin() as conn:
        for request in requests:
            vectors = np.stack([vector_of(text) for text in request.texts])
            conn.execute(_ANSWER, {"id": request.id, "vectors": vectors.astype("<f4").tobytes()})
            if embed_requests.has_columns(conn, "tokens"):
                tokens = [len(text) for text in request.texts]
                conn.execute(_COUNT, {"id": request.id, "tokens": tokens, "truncated": [count > 8 for count in tokens]})
        if tells:
            tell(conn, *(request.id for request in requests))


def tell(conn: sa.Connection, *request_ids: int) -> None:
    conn.execute(sa.text(f"SELECT pg_notify('{ANSWERS_CHANNEL}', :ids)"), {"ids": ",".join(map(str, request_ids))})


class Answerer(threading.Thread):
    """Answers whatever is asked, until it is stopped."""

    def __init__(self, db: sa.Engine, *, tells: bool) -> None:
        super().__init__(daemon=True)
        self.answered: list[EmbedRequest] = []
        self._db = db
        self._tells = tells
        self._ends = threading.Event()

    @property
    def texts(self) -> list[str]:
        """All texts that it was asked for."""
        return [text for request in self.answered for text in request.texts]

    def run(self) -> None:
        while not self._ends.wait(0.002):
            while request := claim(self._db):
                self.answered.append(request)
                answer(self._db, request, tells=self._tells)

    def stop(self) -> None:
        self._ends.set()
        self.join(PATIENCE)


@contextlib.contextmanager
def answering(db: sa.Engine, *, tells: bool = True) -> Iterator[Answerer]:
    answerer = Answerer(db, tells=tells)
    answerer.start()
    try:
        yield answerer
    finally:
        answerer.stop()
