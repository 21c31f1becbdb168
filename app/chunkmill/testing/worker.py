"""A worker in a thread: it does to the ledger what a real one does, with vectors of ``chunkmill.testing.embedding``.

It needs no torch, no model and no Celery. It takes its work from Postgres, so that doorbells are rung and not answered.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import psycopg
import sqlalchemy as sa

from chunkmill.db.connect import create_db, open_alone
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.spaces import LongText, OnLong, SpaceSpec
from chunkmill.domain.states import ChunkBatchState, Route
from chunkmill.ledger import embed_requests
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.embed_requests import EmbedAnswer, EmbedRequest
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.store.read import read_work
from chunkmill.store.write import write_vectors
from chunkmill.testing.embedding import MAX_TOKENS, MODELS, embed, words_of

LOOK_SECONDS = 0.05
"""How often the worker looks for ChunkBatches. Requests of searches wake it."""
OWNER = "chunkmill.testing:1"
REFUSED = "refused_by_test"
"""The code on the dead list of a text that the test told the worker to refuse."""
_DUE = sa.text("""
SELECT id
FROM chunk_batches
WHERE state = :available AND route = :local AND not_before <= now() AND space_id = ANY(CAST(:spaces AS int[]))
ORDER BY priority, id
LIMIT 16
""")


class Worker:
    """Embeds what is enqueued and answers searches, from :meth:`start` to :meth:`stop`."""

    def __init__(self, settings: Settings) -> None:
        # The application's name is that of a worker, so that nobody is told that there is none.
        self._db = create_db(settings.require_database_url(), role="worker", pool_size=2)
        self._refused: dict[bytes, str] = {}
        self._works = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chunkmill-testing-worker", daemon=True)
        self.error: BaseException | None = None
        """What ended the worker; None if nothing did."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and raise what ended it before, if something did."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._db.dispose()
        if self.error is not None:
            raise self.error

    def refuse(self, *texts: str, reason: str = "the test said so") -> None:
        """Put these texts on the dead list when they come, as a real worker does with one that it cannot embed."""
        self._refused |= {content_hash(text): reason for text in texts}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """In the block nothing is embedded and no search is answered: jobs stay open."""
        with self._works:
            yield

    # --- in the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with contextlib.closing(open_alone(self._db)) as connection:
                connection.execute(f"LISTEN {embed_requests.CHANNEL}", prepare=False)
                self._serve(connection)
        except BaseException as error:  # noqa: BLE001 - whoever stops the worker gets it
            self.error = error

    def _serve(self, connection: psycopg.Connection[object]) -> None:
        while not self._stop.is_set():
            with self._works:
                has_worked = self._answer() | self._embed_due()
            if not has_worked:
                for _ in connection.notifies(timeout=LOOK_SECONDS, stop_after=1):
                    pass

    def _spaces(self, conn: sa.Connection) -> dict[int, Space]:
        """The spaces of our models, however their vectors are shortened or stored."""
        spaces = registry.all_spaces(conn)
        return {space.id: space for space in spaces if _is_ours(space.spec)}

    def _answer(self) -> bool:
        with self._db.begin() as conn:
            spaces = self._spaces(conn)
            claimed = embed_requests.claim_some(
                conn, most_requests=64, most_texts=1024, most_tokens=1_000_000, spaces=list(spaces)
            )
            answers = [_answered(request, spaces[request.space_id]) for request in claimed.requests]
            embed_requests.answer_all(conn, answers)
        return bool(claimed.requests)

    def _embed_due(self) -> bool:
        with self._db.begin() as conn:
            parameters = {
                "available": ChunkBatchState.AVAILABLE,
                "local": Route.LOCAL,
                "spaces": list(self._spaces(conn)),
            }
            due = list(conn.execute(_DUE, parameters).scalars())
        for chunk_batch_id in due:
            with self._db.begin() as conn:
                lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner=OWNER, lease_seconds=60)
            if lease is not None:
                self._embed(lease)
        return bool(due)

    def _embed(self, lease: Lease) -> None:
        with self._db.begin() as conn:
            space = registry.get(conn, lease.space_id)
            work = read_work(conn, space, lease.chunk_batch_id)
            dead = [*_too_long(lease, space, work.texts), *self._dead(work.texts)]
            without = {content.content_hash for content in dead}
            rows = [(key, text) for key, text in work.texts if key not in without]
            n_tokens = np.array([len(words_of(text)) for _, text in rows], np.int32)
            is_cut = (n_tokens > MAX_TOKENS) & (space.spec.long_text is not LongText.SPLIT)
            vectors = _vectors([text for _, text in rows], space.spec)
            write_vectors(conn, space, space.spec.fingerprint, [key for key, _ in rows], n_tokens, is_cut, vectors)
            is_ours = chunk_batches.complete_if_held(
                conn, lease, n_embedded=work.known + len(rows), n_truncated=len(work.truncated) + int(is_cut.sum())
            )
            if is_ours:
                dead_chunks.add_contents(conn, dead, job_id=lease.job_id, collection_id=lease.collection_id)
        with self._db.begin() as conn:
            finish_if_done(conn, lease.job_id, space)

    def _dead(self, texts: list[tuple[bytes, str]]) -> list[DeadContent]:
        refused: Mapping[bytes, str] = dict(self._refused)
        return [DeadContent(key, REFUSED, refused[key]) for key, _ in texts if key in refused]


def _is_ours(spec: SpaceSpec) -> bool:
    ours = MODELS.get(spec.model)
    return ours is not None and ours.revision == spec.revision


def _too_long(lease: Lease, space: Space, texts: list[tuple[bytes, str]]) -> list[DeadContent]:
    if lease.on_long is not OnLong.REJECT:
        return []
    return [
        DeadContent(key, "too_long", f"the text has {n:,} tokens; the model reads {MAX_TOKENS}")
        for key, text in texts
        if (n := len(words_of(text))) > MAX_TOKENS
    ]


def _answered(request: EmbedRequest, space: Space) -> EmbedAnswer:
    n_tokens = np.array([len(words_of(text)) for text in request.texts], np.int32)
    is_cut = (n_tokens > MAX_TOKENS) & (space.spec.long_text is not LongText.SPLIT)
    return EmbedAnswer(request.id, _vectors(list(request.texts), space.spec), n_tokens, is_cut)


def _vectors(texts: list[str], spec: SpaceSpec) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """``(n, dimensions)`` of a space, which may be shorter than its model's."""
    return embed(texts, model=spec.model, long_text=spec.long_text)
