"""What happens to a ChunkBatch whose worker died while it held it. Pure.

One death says little: a spot machine may have been taken away. After two deaths the ChunkBatch is a suspect. Workers
embed it alone, so that no neighbour can be the cause of the next death, and it is split until the content that kills is
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SUSPECT_DEATHS = 2
"""After this many deaths a ChunkBatch is a suspect."""
DEAD_DEATHS = 4
"""After this many deaths a single content is dead. During the last two of them it was alone on its worker."""
FEW = 32
"""A ChunkBatch of at most this many contents is split into single contents."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Make the ChunkBatch available at once as it is. A death is not charged as an attempt."""


@dataclass(frozen=True, slots=True)
class Split:
    """Replace the ChunkBatch by new ones with these contents. They are suspects from the start."""

    parts: tuple[tuple[bytes, ...], ...]


@dataclass(frozen=True, slots=True)
class Bury:
    """Put the only content that is left on the dead list."""

    content_hash: bytes


def after_death(deaths: int, missing: Sequence[bytes]) -> Retry | Split | Bury:
    """What to do with a ChunkBatch after a death.

    ``deaths`` counts all its deaths, this one included. ``missing`` are its contents that have no vector yet. A split
    of n contents makes about √n parts of √n contents, or single contents if n is at most FEW. So a content that kills
    among 512 costs five deaths: two of the whole, one of a part, and two alone.
    """
    if deaths < SUSPECT_DEATHS or not missing:
        return Retry()
    if len(missing) == 1:
        return Bury(missing[0]) if deaths >= DEAD_DEATHS else Retry()
    size = 1 if len(missing) <= FEW else math.isqrt(len(missing) - 1) + 1
    return Split(tuple(tuple(missing[i : i + size]) for i in range(0, len(missing), size)))
