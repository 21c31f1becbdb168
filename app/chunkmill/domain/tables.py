"""Tables for a person: as HTML for a notebook, and as plain text for a console.

Texts, ids and metadata come from outside. So everything is escaped, control characters are replaced, and the HTML has
no script, link or image. It names no colour, so that it can be read in a dark theme and in a light one. Styles stand in
each element, because notebooks remove style sheets.
"""

from __future__ import annotations

import html
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from numbers import Real
from typing import SupportsFloat

from chunkmill.domain.budget import dollars
from chunkmill.domain.fitting import GAP, column_widths
from chunkmill.domain.shown import shown

NOTHING = "-"
MAX_ROWS = 50
"""The most rows of a table that are shown. A search may return a million."""
MAX_SHOWN = 1_000_000
"""After about so many characters no further row is shown. A notebook keeps what it shows in its file."""
CUT = 160
"""How many characters of a text a cell of HTML shows. The whole text is the cell's title."""
PLAIN_CUT = 70
"""How many columns of a console a text may take in a table with several columns."""
CONSOLE_WIDTH = 120
"""The width of a console that does not say how wide it is, in columns."""
PERCENT = "%"

_TABLE = "border-collapse:collapse;margin:0.5em 0;color:inherit;background:none;width:auto"
_CELL = "padding:0.2em 0.9em 0.2em 0;vertical-align:top;max-width:50em;text-align:"
_HEAD = "border-bottom:1px solid currentColor;white-space:nowrap"
_SHORT = 24
"""How many characters of a cell stay on one line. A longer cell may be broken anywhere, because a long id has no
blanks."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its head, and the name of the attribute that it shows."""

    head: str
    name: str
    form: str = ""
    """``PERCENT`` for a share from 0.0 to 1.0, ``ID`` for a number that names something; empty for anything else."""


