"""Options about sources that are more than a word or a number."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable

import click

from chunkmill.errors import InvalidInput

_WORDS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "space": " "}


class Refusable(click.ParamType[float]):
    """A number of chunks, or a share such as `1%`, which becomes a float below 1."""

    name = "number"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return value
        if share := re.fullmatch(r"(\d{1,2}(?:\.\d{1,6})?) ?%", str(value)):
            return float(share[1]) / 100
        if not re.fullmatch(r"\d{1,15}", str(value)):
            self.fail(f"{value!r} is neither a number of chunks, such as 10, nor a share, such as 1%", param, ctx)
        return int(str(value))


def as_delimiter(given: str | None) -> str | None:
    """The character that separates columns, which may be given as a word. Raises :class:`InvalidInput`."""
    if given is None:
        return None
    delimiter = _WORDS.get(given.lower(), given)
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise InvalidInput(
            f"--delimiter {given[:20]!r} must be one character other than a quote and a line end, or the word tab."
        )
    return delimiter


def split_names(given: Iterable[str]) -> tuple[str, ...]:
    """The names of fields in options each of which may have several, as one line of CSV. Each comes once."""
    names: dict[str, None] = {}
    for option in given:
        names |= dict.fromkeys(name.strip() for name in next(csv.reader([option], skipinitialspace=True), []) if name)
    return tuple(names)
