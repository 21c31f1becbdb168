"""Calls that wait, written as steps: a step says how long to wait or for what, and the code that runs the steps does
the waiting.

``Client`` waits in the caller's thread. ``AsyncClient`` waits in the event loop, so that a thousand waiting calls need
no thousand threads and hold no connection meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PauseStep:
    """Go on after this number of seconds."""

    seconds: float


class Signal:
    """Is given once, from any thread. One call waits for it, in its thread or in its event loop."""

    __slots__ = ("_event", "_mutex", "_when_given")

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._event = threading.Event()
        self._when_given: Callable[[], object] | None = None

    @property
    def is_given(self) -> bool:
        return self._event.is_set()

    def give(self) -> None:
        """Let whoever waits go on. It may be given again, which has no effect."""
        with self._mutex:
            self._event.set()
            tell, self._when_given = self._when_given, None
        if tell is not None:
            tell()

    def wait(self, seconds: float) -> None:
        """Return when it is given, or after this number of seconds."""
        self._event.wait(seconds)

    def when_given(self, tell: Callable[[], object]) -> None:
        """Call ``tell`` once it is given, in the thread that gives it; at once, if it is given already."""
        with self._mutex:
            if not self._event.is_set():
                self._when_given = tell
                return
        tell()


@dataclass(frozen=True, slots=True)
class WaitStep:
    """Go on when the signal is given, or after this number of seconds."""

    signal: Signal
    seconds: float


@dataclass(slots=True)
class WorkStep:
    """Call a function that may block, as on Postgres. ``result`` is what it returned.

    Without ``is_awaited`` the steps may go on before it has been called, and what it raises is lost.
    """

    function: Callable[[], Any]
    is_awaited: bool = True
    result: Any = None


@dataclass(frozen=True, slots=True)
class TellStep:
    """Call a function of the caller's, then go on."""

    function: Callable[[Any], object]
    argument: object


Step = PauseStep | WaitStep | TellStep | WorkStep
Steps = Generator[Step, None, Result]
"""No transaction is open between two steps, so they may run in different threads, one after the other. A generator that
is closed, or that an exception is thrown into, takes back what it asked for. Between its steps it may block, unless its
function says that it blocks in :class:`WorkStep` alone; closing it may always block."""


def run_steps(steps: Steps[Result]) -> Result:
    """Run the steps to their end in this thread, with the pauses, and return the result."""
    try:
        step = next(steps)
        while True:
            try:
                perform(step)
            except BaseException as error:  # noqa: BLE001 - also Ctrl-C: it is raised again in there
                step = steps.throw(error)
            else:
                step = next(steps)
    except StopIteration as end:
        result: Result = end.value
        return result


def perform(step: Step) -> None:
    if isinstance(step, PauseStep):
        time.sleep(step.seconds)
    elif isinstance(step, WaitStep):
        step.signal.wait(step.seconds)
    elif isinstance(step, WorkStep):
        step.result = step.function()
    else:
        step.function(step.argument)
