"""Turns a view of the ledger into JSON, or into tables for a terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chunkmill.cli.output import NOTHING, FittedTable, duration, line_of
from chunkmill.domain.budget import dollars
from chunkmill.domain.shown import shown
from chunkmill.monitor.reports import Report
from chunkmill.monitor.snapshot import LANES, Money, Snapshot, Totals, lane_states
from chunkmill.monitor.watcher import View

STALE_SECONDS = 3.0
"""If a view is older than this many seconds, its age is shown in red."""
OLD_COUNT_SECONDS = 30.0
"""If the counts are older than this many seconds, their age is shown. A large ledger is counted less often."""
SHOWN_JOBS = 10
WORDS = frozenset({"lane", "state", "why", "worker", "collection", ""})
"""The heads of columns that hold words. All others hold numbers."""
STYLES = {"running": "green", "idle": "dim", "paused": "yellow", "held": "yellow", "stopped": "red"}
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of all workers over their last minute. ``padding`` is the share of computed tokens that was padding."""

    contents_per_s: float
    tokens_per_s: float
    padding: float | None


def rates(workers: Iterable[Report]) -> Rates:
    live = [worker for worker in workers if not worker.is_silent]
    computed = [worker for worker in live if worker.padded_tokens]
    return Rates(
        sum(worker.rate(worker.contents) for worker in live),
        sum(worker.rate(worker.tokens) for worker in live),
        _waste(sum(worker.tokens for worker in computed), sum(worker.padded_tokens for worker in computed)),
    )


def fields(view: View, at: float) -> dict[str, object]:
    """The JSON document of a view. What is not known is null, and ``age_s`` says how old the rest is."""
    snapshot, totals = view.snapshot, view.totals
    return {
        "at": snapshot.at.isoformat() if snapshot else None,
        "age_s": _age(view.snapshot_at, at),
        "counted_s_ago": _age(view.totals_at, at),
        "cost_s": {"now": round(view.snapshot_seconds, 4), "tally": round(view.totals_seconds, 4)},
        "postgres_error": view.postgres_error,
        "redis_error": view.redis_error,
        "doorbells": view.doorbells,
        "lanes": _lane_fields(snapshot, totals) if snapshot else None,
        "rates": asdict(rates(snapshot.workers)) if snapshot else None,
        "workers": [_worker_fields(worker) for worker in snapshot.workers] if snapshot else None,
        "poller_connections": snapshot.connections.pollers if snapshot else None,
        "cache_hit_rate": totals.cache_hits if totals else None,
        "jobs": totals.jobs if totals else None,
        "open_jobs": [asdict(job) | _eta(view, job.id) for job in totals.open_jobs] if totals else None,
        "dead_chunks": totals.dead_chunks if totals else None,
        "money_usd": asdict(snapshot.money) if snapshot else None,
        "recent_faults": snapshot.recent if snapshot else None,
        "faults": [asdict(fault) for fault in snapshot.faults] if snapshot else None,
    }


def draw(view: View | None, at: float, looking_since: float) -> RenderableType:
    if view is None:
        return Text(f"looking for {duration(at - looking_since)} …")
    parts: list[RenderableType] = [_head(view, at, looking_since)]
    parts += [Text(shown(error), style="red") for error in (view.postgres_error, view.redis_error) if error]
    if view.snapshot is not None:
        parts += [Text(), _lanes(view.snapshot, view), Text(), _totals(view.snapshot, view.totals), Text()]
        parts += [_workers(view.snapshot.workers), Text()] if view.snapshot.workers else []
    if view.totals is not None and view.totals.open_jobs:
        parts += [_jobs(view, view.totals), Text()]
    if view.snapshot is not None:
        parts += _faults(view.snapshot)
    return Group(*parts)


