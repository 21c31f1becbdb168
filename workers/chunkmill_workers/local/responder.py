"""Takes the requests that wait in Postgres, has them embedded, and writes the answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Final

import psycopg
import sqlalchemy as sa

from chunkmill.db.retry import is_transient
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.errors import DeviceFailed, StoreLimit
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import LEASE_SECONDS, EmbedAnswer, EmbedRequest
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.engine.loop import Rank
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.embedder import AwaitedRequest, NobodyWaits, RequestEmbedder, WorkerLeaves
from chunkmill_workers.process.responder import Responder
from chunkmill_workers.process.unserved import UnservedWork

CLAIM_REQUESTS: Final = 256
CLAIM_TEXTS: Final = 1_024
CLAIM_SECONDS: Final = 0.5
CLAIM_TOKENS: Final = (2_048, 131_072)
"""A claim takes what the worker embeds in about CLAIM_SECONDS, between these numbers of estimated tokens. What one
worker holds, an idle one cannot take."""
MOST_OPEN: Final = 1_024
"""The most requests that a worker holds at a time."""
HELD_LARGE: Final = 4
"""How many large requests of different callers wait in a worker at a time, so that they take turns."""
IDLE_FIRST_SECONDS: Final = 0.003
"""How long a worker that is busy leaves a new request to those that are idle. Its own device has work meanwhile."""
ASK_SECONDS: Final = 0.1
"""How many seconds the knowledge that somebody waits for a request is used before it is read again."""
HANGS_SECONDS: Final = 25.0
"""How many seconds the engine may finish no step. After that the worker renews no lease, and other workers answer."""


class EmbedResponder(Responder[WorkerContext]):
    """Answers embed requests in the spaces that this worker serves, many at a time.

    Its own thread listens, claims and renews the leases. The threads of the ``embedder`` write the answers when a pass
    has landed, while another slice is computed. So Postgres is never what the device waits for.
    """

    def __init__(self, context: WorkerContext) -> None:
        super().__init__("embed-requests", context)
        self.embedder = RequestEmbedder(context, on_landed=self._write, on_room=self.wake)
        """Requests that did not come from Postgres may be submitted here too."""
        self._may_wait = True
        """Whether requests may wait in Postgres that this worker would take."""
        self._held = _HeldRequests(context)
        self._mutex = threading.Lock()
        self._answers: list[EmbedAnswer] = []
        self._refused: list[tuple[int, Exception]] = []
        self._left: list[int] = []

    @property
    def unserved(self) -> UnservedWork:
        return self._context.engines.left_to_others

    def answer_next(self) -> bool:
        """Claim some requests and answer them in this thread. Returns False if there are none, or if this worker leaves
        or is broken."""
        if self._leaves or not self._claim_some():
            return False
        self.embedder.settle()
        return True

    def look(self, *, may_wait: bool) -> None:
        """Claim what the embedder has room for, and keep what it holds."""
        if self._leaves:
            self.embedder.close()
            self._held.renew_if_due()
            return
        self._held.renew_if_due()
        self.embedder.drop_late()
        self._may_wait |= may_wait
        while self._may_wait and self.embedder.n_open < MOST_OPEN and not self.embedder.waiting(Rank.INTERACTIVE):
            self.embedder.wait_until_idle(IDLE_FIRST_SECONDS)
            if not self._claim_some():
                break
        COUNTS.set(m.EMBED_OPEN, self.embedder.n_open)

    def run(self) -> None:
        self.embedder.start()
        try:
            super().run()
        finally:
            self.embedder.close()

    def stop(self) -> None:
        """End the threads, after the slices that are being computed. What still waited is given back."""
        super().stop()
        self.embedder.close()
        self.embedder.join(5)

    @property
    def _leaves(self) -> bool:
        return self._context.stopping.is_set() or self._context.broken is not None

    def _claim_some(self) -> bool:
        """Claim requests and submit them to the embedder. Returns whether there were any."""
        large = self.embedder.waiting(Rank.SYNCHRONOUS)
        callers = sorted({asked.caller for asked in large if asked.caller})
        is_full = len(large) >= HELD_LARGE
        least, most = CLAIM_TOKENS
        tokens = int(min(most, max(least, self.embedder.tokens_per_second * CLAIM_SECONDS)))
        is_all = True

        def claim(conn: sa.Connection, not_spaces: list[int]) -> Sequence[EmbedRequest]:
            nonlocal is_all
            claimed = embed_requests.claim_some(
                conn,
                most_requests=CLAIM_REQUESTS,
                most_texts=CLAIM_TEXTS,
                most_tokens=tokens,
                synchronous=not is_full,
                not_callers=callers,
                not_spaces=not_spaces,
            )
            is_all = claimed.is_all
            return claimed.requests

        requests = self.claim(claim, loading=self.embedder.loading)
        # What this claim was not allowed to take may wait.
        self._may_wait = not is_all or is_full or bool(callers)
        self._held.add([request for request, _ in requests])
        for request, space in requests:
            self.embedder.submit(self._asked(request, space))
        return bool(requests)

    def _asked(self, request: EmbedRequest, space: Space) -> AwaitedRequest:
        left = request.seconds_left
        return AwaitedRequest(
            space,
            "query" if request.kind == "query" else "document",
            request.texts,
            on_answer=partial(self._on_answer, request.id),
            on_error=partial(self._on_error, request.id),
            urgency=request.urgency,
            caller=request.caller,
            deadline=None if left is None else time.monotonic() + left,
            is_wanted=partial(self._held.is_wanted, request.id),
            traceparent=request.traceparent,
        )

    def _on_answer(self, request_id: int, answer: EmbeddedTexts) -> None:
        with self._mutex:
            self._answers.append(EmbedAnswer(request_id, answer.vectors, answer.tokens, answer.truncated))

    def _on_error(self, request_id: int, error: Exception) -> None:
        if isinstance(error, DeviceFailed):
            # The request is not the reason: its lease ends, and another worker answers. The watchdog ends this worker.
            self._context.broken = str(error)
            self._held.remove([request_id])
            self.embedder.close()
        elif isinstance(error, NobodyWaits):
            self._held.remove([request_id])
            COUNTS.add(m.EMBED_REQUESTS, 1, "dropped")
        elif isinstance(error, WorkerLeaves):
            with self._mutex:
                self._left.append(request_id)
        else:
            with self._mutex:
                self._refused.append((request_id, error))

    def _write(self) -> None:
        """Write what has landed, by whichever thread, in one transaction; after it what ends without vectors."""
        with self._mutex:
            answers, refused, left = self._answers, self._refused, self._left
            self._answers, self._refused, self._left = [], [], []
        if answers:
            self._held.remove([answer.request_id for answer in answers])
            self._context.transact(lambda conn: embed_requests.answer_all(conn, answers), "answer", give_up=True)
            COUNTS.add(m.EMBED_REQUESTS, len(answers), "answered")
        if left:
            with self._held.taken_out(left) as requests, self._context.begin() as conn:
                embed_requests.release(conn, *requests)
            COUNTS.add(m.EMBED_REQUESTS, len(left), "left")
        for request_id, error in refused:
            with self._held.taken_out([request_id]) as requests:
                for request in requests:
                    is_told = self.end_without_vectors(request, error)
                    COUNTS.add(m.EMBED_REQUESTS, 1, "refused" if is_told else "left")


class _HeldRequests:
    """The requests that a worker has claimed and not answered, with their leases as they are now."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._requests: dict[int, EmbedRequest] = {}
        self._known_at: dict[int, float] = {}
        """When it was known of each that somebody waits for it, by ``time.monotonic``."""
        self._renewed_at = time.monotonic()
        self._mutex = threading.Lock()
        self._changing = threading.Lock()
        """Held while leases change in Postgres: who gives a request back must know its lease."""
        self._asking = threading.Lock()

    def add(self, requests: Sequence[EmbedRequest]) -> None:
        now = time.monotonic()
        with self._mutex:
            if not self._requests:
                self._renewed_at = now
            self._requests |= {request.id: request for request in requests}
            self._known_at |= {request.id: now for request in requests}

    def remove(self, request_ids: Sequence[int]) -> None:
        with self._mutex:
            for request_id in request_ids:
                self._requests.pop(request_id, None)
                self._known_at.pop(request_id, None)

    @contextlib.contextmanager
    def taken_out(self, request_ids: Sequence[int]) -> Iterator[list[EmbedRequest]]:
        """Those of the requests that are still held, for the caller to give back. They are held no longer."""
        with self._changing:
            with self._mutex:
                requests = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
            self.remove(request_ids)
            yield requests

    def renew_if_due(self) -> None:
        """Renew all leases three times in LEASE_SECONDS, unless the engine hangs. What another worker has by now, or
        its caller has withdrawn, is held no longer."""
        if not self._requests or time.monotonic() - self._renewed_at < LEASE_SECONDS / 3:
            return
        if self._context.engines.longest_step()[0] > HANGS_SECONDS:
            return
        with self._changing:
            with self._mutex:
                held = list(self._requests.values())
            self._renewed_at = time.monotonic()
            with self._context.begin() as conn:
                renewed = embed_requests.renew_all(conn, held)
            self._keep_only(held, renewed.keys())
            with self._mutex:
                self._requests |= {i: request for i, request in renewed.items() if i in self._requests}

    def is_wanted(self, request_id: int) -> bool:
        """Whether somebody waits for a request, as far as it was known ``ASK_SECONDS`` ago."""
        with self._asking:
            with self._mutex:
                if request_id not in self._requests:
                    return False
                if time.monotonic() - self._known_at[request_id] < ASK_SECONDS:
                    return True
                held = list(self._requests.values())
            try:
                with self._context.begin() as conn:
                    waited_for = embed_requests.still_open(conn, [request.id for request in held])
            except (sa.exc.SQLAlchemyError, psycopg.Error, StoreLimit) as error:
                if not is_transient(error) and not isinstance(error, StoreLimit):
                    raise
                return True  # nobody can withdraw now
            self._keep_only(held, waited_for)
            return request_id in waited_for

    def _keep_only(self, held: Sequence[EmbedRequest], wanted: Collection[int]) -> None:
        """Of those that were ``held``, keep the ``wanted`` ones."""
        self.remove([request.id for request in held if request.id not in wanted])
        now = time.monotonic()
        with self._mutex:
            self._known_at |= {request_id: now for request_id in wanted if request_id in self._requests}
