"""Which code runs on which schema: the code's own migrations, one release older, or newer ones that say it may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OLDEST_SCHEMA = "0005"
"""The oldest migration whose tables this code can work on: the last release's. Raise it with the release, and with a
statement that every process needs and that an older schema does not know."""


@dataclass(frozen=True, slots=True)
class SchemaLevel:
    """``current`` is the database's migration, None where it is empty; ``known`` are this code's, the oldest first;
    ``oldest_code`` is what the database says may run on it, None where it says nothing."""

    current: str | None
    known: Sequence[str]
    oldest_code: str | None = None

    @property
    def head(self) -> str:
        return self.known[-1]


def why_not(level: SchemaLevel, *, oldest_schema: str = OLDEST_SCHEMA) -> str | None:
    """Why this code may not run on that schema, and what to do; None where it may."""
    if level.current is None:
        return f"the database is empty, this version needs {level.head}. Run: chunkmill migrate"
    if level.current in level.known:
        if level.known.index(level.current) >= level.known.index(oldest_schema):
            return None
        return (
            f"the database is at migration {level.current}, this version needs {level.head} (or {oldest_schema}, for "
            "the time of an upgrade). Run: chunkmill migrate"
        )
    if level.oldest_code in level.known:
        return None
    needed = f"{level.oldest_code} or later" if level.oldest_code else "a later one"
    return (
        f"the database is at migration {level.current}, made by a newer release that runs beside code of {needed}; "
        f"this code is of {level.head}. Upgrade this process: a schema is not taken back for it."
    )
