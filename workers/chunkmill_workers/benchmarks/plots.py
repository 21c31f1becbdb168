"""Draws pictures of the results from their JSON alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no window, and no display needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from chunkmill_workers.benchmarks import report, summary
from chunkmill_workers.benchmarks.names import LATENCY, MEMORY, OUR, REFERENCE, START

OURS, OURS_LIGHT, PEER, PEER_LIGHT, INK, GRID = "#0b6e4f", "#6fb98f", "#7a7f87", "#c3c7cc", "#2b2d31", "#e6e8ea"
DPI = 110
"""Sharp enough for a README, and every picture below 150 kB."""
SPEED = "tokens per second (median; whiskers: min to max)"
Result = Mapping[str, Any]
Row = Mapping[str, Any]


def draw(results: Path, images: Path, machine: str) -> list[Path]:
    """Write a PNG to ``images`` for every picture that the JSON of ``machine`` in ``results`` has. Return the paths."""
    drawn = []
    for name, (benchmark, paint) in PICTURES.items():
        source = results / f"{benchmark}-{machine}.json"
        if not source.exists():
            continue
        figure = paint(json.loads(source.read_text(encoding="utf-8")))
        if figure is None:
            continue
        images.mkdir(parents=True, exist_ok=True)
        drawn.append(images / f"{name}-{machine}.png")
        figure.savefig(drawn[-1], dpi=DPI)
        plt.close(figure)
    return drawn


def _engine(result: Result) -> Figure:
    """A bar for each contender, fastest first, with its cosine, and a line where the machine ends."""
    rows = [row for row in summary.rows(result) if not row.get("limit")]
    figure, axes = _axes(1.9 + 0.34 * len(rows))
    for y, row in enumerate(rows):
        _bar(axes, y, row, fidelity=True)
    limits = [row for row in summary.rows(result) if row.get("limit") and row["median"]]
    top = 1.06 * max(row["max"] or 0 for row in rows)
    for at, row in enumerate(sorted(limits, key=lambda row: row["median"])):
        if row["median"] < 1.25 * top:  # a line far to the right would press all bars to the left
            axes.axvline(row["median"], color=INK, lw=1, ls=(0, (2, 2)), zorder=0)
            words, above = f"{row['precision']} products alone", (0, 3 + 9 * (at % 2))
            axes.annotate(
                words, (row["median"], 1), above, xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", fontsize=7.5, color=INK,
            )  # fmt: skip
    _name(axes, [row["name"] for row in rows])
    _legend(figure, rows)
    texts = f"{rows[0]['texts']:,} texts of {rows[0]['mean_tokens']:.0f} tokens on average"
    _finish(
        figure, axes, f"Text to NumPy: {result['settings']['model']}, {texts}", result, SPEED, left=0.27, right=0.78
    )
    return figure


def _lengths(result: Result) -> Figure | None:
    """A panel for each of the other groups of texts, with the contenders in the order of the first picture."""
    rows = [row for row in summary.rows(result) if not row.get("limit")]
    measured = [row for row in result["measurements"] if row["unit"] == "tokens/s"]
    groups = list(dict.fromkeys(row["group"] for row in measured))[1:]
    if not groups:
        return None
    figure, panels = _panels(len(groups), len(rows))
    for axes, group in zip(panels, groups, strict=True):
        own = {row["name"]: row for row in measured if row["group"] == group}
        for y, row in enumerate(rows):
            _bar(axes, y, own[row["name"]], short=True)
        mean = next(iter(own.values()))["mean_tokens"]
        axes.set_title(f"{group}, {mean:.0f} tokens", fontsize=9.5, color=INK, loc="left")
    title = f"Text to NumPy by length, tokens per second: {result['settings']['model']}"
    _finish_panels(figure, panels, rows, title, result)
    return figure


def _costs(result: Result) -> Figure:
    """Memory, time to start and time for one text of each contender. Shorter bars are better."""
    rows = [row for row in summary.rows(result) if not row.get("limit")]
    heads = {MEMORY: "peak memory, MiB", START: "start to first vector, s", LATENCY: "one short text, ms"}
    figure, panels = _panels(len(heads), len(rows))
    for axes, (group, head) in zip(panels, heads.items(), strict=True):
        own = {row["name"]: row for row in result["measurements"] if row["group"] == group}
        for y, row in enumerate(rows):
            if row["name"] in own:
                _bar(axes, y, {**own[row["name"]], "precision": row["precision"]}, short=True)
        axes.set_title(head, fontsize=9.5, color=INK, loc="left")
    title = f"What a process takes, less is better: {result['settings']['model']}"
    _finish_panels(figure, panels, rows, title, result)
    return figure


def _pipeline(result: Result) -> Figure:
    rows = [row for row in result["measurements"] if row["unit"] == "tokens/s"]
    figure, axes = _axes(1.5 + 0.5 * len(rows))
    for y, row in enumerate(rows):
        _bar(axes, y, row, fidelity="cosine_min" in row)
    names = [f"{row['name']}, encode() to NumPy" if row["name"] == REFERENCE else row["name"] for row in rows]
    _name(axes, [name.replace(", ", ",\n", 1) for name in names])
    title = f"{result['settings']['texts']:,} texts to committed, searchable rows"
    _finish(figure, axes, title, result, SPEED, left=0.3, right=0.78)
    return figure


def _million(result: Result) -> Figure:
    """Memory over chunks: the producer while it reads and while it commits, and Redis."""
    samples = result["samples"]
    figure, axes = _axes(4.2)
    axes.xaxis.grid(visible=False)
    axes.yaxis.grid(visible=True, color=GRID)
    lines: tuple[tuple[str, str, Callable[[Mapping[str, Any]], float], str], ...] = (
        ("reading", "producer, reading and checking", lambda s: s["rss_kib"] / 1024, OURS_LIGHT),
        ("committing", "producer, committing", lambda s: s["rss_kib"] / 1024, OURS),
        ("committing", "Redis", lambda s: s["redis_bytes"] / 2**20, PEER),
    )
    top = 0.0
    for phase, label, value, colour in lines:
        chosen = [s for s in samples if s["phase"] == phase and s["rss_kib"]]
        x, y = [s["chunks"] for s in chosen], [value(s) for s in chosen]
        if not x:
            continue
        axes.plot(x, y, color=colour, lw=2, label=label, marker="o", ms=3)
        top = max(top, *y)
    promised = next(row["target"] for row in result["measurements"] if row["name"] == "producer's peak memory")
    axes.axhline(promised, color=INK, lw=1.2, ls=(0, (2, 2)))
    axes.annotate(
        f"promised: below {promised:.0f} MiB", (1, promised), (0, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", fontsize=8.5, color=INK,
    )  # fmt: skip
    axes.set_ylim(0, max(top, promised) * 1.2)
    axes.set_ylabel("MiB in use", fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(_thousands)
    axes.legend(frameon=False, fontsize=8.5, loc="center right", bbox_to_anchor=(1, 0.32))
    title = f"Memory while one producer enqueues {result['settings']['chunks']:,} chunks"
    _finish(figure, axes, title, result, "chunks read from the generator, then committed", left=0.09, right=0.97)
    return figure


def _flat(result: Result) -> Figure:
    """Memory of every part over the chunks that are embedded."""
    samples = result["samples"]
    figure, axes = _axes(4.2)
    axes.xaxis.grid(visible=False)
    axes.yaxis.grid(visible=True, color=GRID)
    for part, colour in (("worker", OURS), ("producer", OURS_LIGHT), ("poller", PEER), ("Redis", INK)):
        chosen = [sample for sample in samples if sample[part] is not None]
        x, y = [sample["embedded"] for sample in chosen], [sample[part] for sample in chosen]
        axes.plot(x, y, color=colour, lw=2, label=part)
    axes.set_ylim(0)
    axes.set_ylabel("MiB in use", fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(_thousands)
    axes.legend(frameon=False, fontsize=8.5, loc="center right")
    title = f"Memory while {result['settings']['chunks']:,} chunks go through the whole system"
    _finish(figure, axes, title, result, "chunks embedded and committed", left=0.09, right=0.97)
    return figure


def _provider(result: Result) -> Figure:
    """Memory over the results that are read: one ProviderBatch alone, and three with up to four steps at a time."""
    figure, axes = _axes(4.2)
    axes.xaxis.grid(visible=False)
    axes.yaxis.grid(visible=True, color=GRID)
    for samples, part, label, colour in (
        ("alone", "worker", "worker, one ProviderBatch, one step at a time", OURS),
        ("samples", "worker", "worker, three ProviderBatches, up to four steps at a time", OURS_LIGHT),
        ("samples", "poller", "poller", PEER),
    ):
        read = [sample for sample in result[samples] if sample["written"]]
        x, y = [sample["written"] for sample in read], [sample[part] for sample in read]
        axes.plot(x, y, color=colour, lw=2, label=label)
    axes.set_ylim(0)
    axes.set_ylabel("MiB in use", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 0.05))
    title = f"Memory while results of {result['settings']['dimensions']:,} dimensions are read, 8 KB each"
    _finish(figure, axes, title, result, "results read, checked and committed", left=0.09, right=0.97)
    return figure


def _search(result: Result) -> Figure | None:
    """Recall over latency of the largest collections: the graph alone with each beam, and the search as it is."""
    points = result["curve"]
    lines = list(dict.fromkeys((point["kind"], point["topics"]) for point in points))
    if not lines:
        return None
    figure, axes = _axes(4.6)
    axes.yaxis.grid(visible=True, color=GRID)
    for (kind, topics), colour in zip(lines, (OURS, PEER, OURS_LIGHT, PEER_LIGHT), strict=False):
        own = [point for point in points if (point["kind"], point["topics"]) == (kind, topics)]
        graph = [point for point in own if point["plan"] == "graph alone"]
        label = f"{kind} topics, asked about {topics}" if kind == "own" else f"{kind} topics"
        x, y = [point["p50_ms"] for point in graph], [point["recall"] for point in graph]
        axes.plot(x, y, color=colour, lw=1.5, marker="o", ms=3, label=f"{label}: graph alone, by beam")
        for plan, marker in (("chunkmill", "*"), ("exact", "s")):
            for point in (point for point in own if point["plan"] == plan):
                size = 13 if plan == "chunkmill" else 5
                label_ = f"{label}: {'chunkmill' if plan == 'chunkmill' else 'exact scan'}"
                axes.plot([point["p50_ms"]], [point["recall"]], marker, color=colour, ms=size, label=label_)
    axes.axhline(0.98, color=INK, lw=1.2, ls=(0, (2, 2)))
    axes.annotate(
        "promised: 0.98", (0.01, 0.98), (0, -11), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=8.5, color=INK,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # the labels of 9 and 10 would touch
    axes.xaxis.set_minor_formatter(_thousands)
    axes.xaxis.set_major_formatter(_thousands)
    axes.tick_params(which="minor", length=0, labelsize=7, colors=PEER)
    axes.set_ylim(top=1.01)
    axes.set_ylabel("recall@10", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=7.5, loc="lower right")
    rows, of_all = points[0]["rows"], result["settings"]["rows_of_the_space"]
    title = f"Recall against latency: {rows:,} chunks in a space of {of_all:,}"
    _finish(figure, axes, title, result, "median latency in ms, without a filter", left=0.09, right=0.97)
    return figure


PICTURES: dict[str, tuple[str, Callable[[Result], Figure | None]]] = {
    "engine": ("engine", _engine),
    "engine-lengths": ("engine", _lengths),
    "engine-costs": ("engine", _costs),
    "pipeline": ("pipeline", _pipeline),
    "enqueue-million": ("enqueue-million", _million),
    "million": ("million", _flat),
    "provider": ("provider", _provider),
    "search": ("search", _search),
    "search-million": ("search-million", _search),
}
"""From a picture's name to the benchmark whose JSON it shows, and the function that draws it."""


