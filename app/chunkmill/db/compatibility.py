"""Which code may run on which schema: that of its own release, that of the last one, or a newer one that allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OLDEST_SCHEMA = "0005"
"""The oldest migration on whose tables this code can work, which is the last release's. Raise it with each release, and
when a statement that every process runs needs a newer schema."""


@dataclass(frozen=True, slots=True)
class SchemaLevel:
    """The migration of a database beside those of this code.

    ``current`` is the database's migration, None if it is empty; ``known`` are this code's, the oldest first;
    ``oldest_code`` is the newest migration of the oldest code that may run on the database, None if it does not say.
    """

    current: str | None
    known: Sequence[str]
    oldest_code: str | None = None

    @property
    def head(self) -> str:
        return self.known[-1]

    @property
    def is_newer(self) -> bool:
        """Whether a newer release made the schema."""
        return self.current is not None and self.current not in self.known


def why_not(level: SchemaLevel, *, oldest_schema: str = OLDEST_SCHEMA) -> str | None:
    """Why this code may not run on that schema, and what to do; None if it may."""
    if level.current is None:
        return f"the database is empty, this version needs {level.head}. Run: chunkmill migrate"
    if level.current in level.known:
        if level.known.index(level.current) >= level.known.index(oldest_schema):
            return None
        return (
            f"the database is at migration {level.current}, this version needs {level.head} (or {oldest_schema}, "
            "during an upgrade). Run: chunkmill migrate"
        )
    if level.oldest_code in level.known:
        return None
    needed = f"{level.oldest_code} or later" if level.oldest_code else "a later one"
    return (
        f"the database is at migration {level.current}, made by a newer release. It allows code of "
        f"{needed} beside it, and this code is of {level.head}. Upgrade this process; do not downgrade the schema."
    )
