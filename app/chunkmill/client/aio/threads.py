"""A few threads that run the blocking parts of an ``AsyncClient``."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Threads:
    """At most ``most`` daemon threads, which begin when there is work and end when they are told to.

    ``ThreadPoolExecutor`` would be joined when the interpreter ends. A thread that waits for a chunk of an event loop
    that has stopped would then keep the process for ever. These threads end with the process, which leaves in the
    database what a killed process leaves.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._changed = threading.Condition()
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._idle = self._started = 0
        self._is_closed = False

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """Run ``function`` in a thread as soon as one is free, in the order of the calls."""
        future: Future[Result] = Future()
        with self._changed:
            if self._is_closed:
                raise RuntimeError(f"{self._name} are closed")
            self._work.append((future, function))
            if len(self._work) > self._idle and self._started < self._most:
                self._started += 1
                threading.Thread(target=self._run, name=f"{self._name}-{self._started}", daemon=True).start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Let the threads end once the work that was submitted is done. This does not wait for them."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            future, function = work
            if future.set_running_or_notify_cancel():
                try:
                    result = function()
                except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del work, future, function  # so that the call's objects do not live until the next call

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            self._idle += 1
            while not self._work and not self._is_closed:
                self._changed.wait()
            self._idle -= 1
            return self._work.popleft() if self._work else None