def _bar(axes: Axes, y: float, row: Row, *, fidelity: bool = False, short: bool = False) -> None:
    """Draw a bar with its number. ``short`` leaves out ratio and cosine."""
    if row["refused"]:
        words = f"no figure: mean cosine {row['cosine_mean']:.4f}" if "cosine_mean" in row else "no figure"
        axes.annotate(words, (0, y), (3, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
        return
    spread = [[row["median"] - row["min"]], [row["max"] - row["median"]]]
    axes.barh(
        y, row["median"], 0.72, color=_colour(row), xerr=spread, error_kw={"lw": 0.8, "ecolor": INK, "capsize": 2}
    )
    words = report.number(row["median"])
    if not short:
        ratio = next((numbers["median"] for to, numbers in row["ratios"].items() if to == f"to {REFERENCE}"), None)
        words += f"  {ratio:.2f} ×" if ratio else ""
        words += f"  cosine {row['cosine_mean']:.5f}" if fidelity else ""
    axes.annotate(
        words, (row["max"], y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _colour(row: Row) -> str:
    int8 = row.get("precision") == "int8"
    if row["name"].startswith(OUR):
        return OURS_LIGHT if int8 else OURS
    return PEER_LIGHT if int8 else PEER


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw the legend of the colours in the picture, below it."""
    names = {
        OURS: "chunkmill", OURS_LIGHT: "chunkmill, int8", PEER: "others", PEER_LIGHT: "others, int8",
    }  # fmt: skip
    used = [colour for colour in names if colour in {_colour(row) for row in rows}]
    keys = [Patch(color=colour) for colour in used]
    figure.legend(
        keys, [names[colour] for colour in used], loc="lower right", ncols=len(used), frameon=False, fontsize=8
    )


def _axes(height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(9, height))
    _style(axes)
    return figure, axes


def _panels(columns: int, rows: int) -> tuple[Figure, list[Axes]]:
    figure, panels = plt.subplots(1, columns, figsize=(9, 1.7 + 0.27 * rows), sharey=True, squeeze=False)
    for axes in panels[0]:
        _style(axes)
    return figure, list(panels[0])


def _style(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.xaxis.grid(visible=True, color=GRID)
    axes.set_axisbelow(True)


def _name(axes: Axes, names: Sequence[str]) -> None:
    """Write the names beside the bars, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _thousands(value: float, _: object) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def _finish(figure: Figure, axes: Axes, title: str, result: Result, x_label: str, *, left: float, right: float) -> None:
    """Add title, machine and versions. The labels of the bars are to the right of ``right``."""
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(_thousands)
    height = figure.get_figheight()
    figure.subplots_adjust(left=left, right=right, top=1 - 0.85 / height, bottom=0.65 / height)
    _head(figure, title, result)


def _finish_panels(figure: Figure, panels: Sequence[Axes], rows: Sequence[Row], title: str, result: Result) -> None:
    _name(panels[0], [row["name"] for row in rows])
    for axes in panels:
        axes.xaxis.set_major_formatter(_thousands)
        axes.locator_params(axis="x", nbins=3)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.22)  # room for the numbers
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.27, right=0.98, top=1 - 1.0 / height, bottom=0.55 / height, wspace=0.08)
    _legend(figure, rows)
    _head(figure, title, result)


def _head(figure: Figure, title: str, result: Result) -> None:
    machine, made = result["machine"], result["versions"]
    details = [machine["gpu"] or machine["cpu"], f"{machine['cores']} cores", result["measured_at"][:10]]
    details += [f"Postgres {made['postgres']}", f"Redis {made['redis-server']}"] if "postgres" in made else []
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.3 / height, title, fontsize=12, weight="bold", color=INK)
    figure.text(0.02, 1 - 0.52 / height, ", ".join(details), fontsize=8.5, color=PEER)
