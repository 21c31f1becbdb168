"""Pictures of the results, drawn from their JSON alone."""

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
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

OURS, OURS_LIGHT, PEER, PEER_LIGHT, INK = "#0b6e4f", "#6fb98f", "#7a7f87", "#c3c7cc", "#2b2d31"
BAR = 0.8
Result = Mapping[str, Any]


def draw(folder: Path, machine: str) -> list[Path]:
    """A PNG beside every JSON of ``machine`` in ``folder`` that has a picture; returns their paths."""
    drawn = []
    for name, paint in PICTURES.items():
        source = folder / f"{name}-{machine}.json"
        if source.exists():
            figure = paint(json.loads(source.read_text(encoding="utf-8")))
            drawn.append(source.with_suffix(".png"))
            figure.savefig(drawn[-1], dpi=150)
            plt.close(figure)
    return drawn


def _engine(result: Result) -> Figure:
    """Groups of bars: a group per kind of text, a bar per contender, and a tick where the machine ends."""
    measured = [each for each in result["measurements"] if each["unit"] == "tokens/s"]
    groups = list(dict.fromkeys(each["group"] for each in measured))
    names = list(dict.fromkeys(each["name"] for each in measured))
    colours = _colours(names)
    height = BAR / len(names)
    figure, axes = _axes(1.6 + len(groups) * (0.35 + 0.3 * len(names)))
    for each in measured:
        y = groups.index(each["group"]) + (names.index(each["name"]) - (len(names) - 1) / 2) * height
        _bar(axes, y, height * 0.9, each, colours[each["name"]])
    for group in groups:
        half = next(each for each in measured if each["group"] == group)
        if (limit := half.get("tokens_per_second_at_gemm_rate")) is not None:
            at = groups.index(group)
            axes.plot([limit, limit], [at - BAR / 2, at + BAR / 2], color=INK, lw=1.2, ls=(0, (2, 2)))
    sizes = {each["group"]: f"{each['group']}\nmean {each['mean_tokens']:.0f} tokens" for each in measured}
    axes.set_yticks(range(len(groups)), [sizes[group] for group in groups])
    keys: list[Patch | Line2D] = [Patch(color=colours[name]) for name in names]
    keys.append(Line2D([], [], color=INK, lw=1.2, ls=(0, (2, 2))))
    limit_name = f"all of the machine's {names[0].split()[-1]} GEMM rate"
    figure.legend(keys, [*names, limit_name], loc="lower center", ncols=3, frameon=False, fontsize=8.5)
    _finish(figure, axes, "Text to NumPy, all-MiniLM-L6-v2", result, "tokens per second (median; whiskers: min to max)")
    figure.subplots_adjust(bottom=1.15 / figure.get_figheight())  # room for the legend
    axes.margins(y=0.02)
    return figure


def _pipeline(result: Result) -> Figure:
    measured = [each for each in result["measurements"] if each["unit"] == "tokens/s"]
    figure, axes = _axes(1.5 + 0.55 * len(measured))
    for y, each in enumerate(measured):
        _bar(axes, y, 0.62, each, (OURS, OURS_LIGHT, PEER)[min(y, 2)])
    labels = [each["name"].replace(", ", ",\n") for each in measured]
    labels[-1] = f"{measured[-1]['name'].replace(' ', chr(10), 1)}, encode()"
    axes.set_yticks(range(len(measured)), labels)
    texts = result["settings"]["texts"]
    _finish(
        figure, axes, f"{texts:,} texts to committed, searchable rows", result,
        "tokens per second (median; whiskers: min to max)",
    )  # fmt: skip
    return figure


def _million(result: Result) -> Figure:
    """Memory over chunks: the producer while it reads and while it commits, and Redis."""
    samples = result["samples"]
    figure, axes = _axes(4.2)
    axes.invert_yaxis()
    axes.xaxis.grid(visible=False)
    axes.yaxis.grid(visible=True, color="#e6e8ea")
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
    promised = next(each["target"] for each in result["measurements"] if each["name"] == "producer's peak memory")
    axes.axhline(promised, color=INK, lw=1.2, ls=(0, (2, 2)))
    axes.annotate(
        f"promised: below {promised:.0f} MiB", (1, promised), (0, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", fontsize=8.5, color=INK,
    )  # fmt: skip
    axes.set_ylim(0, max(top, promised) * 1.2)
    axes.set_ylabel("MiB in use", fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(_thousands)
    axes.legend(frameon=False, fontsize=8.5, loc="center right", bbox_to_anchor=(1, 0.32))
    _finish(
        figure,
        axes,
        f"Memory while one producer enqueues {result['settings']['chunks']:,} chunks",
        result,
        "chunks read from the generator, then committed",
    )
    return figure


PICTURES: dict[str, Callable[[Result], Figure]] = {
    "engine": _engine,
    "pipeline": _pipeline,
    "enqueue-million": _million,
}


def _bar(axes: Axes, y: float, height: float, each: Mapping[str, Any], colour: str) -> None:
    if each["refused"]:
        axes.annotate(" no figure: fails the cosine gate", (0, y), va="center", fontsize=8, color=INK, style="italic")
        return
    spread = [[each["median"] - each["min"]], [each["max"] - each["median"]]]
    axes.barh(y, each["median"], height, color=colour, xerr=spread, error_kw={"lw": 0.8, "ecolor": INK, "capsize": 2})
    ratio = next((found["median"] for to, found in each["ratios"].items() if to.endswith("fp32")), None)
    words = f"{each['median']:,.0f}" + (f"  ({ratio:.2f} ×)" if ratio else "")
    axes.annotate(
        words, (each["max"], y), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _colours(names: Sequence[str]) -> dict[str, str]:
    ours, peers = iter((OURS, OURS_LIGHT)), iter((PEER, PEER_LIGHT))
    return {name: next(ours if name.startswith("chunkmill") else peers) for name in names}


def _axes(height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(9, height))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.xaxis.grid(visible=True, color="#e6e8ea")
    axes.set_axisbelow(True)
    axes.invert_yaxis()  # the first one on top
    return figure, axes


def _thousands(value: float, _: object) -> str:
    return f"{value:,.0f}"


def _finish(figure: Figure, axes: Axes, title: str, result: Result, x_label: str) -> None:
    """Titles, machine and versions, and room for them."""
    found, made = result["machine"], result["versions"]
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(_thousands)
    axes.set_xlim(0, axes.get_xlim()[1] * (1.14 if axes.containers else 1.02))
    facts = [found["gpu"] or found["cpu"], f"{found['cores']} cores"]
    facts += [f"{name} {made[name]}" for name in ("torch", "sentence-transformers") if axes.containers and name in made]
    if not axes.containers:
        facts += [f"Postgres {made['postgres']}", f"Redis {made['redis-server']}"]
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.2 if axes.containers else 0.09, right=0.97, top=1 - 0.75 / height, bottom=0.65 / height
    )
    left = axes.get_position().x0 if not axes.containers else 0.02
    figure.text(left, 1 - 0.32 / height, title, fontsize=13, weight="bold", color=INK)
    figure.text(left, 1 - 0.56 / height, ", ".join(facts), fontsize=8.5, color=PEER)
