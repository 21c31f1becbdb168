"""Draws the result of a tuning as SVG: the speed over the time for one short text.

The SVG is written by hand, so that a machine that embeds needs no library that draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from chunkmill.machine import Machine
from chunkmill.tuning.choose import Candidate, Constraints, SetupMeasurement, pareto

WIDTH, HEIGHT = 960, 576
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 96, 470
LEGEND = 504
# The colours of Okabe and Ito without the yellow, which people with any kind of colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
CHARACTER, LINE = 6.6, 13.0
"""The approximate size of a label's letters, which keeps labels apart."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Scale = Callable[[float], float]


def draw(
    candidates: Sequence[Candidate], constraints: Constraints, winner: Candidate, *, model: str, machine: Machine,
    on: str,
) -> str:  # fmt: skip
    """The SVG file's text."""
    running = [
        (candidate, candidate.measured)
        for candidate in candidates
        if candidate.measured and candidate.measured.tokens_per_second
    ]
    latencies = [measured.latency_ms or 0.0 for _, measured in running]
    speeds = [measured.tokens_per_second or 0.0 for _, measured in running]
    x, x_ticks = _axis(latencies, constraints.max_latency_ms, LEFT, WIDTH - RIGHT, around=True)
    y, y_ticks = _axis([0.0, *speeds], constraints.min_throughput, BOTTOM, TOP, around=False)
    at = {
        candidate.setup: (x(measured.latency_ms or 0.0), y(measured.tokens_per_second or 0.0))
        for candidate, measured in running
    }
    kinds = list(dict.fromkeys(candidate.setup.kind for candidate, _ in running))
    colours = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(kinds)}
    front = {candidate.setup for candidate in pareto(candidates)}
    parts = [*_frame(x, x_ticks, y, y_ticks), *_limits(constraints, x, y), *_titles(winner, model, machine, on)]
    px, py = at[winner.setup]
    parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="11" fill="none" stroke="#111" stroke-width="2"/>')
    for candidate, _ in running:
        px, py = at[candidate.setup]
        colour = colours[candidate.setup.kind]
        fill = colour if candidate.setup in front else "#fff"
        shape = f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
        pale = ' opacity="0.4"' if constraints.failures(candidate) else ""
        parts.append(f"<g{pale}><title>{escape(_words(candidate))}</title>{shape}</g>")
    parts += _labels(
        [(at[candidate.setup], _label(candidate, running), candidate is winner) for candidate, _ in running]
    )
    parts += _legend(colours)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *parts, "</svg>", ""])


def _axis(
    values: Sequence[float], limit: float | None, low: float, high: float, *, around: bool
) -> tuple[Scale, list[float]]:
    """The scale from values to pixels, and the ticks. With ``around``, there is a margin on both sides and no zero."""
    lowest, highest = min(values), max(values)
    if limit is not None and limit < 1.5 * highest:  # a limit far away would press the points together
        lowest, highest = min(lowest, limit), max(highest, limit)
    margin = 0.12 * (highest - lowest) or 0.1 * highest or 1.0
    lowest, highest = (lowest - margin if around else 0.0), highest + margin
    step = 10 ** math.floor(math.log10((highest - lowest) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (highest - lowest) / (step * factor) <= 8)
    ticks = [step * number for number in range(math.ceil(lowest / step), math.floor(highest / step) + 1)]
    return lambda value: low + (value - lowest) / (highest - lowest) * (high - low), ticks


def _frame(x: Scale, x_ticks: Sequence[float], y: Scale, y_ticks: Sequence[float]) -> Iterator[str]:
    for tick in y_ticks:
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e5e5e5"/>'
        yield _text(LEFT - 8, y(tick) + 4, f"{tick:,.0f}", anchor="end")
    for tick in x_ticks:
        yield f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{BOTTOM}" y2="{BOTTOM + 5}" stroke="#888"/>'
        yield _text(x(tick), BOTTOM + 19, f"{tick:g}", anchor="middle")
    yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}" stroke="#888"/>'
    yield _text(WIDTH - RIGHT, BOTTOM + 36, "← ms for one short text (less is better)", anchor="end")
    yield _text(LEFT - 66, TOP - 14, "↑ tokens per second (more is better)")


