"""The table at the end: speed, fidelity and cost of each contender, from the JSON of the results alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from chunkmill_workers.benchmarks import report
from chunkmill_workers.benchmarks.names import LATENCY, LIMIT, MEMORY, REFERENCE, START

Result = Mapping[str, Any]
Row = dict[str, Any]

TITLES = {"engine": "text to NumPy", "pipeline": "text to committed rows"}
WIDE = 110
SHORTER = {"sentence-transformers": "ST", ", the whole": ", whole", ", its engine": ", engine"}
NOTES = (
    "tok/s: median of the rounds, ±: half of max - min. ×ref: to sentence-transformers (ST) in fp32 as it comes. GEMM: "
    "share of the machine's matrix products in the same precision. cosmin, mean: cosines to fp32. MiB: peak memory. "
    "start: s from the process's start to its first vector. ms: one short text."
)


def rows(result: Result) -> list[Row]:
    """One row for each measurement. For ``engine``, one for each contender, fastest first, with all its numbers.

    A contender's speed is that on the first group of texts; ``by_group`` has the others.
    """
    name, measured = result["benchmark"], result["measurements"]
    if name != "engine":
        return [{"benchmark": name, **item} for item in measured]
    headline = measured[0]["group"]
    table = [{"benchmark": name, **item} for item in measured if item["group"] == headline]
    for row in table:
        own = {item["group"]: item for item in measured if item["name"] == row["name"]}
        row["by_group"] = {
            group: item["median"] for group, item in own.items() if item["unit"] == "tokens/s" and group != headline
        }
        for key, group in (("peak_mib", MEMORY), ("start_seconds", START), ("short_text_ms", LATENCY)):
            if group in own:
                row[key] = own[group]["median"]
    return sorted(table, key=lambda row: (row.get("limit", False), -(row["median"] or 0)))


def show(results: Sequence[Result], files: Sequence[str], *, as_json: bool) -> None:
    """Print a table for a person, or one JSON document for a program."""
    if as_json:
        table = [row for result in results for row in rows(result)]
        skipped = [peer for result in results for peer in result.get("skipped", [])]
        told = {"table": table, "skipped": skipped, "files": list(files)}
        click.echo(json.dumps(told, indent=1, ensure_ascii=False))
        return
    for result in results:
        if result["benchmark"] not in ("engine", "pipeline"):
            report.show(result)
    both = [result for result in results if result["benchmark"] in ("engine", "pipeline")]
    if not both:
        return
    console = Console(highlight=False)
    console.print(_table(both, console.width))
    console.print(NOTES, style="dim")
    for met, line in [promise for result in both for promise in promises(result)]:
        console.print(f"[green]met[/green]    {line}" if met else f"[red]missed[/red] {line}")
    for peer in {peer["name"]: peer for result in both for peer in result["skipped"]}.values():
        command = f" Run: {peer['install']}" if "install" in peer else ""
        console.print(f"skipped: {peer['name']}: {peer['reason']}.{command}", markup=False)


def _table(results: Sequence[Result], width: int) -> Table:
    """The table. It fits into 80 columns; a wider terminal also shows the other groups of texts."""
    first = results[0]
    title = f"{first['settings']['model']} on {first['machine']['cpu']}, {first['machine']['cores']} cores"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), header_style="bold", title_justify="left")
    engine = next((result for result in results if result["benchmark"] == "engine"), None)
    groups = list(rows(engine)[0]["by_group"]) if engine and width > WIDE else []
    table.add_column("", no_wrap=True)
    heads = ("tok/s", "±", "×ref", "GEMM", "cosmin", "mean", *(group.removesuffix(" texts") for group in groups))
    for head in (*heads, "MiB", "start", "ms"):
        table.add_column(head, justify="right", no_wrap=True)
    for result in results:
        table.add_section()
        table.add_row(f"[bold]{TITLES[result['benchmark']]}[/bold]")
        for row in rows(result):
            if row["unit"] == "tokens/s":
                table.add_row(*_cells(row, groups))
    return table


def _cells(row: Row, groups: Sequence[str]) -> list[str]:
    name = f" {row['name']}"
    for long, short in SHORTER.items():
        name = name.replace(long, short)
    fidelity = [f"{row['cosine_min']:.4f}", f"{row['cosine_mean']:.5f}"] if "cosine_min" in row else ["", ""]
    if row["refused"]:
        return [name, "[yellow]gate[/yellow]", "", "", "", *fidelity]
    speeds = [row.get("by_group", {}).get(group) for group in groups]
    costs = [row.get(key) for key in ("peak_mib", "start_seconds", "short_text_ms")]
    spread = (row["max"] - row["min"]) / row["median"] / 2
    return [
        name,
        report.number(row["median"]),
        f"{spread:.0%}" if len(row["rounds"]) > 1 else "",
        _ratio(row, REFERENCE, "{:.2f}"),
        _ratio(row, LIMIT, "{:.0%}"),
        *fidelity,
        *("" if speed is None else report.number(speed) for speed in speeds),
        *("" if cost is None else f"{cost:.0f}" if cost >= 100 else f"{cost:.1f}" for cost in costs),
    ]


def _ratio(row: Row, to: str, form: str) -> str:
    numbers = next((ratio for name, ratio in row["ratios"].items() if name.startswith(f"to {to}")), None)
    return form.format(numbers["median"]) if numbers else ""


def promises(result: Result) -> list[tuple[bool, str]]:
    """Every target in a result: whether it is met, and a line that says so."""
    lines = []
    for item in result["measurements"]:
        candidates = [("", item), *((f" {to.removeprefix('to ')}", ratio) for to, ratio in item["ratios"].items())]
        for to, numbers in candidates:
            if "target" not in numbers:
                continue
            unit = f" ×{to}" if to else f" {item['unit']}"
            line = (
                f"{item['name']}, {item['group']}: {numbers['median']:.3g}{unit}, "
                f"the target is {numbers['target_is']} {numbers['target']:g}"
            )
            lines.append((numbers["met"], line))
    return lines
