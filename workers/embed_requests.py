"""Answers texts that someone waits for, between the TokenBatches of bulk work; hears of cancelled jobs, too."""

from __future__ import annotations

import logging
import threading
from typing import Literal

import sqlalchemy as sa

from app.db import spaces
from app.db.connect import raw
from app.errors import ChunkmillError, DeviceFailed
from app.ledger import embed_requests
from app.ledger.embed_requests import CHANNEL, EmbedRequest
from app.ledger.jobs import CANCELLED_CHANNEL
from app.telemetry import metrics as m
from app.telemetry.counts import COUNTS
from workers.context import WorkerContext
from workers.engine.matryoshka import shorten

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Without a notification, look this often: NOTIFY does not cross every connection pooler."""
RECONNECT_SECONDS = 2.0


class EmbedRequestLane(threading.Thread):
    """A thread that listens for embed requests and claims them one by one. It listens for cancelled jobs as well: one
    connection of each worker is enough for both."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(name="embed-requests", daemon=True)
        self._context = context
        self._stop_lane = threading.Event()

    def stop(self) -> None:
        self._stop_lane.set()
        self.join(timeout=5)

    def run(self) -> None:
        while not self._stop_lane.is_set():
            try:
                self._listen()
            except Exception as error:  # noqa: BLE001 - a worker whose lane ended would never answer again
                logger.warning("embed requests: %s; listening again", type(error).__name__)
                self._stop_lane.wait(RECONNECT_SECONDS)

    def _listen(self) -> None:
        with self._context.db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(sa.text(f"LISTEN {CHANNEL}"))
            conn.execute(sa.text(f"LISTEN {CANCELLED_CHANNEL}"))
            try:
                while not self._stop_lane.is_set():
                    while self.answer_next():
                        pass
                    heard = {notice.channel for notice in raw(conn).notifies(timeout=LOOK_SECONDS, stop_after=1)}
                    if CANCELLED_CHANNEL in heard:
                        # The ledger says which leases are gone. The notice may be late: its job may have been tried
                        # again since, and the lease that is held now may be good.
                        self._context.leases.renew()
            finally:
                # A listening connection must not go back into the pool.
                conn.invalidate()

    def answer_next(self) -> bool:
        """Answer one request; False when there is none, or when this worker leaves or is broken."""
        if self._context.stopping.is_set() or self._context.broken:
            return False
        with self._context.db.begin() as conn:
            request = embed_requests.claim_next(conn, not_spaces=self._context.engines.unserved())
            if request is None:
                return False
            space = spaces.get(conn, request.space_id)
        self._answer(request, space)
        return True

    def _answer(self, request: EmbedRequest, space: spaces.Space) -> None:
        kind: Literal["document", "query"] = "query" if request.kind == "query" else "document"
        spec = space.spec
        try:
            engine = self._context.engine_for(space)
            result = engine.embed(request.texts, kind=kind, on_long=spec.long_text.policy, urgent=True)
        except DeviceFailed as broken:
            # No fault of the request: its lease runs out, and another worker answers. The watchdog ends this one.
            self._context.broken = str(broken)
            return
        except Exception as error:  # noqa: BLE001 - whatever it was, whoever waits gets a reason at once
            reason = str(error) if isinstance(error, ChunkmillError) else f"{type(error).__name__} in the engine"
            with self._context.db.begin() as conn:
                embed_requests.refuse(conn, request.id, f"{self._context.name}: {reason}")
            return
        COUNTS.add_all(
            (
                (m.URGENT_TEXTS, len(request.texts)),
                (m.TOKEN_BATCHES, result.timings.token_batches),
                (m.TOKENS, result.timings.tokens),
                (m.PADDED_TOKENS, result.timings.padded_tokens),
                (m.ENGINE_SECONDS, result.timings.forward),
                (m.TOKENIZE_SECONDS, result.timings.tokenize),
            )
        )
        with self._context.db.begin() as conn:
            vectors = shorten(result.vectors, spec.dimensions, normalize=spec.normalize)
            embed_requests.answer(conn, request.id, vectors)
