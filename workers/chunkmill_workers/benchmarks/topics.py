"""Synthetic collections of known topics: points around 400 centres in 48 dimensions, laid into 384.

Real vectors of texts have few intrinsic dimensions and lie in clusters. That is what makes a graph miss what a filter
or a collection leaves of it, which vectors at random would not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from chunkmill import Chunk

TOPICS, INTRINSIC, DIMENSIONS = 400, 48, 384
WIDTH = 0.5
"""How far a text is from the centre of its topic, in each dimension, if the centres are 1 from 0."""
BLOCK = 4_096
"""Rows that are made at once, which bounds the memory."""
SHARES = {"50 %": ("half", 2), "5 %": ("twentieth", 20), "0.5 %": ("of_200", 200), "0.05 %": ("of_2000", 2_000)}
"""From the share of chunks that pass a filter to the key in the metadata and the number of its values."""


class Kind(StrEnum):
    """Which topics a collection has."""

    MIXED = "mixed"
    """All topics, so that the collection says nothing of the topic."""
    OWN = "own"
    """Some topics that no other collection of this kind has."""


class World:
    """The topics of a run, which depend on nothing but the seed."""

    def __init__(self, seed: int = 17) -> None:
        rng = np.random.default_rng(seed)
        self._centres = rng.standard_normal((TOPICS, INTRINSIC))
        self._laid = np.linalg.qr(rng.standard_normal((DIMENSIONS, INTRINSIC)))[0].T

    def vectors(self, topics: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
        """``(n, 384)`` float32 of length 1: a point of each of the ``(n,)`` topics."""
        points = self._centres[topics] + WIDTH * rng.standard_normal((len(topics), INTRINSIC))
        laid = (points @ self._laid).astype(np.float32)
        laid /= np.linalg.norm(laid, axis=1, keepdims=True)
        return laid


@dataclass(frozen=True, slots=True)
class Corpus:
    """A collection of ``rows`` chunks. Each block of it can be made again, so that none is kept."""

    kind: Kind
    rows: int
    number: int
    """Which collection of its kind it is, from 0 on."""
    of: int
    """How many collections of its kind there are."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.rows}"

    @property
    def topics(self) -> NDArray[np.int64]:
        every = np.arange(TOPICS)
        return every if self.kind is Kind.MIXED else every[self.number :: self.of]

    @property
    def other_topics(self) -> NDArray[np.int64]:
        """The topics that the collection does not have."""
        return np.setdiff1d(np.arange(TOPICS), self.topics)

    def text(self, row: int) -> str:
        return f"row {row} of {self.name}"

    def chunks(self, first: int = 0, rows: int | None = None) -> Iterator[Chunk]:
        """The chunks from ``first`` on. The metadata says nothing of the topic."""
        for row in range(first, first + (self.rows if rows is None else rows)):
            metadata = {key: (row * 7_919 + 13) % values for key, values in SHARES.values()}
            yield Chunk(f"{row}", self.text(row), metadata)

    def blocks(
        self, world: World, first: int = 0, rows: int | None = None
    ) -> Iterator[tuple[range, NDArray[np.float32]]]:
        """The rows and the vectors of each block."""
        end = first + (self.rows if rows is None else rows)
        for start in range(first, end, BLOCK):
            part = range(start, min(start + BLOCK, end))
            rng = np.random.default_rng([self.rows, self.number, self.kind is Kind.OWN, start])
            yield part, world.vectors(rng.choice(self.topics, len(part)), rng)

    def queries(self, world: World, n: int, *, own: bool) -> NDArray[np.float32]:
        """``(n, 384)`` queries about topics of the collection, or about topics of others."""
        rng = np.random.default_rng([self.rows, self.number, own, 99])
        return world.vectors(rng.choice(self.topics if own else self.other_topics, n), rng)
