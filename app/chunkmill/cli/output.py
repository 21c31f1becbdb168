"""Prints results as tables for a person or as JSON for a program, and errors as one line."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from itertools import product
from pathlib import PurePath
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from chunkmill.domain.budget import dollars
from chunkmill.domain.fitting import GAP, column_widths
from chunkmill.domain.plurals import count as count  # for commands
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

json_option = click.option("--json", is_flag=True, expose_value=False, help="Print JSON, as into a pipe.")
"""Every command accepts it. `chunkmill.cli.__main__` reads it before it looks the command up."""


class Group(click.Group):
    """A command that has commands below it. Its help shows the whole first sentence of each."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        below = [(name, command) for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=10_000)) for name, command in below])


class Screen:
    """Writes results to stdout, and errors, hints and progress to stderr.

    ``json`` makes results JSON. It is so with ``--json``, and also in a pipe if that takes ``json_in_pipes``.
    ``asked_json``, which is ``--json``, makes errors JSON too and leaves hints out.
    """

    def __init__(self, *, as_json: bool, json_in_pipes: bool = False) -> None:
        self.asked_json = as_json
        # Chunk ids and texts are printed as they are, so nothing in them may be read as markup.
        plain = {"highlight": False, "markup": False, "emoji": False}
        self.out = Console(**plain)  # type: ignore[arg-type]
        if not self.out.is_terminal:
            self.out = Console(width=PIPE_WIDTH, **plain)  # type: ignore[arg-type]
        self.err = Console(stderr=True, **plain)  # type: ignore[arg-type]
        self.json = as_json or (json_in_pipes and not self.out.is_terminal)

    def document(self, data: object) -> None:
        """Print one JSON document."""
        click.echo(self._json(data, indent=2))

    def line(self, data: object) -> None:
        """Print one JSON document on one line, because another document follows."""
        click.echo(self._json(data))

    def say(self, *parts: str | tuple[str, str], indent: int = 0) -> None:
        """Print one line of text parts, some of which have a style. Nothing is printed if results are JSON.

        If a terminal is too narrow for the line, it continues ``indent`` columns from the left.
        """
        if not self.json:
            _print_words(self.out, line_of(*parts), indent)

    def text(self, text: str) -> None:
        """Print a text that may have lines. Nothing is printed if results are JSON."""
        if not self.json:
            self.out.print(Text(shown(text, lines=True)), soft_wrap=True)

    def hint(self, message: str) -> None:
        """Print one line on stderr about what to do next. With ``--json`` nothing is printed."""
        if not self.asked_json:
            _print_words(self.err, Text(shown(message), style="yellow"))

    def error(self, code: str, message: str) -> None:
        message = without_passwords(" ".join(message.split()))
        if self.asked_json:
            click.echo(json.dumps({"error": code, "message": message}), err=True)
        else:
            _print_words(self.err, Text.assemble(("error: ", "bold red"), (shown(message), "red")))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], optional: Sequence[str] = ()) -> None:
        """Print rows under column heads. Numbers stand to the right, and a long text continues on the next line.

        If there is no room for all columns, ``optional`` ones are left out one after the other, and named below.
        """
        cells = [[cell_of(value) for value in row] for row in rows]
        # A long name is broken only if it would be without the optional columns too.
        for breaks_long, left_out in product((False, True), range(len(optional) + 1)):
            kept = [index for index, head in enumerate(columns) if head not in optional[:left_out]]
            heads, shorter = [columns[index] for index in kept], [[row[index] for index in kept] for row in cells]
            if _fits(heads, shorter, self.out.width, breaks_long=breaks_long):
                self._table(heads, shorter)
                if left_out:
                    self.say((f"A wider terminal also shows: {', '.join(optional[:left_out])}. --json has all.", "dim"))
                return
        self._table(columns, cells)

    def _table(self, columns: Sequence[str], cells: Sequence[Sequence[Text]]) -> None:
        right = []
        for index in range(len(columns)):
            values = [row[index] for row in cells if row[index].plain != NOTHING]
            right.append(bool(values) and all(value.justify == "right" for value in values))
        self._print(FittedTable(columns, cells, right))

    def fields(self, fields: Mapping[str, object]) -> None:
        """Print one name and value per line. A long word stays whole, so that a URL can be copied."""
        if self.json:
            return
        width = max(map(len, fields))
        for name, value in fields.items():
            cell = cell_of(value)
            line = line_of((f"{name:<{width}}  ", "dim"), (cell.plain, str(cell.style)))
            _print_words(self.out, line, indent=width + GAP)

    def _json(self, data: object, *, indent: int | None = None) -> str:
        # JSON's own escapes keep a character that the encoding of stdout lacks.
        ascii_only = not self.out.encoding.startswith("utf")
        return shown_json(data, indent=indent, ascii_only=ascii_only, default=_jsonable)

    def _print(self, table: FittedTable) -> None:
        if self.out.is_terminal:
            self.out.print(table)
            return
        # rich pads every line with blanks up to the table's edge. Files and diffs should not contain them.
        with self.out.capture() as capture:
            self.out.print(table)
        click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _fits(heads: Sequence[str], rows: Sequence[Sequence[Text]], width: int, *, breaks_long: bool) -> bool:
    columns = [[head, *(row[index].plain for row in rows)] for index, head in enumerate(heads)]
    return column_widths(columns, width, cell_len, breaks_long=breaks_long) is not None


