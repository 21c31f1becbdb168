"""Shows views again and again: drawn on a terminal, or printed as one JSON document per line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import RenderableType
from rich.live import Live

from chunkmill.cli.output import Screen
from chunkmill.cli.watch.refresher import Refresher, ViewReader
from chunkmill.errors import InvalidInput

View = TypeVar("View")

PATIENCE_SECONDS = 5.0
"""With ``--json``: after how many seconds without news the last view is printed again."""


def show(
    screen: Screen,
    command: str,
    reader: Callable[[], ViewReader[View]],
    draw: Callable[[View | None, float, float], RenderableType],
    fields: Callable[[View, float], object],
    *,
    every: float,
    times: int | None,
) -> None:
    """Show what ``reader()`` reads until Ctrl-C, or ``times`` times.

    ``draw`` gets the view, the time now and since when the reader has been looking; ``fields`` gets the first two. Both
    times are of this process's monotonic clock. Raises :class:`InvalidInput` in a pipe that gets tables.
    """
    if not screen.json and not screen.out.is_terminal:
        raise InvalidInput(f"`{command}` draws on a terminal. In a pipe, add --json to get one JSON document per line.")
    refresher = Refresher(reader(), every)
    refresher.start()
    try:
        if screen.json:
            # One line for each new view. While a server hangs, the old view is printed with its age.
            for view in _views(refresher, max(PATIENCE_SECONDS, 3 * every), times):
                if view is not None:
                    screen.line(fields(view, time.monotonic()))
        else:
            with Live(console=screen.out, screen=True, auto_refresh=False) as live:
                for view in _views(refresher, min(1.0, every), times, counts_nothing=True):
                    live.update(draw(view, time.monotonic(), refresher.looking_since), refresh=True)
    except KeyboardInterrupt:
        pass  # Ctrl-C is the way to end it
    finally:
        refresher.stop()


def _views(
    refresher: Refresher[View], timeout: float, times: int | None, *, counts_nothing: bool = False
) -> Iterator[View | None]:
    """The views, and None if there is none yet, which counts as one of ``times`` only with ``counts_nothing``."""
    shown = 0
    while times is None or shown < times:
        view = refresher.latest(timeout)
        shown += view is not None or counts_nothing
        yield view
