"""Fields of a JSON body. A null counts as a field that was not given, because clients send many of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from chunkmill.gateway.errors import Refusal

Meaning = TypeVar("Meaning")


def invalid(param: str, problem: str, code: str = "invalid_input") -> Refusal:
    """The refusal of a field, or of an item of it, such as ``input[3]``. ``problem`` holds nothing of a text."""
    return Refusal(400, code, f"{param} {problem}", param=param.partition("[")[0])


def given(body: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """The first of several names of a field that has a value, and the value; None if none has.

    Raises :class:`Refusal` if two of them have different values.
    """
    present = [(name, body[name]) for name in names if body.get(name) is not None]
    if not present:
        return names[0], None
    name, value = present[0]
    for other, differs in present[1:]:
        if differs != value:
            raise invalid(other, f"contradicts {name}. Give one of the two.")
    return name, value


def text_field(body: Mapping[str, Any], *names: str) -> str | None:
    name, value = given(body, *names)
    if value is not None and not isinstance(value, str):
        raise invalid(name, f"must be a string, not {_kind(value)}.")
    return value


def flag_field(body: Mapping[str, Any], *names: str) -> bool | None:
    name, value = given(body, *names)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, f"must be true or false, not {_kind(value)}.")
    return value


def number_field(
    body: Mapping[str, Any], *names: str, least: int, most: int, code: str = "invalid_input"
) -> int | None:
    name, value = given(body, *names)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise invalid(name, f"must be a whole number, not {_kind(value)}.", code)
    if value is not None and not least <= value <= most:
        raise invalid(name, f"must be from {least:,} to {most:,}.", code)
    return value


def word_field(body: Mapping[str, Any], *names: str, meanings: Mapping[str, Meaning]) -> Meaning | None:
    """What the word of a field means. Capitals make no difference."""
    name, value = given(body, *names)
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in meanings:
        raise invalid(name, f"must be one of: {', '.join(meanings)}.")
    return meanings[value.lower()]


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    kinds = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return kinds.get(type(value), "null")
