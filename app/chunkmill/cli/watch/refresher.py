"""Reads servers again and again in a thread of its own, for `status --watch` and `jobs --watch`."""

from __future__ import annotations

import threading
import time
from typing import Generic, Protocol, TypeVar

View = TypeVar("View")
Seen = TypeVar("Seen", covariant=True)


class ViewReader(Protocol[Seen]):
    """What looks. ``look`` raises nothing because a server is away: the view says so."""

    def look(self) -> Seen: ...

    def close(self) -> None: ...


class Refresher(threading.Thread, Generic[View]):
    """Reads the servers repeatedly in a thread of its own, so that the screen's clock goes on while a server hangs."""

    def __init__(self, watcher: ViewReader[View], every: float) -> None:
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
