"""Progress on stderr: a bar on a terminal, otherwise a JSON line every few seconds."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from types import TracebackType

import click
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from chunkmill.cli.output import Screen, duration
from chunkmill.domain.shown import shown
from chunkmill.telemetry.pace import Pace

LINE_SECONDS = 5.0
"""How many seconds pass between two JSON lines, also while nothing is counted; shorter work prints none."""
DRAW_SECONDS = 0.1
WAIT_SECONDS = 0.5
"""How long a bar that waits is not drawn if nothing is counted."""
PACE_SECONDS = 30.0
"""Rates are measured over this many seconds. Tokens are booked by ChunkBatch, so over less time the rate would jump."""


class Bar:
    """Shows the progress of one piece of work, as a context manager.

    On a terminal it is drawn from the beginning, or if it ``waits``, from the first update or after half a second, so
    that work that is refused at once shows none.
    """

    def __init__(self, screen: Screen, what: str, *, waits: bool = False) -> None:
        self._what = what
        self._waits = waits
        self._next = 0.0
        self._line: dict[str, float | str | None] = {}
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._beside: threading.Thread | None = None
        self._progress: Progress | None = None
        if screen.err.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=screen.err,
                transient=True,
                expand=True,
                refresh_per_second=5,
            )
            self._task = self._progress.add_task(shown(what), total=None, numbers="")

    def __enter__(self) -> Bar:
        if self._progress is not None and not self._waits:
            self._progress.start()
        else:
            beside = self._print_lines if self._progress is None else partial(self._draw_later, self._progress)
            self._beside = threading.Thread(target=beside, name="chunkmill-progress", daemon=True)
            self._beside.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._beside is not None:
            self._beside.join()
        if self._progress is not None:
            self._progress.stop()

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            line = {"progress": self._what, **self._line, "seconds": round(time.monotonic() - self._began, 1)}
            click.echo(json.dumps(line), err=True)

    def _draw_later(self, progress: Progress) -> None:
        if not self._ended.wait(WAIT_SECONDS):
            progress.start()

    def update(self, done: int, total: int | None, unit: str, known: dict[str, float] | None = None) -> None:
        """Show ``done`` of ``total``, which is None if it is not known yet, and the :func:`rates` that are ``known``.

        It is cheap enough to call for every chunk.
        """
        known = known or {}
        if self._progress is None:
            self._line = {"done": done, "total": total, "unit": unit} | {
                name: round(value, 1) for name, value in known.items()
            }
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._progress.start()  # which does nothing if it is drawn already
        self._next = now + DRAW_SECONDS
        counted = f"{done:,} {unit}" if total is None else f"{done:,}/{total:,} {unit}"
        self._progress.update(self._task, completed=done, total=total, numbers="  ".join([counted, *_in_words(known)]))

    def note(self, said: str) -> None:
        """Show a sentence that stays: above the bar, or as a line of its own."""
        if self._progress is None:
            click.echo(json.dumps({"progress": self._what, "note": said}), err=True)
        else:
            self._progress.console.print(Text(shown(said), "yellow"))

    def stage(self, what: str) -> None:
        """Continue under another name. What was counted under the last one is gone, and the total is not known."""
        self._what, self._line = what, {}
        if self._progress:
            self._progress.update(self._task, description=shown(what), completed=0, total=None, numbers="")


def rates(pace: Pace, done: int, left: int, tokens: int) -> dict[str, float]:
    """``per_s``, ``tokens_per_s`` and ``eta_s``, as far as they are known."""
    per_s, tokens_per_s = pace.add(time.monotonic(), done, tokens)
    known = {}
    if per_s > 0:
        known["per_s"] = per_s
        if tokens_per_s > 0:
            known["tokens_per_s"] = tokens_per_s
        if (seconds := pace.seconds_left(left)) is not None:
            known["eta_s"] = seconds
    return known


def _in_words(known: dict[str, float]) -> list[str]:
    words = []
    if "per_s" in known:
        words.append(f"{known['per_s']:,.0f}/s")
    if "tokens_per_s" in known:
        words.append(f"{known['tokens_per_s']:,.0f} tokens/s")
    if "eta_s" in known:
        words.append(f"{duration(round(known['eta_s']))} left")
    return words
