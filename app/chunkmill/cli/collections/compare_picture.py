"""Draws a comparison of two models as SVG: how much each measure changes, with the bounds of its 95 % interval.

The SVG is written by hand, as that of `chunkmill tune` is, so that no library that draws is needed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from xml.sax.saxutils import escape

from chunkmill.cli.late import Change, Comparison
from chunkmill.domain.spaces import told_apart

WIDTH, LEFT, RIGHT, TOP, ROW = 760, 190, 150, 96, 46
LINE = 100
"""Letters of 12 pixels that fit into the width, in any of the fonts."""
BETTER, WORSE, UNKNOWN = "#2a7", "#c33", "#888"


def picture(told: Comparison) -> str:
    """An SVG document."""
    changes = told.changes
    rows = [
        ("nDCG@10", changes.ndcg), ("recall@10", changes.recall), ("recall@100", changes.deep_recall),
        ("MRR@10", changes.mrr),
    ]  # fmt: skip
    bounds = [abs(bound) for _, one in rows for bound in (one.low, one.high, one.difference) if math.isfinite(bound)]
    most = 1.15 * max([*bounds, 0.005])
    bottom = TOP + ROW * len(rows)
    parts = list(_titles(told))
    parts += _axis(most, bottom)
    for i, (name, one) in enumerate(rows):
        parts += _row(name, one, most, TOP + ROW * i + ROW / 2)
    below = [f"overlap@10 {changes.overlap:.0%} · RBO {changes.rbo:.2f}", *textwrap.wrap(told.sentence, LINE)]
    parts += [_text(24, bottom + 52 + 18 * i, words) for i, words in enumerate(below)]
    height = bottom + 56 + 18 * len(below)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>', *parts, "</svg>", ""])


def _titles(told: Comparison) -> Iterator[str]:
    old, new = told_apart((told.old.model, told.old.space), (told.new.model, told.new.space))
    yield _text(24, 30, f"{new} against {old}", size=17, weight=600, fill="#111")
    yield _text(
        24, 52,
        f"collection {told.collection}: {told.changes.queries:,} queries in {told.sample:,} of {told.contents:,} texts",
    )  # fmt: skip
    yield _text(24, 74, "← the new one is worse · change of the measure, 95 % interval · it is better →", fill=UNKNOWN)


def _axis(most: float, bottom: float) -> Iterator[str]:
    step = 10 ** math.floor(math.log10(most))
    step *= next(factor for factor in (0.5, 1, 2, 5) if most / (step * factor) <= 4)
    for number in range(-int(most / step), int(most / step) + 1):
        x, dark = _x(number * step, most), "#888" if number == 0 else "#e5e5e5"
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="{dark}"/>'
        yield _text(x, bottom + 18, f"{number * step:+.3g}" if number else "0", anchor="middle")


def _row(name: str, one: Change, most: float, y: float) -> Iterator[str]:
    colour = BETTER if one.low > 0 else WORSE if one.high < 0 else UNKNOWN
    low, high = (_x(min(most, max(-most, bound)), most) for bound in (one.low, one.high))
    yield _text(24, y + 4, name, weight=600)
    yield f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="4"/>'
    yield f'<circle cx="{_x(one.difference, most):.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>'
    yield _text(WIDTH - RIGHT + 16, y + 4, f"{one.old:.3f} → {one.new:.3f}")


def _x(value: float, most: float) -> float:
    return LEFT + (value + most) / (2 * most) * (WIDTH - RIGHT - LEFT)


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", fill: str = "#333", size: int = 12, weight: int = 400
) -> str:
    style = f'text-anchor="{anchor}" fill="{fill}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