def _head(view: View, at: float, looking_since: float) -> Text:
    head = Text.assemble(("Chunkmill", "bold"), "  end with Ctrl-C")
    age = _age(view.snapshot_at, at)
    if age is not None and view.snapshot:
        head.append(f"   as of {view.snapshot.at.astimezone():%H:%M:%S}", style="dim")
        if age > STALE_SECONDS:
            head.append(f"   {duration(age)} old", style="bold red")
    if view.totals_at is not None and at - view.totals_at > OLD_COUNT_SECONDS:
        head.append(f"   counted {duration(round(at - view.totals_at))} ago", style="dim")
    if at - looking_since > STALE_SECONDS:
        head.append(f"   no answer for {duration(at - looking_since)}", style="bold red")
    return head


def _lanes(snapshot: Snapshot, view: View) -> FittedTable:
    rows: list[Sequence[object]] = []
    reasons = {lane.route: lane.why for lane in snapshot.lanes}
    for route, state in lane_states(snapshot).items():
        oldest = snapshot.oldest.get(route)
        totals = view.totals
        is_missed = state == "idle" and oldest is not None
        rows.append(
            (
                route.value,
                Text(state, style="yellow" if is_missed else STYLES[state]),
                totals.ready[route] if totals else None,
                snapshot.running[route],
                None if oldest is None else duration(oldest),
                totals.discarded[route] if totals else None,
                reasons.get(route) or ("no worker reports" if state == "idle" else None),
            )
        )
    return _table(("lane", "state", "ready", "running", "oldest waits", "discarded", "why"), rows)


def _totals(snapshot: Snapshot, totals: Totals | None) -> Table:
    current = rates(snapshot.workers)
    table = Table.grid(padding=(0, 2, 0, 0))
    pairs = [
        ("texts/s", f"{current.contents_per_s:,.0f}"),
        ("tokens/s", f"{current.tokens_per_s:,.0f}"),
        ("padding", _percent(current.padding)),
        ("cache hits", _percent(totals.cache_hits if totals else None)),
        ("dead chunks", f"{totals.dead_chunks:,}" if totals else NOTHING),
        ("pollers", "connected" if snapshot.connections.pollers else "none, start one: chunkmill poller"),
    ]
    for row in (pairs[:4], pairs[4:]):  # all of them are too long for a terminal with 80 columns
        line = Text()
        for name, value in row:
            line.append(f"{name} ", style="dim")
            line.append(f"{value}   ", style="red" if value.startswith("none") else "")
        table.add_row(line)
    table.add_row(_money(snapshot.money))
    return table


def _money(money: Money) -> Text:
    line = Text.assemble(("charged today ", "dim"), f"{dollars(money.today)} USD   ")
    line.append("this month ", style="dim")
    line.append(f"{dollars(money.month)} USD   ")
    if money.committed:
        line.append("committed ", style="dim")
        line.append(f"about {dollars(money.committed)} USD   ")
    for name, usd in (("lost", money.lost), ("maybe charged", money.maybe_charged)):
        if usd:
            line.append(f"{name} ", style="dim")
            line.append(f"{dollars(usd)} USD   ", style="red")
    if money.limit is not None:
        share = (money.month + money.committed) / money.limit if money.limit else 1
        line.append("of ", style="dim")
        line.append(f"{money.limit:f} USD, {share:.0%}", style="red" if share >= 1 else "")
    return line


