"""What a run prints: lines while it goes, and a table and a JSON document in the end."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from tests.chaos.executions import Count
from tests.chaos.world import Hit

PROGRESS_SECONDS = 5.0
KILLS = frozenset({"worker-killed", "worker-crashed", "all-workers-killed"})


@dataclass(frozen=True, slots=True)
class Result:
    """One fault and what followed. Seconds are None for what did not come."""

    kind: str
    hit: Hit
    progress: float | None
    """From the fault's end to the next committed vectors."""
    recovery: float | None
    """The same, until workers also claim new work and nothing is held by those struck."""
    takeover: float | None
    """From the strike until others have, or have done, what the struck held; None where they held nothing."""

    @property
    def survived(self) -> bool:
        return self.recovery is not None and not self.hit.problems


class Screen:
    """On a terminal lines and a status at the bottom; in a pipe a JSON line for each event."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False)
        self.is_terminal = self._console.is_terminal
        self._started = time.monotonic()
        self._next = 0.0
        self._mutex = threading.Lock()
        self._status: Status | None = None
        if self.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()

    def event(self, name: str, **details: object) -> None:
        with self._mutex:
            if self.is_terminal:
                shown = {key: value for key, value in details.items() if value not in (None, {}, [])}
                said = "  ".join(f"{key} {_short(value)}" for key, value in shown.items())
                self._console.print(f"{self._elapsed():7.1f} s  {name}  {said}")
            else:
                print(json.dumps({"event": name, "at": self._elapsed(), **details}), flush=True)

    def progress(self, **counts: object) -> None:
        """Cheap to call often."""
        if self._status is not None:
            self._status.update("  ".join(f"{key} {value}" for key, value in counts.items()))
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_SECONDS
            self.event("progress", **counts)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()

    def end(self, report: dict[str, Any]) -> None:
        """The table for a person, also beside the JSON of a pipe, where it goes to stderr."""
        if not self.is_terminal:
            self.event("report", **report)
        console = self._console if self.is_terminal else Console(stderr=True, width=140, highlight=False, markup=False)
        show(report, console)

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._started, 1)


def make_report(results: Sequence[Result], count: Count | None, ledger: dict[str, object]) -> dict[str, Any]:
    """The part of the report that is about the faults. ``count`` None: the real engine writes no log."""
    drains = [note for result in results if isinstance(note := result.hit.notes.get("drain_s"), float)]
    report: dict[str, Any] = {
        "faults": len(results),
        "survived": sum(result.survived for result in results),
        "to_progress_s": _spread([result.progress for result in results]),
        "to_recovery_s": _spread([result.recovery for result in results]),
        "to_takeover_s": _spread([result.takeover for result in results]),
        "drain_s": _spread(drains),
        "by_kind": [_of_kind(name, results, count) for name in sorted({result.kind for result in results})],
        "ledger": ledger,
    }
    if count is None:
        report |= {"texts_recomputed": ledger["recomputed"], "duplicates_executed": ledger["attempts_recomputing"]}
    else:
        kills = [result.hit.number for result in results if result.kind in KILLS]
        report |= {
            "texts_executed": count.executed,
            "texts_recomputed": count.recomputed,
            "recomputed_without_a_fault": count.recomputed_by_fault[None],
            "recomputed_per_kill": _spread([float(count.recomputed_by_fault[number]) for number in kills]),
            "duplicates_executed": count.duplicates,
        }
    return report


def _of_kind(name: str, results: Sequence[Result], count: Count | None) -> dict[str, Any]:
    mine = [result for result in results if result.kind == name]
    row: dict[str, Any] = {
        "kind": name,
        "struck": len(mine),
        "survived": sum(result.survived for result in mine),
        "to_progress_s": _spread([result.progress for result in mine]),
        "to_recovery_s": _spread([result.recovery for result in mine]),
        "to_takeover_s": _spread([result.takeover for result in mine]),
    }
    if count is not None:
        row["recomputed"] = sum(count.recomputed_by_fault[result.hit.number] for result in mine)
        row["duplicates"] = sum(count.duplicates_by_fault[result.hit.number] for result in mine)
    return row


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": round(statistics.median(known), 2), "worst": round(max(known), 2)}


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report for a person."""
    counted = "texts_executed" in report
    heads = ["fault", "survived", "progress s", "recovery s", "takeover s"]
    heads += ["recomputed", "duplicates"] if counted else []
    title = f"{report['engine']} engine, seed {report['seed']}; seconds are median / worst"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head == "fault" else "right", no_wrap=True)
    for row in [*report["by_kind"], {"kind": "all", "struck": report["faults"], **report}]:
        cells = [row["kind"], f"{row['survived']} of {row['struck']}"]
        for name in ("to_progress_s", "to_recovery_s", "to_takeover_s"):
            spread = row[name]
            cells.append(f"{spread['median']:.1f} / {spread['worst']:.1f}" if spread else "-")
        if counted:
            cells.append(str(row.get("recomputed", report["texts_recomputed"])))
            cells.append(str(row.get("duplicates", report["duplicates_executed"])))
        table.add_row(*cells)
    console.print(table)
    for name in (
        "chunks", "jobs", "seconds", "texts_executed", "texts_recomputed", "recomputed_per_kill",
        "recomputed_without_a_fault", "duplicates_executed", "drain_s", "unasked_exits", "lowest_similarity", "ledger",
    ):  # fmt: skip
        if name in report:
            console.print(f"{name.replace('_', ' '):<27} {_short(report[name])}")
    for problem in report["problems"]:
        console.print(f"BROKEN: {problem}", style="red")
    console.print(
        f"{report['survived']} of {report['faults']} faults survived; "
        + (f"{len(report['problems'])} promises broken" if report["problems"] else "every promise held")
    )


def _short(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
