"""The words of a re-embedding: the way of a collection from one space to another."""

from __future__ import annotations

from enum import StrEnum


class SpaceRole(StrEnum):
    """What a space other than the active one is to a collection."""

    FILLING = "filling"
    """It gets the vectors of all chunks, and may answer a share of the searches."""
    PREVIOUS = "previous"
    """The collection left it, and it is kept up to date, so that the collection can come back."""


class ReembeddingState(StrEnum):
    """The states of a re-embedding, in the order in which it goes through them, and the two other ends."""

    PLANNED = "planned"
    """It is written down. Nothing was sent to a worker."""
    FILLING = "filling"
    """Workers embed the stored texts into the new space."""
    INDEXING = "indexing"
    """Every chunk has a vector, or is dead in the new space, and the serving index is built."""
    JUDGING = "judging"
    """The gates are checked. It stays here if one of them is not passed."""
    RAMPING = "ramping"
    """The new space answers a growing share of the searches."""
    FLIPPED = "flipped"
    """The new space is the active one. The old one is kept up to date."""
    FINISHED = "finished"
    """The old space is no longer kept."""
    CANCELLED = "cancelled"
    ROLLED_BACK = "rolled_back"

    @property
    def is_end(self) -> bool:
        return self in (ReembeddingState.FINISHED, ReembeddingState.CANCELLED, ReembeddingState.ROLLED_BACK)