ID = "id"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of values under heads. Without heads it is a list of fields: each row has a name and a value."""

    heads: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    title: str = ""
    left_out: int = 0
    """How many rows there are beside these."""


@dataclass(frozen=True, slots=True)
class MarkedValue:
    """A value with the form in which it is shown."""

    value: object
    form: str


def table_of(columns: Sequence[Column], items: Sequence[object], *, title: str = "") -> Table:
    """The table of the first items, with a row for each."""
    first = items[:MAX_ROWS]
    rows = tuple(tuple(MarkedValue(getattr(item, c.name), c.form) for c in columns) for item in first)
    return Table(tuple(c.head for c in columns), rows, title, len(items) - len(first))


def as_html(tables: Iterable[Table], *, otherwise: str) -> str:
    """The tables as a fragment of HTML; ``otherwise`` is said if none has a row."""
    parts = [_html_table(table) for table in tables if table.rows]
    return f"<div>{''.join(parts)}</div>" if parts else f"<p>{_escaped(otherwise)}</p>"


def as_text(tables: Iterable[Table], *, otherwise: str, width: int | None = None) -> str:
    """The tables as lines of at most ``width`` columns, by default those of the console."""
    width = width or shutil.get_terminal_size((CONSOLE_WIDTH, 24)).columns
    parts = [_plain_table(table, width) for table in tables if table.rows]
    return "\n\n".join(parts) if parts else otherwise


def text_of(value: object) -> str:
    """A value as a cell shows it, with its line breaks, and without characters that steer a terminal."""
    if isinstance(value, MarkedValue):
        return _text_of(value.value, value.form)
    return _text_of(value, "")


def _text_of(value: object, form: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if form == PERCENT and isinstance(value, SupportsFloat):
        return f"{100 * float(value):.0f} %"
    if isinstance(value, Decimal):
        return dollars(value)
    if isinstance(value, int):
        return str(value) if form == ID else f"{value:,}"
    if isinstance(value, Real):
        return f"{float(value):.3f}"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Mapping):
        text = json.dumps(value, ensure_ascii=False, default=str) if value else ""
    elif isinstance(value, tuple | list):
        text = ", ".join(map(text_of, value))
    else:
        text = str(value)
    return shown(text, lines=True)


def is_number(value: object) -> bool:
    """Whether a cell stands to the right."""
    if isinstance(value, MarkedValue):
        value = value.value
    return isinstance(value, Real | Decimal) and not isinstance(value, bool)


def _html_table(table: Table) -> str:
    rows: list[str] = []
    size = 0
    sides = [
        "right" if any(map(is_number, values)) and table.heads else "left" for values in zip(*table.rows, strict=True)
    ]
    for row in table.rows:
        if size > MAX_SHOWN:
            break
        cells = [_html_cell(value, side) for value, side in zip(row, sides, strict=True)]
        if not table.heads:
            cells[0] = f'<th scope="row" style="{_CELL}left;white-space:nowrap">{_escaped(text_of(row[0]))}</th>'
        rows.append(f"<tr>{''.join(cells)}</tr>")
        size += len(rows[-1])
    head = "".join(
        f'<th scope="col" style="{_CELL}{side};{_HEAD}">{_escaped(name)}</th>'
        for name, side in zip(table.heads, sides, strict=False)
    )
    title = (
        f'<caption style="caption-side:top;text-align:left">{_escaped(table.title)}</caption>' if table.title else ""
    )
    more = table.left_out + len(table.rows) - len(rows)
    return (
        f'<table style="{_TABLE}">{title}{f"<thead><tr>{head}</tr></thead>" if head else ""}'
        f"<tbody>{''.join(rows)}</tbody></table>{f'<p>{_more(more)}</p>' if more else ''}"
    )


def _html_cell(value: object, side: str) -> str:
    whole = text_of(value)
    text = " ".join(whole.split())
    title = ""
    if len(text) > CUT:
        text, title = text[: CUT - 1] + "…", f' title="{_escaped(whole)}"'
    # A text in Arabic runs from right to left in its own cell, and nowhere else.
    lines = "white-space:nowrap" if len(text) <= _SHORT else "overflow-wrap:anywhere"
    return f'<td dir="auto" style="{_CELL}{side};{lines}"{title}>{_escaped(text)}</td>'


def _escaped(text: str) -> str:
    return html.escape(shown(text, lines=True), quote=True)


def _plain_table(table: Table, width: int) -> str:
    try:
        from rich.cells import cell_len, set_cell_size
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:  # as where only chunkmill.remote is used
        rows = [table.heads, *table.rows] if table.heads else table.rows
        return "\n".join("  ".join(" ".join(text_of(value).split()) for value in row) for row in rows)

    texts = [[" ".join(text_of(value).split()) for value in row] for row in table.rows]
    if table.heads:
        texts = [
            [t if cell_len(t) <= PLAIN_CUT else set_cell_size(t, PLAIN_CUT - 1).rstrip() + "…" for t in row]
            for row in texts
        ]
    columns = [list(column) for column in zip(*([table.heads] if table.heads else []), *texts, strict=True)]
    widths = column_widths(columns, width, cell_len) if table.heads else None
    has_heads = widths is not None
    if table.heads and not has_heads:  # each row becomes a list of fields, with a blank line between two
        texts = [
            line
            for number, row in enumerate(texts)
            for line in ([["", ""]] if number else []) + [list(pair) for pair in zip(table.heads, row, strict=True)]
        ]
    grid = RichTable(box=None, show_header=has_heads, pad_edge=False, padding=(0, GAP, 0, 0), title_justify="left")
    for index in range(len(texts[0])):
        numbers = has_heads and any(is_number(row[index]) for row in table.rows)
        head = Text(table.heads[index]) if has_heads else ""
        is_name = not has_heads and index == 0
        grid.add_column(
            head,
            justify="right" if numbers else "left",
            no_wrap=is_name,
            overflow="fold",
            width=widths[index] if widths is not None else None,
        )
    for row in texts:
        grid.add_row(*map(Text, row))
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(grid)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    if table.title:
        lines.insert(0, shown(table.title))
    if table.left_out:
        lines.append(_more(table.left_out))
    return "\n".join(lines)


def _more(number: int) -> str:
    return f"and {number:,} more"
