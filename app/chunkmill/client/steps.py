"""Calls that wait, written as steps: they say when and for how long, and somebody else does the waiting.

``Client`` waits in the caller's thread. ``AsyncClient`` waits in the event loop, so that a thousand waiting calls need
no thousand threads and hold no connection meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Pause:
    """Go on after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Tell:
    """Call a function of the caller's, then go on."""

    function: Callable[[Any], object]
    argument: object


Step = Pause | Tell
Steps = Generator[Step, None, Result]
"""No transaction is open between two steps, so they may run in different threads, one after the other. A generator that
is closed, or that an exception is thrown into, takes back what it asked for."""


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
    if isinstance(step, Pause):
        time.sleep(step.seconds)
    else:
        step.function(step.argument)
