"""`jobs --watch`: the latest jobs with bars, drawn again and again on a terminal or printed as JSON lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chunkmill.cli.canvas import bar
from chunkmill.cli.late import Client
from chunkmill.cli.output import STATE_STYLES, Screen, duration
from chunkmill.cli.watch.showing import show
from chunkmill.cli.watch.view import STALE_SECONDS
from chunkmill.domain.results import Job
from chunkmill.domain.shown import shown
from chunkmill.errors import StoreUnavailable
from chunkmill.telemetry.pace import Pace

PACE_SECONDS = 60.0
BAR, GAP, LEAST_NAME = 10, 2, 8
"""Columns of a bar, between two columns, and of a collection's name at least."""
NAME = 2
"""The place of the collection's name in a row."""


@dataclass(frozen=True, slots=True)
class JobsView:
    """The latest that is known. If there is an ``error``, the jobs are from before it."""

    jobs: Sequence[Job] = ()
    per_s: dict[int, float] = field(default_factory=dict)
    """How many texts of each open job got a vector per second, by the job's id."""
    seconds_left: dict[int, float | None] = field(default_factory=dict)
    """How long each open job still takes, by its id; None if nobody can tell yet."""
    error: str | None = None
    read_at: float | None = None
    """When the jobs were read, on this process's monotonic clock."""


class JobsWatcher:
    """Reads the latest jobs. While Postgres is away it keeps what it knows, and looks again."""

    def __init__(self, client: Client, limit: int) -> None:
        self._client, self._limit = client, limit
        self._paces: dict[int, Pace] = {}
        self._view = JobsView()

    def look(self) -> JobsView:
        """Read them once."""
        try:
            jobs = self._client.jobs(self._limit)
        except StoreUnavailable as error:
            self._view = replace(self._view, error=str(error), per_s={}, seconds_left={})
            self._paces.clear()
            return self._view
        now = time.monotonic()
        open_jobs = [job for job in jobs if not job.state.is_final]
        self._paces = {job.id: self._paces.get(job.id) or Pace(PACE_SECONDS) for job in open_jobs}
        per_s = {job.id: self._paces[job.id].add(now, job.embedded)[0] for job in open_jobs}
        seconds_left = {job.id: self._paces[job.id].seconds_left(job.remaining) for job in open_jobs}
        self._view = JobsView(tuple(jobs), per_s, seconds_left, None, now)
        return self._view

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()


def watch(screen: Screen, limit: int, *, every: float, times: int | None) -> None:
    """Show the jobs until Ctrl-C, or ``times`` times. Raises :class:`InvalidInput` in a pipe that gets tables."""

    def drawn(view: JobsView | None, at: float, looking_since: float) -> RenderableType:
        return draw(view, at, looking_since, screen.out.width)

    show(screen, "jobs --watch", lambda: JobsWatcher(Client.from_env(), limit), drawn, fields, every=every, times=times)


def fields(view: JobsView, at: float) -> dict[str, object]:
    """The JSON document of a view; ``age_s`` says how old it is."""
    return {
        "age_s": None if view.read_at is None else round(max(0.0, at - view.read_at), 1),
        "postgres_error": view.error,
        "jobs": [
            {
                "id": job.id,
                "state": job.state.value,
                "collection": job.collection,
                "contents": job.contents,
                "remaining": job.remaining,
                "dead": job.dead,
                "progress": round(job.progress, 4),
                "contents_per_s": view.per_s.get(job.id),
                "eta_s": view.seconds_left.get(job.id),
            }
            for job in view.jobs
        ],
    }


def draw(view: JobsView | None, at: float, looking_since: float, columns: int) -> RenderableType:
    """What a terminal of that width shows."""
    if view is None or (view.read_at is None and view.error is None):
        return Text(f"looking for {duration(at - looking_since)} …")
    head = Text.assemble(("Chunkmill", "bold"), "  jobs, end with Ctrl-C")
    age = None if view.read_at is None else at - view.read_at
    if age is not None and age > STALE_SECONDS:
        head.append(f"   {duration(age)} old", "bold red")
    parts: list[RenderableType] = [head]
    if view.error is not None:
        parts.append(Text(shown(view.error), style="red"))
    if not view.jobs:
        return Group(*parts, Text("No jobs yet.") if view.error is None else Text())
    has_dead = any(job.dead for job in view.jobs)
    heads = ["job", "state", "collection", "", "texts", *(["dead"] if has_dead else []), "per s", "done in"]
    rows = [_row(view, job, has_dead=has_dead) for job in view.jobs]
    # Only names are cut, so that all else can be read.
    others = [max(len(heads[i]), *(row[i].cell_len for row in rows)) for i in range(len(heads)) if i != NAME]
    room = max(LEAST_NAME, columns - sum(others) - GAP * len(others))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
    for title in heads:
        table.add_column(title, justify="left" if title in ("state", "collection", "") else "right", no_wrap=True)
    for row in rows:
        row[NAME].truncate(room, overflow="ellipsis")
        table.add_row(*row)
    return Group(*parts, Text(), table)


def _row(view: JobsView, job: Job, *, has_dead: bool) -> list[Text]:
    done, rate, eta = job.contents - job.remaining, view.per_s.get(job.id), view.seconds_left.get(job.id)
    style = STATE_STYLES.get(job.state.value, "")
    share = done / job.contents if job.contents else float(job.state.is_final)
    return [
        Text(str(job.id)),
        Text(job.state.value, style=style),
        Text(shown(job.collection)),
        Text(bar(share, BAR), style=style),
        Text(f"{done:,}/{job.contents:,}"),
        *([Text(f"{job.dead:,}", style="red" if job.dead else "")] if has_dead else []),
        Text(f"{rate:,.0f}" if rate else ""),
        Text(duration(round(eta)) if eta is not None else ""),
    ]