def _limits(constraints: Constraints, x: Scale, y: Scale) -> Iterator[str]:
    """The shaded areas beyond the constraints."""
    if constraints.max_latency_ms is not None and x(constraints.max_latency_ms) < WIDTH - RIGHT:
        at = max(x(constraints.max_latency_ms), LEFT)
        yield _shade(at, TOP, WIDTH - RIGHT - at, BOTTOM - TOP)
        yield _text(at + 6, TOP + 14, f"over {constraints.max_latency_ms:g} ms", fill="#a33")
    if constraints.min_throughput is not None and y(constraints.min_throughput) < BOTTOM:
        at = max(y(constraints.min_throughput), TOP)
        yield _shade(LEFT, at, WIDTH - RIGHT - LEFT, BOTTOM - at)
        yield _text(LEFT + 6, BOTTOM - 8, f"under {constraints.min_throughput:,.0f} tokens/s", fill="#a33")


def _shade(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#d33" fill-opacity="0.08"/>'


def _titles(winner: Candidate, model: str, machine: Machine, on: str) -> Iterator[str]:
    where = f"{machine.gpu}, {machine.cpu}" if machine.gpu else machine.cpu
    title = f"{model} on {where}, {machine.cores} cores"
    yield _text(LEFT - 66, 32, title, size=18, weight=600, fill="#111")
    yield _text(LEFT - 66, 54, f"chosen: {_words(winner)}")
    yield _text(WIDTH - RIGHT, HEIGHT - 14, f"chunkmill tune, {on[:10]}", anchor="end", fill="#888")


def _words(candidate: Candidate) -> str:
    setup, measured = candidate.setup, candidate.measured or SetupMeasurement(math.nan, math.nan)
    return (
        f"{setup.kind}, {setup.batch_tokens:,} tokens in a pass: {measured.tokens_per_second or 0:,.0f} tokens/s, "
        f"{measured.latency_ms or 0:.1f} ms, {measured.peak_mib or 0:,.0f} MiB, "
        f"cosine at least {measured.cosine_min:.5f}"
    )


def _label(candidate: Candidate, running: Sequence[tuple[Candidate, SetupMeasurement]]) -> str:
    """The number of tokens in a pass, and what else differs among the candidates."""
    setup = candidate.setup
    tokens = setup.batch_tokens
    words = f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"
    if len({candidate.setup.threads for candidate, _ in running}) > 1:
        words += f" ·{setup.threads}t"
    if len({candidate.setup.parallel_batches for candidate, _ in running}) > 1:
        words += f" ×{setup.parallel_batches}"
    return words


def _labels(wanted: Sequence[tuple[Point, str, bool]]) -> Iterator[str]:
    """The labels, each beside its point, the winner's first. A label that would cover another is left out."""
    sizes = [12 if bold else 6 for _, _, bold in wanted]
    taken = [(px - by, py - by, px + by, py + by) for ((px, py), _, _), by in zip(wanted, sizes, strict=True)]
    for (px, py), text, bold in sorted(wanted, key=lambda label: not label[2]):
        width = CHARACTER * len(text) + 2
        gap = 15.0 if bold else 9.0
        places = [(px + gap, py - LINE / 2), (px - gap - width, py - LINE / 2), (px - width / 2, py - gap - LINE),
                  (px - width / 2, py + gap), (px + gap, py - LINE - 2), (px + gap, py + 2),
                  (px - gap - width, py - LINE - 2), (px - gap - width, py + 2)]  # fmt: skip
        boxes = [(bx, by, bx + width, by + LINE) for bx, by in places]
        box = next((free for free in boxes if not any(_overlap(free, other) for other in taken)), None)
        if box is None:
            continue  # a mouse over the point shows its title
        taken.append(box)
        yield _text(box[0] + 1, box[3] - 3, text, weight=700 if bold else 400)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(colours: dict[str, str]) -> Iterator[str]:
    at = float(LEFT - 66)
    for kind, colour in colours.items():
        yield f'<circle cx="{at + 6:.1f}" cy="{LEGEND + 20}" r="5" fill="{colour}"/>'
        yield _text(at + 17, LEGEND + 24, kind)
        at += 17 + CHARACTER * len(kind) + 24
    note = "labels: tokens in a pass · filled: no other beats it in speed, time and memory · pale: breaks a constraint"
    yield _text(LEFT - 66, HEIGHT - 14, note, fill="#888")


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", fill: str = "#333", size: int = 12, weight: int = 400
) -> str:
    style = f'text-anchor="{anchor}" fill="{fill}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
