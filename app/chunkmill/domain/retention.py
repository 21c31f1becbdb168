"""What a prune or an eviction takes away, and what the cache holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from chunkmill.errors import InvalidInput

OnProgress = Callable[[str, int, int], None]
"""Called after each slice with what is pruned, how many of it are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Amount:
    """``bytes`` are those of the rows themselves; indexes come on top."""

    rows: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.rows + other.rows, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What went, by table, or would go where ``dry_run``. ``before``: what is older than this; None for all.

    ``kept_jobs`` failed or were cancelled long enough ago and stay all the same: chunks of theirs still have no vector,
    and ``retry`` needs to know which.
    """

    dry_run: bool
    before: datetime | None
    amounts: Mapping[str, Amount]
    kept_jobs: int = 0

    @property
    def total(self) -> Amount:
        return sum(self.amounts.values(), Amount())


@dataclass(frozen=True, slots=True)
class CacheSpace:
    """One space's vectors, and how often an enqueue found what it needed.

    ``unreferenced`` vectors are the cache proper: no chunk of a collection in this space has their text, so they only
    wait for it to come back; ``oldest`` is when the first such text was stored. ``table_bytes`` and ``index_bytes`` are
    what Postgres uses on disk. Of ``contents`` that enqueues asked for, ``hits`` had a vector already; ``recent_``
    counts the last ``recent_days``. Both are over the jobs that are still there: a prune forgets the older ones.
    """

    id: int
    space: str
    model: str
    vectors: int
    unreferenced: Amount
    oldest: datetime | None
    table_bytes: int
    index_bytes: int
    contents: int
    hits: int
    recent_days: float
    recent_contents: int
    recent_hits: int

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.contents if self.contents else None

    @property
    def recent_hit_rate(self) -> float | None:
        return self.recent_hits / self.recent_contents if self.recent_contents else None


def as_age(argument: str, given: object) -> timedelta:
    """A timedelta, or so many days. Raises :class:`InvalidInput`."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        try:
            given = timedelta(days=given)
        except (OverflowError, ValueError):
            raise InvalidInput(f"{argument} is {given!r}; it must be a number of days that the calendar has.") from None
    if not isinstance(given, timedelta):
        raise InvalidInput(f"{argument} is {given!r}; it must be a timedelta or a number of days.")
    if given < timedelta(0):
        raise InvalidInput(f"{argument} is {given}; it must not be negative.")
    return given
