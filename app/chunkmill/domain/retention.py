"""The results of a prune or an eviction, and the contents of the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from chunkmill.domain.printed import PrintedResult
from chunkmill.errors import InvalidInput

OnProgress = Callable[[str, int, int], None]
"""A function that is called after each slice with the name of what is deleted, how many are deleted, and how many there
are."""


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of rows, and their size."""

    rows: int = 0
    bytes: int = 0
    """The bytes of the rows themselves, without their entries in indexes."""

    def __str__(self) -> str:
        return f"{self.rows:,} rows, {self.bytes:,} bytes"

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.rows + other.rows, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Pruned(PrintedResult):
    """What a prune or an eviction deleted."""

    dry_run: bool
    """Nothing was deleted: the amounts are what would be."""
    before: datetime | None
    """Only older rows were deleted; None if age did not matter."""
    amounts: Mapping[str, Amount]
    """What was deleted, by table."""
    kept_jobs: int = 0
    """Jobs that failed or were cancelled long enough ago, and were kept, because some of their chunks have no vector
    and ``retry`` needs to know which."""
    spaces: tuple[str, ...] = ()
    """The fingerprints of the spaces that were dropped, because nothing referred to them any more."""

    @property
    def total(self) -> Amount:
        """The sum over all tables."""
        return sum(self.amounts.values(), Amount())


@dataclass(frozen=True, slots=True)
class CacheSpace(PrintedResult):
    """The vectors of one space, and how often an enqueue found the vectors that it needed.

    Hits are counted over the jobs that are in the ledger. A prune deletes older ones.
    """

    id: int
    """The number of the space, which is also in the name of its table."""
    space: str
    """The fingerprint of the embedding space."""
    model: str
    vectors: int
    unreferenced: Amount
    """The cache: vectors whose text no chunk of a collection in this space has. They serve if the text comes back."""
    oldest: datetime | None
    """When the first of the unreferenced texts was stored; None if there is none."""
    table_bytes: int
    """What Postgres uses on disk for the vectors."""
    index_bytes: int
    """What Postgres uses on disk for their indexes."""
    contents: int
    """Contents that enqueues asked for."""
    hits: int
    """Those of ``contents`` that had a vector already."""
    recent_days: float
    """How many days ``recent_contents`` and ``recent_hits`` cover."""
    recent_contents: int
    recent_hits: int

    @property
    def hit_rate(self) -> float | None:
        """``hits`` as a share of ``contents``, from 0.0 to 1.0; None without contents."""
        return self.hits / self.contents if self.contents else None

    @property
    def recent_hit_rate(self) -> float | None:
        """``recent_hits`` as a share of ``recent_contents``, from 0.0 to 1.0; None without contents."""
        return self.recent_hits / self.recent_contents if self.recent_contents else None


def as_age(argument: str, given: object) -> timedelta:
    """``given`` as a timedelta; a number counts days. Raises :class:`InvalidInput`, which names ``argument``."""
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


@dataclass(frozen=True, slots=True)
class QueryCache(PrintedResult):
    """What a client keeps of the vectors that it has asked for, and how often that helped."""

    hits: int
    """Texts whose vector was known, since the client was made."""
    misses: int
    """Texts whose vector was not known."""
    vectors: int
    """How many vectors it holds now."""
    bytes: int
    """About how many bytes of memory it takes now."""
    limit: int
    """How many bytes it may take. 0 if it is off."""
