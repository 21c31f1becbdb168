"""Leaving: what a worker does between "you will be stopped" and the end, and how it ends when it cannot go on."""

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

# Some platforms leave 15 s between the notice and the end. A TokenBatch takes well under a second; what is still
# under way by now hangs, in the device or in Postgres.
LIMIT_S = 8.0
LAST_WORDS_S = 3.0
SECOND_TIME = 128 + 15
"""Exit code of a process ended by SIGTERM."""


class Drain:
    """Tasks stop at their next TokenBatch, commit what they have and give their ChunkBatches back, uncharged."""

    def __init__(self, contexts: Sequence[QueueContext]) -> None:
        self._contexts = contexts
        self._begun = self._told_itself = False
        self._reader, self._writer = os.pipe()
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def tell_itself(self) -> None:
        """Start to leave as if SIGTERM had come. Once: the platform's own signal, which follows a notice or comes with
        it, is then no second one."""
        if not self._begun:
            self._told_itself = True
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(self) -> None:
        """Start to leave; a second call leaves at once, with whatever is held.

        For a signal handler, which may interrupt anything: no lock is taken here and nothing is logged.
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
        logger.info("draining: tasks stop after their TokenBatch and release their leases")
        time.sleep(LIMIT_S)  # a worker that is done sooner ends without this thread
        logger.warning("not done %g s after the notice: giving back what is held, and leaving", LIMIT_S)
        with_last_words(self._give_back)
        leave(0)

    def _give_back(self) -> None:
        context = self._contexts[0]  # all of a process have one name
        with context.db.begin() as conn:
            book_released(conn, context.name)
            given = chunk_batches.release_all(conn, context.name)
            provider_batches.release_all(conn, context.name)
        logger.info("gave back %s ChunkBatches", given)


def with_last_words(act: Callable[[], None]) -> None:
    """Run ``act``, but wait no longer than a moment for it: Postgres may be what is broken."""

    def run() -> None:
        try:
            act()
        except Exception:
            logger.exception("the leases could not be given back; they run out by themselves")

    thread = threading.Thread(target=run, name="last-words", daemon=True)
    thread.start()
    thread.join(LAST_WORDS_S)


def leave(code: int) -> NoReturn:
    """End the process here: Python's own end waits for threads, and one of them may hang."""
    os._exit(code)
