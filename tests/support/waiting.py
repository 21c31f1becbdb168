"""How tests wait: for an event, never for a time.

The bound on each wait only keeps a broken build from hanging, so it is minutes long: a machine that runs fifteen other
programs needs more than a minute to start one worker. ``TEST_PATIENCE`` changes it, in seconds; `make mutants` lowers
it, because most waits that fail there are meant to fail.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

PATIENCE = float(os.environ.get("TEST_PATIENCE", "300"))
# For the threads of a test that has failed: they are told to end, but may not be able to.
SHORT_PATIENCE = 10.0


def until(condition: Callable[[], object], explain: Callable[[], object] = str, *, pause: float | None = None) -> None:
    """Return once ``condition()`` is true. Fail after ``PATIENCE`` seconds, with what ``explain()`` returns.

    Between two looks it sleeps ``pause`` seconds; if that is not given, 0.02 to 0.1, the longer it waits the longer,
    because what many tests look at costs as much of the processor as the work that they wait for.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > PATIENCE:
            raise AssertionError(f"still not true after {PATIENCE:g} s\n{explain()}")
        time.sleep(min(0.1, max(0.02, waited / 20)) if pause is None else pause)


class Call(threading.Thread):
    """A call in its own thread, which does not keep pytest from ending."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._future: Future[Any] = Future()
        self.start()

    def run(self) -> None:
        try:
            self._future.set_result(self._function())
        except BaseException as error:  # noqa: BLE001 - result() raises it
            self._future.set_exception(error)

    def result(self) -> Any:
        """Wait for the end of the call. Return what it returned, or raise what it raised."""
        return self._future.result(PATIENCE)


@contextmanager
def running(*functions: Callable[[], Any], release: Callable[[], object] | None = None) -> Iterator[list[Call]]:
    """Call each function in its own thread, and wait for all of them at the end of the block.

    ``release`` is called before that wait, also if the block failed: it releases what the functions wait for. If a
    function raised an exception, the block raises it.
    """
    calls = [Call(function) for function in functions]
    try:
        yield calls
    except BaseException:
        if release is not None:
            release()
        for call in calls:
            call.join(SHORT_PATIENCE)
        raise
    if release is not None:
        release()
    for call in calls:
        call.result()


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Call all functions at once, each in its own thread, and return what each returned."""
    with running(*functions) as calls:
        return [call.result() for call in calls]
