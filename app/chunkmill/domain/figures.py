"""Pictures as PNG and SVG, drawn by matplotlib, which is imported when something is drawn (extra ``pictures``)."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from chunkmill.errors import InvalidInput, install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from chunkmill.domain.maps import CollectionMap

INK, PALE, GRID = "#222222", "#777777", "#e5e5e5"
STYLE: Any = {
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "svg.fonttype": "none",  # texts of an SVG stay texts
    "xtick.color": PALE,
    "ytick.color": PALE,
}
DOTS_PER_INCH = 150


def figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty picture of ``width`` × ``height`` inches, with axes above each other that share their times.

    It belongs to no window and no other thread. Raises :class:`InvalidInput` if matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure as Empty

    with mpl.rc_context(STYLE):
        made = Empty(figsize=(width, height), layout="constrained")
        axes = made.subplots(rows, 1, squeeze=False, sharex=True)
    return made, list(axes[:, 0])


def require_matplotlib() -> None:
    """Raise :class:`InvalidInput` with the command that installs it, unless it is there."""
    if find_spec("matplotlib") is None:
        raise InvalidInput(
            "PNG and SVG are drawn by matplotlib, which is not installed. The terminal and .html need nothing. For "
            f"pictures run: {install_command('pictures')}"
        )


def written(made: Figure, kind: str) -> bytes:
    """The bytes of the file: ``png`` or ``svg``. The same picture gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.text import Text

    for text in made.findobj(Text):
        text.set_parse_math(False)  # a name, an id or a value with two dollar signs is not a formula
    out = io.BytesIO()
    nothing = {"Date": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context({**STYLE, "svg.hashsalt": "chunkmill"}):
        made.savefig(out, format=kind, dpi=DOTS_PER_INCH, metadata=nothing)
    return out.getvalue()


def map_figure(drawn: CollectionMap) -> Figure:
    """The points of a map with its legend."""
    legend = drawn.legend()
    made, (axes,) = figure(9, 6.5)
    size = 3 if len(drawn) > 20_000 else 6 if len(drawn) > 3_000 else 14 if len(drawn) > 300 else 30
    colours = [legend.colours[group] for group in legend.groups]
    # An SVG of a hundred thousand circles opens in no browser, so many points are one picture in it.
    axes.scatter(
        drawn.points[:, 0], drawn.points[:, 1], s=size, c=colours or None, alpha=0.75, linewidths=0,
        rasterized=len(drawn) > 2_000,
    )  # fmt: skip
    if drawn.explained is not None:
        axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    made.suptitle(drawn.title(), x=0.005, ha="left", fontsize=13, color=INK)
    axes.set_title(drawn.caption(), loc="left", fontsize=9, color=PALE)
    if legend.bounds is not None:
        _scale(made, axes, drawn, legend.colours, legend.bounds)
    elif drawn.by is not None:
        _labels(axes, drawn.by, list(zip(legend.labels, legend.colours, legend.counts, strict=True)))
    return made


def _labels(axes: Axes, by: str, labels: list[tuple[str, str, int]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="o", color=colour, label=f"{_short(label)}  {number:,}")
        for label, colour, number in labels
    ]
    axes.legend(
        handles=handles, title=_short(by), loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
        alignment="left",
    )  # fmt: skip


def _scale(
    made: Figure, axes: Axes, drawn: CollectionMap, colours: tuple[str, ...], bounds: tuple[float, float]
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = ScalarMappable(Normalize(*bounds), ListedColormap(colours[:256]))
    made.colorbar(shades, ax=axes, shrink=0.5, label=_short(drawn.by or ""))


def _short(words: str, most: int = 32) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"
