"""Compares the name of the model that answered with the name that is expected. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

# A date, or a revision such as -001. Not -v2 and not -8b: those are other weights under nearly the same name.
_DATED: Final = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8}|\d{4}|0\d{2})|:latest", re.ASCII)
_VERSION: Final = re.compile(r"-v\d+$", re.ASCII)


def is_same_model(one: str, other: str) -> bool:
    """Whether both names mean one model: one may have an owner before it (``models/m``) or a date behind it."""
    short, long = sorted((one.strip().lower(), other.strip().lower()), key=len)
    if long.endswith(f"/{short}"):
        return True
    base = long if long.startswith(short) else long.rpartition("/")[2]
    return base.startswith(short) and (base == short or _DATED.fullmatch(base[len(short) :]) is not None)


def is_another(answered: str, asked: str, known: Collection[str]) -> bool:
    """Whether the server names another model than it was asked for, of those ``known`` by their own names.

    A server may call a model as it likes, so a name that is merely unknown is not another model's.
    """

    def the_known(name: str) -> str | None:
        plain = _VERSION.sub("", name)  # OpenAI answers as text-embedding-ada-002-v2
        return next((own for own in known if is_same_model(own, plain)), None)

    return the_known(asked) is not None and the_known(answered) not in (None, the_known(asked))