def _workers(workers: Sequence[Report]) -> FittedTable:
    rows: list[Sequence[object]] = []
    for worker in workers:
        silent = worker.is_silent
        memory = None
        if worker.gpu_memory_used is not None and worker.gpu_memory_total:
            memory = f"{worker.gpu_memory_used / GIB:.1f} of {worker.gpu_memory_total / GIB:.0f} GiB"
        rows.append(
            (
                worker.label,
                None if silent else f"{worker.rate(worker.contents):,.0f}",
                None if silent else f"{worker.rate(worker.tokens):,.0f}",
                None if silent else _percent(_waste(worker.tokens, worker.padded_tokens)),
                None if silent else _percent(_busy(worker)),
                None if silent else _percent(worker.gpu_busy),
                None if silent else memory,
                None if silent else worker.held,
                Text(f"silent for {duration(worker.silent_seconds)}", style="red") if silent else "",
            )
        )
    heads = ("worker", "texts/s", "tokens/s", "padding", "busy", "GPU", "GPU memory", "holds", "")
    # Without a GPU, or if nobody is silent, a column says nothing.
    kept = [
        index for index, head in enumerate(heads)
        if (head not in ("GPU", "GPU memory") or any(row[index] not in (None, NOTHING) for row in rows))
        and (head or any(worker.is_silent for worker in workers))
    ]  # fmt: skip
    return _table([heads[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _jobs(view: View, totals: Totals) -> FittedTable:
    rows: list[Sequence[object]] = []
    for job in totals.open_jobs[:SHOWN_JOBS]:
        eta = view.etas.get(job.id)
        rows.append(
            (
                job.id,
                job.collection,
                job.state.value,
                job.remaining,
                job.contents,
                f"{eta.per_second:,.0f}" if eta else None,
                duration(round(eta.seconds)) if eta and eta.seconds is not None else None,
            )
        )
    if len(totals.open_jobs) > SHOWN_JOBS:
        rows.append((f"+{len(totals.open_jobs) - SHOWN_JOBS:,}", *[None] * 6))
    return _table(("job", "collection", "state", "texts left", "of", "texts/s", "done in"), rows)


def _faults(snapshot: Snapshot) -> list[RenderableType]:
    if not snapshot.faults:
        return []
    recent = ", ".join(f"{n:,} {kind}" for kind, n in sorted(snapshot.recent.items()) if n)
    lines: list[RenderableType] = [Text.assemble(("faults", "bold"), f"   in the last ten minutes: {recent or 'none'}")]
    for fault in snapshot.faults:
        line = line_of((f"{fault.at.astimezone():%m-%d %H:%M:%S}  ", "dim"), (f"{fault.what:<9}  ", "red"), fault.line)
        line.no_wrap, line.overflow = True, "ellipsis"
        lines.append(line)
    return lines


def _lane_fields(snapshot: Snapshot, totals: Totals | None) -> list[dict[str, object]]:
    states = lane_states(snapshot)
    reasons = {lane.route: lane.why for lane in snapshot.lanes}
    return [
        {
            "lane": route.value,
            "state": states[route],
            "why": reasons.get(route),
            "ready": totals.ready[route] if totals else None,
            "running": snapshot.running[route],
            "oldest_waiting_s": snapshot.oldest.get(route),
            "discarded": totals.discarded[route] if totals else None,
        }
        for route in LANES
    ]


def _worker_fields(worker: Report) -> dict[str, object]:
    return {
        "name": worker.name,
        "label": worker.label,
        "kind": worker.kind,
        "device": worker.device,
        "started_at": worker.started_at.isoformat(),
        "silent_s": round(worker.silent_seconds, 1),
        "silent": worker.is_silent,
        "contents_per_s": worker.rate(worker.contents),
        "tokens_per_s": worker.rate(worker.tokens),
        "padding": _waste(worker.tokens, worker.padded_tokens),
        "busy": _busy(worker),
        "held": worker.held,
        "gpu_busy": worker.gpu_busy,
        "gpu_memory_used": worker.gpu_memory_used,
        "gpu_memory_total": worker.gpu_memory_total,
    }


def _eta(view: View, job_id: int) -> dict[str, object]:
    eta = view.etas.get(job_id)
    return {"contents_per_s": eta.per_second if eta else None, "eta_s": eta.seconds if eta else None}


def _waste(tokens: int, padded: int) -> float | None:
    return max(0.0, 1 - tokens / padded) if padded else None


def _busy(worker: Report) -> float | None:
    """The share of time in which a TokenBatch was on the device; None for a worker of paid routes."""
    return None if worker.kind == "provider" else min(1.0, worker.rate(worker.engine_seconds))


def _age(then: float | None, at: float) -> float | None:
    return None if then is None else round(max(0.0, at - then), 1)


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> FittedTable:
    cells = [[_cell(cell) for cell in row] for row in rows]
    return FittedTable(heads, cells, [head not in WORDS for head in heads])


def _cell(cell: object) -> Text:
    if isinstance(cell, Text):
        return cell
    if cell is None:
        return Text(NOTHING, style="dim")
    return Text(f"{cell:,}" if isinstance(cell, int) else shown(str(cell)))
