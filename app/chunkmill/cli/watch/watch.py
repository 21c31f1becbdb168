"""`status --watch`: the status, drawn again and again on a terminal or printed as one JSON document per line."""

from __future__ import annotations

import threading
import time

from rich.live import Live

from chunkmill.cli.output import Screen
from chunkmill.cli.watch.view import draw, fields
from chunkmill.errors import InvalidInput
from chunkmill.monitor.watcher import View, Watcher
from chunkmill.settings import Settings

PATIENCE_SECONDS = 5.0
"""With ``--json``: after how many seconds without news the last view is printed again."""


class Refresher(threading.Thread):
    """Reads the servers repeatedly in a thread of its own, so that the screen's clock goes on while a server hangs."""

    def __init__(self, watcher: Watcher, every: float) -> None:
        super().__init__(name="refresher", daemon=True)
        self._watcher = watcher
        self._every = every
        self._stop_refreshing = threading.Event()
        self._changed = threading.Condition()
        self.view: View | None = None
        self.looking_since = time.monotonic()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_refreshing.is_set():
                self.looking_since = time.monotonic()
                view = self._watcher.look()
                with self._changed:
                    self.view = view
                    self._changed.notify_all()
                self._stop_refreshing.wait(self._every)
        except BaseException as error:  # noqa: BLE001 - raised again in `latest`
            with self._changed:
                self.error = error
                self._changed.notify_all()
        finally:
            self._watcher.close()

    def latest(self, timeout: float) -> View | None:
        """The latest view, after waiting up to ``timeout`` seconds for a new one; None if there is none yet."""
        with self._changed:
            self._changed.wait(timeout)
        if self.error is not None:
            raise self.error
        return self.view

    def stop(self) -> None:
        self._stop_refreshing.set()
        self.join(timeout=1)  # if it hangs, it ends with the process


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


def _print(screen: Screen, refresher: Refresher, every: float, times: int | None) -> None:
    left = times
    while left is None or left > 0:
        # One line for each new view. While a server hangs, the old view is printed with its age.
        view = refresher.latest(max(PATIENCE_SECONDS, 3 * every))
        if view is not None:
            screen.line(fields(view, time.monotonic()))
            left = None if left is None else left - 1


def _draw(screen: Screen, refresher: Refresher, every: float, times: int | None) -> None:
    left = times
    with Live(console=screen.out, screen=True, auto_refresh=False) as live:
        while left is None or left > 0:
            view = refresher.latest(min(1.0, every))
            live.update(draw(view, time.monotonic(), refresher.looking_since), refresh=True)
            left = None if left is None else left - 1
