"""`status --watch`: the status, drawn again and again on a terminal or printed as one JSON document per line."""

from __future__ import annotations

from chunkmill.cli.output import Screen
from chunkmill.cli.watch.showing import show
from chunkmill.cli.watch.view import draw, fields
from chunkmill.monitor.watcher import Watcher
from chunkmill.settings import Settings


def watch(screen: Screen, settings: Settings, *, every: float, times: int | None) -> None:
    """Show the status until Ctrl-C, or ``times`` times. Raises :class:`InvalidInput` in a pipe that gets tables."""
    show(screen, "status --watch", lambda: Watcher(settings), draw, fields, every=every, times=times)
