"""Stops a call that runs in a thread from another thread: the call checks between two transactions and between two
chunks whether it is to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from chunkmill.domain.retention import OnProgress

Item = TypeVar("Item")

IS_STOPPED: ContextVar[Callable[[], bool] | None] = ContextVar("chunkmill_is_stopped", default=None)
"""Says whether the call in this context is to end. None for a call that nobody can stop, as those of ``Client``."""


class Stopped(BaseException):
    """The call ends here because somebody stopped it. No ``except Exception`` of a caller's iterable catches it."""


def end_if_stopped() -> None:
    """Raise :class:`Stopped` if the call is to end."""
    is_stopped = IS_STOPPED.get()
    if is_stopped is not None and is_stopped():
        raise Stopped


def stoppable(items: Iterable[Item]) -> Iterable[Item]:
    """The items, until the call is stopped."""
    return items if IS_STOPPED.get() is None else _until_stopped(items)


def _until_stopped(items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        end_if_stopped()
        yield item


def stopping_between(on_progress: OnProgress | None) -> OnProgress | None:
    """``on_progress``, which then also ends a call that is stopped."""
    if IS_STOPPED.get() is None:
        return on_progress

    def look(what: str, done: int, of: int) -> None:
        end_if_stopped()
        if on_progress is not None:
            on_progress(what, done, of)

    return look
