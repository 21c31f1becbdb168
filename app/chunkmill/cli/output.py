"""Prints results as tables for a person or as JSON for a program, and errors as one line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import PurePath
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chunkmill.domain.shown import shown, shown_json
from chunkmill.telemetry.logging import without_passwords

PIPE_WIDTH = 10_000
"""Width in columns if stdout is not a terminal, because a program that reads a pipe needs whole lines."""
NOTHING = "-"

STATE_STYLES = {
    "running": "green", "connected": "green", "completed": "green", "ok": "green", "complete": "green",
    "enqueueing": "cyan", "cancelled": "yellow", "warn": "yellow",
    "failed": "red", "down": "red", "fail": "red", "unreachable": "red",
}  # fmt: skip

json_option = click.option("--json", is_flag=True, expose_value=False, help="Print JSON.")
"""Every command accepts it. `chunkmill.cli.__main__` reads it before it looks the command up."""


class Screen:
    """Writes results to stdout, and errors, hints and progress to stderr. ``json`` makes results and errors JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.json = as_json
        # Chunk ids and texts are printed as they are, so nothing in them may be read as markup.
        plain = {"highlight": False, "markup": False, "emoji": False}
        self.out = Console(**plain)  # type: ignore[arg-type]
        if not self.out.is_terminal:
            self.out = Console(width=PIPE_WIDTH, **plain)  # type: ignore[arg-type]
        self.err = Console(stderr=True, **plain)  # type: ignore[arg-type]

    def document(self, data: object) -> None:
        """Print one JSON document."""
        click.echo(self._json(data, indent=2))

    def line(self, data: object) -> None:
        """Print one JSON document on one line, because another document follows."""
        click.echo(self._json(data))

    def say(self, *parts: str | tuple[str, str]) -> None:
        """Print one line of text parts, some of which have a style. With ``--json`` nothing is printed."""
        if not self.json:
            self.out.print(line_of(*parts), soft_wrap=True)

    def text(self, text: str) -> None:
        """Print a text that may have lines. With ``--json`` nothing is printed."""
        if not self.json:
            self.out.print(Text(shown(text, lines=True)), soft_wrap=True)

    def hint(self, message: str) -> None:
        """Print one line on stderr about what to do next. With ``--json`` nothing is printed."""
        if not self.json:
            self.err.print(Text(shown(message), style="yellow"), soft_wrap=True)

    def error(self, code: str, message: str) -> None:
        message = without_passwords(" ".join(message.split()))
        if self.json:
            click.echo(json.dumps({"error": code, "message": message}), err=True)
        else:
            self.err.print(Text.assemble(("error: ", "bold red"), (shown(message), "red")), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print rows under column heads. Numbers stand to the right, and a long text continues on the next line."""
        cells = [[cell_of(value) for value in row] for row in rows]
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for index, head in enumerate(columns):
            values = [row[index] for row in cells if row[index].plain != NOTHING]
            numbers = bool(values) and all(value.justify == "right" for value in values)
            table.add_column(head, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
        for row in cells:
            table.add_row(*row)
        self._print(table)

    def fields(self, fields: Mapping[str, object]) -> None:
        """Print one name and value per line. The terminal breaks long lines, so a URL can be copied whole."""
        width = max(map(len, fields))
        for name, value in fields.items():
            cell = cell_of(value)
            self.say((f"{name:<{width}}  ", "dim"), (cell.plain, str(cell.style)))

    def _json(self, data: object, *, indent: int | None = None) -> str:
        # JSON's own escapes keep a character that the encoding of stdout lacks.
        ascii_only = not self.out.encoding.startswith("utf")
        return shown_json(data, indent=indent, ascii_only=ascii_only, default=_jsonable)

    def _print(self, table: Table) -> None:
        if self.out.is_terminal:
            self.out.print(table)
            return
        # rich pads every line with blanks up to the table's edge. Files and diffs should not contain them.
        with self.out.capture() as capture:
            self.out.print(table)
        click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def beginning(text: str, limit: int) -> str:
    """The beginning of the first paragraph, on one line of at most ``limit`` columns."""
    words = Text(shown(" ".join(text[: 4 * limit].strip().split("\n\n", 1)[0].split())))
    words.truncate(limit, overflow="ellipsis")  # counts columns: a Chinese character takes two
    return words.plain


def exact(number: Decimal) -> str:
    """The number in digits, without an exponent and without zeros at the end of its places."""
    digits = f"{number:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def count(number: int, one: str, many: str | None = None) -> str:
    """`1 chunk`, `2,000 chunks`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """`0.3 s`, `42 s`, `3:07`, `2:05:00`; a whole number is shown without decimals."""
    if isinstance(seconds, float) and seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def prepare_streams() -> None:
    """Make stdout and stderr print an escape instead of failing for a character that the encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def line_of(*parts: str | tuple[str, str]) -> Text:
    """One line of parts, some of which have a style."""
    return Text.assemble(*[shown(part) if isinstance(part, str) else (shown(part[0]), part[1]) for part in parts])


def cell_of(value: object) -> Text:
    """A value as a table shows it. A Text is shown as it is."""
    if isinstance(value, Text):
        return value
    if value is None:
        return Text(NOTHING, style="dim")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int):
        return Text(f"{value:,}", justify="right")
    if isinstance(value, float):
        return Text(f"{value:.3f}", justify="right")
    text = shown(str(value))
    return Text(text, style=STATE_STYLES.get(text, ""))


def _jsonable(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Decimal):
        return exact(value)  # a number of JSON would be read as a float
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
