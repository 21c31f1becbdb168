"""What is believed of a provider's numbers and names: nothing outside bounds that we know ourselves. Pure.

A number or a name that is out of bounds is an error that names its field. A count of tokens is an exception: the
vectors beside it are paid for and good, so our own count is booked in its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

MAX_COUNT: Final = 2**31 - 1
"""The largest count that is believed, and that a column of the ledger holds."""
TOKENS_FACTOR: Final = 4.0
"""How many times our own count of tokens a provider may charge; ``tokens_factor`` in OPENAI_MODELS says otherwise."""
TOKENS_SLACK: Final = 1_000
"""Tokens that it may charge beyond that, because a short text has a few special tokens."""

_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][\w.:;,=+%/@~-]{0,499}", re.ASCII)


def identifier(field: str, given: object, secrets: Sequence[str] = ()) -> str | None:
    """The id of a file or a batch; None if there is none. Raises a ValueError that names the field if it is odd.

    An id is logged and shown, so one that holds a secret is odd too.
    """
    if given is None or given == "":
        return None
    if isinstance(given, str) and _IDENTIFIER.fullmatch(given) and not any(word and word in given for word in secrets):
        return given
    raise ValueError(f"{field} is not an id: it must be 1 to 500 letters, digits and signs such as - and _")


def count(field: str, given: object) -> int | None:
    """A count; None if it is not a whole number. Raises a ValueError that names the field if it is out of bounds."""
    if type(given) is not int:
        return None
    if 0 <= given <= MAX_COUNT:
        return given
    raise ValueError(f"{field} is out of bounds: it must be from 0 to {MAX_COUNT:,}")


def believed_tokens(usage: object, counted: int, factor: float = TOKENS_FACTOR) -> tuple[int | None, bool]:
    """``(tokens, odd)``: how many tokens the ``usage`` of an answer says, if that can be true of ``counted`` ones.

    ``tokens`` is None if it says nothing that can be true; it is ``odd`` if it says something all the same. With a
    ``factor`` of 0 nothing that it says is believed, and nothing is odd.
    """
    if not factor:
        return None, False
    said = _first(usage, "prompt_tokens", "total_tokens")
    if said is None:
        return None, False
    if type(said) is int and 0 <= said <= counted * factor + TOKENS_SLACK:
        return said, False
    return None, True


def _first(usage: object, *names: str) -> Any:
    given = (usage.get(name) for name in names) if isinstance(usage, dict) else iter(())
    return next((value for value in given if value is not None), None)
