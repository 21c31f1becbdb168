"""`cost --plot`: tokens and US dollars over time or by what they were for, on the terminal or as PNG or SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

from rich.cells import set_cell_size
from rich.text import Text

from chunkmill.cli.canvas import bar
from chunkmill.cli.watch.plot import COLOURS
from chunkmill.domain.budget import dollars
from chunkmill.domain.costs import Cost, Costs, CostsBy
from chunkmill.domain.shown import shown
from chunkmill.domain.states import Route

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 60
"""How many rows a drawing has at most: the latest days or months, or the most expensive of the others."""
KEY_COLUMNS, LEAST_BAR = 24, 4


@dataclass(frozen=True, slots=True)
class Row:
    """What one route did for one key. ``usd`` is None if nobody knows a price."""

    key: str
    route: Route | None
    tokens: int = 0
    usd: Decimal | None = None


def rows_of(costs: Costs) -> tuple[list[Row], int]:
    """The rows that are drawn, and how many are left out. Days and months without work stand among the others."""
    made = [_row(cost) for cost in costs.rows]
    if costs.by in (CostsBy.DAY, CostsBy.MONTH) and made:
        known = {row.key for row in made}
        made += [Row(key, None) for key in _between(min(known), max(known)) if key not in known]
        made.sort(key=lambda row: row.key)
        return made[-MOST_ROWS:], max(0, len(made) - MOST_ROWS)
    made.sort(key=lambda row: (-(row.usd or 0), -row.tokens))
    return made[:MOST_ROWS], max(0, len(made) - MOST_ROWS)


def _row(cost: Cost) -> Row:
    return Row(cost.key, cost.route, cost.tokens, cost.usd)


def _between(first: str, last: str) -> Iterator[str]:
    """The days or months from the first to the last."""
    is_month = len(first) == len("2026-01")
    at, end = (date.fromisoformat(f"{key}-01" if is_month else key) for key in (first, last))
    while at <= end:
        yield f"{at:%Y-%m}" if is_month else f"{at:%Y-%m-%d}"
        at = (at.replace(day=1) + timedelta(days=32)).replace(day=1) if is_month else at + timedelta(days=1)


def draw(costs: Costs, columns: int) -> list[Text]:
    """The drawing on a terminal, as lines of at most that many columns."""
    rows, left_out = rows_of(costs)
    keys = min(KEY_COLUMNS, max(len(costs.by), *(Text(shown(row.key)).cell_len for row in rows)))
    lanes = max(len("route"), *(len(row.route or "") for row in rows))
    # The amounts are as wide as they are, and the two bars share what is left.
    amounts = [(_short(row.tokens), "-" if row.usd is None else dollars(row.usd)) for row in rows]
    wide = [max(len(head), *(len(pair[i]) for pair in amounts)) for i, head in enumerate(("tokens", "USD"))]
    size = max(LEAST_BAR, (columns - keys - lanes - sum(wide) - 6) // 2)
    most_tokens = max(row.tokens for row in rows) or 1
    most_usd = max(row.usd or Decimal(0) for row in rows) or Decimal(1)
    head = f"{costs.by:<{keys}}  {'route':<{lanes}}  {'tokens':<{size + 1 + wide[0]}}  USD"
    lines = [Text(head, style="bold")]
    previous = None
    for row, (tokens, usd) in zip(rows, amounts, strict=True):
        colour = COLOURS[row.route] if row.route else "default"
        line = Text(set_cell_size("" if row.key == previous else shown(row.key), keys) + "  ")
        previous = row.key
        line.append(f"{row.route or '':<{lanes}}  ")
        if row.route is not None:
            for share, amount, columns_of in (
                (row.tokens / most_tokens, tokens, wide[0]), (float((row.usd or 0) / most_usd), usd, wide[1])
            ):  # fmt: skip
                drawn = bar(share, size)
                line.append(drawn, colour).append(
                    f" {amount}" + " " * (size - len(drawn) + columns_of - len(amount) + 2)
                )
        line.rstrip()
        lines.append(line)
    if left_out:
        kept = "latest" if costs.by in (CostsBy.DAY, CostsBy.MONTH) else "most expensive"
        lines.append(Text(f"These are the {kept} {len(rows):,} rows of {len(rows) + left_out:,}.", style="dim"))
    return lines


def figure(costs: Costs) -> Figure:
    """The drawing for PNG and SVG: bars of tokens above bars of US dollars."""
    from matplotlib.patches import Patch

    from chunkmill.domain.figures import GRID, INK, PALE
    from chunkmill.domain.figures import figure as empty

    rows, left_out = rows_of(costs)
    keys = list(dict.fromkeys(row.key for row in rows))
    made, (above, below) = empty(9, 6, 2)
    for axis, title, values in (
        (above, "tokens", [float(row.tokens) for row in rows]),
        (below, "US dollars", [float(row.usd or 0) for row in rows]),
    ):
        _bars(axis, rows, keys, values)
        axis.set_title(title, loc="left", fontsize=11, color=INK)
        axis.grid(axis="y", color=GRID)
        axis.set_axisbelow(True)
    above.yaxis.set_major_formatter(lambda tokens, _: _short(round(tokens)))
    step = max(1, -(-len(keys) // 15))
    below.set_xticks(range(0, len(keys), step), [_short_key(key) for key in keys[::step]], rotation=30, ha="right")
    said = f", the {len(rows)} of {len(rows) + left_out} rows with most" if left_out else ""
    made.suptitle(f"What was embedded, by {costs.by}{said}", x=0.01, ha="left", fontsize=13, color=INK)
    lanes = [route for route in Route if any(row.route is route for row in rows)]
    handles = [Patch(color=COLOURS[route], label=route.value) for route in lanes]
    above.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    if any(row.route is not None and row.usd is None for row in rows):
        below.set_title("without local work: GPU_HOUR_USD is not set", loc="right", fontsize=8, color=PALE)
    return made


def _bars(axis: object, rows: Sequence[Row], keys: Sequence[str], values: Sequence[float]) -> None:
    """One bar for each key, in which the routes stand on one another."""
    bottoms = dict.fromkeys(keys, 0.0)
    place = {key: i for i, key in enumerate(keys)}
    for row, value in zip(rows, values, strict=True):
        if row.route is not None and value > 0:
            axis.bar(place[row.key], value, 0.8, bottoms[row.key], color=COLOURS[row.route])  # type: ignore[attr-defined]
            bottoms[row.key] += value


def _short_key(key: str) -> str:
    key = shown(key)
    return key if len(key) <= KEY_COLUMNS else key[: KEY_COLUMNS - 1] + "…"


def _short(number: int) -> str:
    """`950`, `12.3 k`, `4.5 M`."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"
