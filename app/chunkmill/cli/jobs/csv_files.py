"""The rows of CSV and TSV files: what separates their columns, and their values."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TextIO

from chunkmill.errors import InvalidInput

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""What may separate columns if nobody says it."""
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?")
_WORDS = {"true": True, "false": False, "null": None, "": None}
_EXCEL_LINE = re.compile(r"(?i)sep=(.)\r?\n?")


@dataclass(frozen=True, slots=True)
class Row:
    """A row with the number of its first line. ``problem`` says why there are no cells."""

    line: int
    cells: Sequence[str] = ()
    problem: str | None = None


class Table:
    """A file whose first row names its columns. Iterate over it for the other rows.

    ``delimiter`` is what separates columns; None looks for the first of :data:`DELIMITERS` with which the header has
    all columns of ``needed``. An empty file has no columns. Raises :class:`InvalidInput`.
    """

    def __init__(self, name: str, file: TextIO, *, delimiter: str | None, needed: Collection[str], limit: int) -> None:
        csv.field_size_limit(limit)
        self._lines = _BoundedLines(file, limit)
        try:
            first = self._lines.peek()
            if delimiter is None and (said := _EXCEL_LINE.fullmatch(first)):
                next(self._lines)  # Excel writes it, and reads it, to say what separates columns
                delimiter, first = said[1], self._lines.peek()
            self.is_guessed = delimiter is None
            self.delimiter = _guessed(first, needed) if delimiter is None else delimiter
            # Strict, because otherwise a quote that is never closed silently takes the rest of the file into one text.
            self._reader = csv.reader(self._lines, strict=True, delimiter=self.delimiter)
            self.columns: list[str] = next(self._reader, [])
        except csv.Error as error:
            raise InvalidInput(
                f"{name}:1: not a CSV header: {error}. The first line has to name the columns."
            ) from None

    def __iter__(self) -> Iterator[Row]:
        while True:
            first = self._lines.begin_record()
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                last = self._lines.number
                several = f"; lines {first} to {last} were read as one record: is a quote not closed?"
                yield Row(first, problem=f"not valid CSV: {error}{several if last > first else ''}")
                continue
            if not cells:
                continue
            if len(cells) != len(self.columns):
                yield Row(first, problem=f"it has {len(cells)} columns, the header has {len(self.columns)}")
                continue
            yield Row(first, cells)


def typed(cell: str) -> Any:
    """The number, the truth value or the null that a cell is; else its text. An empty cell is null.

    Only what JSON would write in the same way is a number: 007, +1, 1,5 and a long number stay text.
    """
    if _NUMBER.fullmatch(cell):
        return json.loads(cell)
    return _WORDS.get(cell.lower(), cell)


def _guessed(header: str, needed: Collection[str]) -> str:
    for delimiter in DELIMITERS:
        try:
            columns = next(csv.reader([header], strict=True, delimiter=delimiter), [])
        except csv.Error:
            continue
        if set(needed) <= set(columns):
            return delimiter
    return ","


class _BoundedLines:
    """The lines of a text file. A record of more than ``limit`` characters raises `csv.Error`.

    The limit of the module `csv` is for one field, and a record may have any number of them.
    """

    def __init__(self, file: TextIO, limit: int) -> None:
        self._file = file
        self._limit = self._left = limit
        self._kept: str | None = None
        self.number = 0
        """Of the line that was read last, from 1 on."""

    def begin_record(self) -> int:
        """Allow another record, and return the number of its first line."""
        self._left = self._limit
        return self.number + 1

    def peek(self) -> str:
        """The next line, which stays the next one; empty at the end. Call it between two records."""
        self._left = self._limit
        self._kept = next(self, "")
        self.number -= bool(self._kept)
        return self._kept

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        if self._kept is not None:
            line, self._kept = self._kept, None
            self.number += bool(line)
            if not line:
                raise StopIteration
            return line
        line = self._file.readline(self._left)
        if not line:
            if not self._left:
                raise csv.Error(f"the record is longer than {self._limit:,} characters")
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if not self._left and not line.endswith(("\r", "\n")):
            while (rest := self._file.readline(self._limit)) and not rest.endswith(("\r", "\n")):
                pass
            raise csv.Error(f"the record is longer than {self._limit:,} characters")
        return line
