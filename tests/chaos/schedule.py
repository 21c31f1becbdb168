"""Which fault strikes when: a pure function of the seed, so that a run can be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

GAP_SECONDS = (0.3, 3.0)
"""Between two strikes. Short, so that faults overlap: a worker dies while Redis is away."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault to come. ``seed`` decides what the fault chooses itself: its victim, and how long it lasts."""

    number: int
    kind: str
    gap: float
    seed: int


def make_schedule(seed: int, faults: int, kinds: Sequence[str]) -> list[Planned]:
    """``faults`` faults; every kind strikes once before one strikes for the second time."""
    random = Random(seed)
    deck: list[str] = []
    planned = []
    for number in range(1, faults + 1):
        if not deck:
            deck = random.sample(sorted(kinds), len(kinds))
        planned.append(Planned(number, deck.pop(), round(random.uniform(*GAP_SECONDS), 2), random.getrandbits(32)))
    return planned
