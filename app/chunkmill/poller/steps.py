"""The steps of a poller's round. If one of them fails, the others are done all the same."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa

from chunkmill.broker import publish_errors
from chunkmill.db.connect import limit_error, limit_of
from chunkmill.db.retry import is_outage
from chunkmill.domain.reasons import reason_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Steps:
    """Runs steps, and says once why one of them fails until it succeeds or fails for another reason."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}
        self.redis_error: Exception | None = None
        """Why Redis cannot be used, if a step of this round found that out."""

    def begin(self) -> None:
        """Begin a round."""
        self.redis_error = None

    def run(self, what: str, step: Callable[[], T]) -> T | None:
        """What ``step`` returns; None if it failed, which is logged. Raises only an outage of Postgres."""
        try:
            done = step()
        except publish_errors() as error:
            self.redis_error = error
        except Exception as error:
            if is_outage(error):
                raise
            self._say(what, error)
        else:
            self.forget(what)
            return done
        return None

    def repeat(self, what: str, step: Callable[[], object], stop: threading.Event, seconds: float) -> None:
        """Run ``step`` every ``seconds`` until ``stop``, whatever goes wrong. It is the whole of a thread.

        A thread that ended would leave its work undone until the poller is started again, and nothing would show it.
        """
        while not stop.wait(seconds):
            try:
                self.run(what, step)
            except Exception as error:  # noqa: BLE001 - only an outage comes here, which the poller's rounds report
                logger.debug("poller: %s waits for Postgres: %s", what, reason_of(error))

    def forget(self, what: str) -> None:
        """Forget why ``what`` failed, because it succeeded or because nobody tries it again."""
        self._said.pop(what, None)

    def _say(self, what: str, error: Exception) -> None:
        said = str(limit_error(what, error)) if limit_of(error) else f"{what}: {reason_of(error)}."
        if self._said.get(what) == said:
            return
        self._said[what] = said
        traceback = None if isinstance(error, sa.exc.DBAPIError) else error
        logger.error("poller: %s It is tried again, and the rest of the round is done.", said, exc_info=traceback)
