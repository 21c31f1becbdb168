"""Asks a gateway until it answers, may not be asked again, or the caller's time is over."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from chunkmill.errors import GatewayUnavailable, InvalidInput
from chunkmill.remote.reading import UnreadableAnswer
from chunkmill.remote.refusals import Failure, failure_of, failure_of_silence, late_failure
from chunkmill.remote.servers import Server
from chunkmill.remote.steps import (
    Answer,
    OpenAnswer,
    OpenStep,
    PauseStep,
    Request,
    SendStep,
    Steps,
    Unanswered,
    WorkStep,
)

T = TypeVar("T")

LONG_WORK_BYTES = 128 * 1024
"""Reading more JSON than this would hold an event loop for milliseconds."""
LONGEST_ATTEMPT_S = 600.0
LONGEST_ANSWER = 64 * 1024 * 1024
LONGEST_WORK_S = 86_400.0
"""How long the gateway works at most for one request that lasts."""
SILENCE_S = 60.0
"""A gateway that works for us sends something every 15 s. If nothing comes for so long, it is gone."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0


class RemoteCalls:
    """What the verbs share: the servers and how they are asked."""

    def __init__(self, server: Server, fallback: Server | None, timeout: float) -> None:
        self._server = server
        self._fallback = fallback
        self._timeout = timeout
        self._clock: Callable[[], float] = time.monotonic
        self._secrets = tuple({one.key.reveal() for one in (server, fallback) if one is not None})

    def _deadline(self, seconds: float | None = None) -> float:
        return self._clock() + (self._timeout if seconds is None else seconds)

    def _left(self, deadline: float) -> float:
        """How many seconds one attempt may take."""
        return min(LONGEST_ATTEMPT_S, max(0.001, deadline - self._clock()))

    def _ask(self, make: Callable[[float], Request], *, deadline: float, is_repeatable: bool = True) -> Steps[Answer]:
        """The answer to ``make(seconds)``. A request that is not repeatable is repeated only if it had no effect."""
        return (
            yield from self._repeated(
                lambda: self._attempt(self._server, make(self._left(deadline))), deadline, is_repeatable=is_repeatable
            )
        )

    def _open(self, make: Callable[[float], Request], *, deadline: float) -> Steps[OpenAnswer]:
        """The answer to ``make(seconds)``, whose body is still to be read."""

        def attempt() -> Steps[OpenAnswer | Failure]:
            try:
                opened: Answer | OpenAnswer = yield OpenStep(self._server, make(self._left(deadline)))
            except Unanswered as silence:
                return failure_of_silence(silence, self._server.name)
            if isinstance(opened, Answer):
                return failure_of(opened, self._server.name, self._secrets)
            return opened

        return (yield from self._repeated(attempt, deadline))

    def _repeated(
        self, attempt: Callable[[], Steps[T | Failure]], deadline: float, *, is_repeatable: bool = True
    ) -> Steps[T]:
        tries = 0
        while True:
            result = yield from attempt()
            if not isinstance(result, Failure):
                return result
            if not result.may_repeat or not (is_repeatable or result.is_undone):
                raise result.error
            yield from self._wait(result, tries, deadline)
            tries += 1

    def _attempt(self, server: Server, request: Request) -> Steps[Answer | Failure]:
        """The answer to one request, or why there is none."""
        try:
            answer: Answer = yield SendStep(server, request)
        except Unanswered as silence:
            return failure_of_silence(silence, server.name)
        return answer if answer.is_ok else failure_of(answer, server.name, self._secrets)

    def _wait(self, failure: Failure, tries: int, deadline: float) -> Steps[None]:
        """Pause before the next attempt. Raises the failure if the time would be over then."""
        pause = pause_after(tries) if failure.retry_after is None else failure.retry_after
        if self._clock() + pause >= deadline:
            raise failure.error
        yield PauseStep(pause)

    def _read(self, server: Server, body: bytes, reader: Callable[[], T]) -> Steps[T]:
        """What ``reader`` makes of an answer."""
        try:
            result: T = yield WorkStep(reader, len(body) > LONG_WORK_BYTES)
        except UnreadableAnswer as error:
            raise unreadable(server, error) from None
        return result

    def _get(
        self,
        path: str,
        reader: Callable[[bytes], T],
        *,
        query: Mapping[str, str] | None = None,
        method: str = "GET",
        body: bytes | None = None,
        timeout: float | None = None,
        is_repeatable: bool = True,
    ) -> Steps[T]:
        """What the answer to a request without a stream holds."""
        headers = {} if body is None else {"content-type": "application/json"}

        def make(seconds: float) -> Request:
            return Request(method, path, seconds, query or {}, headers, body, LONGEST_ANSWER)

        answer = yield from self._ask(make, deadline=self._deadline(timeout), is_repeatable=is_repeatable)
        return (yield from self._read(self._server, answer.body, lambda: reader(answer.body)))

    def _get_lasting(
        self, path: str, reader: Callable[[bytes], T], body: Mapping[str, Any], timeout: float | None = None
    ) -> Steps[T]:
        """What the answer to a POST holds that may take ``timeout`` seconds, or if it is None, as long as the work.

        It is not repeated once it has begun.

        The gateway sends blank lines meanwhile, with the status 200, and an error in the body if it comes after them.
        """
        seconds = LONGEST_WORK_S if timeout is None else min(timeout, LONGEST_WORK_S)
        content = as_json({**body, **({} if timeout is None else {"timeout_s": seconds})})

        def attempt() -> Steps[Answer | Failure]:
            headers = {"content-type": "application/json"}
            request = Request(
                "POST", path, seconds + self._timeout, {}, headers, content, LONGEST_ANSWER, silence=SILENCE_S
            )
            made = yield from self._attempt(self._server, request)
            if isinstance(made, Failure):
                return made
            late = yield from self._read(
                self._server, made.body, lambda: late_failure(made, self._server.name, self._secrets)
            )
            return made if late is None else late

        answer = yield from self._repeated(attempt, self._deadline(), is_repeatable=False)
        return (yield from self._read(self._server, answer.body, lambda: reader(answer.body)))


def as_json(body: Mapping[str, Any]) -> bytes:
    """Raises :class:`InvalidInput` for a number that is not finite."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise InvalidInput("a number that is not finite cannot be sent to a gateway.") from None


def unreadable(server: Server, error: UnreadableAnswer) -> GatewayUnavailable:
    return GatewayUnavailable(
        f"{server.name} gave an answer of an unexpected kind: {error}. Is it a gateway of Chunkmill, and not of "
        "an older release?"
    )


def pause_after(tries: int) -> float:
    """Seconds before the next attempt: twice as many each time, and for no two clients the same."""
    pause: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(tries, 10))
    return pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def told_timeout_ms(seconds: float) -> int:
    """How long the gateway may wait for a worker, so that its answer still arrives within ``seconds``."""
    return max(1, math.floor(1000 * (seconds - min(1.0, seconds / 10))))