_UNDERLINE = re.compile(r"^[ \t]*([=~^*#\"'`+-])\1{2,}[ \t]*(?:\n|\Z)", re.MULTILINE)
"""A line under or over a heading, as in reStructuredText. A result has one line to show, which it must not use up."""


class FittedTable:
    """A table that breaks no word: if its columns do not fit beside each other, each row becomes a list of fields."""

    def __init__(self, heads: Sequence[str], rows: Sequence[Sequence[Text]], right: Sequence[bool]) -> None:
        """``right`` says which columns hold numbers."""
        self._heads, self._rows, self._right = heads, rows, right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = zip(*self._rows, strict=True) if self._rows else ([] for _ in self._heads)
        columns = [[head, *(cell.plain for cell in column)] for head, column in zip(self._heads, cells, strict=True)]
        widths = column_widths(columns, options.max_width, cell_len)
        yield self._fields() if widths is None else self._table(widths)

    def _table(self, widths: Sequence[int]) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
        for head, right, width in zip(self._heads, self._right, widths, strict=True):
            table.add_column(Text(head), justify="right" if right else "left", width=width, overflow="fold")
        for row in self._rows:
            table.add_row(*row)
        return table

    def _fields(self) -> Table:
        fields = Table.grid(padding=(0, GAP, 0, 0))
        fields.add_column(style="dim", no_wrap=True)
        fields.add_column(justify="left", overflow="fold")
        for number, row in enumerate(self._rows):
            if number:
                fields.add_row("", "")
            for head, cell in zip(self._heads, row, strict=True):
                left = cell.copy()
                left.justify = "left"
                fields.add_row(Text(head), left)
        return fields


_COMMAND = re.compile(r"`[^`]+`|\b(?:chunkmill|celery|pip|redis-cli|systemctl) [^;,()]+$")
"""What is copied from a sentence: in backticks, or at its end."""
_GLUE = "\ue000"
"""Stands for a blank at which a line is not broken. It takes one column."""


def _print_words(console: Console, text: Text, indent: int = 0) -> None:
    """Print a line. On a terminal it is broken between words, and not inside of a command. Further lines are indented.

    A pipe gets one line, because a program reads it.
    """
    if not console.is_terminal or cell_len(text.plain) <= console.width:
        console.print(text, soft_wrap=True)
        return
    for number, line in enumerate(text.divide(_breaks(text.plain, console.width, indent))):
        line.rstrip()
        if number:
            line.pad_left(indent)
        console.print(line, soft_wrap=True)


def _breaks(line: str, width: int, indent: int) -> list[int]:
    """Where to break a line: before the words that do not fit. The lines after the first begin after ``indent``."""
    whole = _COMMAND.sub(
        lambda command: command[0] if cell_len(command[0]) > width - indent else command[0].replace(" ", _GLUE), line
    )
    offsets, used = [], 0
    for number, word in enumerate(re.finditer(r"\s*\S+", whole)):
        if number and used + cell_len(word[0]) > width:
            start = word.end() - len(word[0].lstrip())
            offsets.append(start)
            used = indent + cell_len(whole[start : word.end()])
        else:
            used += cell_len(word[0])
    return offsets


def beginning(text: str, limit: int) -> str:
    """The beginning of the first paragraph, on one line of at most ``limit`` columns, without lines under headings."""
    first = _UNDERLINE.sub("", text[: 4 * limit]).strip().split("\n\n", 1)[0]
    words = Text(shown(" ".join(first.split())))
    words.truncate(limit, overflow="ellipsis")  # counts columns: a Chinese character takes two
    return words.plain


def exact(number: Decimal) -> str:
    """The number in digits, without an exponent and without zeros at the end of its places."""
    digits = f"{number:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


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


def in_dollars(usd: Decimal | None) -> str | None:
    """An amount for a table; None if it is not known."""
    return None if usd is None else dollars(usd)
