"""Progress on stderr: a bar on a terminal, else a JSON line every few seconds."""

from __future__ import annotations

import json
import time
from collections import deque
from types import TracebackType

import click
from rich.progress import BarColumn, Progress, TextColumn

from chunkmill.cli.output import Screen, duration

LINE_SECONDS = 5.0
"""Between two JSON lines; shorter work prints none."""
DRAW_SECONDS = 0.1
PACE_SECONDS = 30.0
"""Rates are those of the last half minute: tokens are booked by ChunkBatch, so a shorter look jumps."""


class Bar:
    """One piece of work under way, as a context manager."""

    def __init__(self, screen: Screen, what: str) -> None:
        self._what = what
        self._next = 0.0
        self._progress: Progress | None = None
        if screen.err.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[facts]}"),
                console=screen.err,
                transient=True,
                expand=True,
                refresh_per_second=5,
            )
            self._task = self._progress.add_task(what, total=None, facts="")
        else:
            self._next = time.monotonic() + LINE_SECONDS

    def __enter__(self) -> Bar:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, done: int, total: int | None, unit: str, facts: dict[str, float] | None = None) -> None:
        """``total`` None: not known yet. ``facts`` are those of :class:`Pace`. Cheap to call for every chunk."""
        now = time.monotonic()
        if now < self._next:
            return
        facts = facts or {}
        if self._progress is None:
            self._next = now + LINE_SECONDS
            line = {"progress": self._what, "done": done, "total": total, "unit": unit}
            click.echo(json.dumps(line | {name: round(value, 1) for name, value in facts.items()}), err=True)
            return
        self._next = now + DRAW_SECONDS
        counted = f"{done:,} {unit}" if total is None else f"{done:,}/{total:,} {unit}"
        self._progress.update(self._task, completed=done, total=total, facts="  ".join([counted, *_in_words(facts)]))

    def stage(self, what: str) -> None:
        """Go on under another name, with an end that is not known."""
        self._what = what
        if self._progress:
            self._progress.update(self._task, description=what, total=None)


class Pace:
    """Rates over the last half minute, and the time that is left at that rate."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int, int]] = deque()

    def facts(self, done: int, left: int, tokens: int) -> dict[str, float]:
        """``per_s``, ``tokens_per_s`` and ``eta_s``, as far as they are known."""
        now = time.monotonic()
        self._looks.append((now, done, tokens))
        while now - self._looks[0][0] > PACE_SECONDS:
            self._looks.popleft()
        then, done_then, tokens_then = self._looks[0]
        facts = {}
        if done > done_then and now > then:
            facts["per_s"] = (done - done_then) / (now - then)
            if tokens > tokens_then:
                facts["tokens_per_s"] = (tokens - tokens_then) / (now - then)
            facts["eta_s"] = left / facts["per_s"]
        return facts


def _in_words(facts: dict[str, float]) -> list[str]:
    words = []
    if "per_s" in facts:
        words.append(f"{facts['per_s']:,.0f}/s")
    if "tokens_per_s" in facts:
        words.append(f"{facts['tokens_per_s']:,.0f} tokens/s")
    if "eta_s" in facts:
        words.append(f"{duration(round(facts['eta_s']))} left")
    return words
