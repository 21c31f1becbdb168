"""What a collection holds and where, what a drop did, and the names of the SQL views. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from chunkmill.domain.printed import PrintedResult
from chunkmill.domain.results import Index

COUNTED = 1_000
"""The chunks of a collection are counted up to here. If there are more, their number is estimated."""
LONGEST_IDENTIFIER = 63
"""Postgres cuts the name of a table or a view after so many bytes."""

OnDropped = Callable[[int], None]
"""A function that is called after each slice with how many chunks are deleted."""


@dataclass(frozen=True, slots=True)
class CollectionInfo(PrintedResult):
    """A collection, how much is in it, and how it is served."""

    name: str
    aliases: tuple[str, ...]
    """Its other names, in order."""
    space: str
    """The fingerprint of its embedding space."""
    model: str
    chunks: int
    embedded: int
    """Contents with a vector in its space. Chunks with the same text share one content."""
    counted: bool
    """Whether ``chunks`` and ``embedded`` are exact. Otherwise they are estimated from a sample of the table, and
    ``embedded`` as if no two chunks had the same text."""
    pending: int
    """Contents of its open jobs that are not embedded yet."""
    dead: int
    """Chunks that are in the collection, are on a dead list, and have no vector."""
    index: Index
    """What serves its searches. All numbers are 0 without a serving index."""
    view: str | None
    """The SQL view that shows it, quoted, such as ``"chunkmill_collections"."docs"``. None if there is none."""
    created_at: datetime
    last_enqueue_at: datetime | None
    """When its latest job was created; None if all of its jobs are pruned."""


@dataclass(frozen=True, slots=True)
class DroppedCollection(PrintedResult):
    """What a drop did before it returned."""

    name: str
    chunks: int
    """Chunks that were deleted."""
    complete: bool
    """No chunk is left. Otherwise the drop did not wait or was interrupted, and a poller deletes the rest."""


def embedded_of(chunks: int, waiting: Sequence[int]) -> int:
    """About how many contents have a vector, if ``chunks`` were as many contents and these are still ``waiting``."""
    return max(0, chunks - sum(waiting))


def view_name(collection: str) -> str:
    """The name of the view of a collection or an alias: its own, or the beginning of a long one and its hash.

    The function ``collection_view_name`` of the database says the same.
    """
    encoded = collection.encode()
    if len(encoded) <= LONGEST_IDENTIFIER:
        return collection
    beginning = encoded[:46].decode(errors="ignore")
    return f"{beginning}_{hashlib.sha256(encoded).hexdigest()[:16]}"


def quoted(*names: str) -> str:
    """SQL identifiers, quoted and joined by dots."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)
