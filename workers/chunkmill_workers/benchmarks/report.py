"""Writes results: a JSON file for each benchmark, a table for a person, and lines that show progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.stats import Measurement

Say = Callable[[str], None]


def document(
    name: str, rows: Sequence[Measurement], *, settings: Mapping[str, Any], versions: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One result as it is written to JSON."""
    return {
        "benchmark": name,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions() | dict(versions or {}),
        "settings": dict(settings),
        "measurements": [measured.as_json() for measured in rows],
        **(extra or {}),
    }


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``<name>-<machine>.json``, which replaces that of an earlier run, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{machine.slug(result['machine'])}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def show(result: Mapping[str, Any]) -> None:
    """Print the table of one benchmark."""
    table = Table(title=f"{result['benchmark']}: {result['machine']['cpu']}, {result['machine']['cores']} cores")
    for head in ("", "median", "min to max", "unit", "ratio", "target"):
        table.add_column(head, justify="left" if head in ("", "unit", "target") else "right")
    group = None
    for row in result["measurements"]:
        if row["group"] != group:
            group = row["group"]
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        ratios = "\n".join(
            f"{ratio['median']:.3g} × {to.removeprefix('to ')}{promised(ratio)}" for to, ratio in row["ratios"].items()
        )
        if row["refused"]:
            table.add_row(f"  {row['name']}", "none", "", row["unit"], f"[yellow]{row['refused']}[/yellow]")
            continue
        spread = f"{number(row['min'])} to {number(row['max'])}" if len(row["rounds"]) > 1 else ""
        table.add_row(f"  {row['name']}", number(row["median"]), spread, row["unit"], ratios, promised(row))
    Console().print(table)


def number(value: float) -> str:
    """``value`` with three digits or more, and with separated thousands."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def promised(numbers: Mapping[str, Any], form: str | None = None) -> str:
    """The target of a measurement or a ratio, green if it is met and else red; empty if there is none."""
    if "target" not in numbers:
        return ""
    sign = "≤" if numbers["target_is"] == "at most" else "≥"
    colour = "green" if numbers["met"] else "red"
    value = form.format(numbers["target"]) if form else number(numbers["target"])
    return f" [{colour}]{sign} {value}[/{colour}]"


class Activity:
    """Shows what is being measured: a spinner on a terminal, else short lines on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._began = time.monotonic()
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Activity:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def within(self, what: str) -> Say:
        """A function that shows its argument, after ``what``."""

        def say(now: str) -> None:
            if self._progress:
                self._progress.update(self._task, description=f"{what}: {now}")
            else:
                self._console.print(
                    f"{time.monotonic() - self._began:6.0f} s  {what}: {now}", highlight=False, soft_wrap=True
                )

        return say
