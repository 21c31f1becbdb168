"""What a view of the ledger looks like: as facts for JSON, and drawn for a terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chunkmill.cli.output import NOTHING, duration, shown
from chunkmill.cli.paid.lanes import why
from chunkmill.domain.budget import dollars
from chunkmill.monitor.reports import Report
from chunkmill.monitor.snapshot import LANES, Money, Now, Tally
from chunkmill.monitor.watcher import View, lane_states

STALE_SECONDS = 3.0
"""A look that is older is said to be."""
SHOWN_JOBS = 10
STYLES = {"running": "green", "idle": "yellow", "paused": "yellow", "held": "yellow", "stopped": "red"}
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Rates:
    """Of all workers that report, over their last minutes. ``padding`` is the wasted share of what was computed."""

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


def facts(view: View, at: float) -> dict[str, object]:
    """One JSON document. What is not known is null; ``age_s`` says how old the rest is."""
    now, tally = view.now, view.tally
    return {
        "at": now.at.isoformat() if now else None,
        "age_s": _age(view.now_at, at),
        "counted_s_ago": _age(view.tally_at, at),
        "cost_s": {"now": round(view.now_seconds, 4), "tally": round(view.tally_seconds, 4)},
        "postgres_error": view.postgres_error,
        "redis_error": view.redis_error,
        "doorbells": view.doorbells,
        "lanes": _lane_facts(now, tally) if now else None,
        "rates": asdict(rates(now.workers)) if now else None,
        "workers": [_worker_facts(worker) for worker in now.workers] if now else None,
        "pollers": now.pollers if now else None,
        "cache_hit_rate": tally.cache_hits if tally else None,
        "jobs": tally.jobs if tally else None,
        "open_jobs": [asdict(job) | _eta(view, job.id) for job in tally.open_jobs] if tally else None,
        "dead_chunks": tally.dead_chunks if tally else None,
        "money_usd": asdict(now.money) if now else None,
        "recent_faults": now.recent if now else None,
        "faults": [asdict(fault) for fault in now.faults] if now else None,
    }


def draw(view: View | None, at: float, looking_since: float) -> RenderableType:
    if view is None:
        return Text(f"looking for {duration(at - looking_since)} …")
    parts: list[RenderableType] = [_head(view, at, looking_since)]
    parts += [Text(shown(error), style="red") for error in (view.postgres_error, view.redis_error) if error]
    if view.now is not None:
        parts += [Text(), _lanes(view.now, view), Text(), _totals(view.now, view.tally), Text()]
        parts += [_workers(view.now.workers), Text()] if view.now.workers else []
    if view.tally is not None and view.tally.open_jobs:
        parts += [_jobs(view, view.tally), Text()]
    if view.now is not None:
        parts += _faults(view.now)
    return Group(*parts)


def _head(view: View, at: float, looking_since: float) -> Text:
    head = Text.assemble(("Chunkmill", "bold"), "  Ctrl-C ends this")
    age = _age(view.now_at, at)
    if age is not None and view.now:
        head.append(f"   seen {view.now.at.astimezone():%H:%M:%S} in {1000 * view.now_seconds:.0f} ms", style="dim")
        if age > STALE_SECONDS:
            head.append(f"   {duration(age)} old", style="bold red")
    if view.tally_at is not None:
        head.append(f"   counted {duration(at - view.tally_at)} ago in {1000 * view.tally_seconds:.0f} ms", style="dim")
    if at - looking_since > STALE_SECONDS:
        head.append(f"   no answer for {duration(at - looking_since)}", style="bold red")
    return head


def _lanes(now: Now, view: View) -> Table:
    table = _table("lane", "state", "ready", "running", "oldest waits", "discarded", "why")
    reasons = {lane.route: why(lane) for lane in now.lanes}
    for route, state in lane_states(now).items():
        oldest = now.oldest.get(route)
        tally = view.tally
        _row(
            table,
            route.value,
            Text(state, style=STYLES[state]),
            tally.ready[route] if tally else None,
            now.running[route],
            None if oldest is None else duration(oldest),
            tally.discarded[route] if tally else None,
            reasons.get(route) or ("no worker reports" if state == "idle" else None),
        )
    return table


def _totals(now: Now, tally: Tally | None) -> Table:
    found = rates(now.workers)
    table = Table.grid(padding=(0, 2, 0, 0))
    pairs = [
        ("contents/s", f"{found.contents_per_s:,.0f}"),
        ("tokens/s", f"{found.tokens_per_s:,.0f}"),
        ("padding", _percent(found.padding)),
        ("cache hits", _percent(tally.cache_hits if tally else None)),
        ("dead chunks", f"{tally.dead_chunks:,}" if tally else NOTHING),
        ("pollers", "connected" if now.pollers else "none: chunkmill poller"),
    ]
    line = Text()
    for name, value in pairs:
        line.append(f"{name} ", style="dim")
        line.append(f"{value}   ", style="red" if value.startswith("none") else "")
    table.add_row(line)
    table.add_row(_money(now.money))
    return table


def _money(money: Money) -> Text:
    line = Text.assemble(("charged today ", "dim"), f"{dollars(money.today)} USD   ")
    line.append("this month ", style="dim")
    line.append(f"{dollars(money.month)} USD   ")
    if money.committed:
        line.append("committed ", style="dim")
        line.append(f"about {dollars(money.committed)} USD   ")
    if money.limit is not None:
        share = (money.month + money.committed) / money.limit if money.limit else 1
        line.append("of ", style="dim")
        line.append(f"{money.limit:f} USD, {share:.0%}", style="red" if share >= 1 else "")
    return line


def _workers(workers: Sequence[Report]) -> Table:
    table = _table("worker", "contents/s", "tokens/s", "padding", "busy", "GPU", "GPU memory", "holds", "")
    for worker in workers:
        silent = worker.is_silent
        memory = None
        if worker.gpu_memory_used is not None and worker.gpu_memory_total:
            memory = f"{worker.gpu_memory_used / GIB:.1f} of {worker.gpu_memory_total / GIB:.0f} GiB"
        _row(
            table,
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
    return table


def _jobs(view: View, tally: Tally) -> Table:
    table = _table("job", "collection", "state", "left", "of", "contents/s", "done in")
    for job in tally.open_jobs[:SHOWN_JOBS]:
        eta = view.etas.get(job.id)
        _row(
            table,
            job.id,
            job.collection,
            job.state.value,
            job.remaining,
            job.contents,
            f"{eta.per_second:,.0f}" if eta else None,
            duration(round(eta.seconds)) if eta else None,
        )
    if len(tally.open_jobs) > SHOWN_JOBS:
        _row(table, f"+{len(tally.open_jobs) - SHOWN_JOBS:,}", *[None] * 6)
    return table


def _faults(now: Now) -> list[RenderableType]:
    if not now.faults:
        return []
    recent = ", ".join(f"{n:,} {kind}" for kind, n in sorted(now.recent.items()) if n)
    lines: list[RenderableType] = [Text.assemble(("faults", "bold"), f"   in the last ten minutes: {recent or 'none'}")]
    for fault in now.faults:
        line = Text.assemble(
            (f"{fault.at.astimezone():%m-%d %H:%M:%S}  ", "dim"), (f"{fault.what:<9}  ", "red"), shown(fault.line)
        )
        line.no_wrap, line.overflow = True, "ellipsis"
        lines.append(line)
    return lines


def _lane_facts(now: Now, tally: Tally | None) -> list[dict[str, object]]:
    states = lane_states(now)
    reasons = {lane.route: why(lane) for lane in now.lanes}
    return [
        {
            "lane": route.value,
            "state": states[route],
            "why": reasons.get(route),
            "ready": tally.ready[route] if tally else None,
            "running": now.running[route],
            "oldest_waiting_s": now.oldest.get(route),
            "discarded": tally.discarded[route] if tally else None,
        }
        for route in LANES
    ]


def _worker_facts(worker: Report) -> dict[str, object]:
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
    """The share of its time in which a TokenBatch was on the device; a provider's worker has no device."""
    return None if worker.kind == "provider" else min(1.0, worker.rate(worker.engine_seconds))


def _age(then: float | None, at: float) -> float | None:
    return None if then is None else round(max(0.0, at - then), 1)


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def _table(*heads: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    words = {"lane", "state", "why", "worker", "collection", ""}
    for head in heads:
        table.add_column(head, justify="left" if head in words else "right", overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*[_cell(cell) for cell in cells])


def _cell(cell: object) -> Text:
    if isinstance(cell, Text):
        return cell
    if cell is None:
        return Text(NOTHING, style="dim")
    return Text(f"{cell:,}" if isinstance(cell, int) else shown(str(cell)))
