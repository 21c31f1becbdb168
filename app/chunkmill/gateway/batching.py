"""Asks together what many requests ask at once: one round trip to Postgres for all that wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class QuestionBatcher(Generic[Question, Answer]):
    """``await batching(question)`` calls ``function`` in a thread, with all questions that came while it last ran.

    ``function`` gives as many answers as it got questions, in their order. If it raises, all of them get the error. It
    runs once at a time, so its time, and no timer, decides how many questions come together.
    """

    def __init__(self, function: Callable[[Sequence[Question]], Sequence[Answer]], *, most: int = 1000) -> None:
        self._function = function
        self._most = most
        self._waiting: deque[tuple[Question, asyncio.Future[Answer]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, question: Question) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        # If the caller goes away, the question is answered all the same: it may have changed something.
        return await future

    async def close(self) -> None:
        """Wait for what is asked."""
        while self._running is not None and not self._running.done():
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            try:
                answers = await asyncio.to_thread(self._function, [question for question, _ in taken])
            except Exception as error:  # noqa: BLE001 - whoever asked gets it
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), answer in zip(taken, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
