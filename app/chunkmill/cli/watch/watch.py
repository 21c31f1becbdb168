"""`status --watch`: the look again and again, drawn on a terminal, or as a JSON document a line."""

from __future__ import annotations

import threading
import time

from rich.live import Live

from chunkmill.cli.output import Screen
from chunkmill.cli.watch.view import draw, facts
from chunkmill.errors import InvalidInput
from chunkmill.monitor.watcher import Looker, View
from chunkmill.settings import Settings

PATIENCE_SECONDS = 5.0


class Watcher(threading.Thread):
    """Looks in a thread of its own: a server that is away takes seconds to say so, and the clock goes on meanwhile."""

    def __init__(self, looker: Looker, every: float) -> None:
        super().__init__(name="watcher", daemon=True)
        self._looker = looker
        self._every = every
        self._stop_watching = threading.Event()
        self._seen = threading.Condition()
        self.view: View | None = None
        self.looking_since = time.monotonic()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_watching.is_set():
                self.looking_since = time.monotonic()
                view = self._looker.look()
                with self._seen:
                    self.view = view
                    self._seen.notify_all()
                self._stop_watching.wait(self._every)
        except BaseException as error:  # noqa: BLE001 - raised again where somebody reads it
            with self._seen:
                self.error = error
                self._seen.notify_all()
        finally:
            self._looker.close()

    def latest(self, timeout: float) -> View | None:
        """What was seen last, after at most so long for the next look. None: nothing yet."""
        with self._seen:
            self._seen.wait(timeout)
        if self.error is not None:
            raise self.error
        return self.view

    def stop(self) -> None:
        self._stop_watching.set()
        self.join(timeout=1)  # a look that hangs ends with the process


def watch(screen: Screen, settings: Settings, *, every: float, times: int | None) -> None:
    """Until Ctrl-C, or ``times`` looks. Raises :class:`InvalidInput` in a pipe without ``--json``."""
    if not screen.json and not screen.out.is_terminal:
        raise InvalidInput(
            "`status --watch` draws on a terminal. In a pipe add --json: a document a line, one per look."
        )
    watcher = Watcher(Looker(settings), every)
    watcher.start()
    try:
        if screen.json:
            _print(screen, watcher, every, times)
        else:
            _draw(screen, watcher, every, times)
    except KeyboardInterrupt:
        pass  # how one ends a watch
    finally:
        watcher.stop()


def _print(screen: Screen, watcher: Watcher, every: float, times: int | None) -> None:
    left = times
    while left is None or left > 0:
        # One line a look; while a look hangs, the old one with its age.
        view = watcher.latest(max(PATIENCE_SECONDS, 3 * every))
        if view is not None:
            screen.line(facts(view, time.monotonic()))
            left = None if left is None else left - 1


def _draw(screen: Screen, watcher: Watcher, every: float, times: int | None) -> None:
    left = times
    with Live(console=screen.out, screen=True, auto_refresh=False) as live:
        while left is None or left > 0:
            view = watcher.latest(min(1.0, every))
            live.update(draw(view, time.monotonic(), watcher.looking_since), refresh=True)
            left = None if left is None else left - 1
