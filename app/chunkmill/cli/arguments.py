"""Command-line arguments that are a number with a unit, or a JSON object."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
DAYS = {"s": 1 / 86_400, "min": 1 / 1_440, "h": 1 / 24, "d": 1.0, "w": 7.0, "y": 365.0}


class Quantity(click.ParamType[float]):
    """A number with a unit, converted to ``unit``."""

    def __init__(self, name: str, units: Mapping[str, float], unit: str, example: str) -> None:
        self.name = name
        self._units, self._unit, self._example = units, unit, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", str(value).strip().lower())
        if match is None or match[2] not in self._units or not float(match[1]):
            self.fail(
                f"{value!r} is not a valid {self.name}: write a number and a unit, such as {self._example}.", param, ctx
            )
        return float(match[1]) * self._units[match[2]] / self._units[self._unit]


def require_writable(path: Path, kinds: Sequence[str]) -> None:
    """Refuse a file with another ending, or in a folder that is missing or may not be written."""
    if path.suffix.lower() not in kinds:
        raise click.BadParameter(f"the name {str(path)!r} must end with {' or '.join(kinds)}.")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise click.BadParameter(f"the folder {str(path.parent)!r} does not exist, or you may not write there.")


def picture_file(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a picture that cannot be written before anything is read. It is a .png or a .svg file."""
    if path is not None:
        from chunkmill.domain.figures import require_matplotlib

        require_writable(path, (".png", ".svg"))
        require_matplotlib()
    return path


def usd_option(_: click.Context, __: click.Parameter, given: str | None) -> Decimal | None:
    try:
        return None if given is None else Decimal(given)
    except InvalidOperation:
        raise click.BadParameter("it must be an amount such as 0.50.") from None


def quote_options(command: Command) -> Command:
    """The options ``--max-usd`` and ``--dry-run`` of a command that has texts embedded."""
    most = click.option(
        "--max-usd", metavar="USD", callback=usd_option, help="Send nothing if it would cost more than this."
    )
    dry = click.option("--dry-run", is_flag=True, help="Say what would be embedded and what it would cost, and stop.")
    return most(dry(command))


def watch_options(command: Command) -> Command:
    """The options ``--every`` and ``--times`` of a command with ``--watch``."""
    every = click.option(
        "--every",
        type=click.FloatRange(0.2, 3600),
        default=1.0,
        show_default=True,
        help="Seconds between two updates of --watch.",
    )
    times = click.option(
        "--times", type=click.IntRange(1), help="Number of updates of --watch. Without it, --watch ends with Ctrl-C."
    )
    return every(times(command))


class JsonObject(click.ParamType[dict[str, Any]]):
    """A JSON object, such as `{"source": "x"}`."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            given = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"not valid JSON: {error}", param, ctx)
        if not isinstance(given, dict):
            self.fail('it must be a JSON object, such as {"source": "x"}', param, ctx)
        return given
