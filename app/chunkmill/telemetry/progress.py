"""Shows how a job goes on, where its caller looks: in a notebook's cell, on a terminal, or as a line now and then.

It needs no library. In a notebook it updates one display of IPython's, which every front end of Jupyter knows; there is
no widget, so nothing has to be installed beside the notebook, and a saved notebook keeps the last state.
"""

from __future__ import annotations

import html
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from chunkmill.domain.shown import shown
from chunkmill.telemetry.pace import Pace

if TYPE_CHECKING:
    from chunkmill.domain.results import Job

DRAW_SECONDS = 0.2
"""How much time is between two drawings at least."""
LINE_SECONDS = 5.0
"""How much time is between two lines in a log; shorter work writes only its end."""
PACE_SECONDS = 30.0
"""Rates are measured over this many seconds. Vectors come ChunkBatch by ChunkBatch, so over less time they would jump.
"""
LEAST_BAR, MOST_BAR = 10, 40
"""The columns of a bar on a terminal."""
_CELL = "font-family:monospace;font-size:13px;padding:2px 0"


class JobProgress:
    """The progress of one job. :meth:`look` is given the job each time it was read, and :meth:`note` a sentence."""

    def __init__(self, job_id: int, *, stream: TextIO | None = None) -> None:
        self._job_id = job_id
        self._stream = sys.stderr if stream is None else stream
        self._is_notebook = stream is None and in_notebook()
        self._pace = Pace(PACE_SECONDS)
        self._next = 0.0
        self._began = time.monotonic()
        self._note = ""
        self._job: Job | None = None
        self._handle: Any = None
        self._line_open = False

    def look(self, job: Job) -> None:
        """Show the job. If it was drawn a moment ago, it is drawn again only at its end."""
        now = time.monotonic()
        done, is_last = job.contents - job.remaining, job.state.is_final
        (per_s,) = self._pace.add(now, job.embedded)
        self._job = job
        if not is_last and now < self._next:
            return
        words = f"{done:,} of {job.contents:,} {'text' if job.contents == 1 else 'texts'}"
        if is_last:
            words += f", {job.state} after {_span(now - self._began)}"
        elif per_s > 0:
            words += f", {per_s:,.{0 if per_s >= 10 else 1}f}/s"
            if (seconds := self._pace.seconds_left(job.remaining)) is not None:
                words += f", {_span(seconds)} left"
        if job.dead:
            words += f", {job.dead:,} dead"
        if is_last:
            self._note = ""
        self._draw(done / job.contents if job.contents else float(is_last), words, now, is_last=is_last)

    def note(self, said: str) -> None:
        """Show a sentence about what hinders the job, until it ends."""
        self._note = shown(said)
        if self._is_notebook:
            self._next = 0.0
            if self._job is not None:
                self.look(self._job)
        else:
            self._clear()
            self._write(f"job {self._job_id}: {self._note}\n")

    def close(self) -> None:
        """Leave the last state as it is."""
        if self._line_open:
            self._write("\n")
            self._line_open = False

    def _draw(self, share: float, words: str, now: float, *, is_last: bool) -> None:
        if self._is_notebook:
            self._next = now + DRAW_SECONDS
            cell = _Cell(self._job_id, share, words, self._note, is_last=is_last)
            if self._handle is None:
                from IPython.display import display

                self._handle = display(cell, display_id=True)
            else:
                self._handle.update(cell)
        elif _is_terminal(self._stream):
            self._next = now + DRAW_SECONDS
            self._clear()
            self._write(line(f"job {self._job_id}", share, words, shutil.get_terminal_size().columns))
            self._line_open = True
        else:
            if self._next or is_last:
                self._write(f"job {self._job_id}: {words}\n")
            self._next = now + LINE_SECONDS

    def _clear(self) -> None:
        if self._line_open:
            self._write("\r\x1b[2K")
            self._line_open = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return  # nobody reads it any more, and the job goes on all the same


class _Cell:
    """What a notebook's cell shows: an element for browsers, and words for all else."""

    def __init__(self, job_id: int, share: float, words: str, note: str, *, is_last: bool) -> None:
        self._job_id, self._share, self._words, self._note, self._is_last = job_id, share, words, note, is_last

    def _repr_html_(self) -> str:
        # Without a value the element says that nobody knows how much there is.
        value = f' value="{min(1.0, max(0.0, self._share)):.4f}"'
        note = f'<div style="color:#b35900">{html.escape(self._note)}</div>' if self._note else ""
        return (
            f'<div style="{_CELL}"><label>job {self._job_id} '
            f'<progress max="1"{value} style="width:40%;vertical-align:middle"></progress> '
            f"{html.escape(self._words)}</label>{note}</div>"
        )

    def __repr__(self) -> str:
        note = f"\n{self._note}" if self._note else ""
        return f"{line(f'job {self._job_id}', self._share, self._words, 80)}{note}"


def line(name: str, share: float, words: str, columns: int) -> str:
    """One line of at most that many columns, with a bar if there is room for one."""
    room = columns - 1 - len(name) - len(words) - 2
    if room < LEAST_BAR:
        return f"{name} {words}"[: columns - 1]
    size = min(MOST_BAR, room)
    full = round(min(1.0, max(0.0, share)) * size)
    return f"{name} {'━' * full}{'─' * (size - full)} {words}"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython is not imported if nobody did."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _span(seconds: float) -> str:
    """`42 s`, `3:07`, `2:05:00`."""
    minutes, left = divmod(round(seconds), 60)
    if not minutes:
        return f"{left} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
