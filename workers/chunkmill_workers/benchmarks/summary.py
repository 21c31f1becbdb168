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
        return [{"benchmark": name, **each} for each in measured]
    headline = measured[0]["group"]
    found = [{"benchmark": name, **each} for each in measured if each["group"] == headline]
    for row in found:
        own = {each["group"]: each for each in measured if each["name"] == row["name"]}
        row["by_group"] = {
            group: each["median"] for group, each in own.items() if each["unit"] == "tokens/s" and group != headline
        }
        for key, group in (("peak_mib", MEMORY), ("start_seconds", START), ("short_text_ms", LATENCY)):
            if group in own:
                row[key] = own[group]["median"]
    return sorted(found, key=lambda row: (row.get("limit", False), -(row["median"] or 0)))


def show(results: Sequence[Result], files: Sequence[str], *, as_json: bool) -> None:
    """Print a table for a person, or one JSON document for a program."""
    if as_json:
        found = [row for result in results for row in rows(result)]
        skipped = [each for result in results for each in result.get("skipped", [])]
        told = {"table": found, "skipped": skipped, "files": list(files)}
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
    for met, line in [found for result in both for found in promises(result)]:
        console.print(f"[green]met[/green]    {line}" if met else f"[red]missed[/red] {line}")
    for each in {each["name"]: each for result in both for each in result["skipped"]}.values():
        command = f" Run: {each['install']}" if "install" in each else ""
        console.print(f"skipped: {each['name']}: {each['reason']}.{command}", markup=False)


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
    found = next((ratio for name, ratio in row["ratios"].items() if name.startswith(f"to {to}")), None)
    return form.format(found["median"]) if found else ""


def promises(result: Result) -> list[tuple[bool, str]]:
    """Every target in a result: whether it is met, and a line that says so."""
    found = []
    for each in result["measurements"]:
        candidates = [("", each), *((f" {to.removeprefix('to ')}", ratio) for to, ratio in each["ratios"].items())]
        for to, numbers in candidates:
            if "target" not in numbers:
                continue
            unit = f" ×{to}" if to else f" {each['unit']}"
            line = (
                f"{each['name']}, {each['group']}: {numbers['median']:.3g}{unit}, "
                f"the target is {numbers['target_is']} {numbers['target']:g}"
            )
            found.append((numbers["met"], line))
    return found
