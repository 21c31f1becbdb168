"""Checks of arguments that several methods of the client share."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeVar

from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput, UnknownRoute

Word = TypeVar("Word", bound=StrEnum)


def as_word(words: type[Word], given: Word | str, argument: str) -> Word:
    """The member of ``words`` that ``given`` names.

    Raises :class:`InvalidInput`, or :class:`UnknownRoute` for a route. The message names ``argument``.
    """
    try:
        return words(given)
    except ValueError:
        kind = UnknownRoute if words is Route else InvalidInput
        raise kind(f"{argument} is {given!r}; it must be one of: {', '.join(map(str, words))}.") from None


def as_deadline(given: object, now: datetime) -> datetime:
    """The deadline that ``given`` means: a datetime with a time zone, or a timedelta or seconds from ``now`` on.

    Raises :class:`InvalidInput` if it is none of these, or is in the past.
    """
    if isinstance(given, datetime):
        if given.tzinfo is None:
            raise InvalidInput(
                f"deadline is {given.isoformat(sep=' ')} without a time zone; give it one, such as tzinfo=UTC."
            )
        deadline = given
    elif isinstance(given, timedelta | int | float) and not isinstance(given, bool):
        try:
            deadline = now + (given if isinstance(given, timedelta) else timedelta(seconds=given))
        except (OverflowError, ValueError):
            raise InvalidInput(f"deadline is {given!r}; it must be a moment that a datetime can hold.") from None
    else:
        raise InvalidInput(
            f"deadline is {given!r}; it must be a datetime with a time zone, a timedelta, or a number of seconds."
        )
    if deadline <= now:
        shown = deadline.isoformat(sep=" ", timespec="seconds")
        raise InvalidInput(f"deadline {shown} is in the past; give a later one.")
    return deadline


def require_name(argument: str, name: object) -> None:
    """Raise :class:`InvalidInput` unless ``name`` is a text of 1 to 200 characters that Postgres can store."""
    if not isinstance(name, str) or not name.strip() or "\x00" in name or len(name) > 200:
        raise InvalidInput(f"{argument} is {name!r}; it must be a text of 1 to 200 characters without NUL.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{argument} contains a lone surrogate, which is not valid Unicode.") from None
