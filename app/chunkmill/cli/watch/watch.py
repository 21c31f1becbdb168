"""`status --watch`: the status, drawn again and again on a terminal or printed as one JSON document per line."""

from __future__ import annotations

import time

from rich.live import Live

from chunkmill.cli.output import Screen
from chunkmill.cli.watch.refresher import Refresher
from chunkmill.cli.watch.view import draw, fields
from chunkmill.errors import InvalidInput
from chunkmill.monitor.watcher import View, Watcher
from chunkmill.settings import Settings

PATIENCE_SECONDS = 5.0
"""With ``--json``: after how many seconds without news the last view is printed again."""


def watch(screen: Screen, settings: Settings, *, every: float, times: int | None) -> None:
    """Show the status until Ctrl-C, or ``times`` times. Raises :class:`InvalidInput` in a pipe without ``--json``."""
    if not screen.json and not screen.out.is_terminal:
        raise InvalidInput(
            "`status --watch` draws on a terminal. In a pipe, add --json to get one JSON document per line."
        )
    refresher = Refresher(Watcher(settings), every)
    refresher.start()
    try:
        if screen.json:
            _print(screen, refresher, every, times)
        else:
            _draw(screen, refresher, every, times)
    except KeyboardInterrupt:
        pass  # Ctrl-C is the way to end it
    finally:
        refresher.stop()


def _print(screen: Screen, refresher: Refresher[View], every: float, times: int | None) -> None:
    left = times
    while left is None or left > 0:
        # One line for each new view. While a server hangs, the old view is printed with its age.
        view = refresher.latest(max(PATIENCE_SECONDS, 3 * every))
        if view is not None:
            screen.line(fields(view, time.monotonic()))
            left = None if left is None else left - 1


def _draw(screen: Screen, refresher: Refresher[View], every: float, times: int | None) -> None:
    left = times
    with Live(console=screen.out, screen=True, auto_refresh=False) as live:
        while left is None or left > 0:
            view = refresher.latest(min(1.0, every))
            live.update(draw(view, time.monotonic(), refresher.looking_since), refresh=True)
            left = None if left is None else left - 1
