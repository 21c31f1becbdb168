"""How a worker leaves: what it does between the signal and its end, and how it ends if it cannot go on."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from chunkmill.ledger.provider import provider_batches
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.usage import book_released
from chunkmill_workers.process.context import QueueContext

logger = logging.getLogger(__name__)

LIMIT_S = 8.0
"""How long a drain may take, in seconds. Some platforms leave 15 s between the notice and the end. A TokenBatch takes
well under a second, so what is not done by then hangs in the device or in Postgres. A worker that waits for a provider
may take longer, because the answer is paid for, but not after a notice."""
LAST_WORDS_S = 3.0
"""How long a worker that must leave waits for Postgres to take its leases back, in seconds."""
SECOND_TIME = 128 + 15
"""The exit code of a process that SIGTERM ended, for a worker that gets it twice."""


class Drain:
    """Drains the worker: tasks stop after their TokenBatch, commit, and give their ChunkBatches back uncharged."""

    def __init__(self, contexts: Sequence[QueueContext]) -> None:
        self._contexts = contexts
        self._begun = self._told_itself = False
        self._noticed_at: float | None = None
        self._reader, self._writer = os.pipe()
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def tell_itself(self) -> None:
        """Start to leave as if SIGTERM had come, and soon: the machine will be taken. The platform's own signal, which
        comes with the notice or after it, does not count as the second one then."""
        self._noticed_at = time.monotonic()
        self._told_itself = True
        if not self._begun:
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(self) -> None:
        """Start to leave. A second call ends the process at once, whatever it still holds.

        It is called by a signal handler, which may interrupt anything, so it takes no lock and logs nothing.
        """
        if not self._begun:
            self._begun = True
            os.write(self._writer, b"!")
        elif self._told_itself:
            self._told_itself = False
        else:
            leave(SECOND_TIME)

    def _run(self) -> None:
        os.read(self._reader, 1)
        for context in self._contexts:
            context.stopping.set()
        logger.info("draining: tasks stop after their TokenBatch or their request, and release their leases")
        began = time.monotonic()
        # A worker that is done earlier ends the process, and this thread with it.
        while (left := self._ends_at(began) - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        logger.warning(
            "not done %.0f s after the notice: the worker gives back what it holds, and leaves",
            time.monotonic() - began,
        )
        with_last_words(self._give_back)
        leave(0)

    def _ends_at(self, began: float) -> float:
        """When the drain ends, by ``time.monotonic``, as things are now."""
        if self._noticed_at is not None:
            return self._noticed_at + LIMIT_S
        return began + LIMIT_S + max(context.answer_seconds for context in self._contexts)

    def _give_back(self) -> None:
        for context in self._contexts:
            context.book_abandoned()
        context = self._contexts[0]  # all contexts of a process have the same name
        with context.db.begin() as conn:
            book_released(conn, context.name)
            given = chunk_batches.release_all(conn, context.name)
            provider_batches.release_all(conn, context.name)
        logger.info("gave back %s ChunkBatches", given)


def with_last_words(act: Callable[[], None]) -> None:
    """Run ``act``, but wait for it for ``LAST_WORDS_S`` at most, because Postgres may be what is broken."""

    def run() -> None:
        try:
            act()
        except Exception:
            logger.exception("the leases could not be given back; they end by themselves")

    thread = threading.Thread(target=run, name="last-words", daemon=True)
    thread.start()
    thread.join(LAST_WORDS_S)


def leave(code: int) -> NoReturn:
    """End the process at once. Python's own exit waits for threads, and one of them may hang."""
    os._exit(code)
