"""What becomes of a ChunkBatch whose worker died with it. Pure.

One death says little: a spot machine went. After two, the ChunkBatch is a suspect: workers embed it alone, so that
what dies next was no neighbour's fault, and it is cut in smaller ones until the content that kills stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SUSPECT_DEATHS = 2
DEAD_DEATHS = 4
"""Of a single content: two of them while it was alone on a worker."""
FEW = 32


@dataclass(frozen=True, slots=True)
class Again:
    """Whole, at once, and uncharged: the attempts are for errors."""


@dataclass(frozen=True, slots=True)
class Split:
    """Into new ChunkBatches, suspects from the start."""

    parts: tuple[tuple[bytes, ...], ...]


@dataclass(frozen=True, slots=True)
class Bury:
    """The one content left goes to the dead list."""

    content_hash: bytes


def after_death(deaths: int, missing: Sequence[bytes]) -> Again | Split | Bury:
    """``deaths`` so far, this one counted; ``missing`` are the contents that have no vector yet.

    A split makes about √n parts of √n contents, and single contents of a few: 512 contents cost two deaths whole, one
    in a part and two alone.
    """
    if deaths < SUSPECT_DEATHS or not missing:
        return Again()
    if len(missing) == 1:
        return Bury(missing[0]) if deaths >= DEAD_DEATHS else Again()
    size = 1 if len(missing) <= FEW else math.isqrt(len(missing) - 1) + 1
    return Split(tuple(tuple(missing[i : i + size]) for i in range(0, len(missing), size)))
