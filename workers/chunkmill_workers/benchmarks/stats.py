"""Rounds, medians, ratios and the cosine gate. Pure, except for the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Target:
    """The number that the design promises for a measurement or a ratio."""

    value: float
    at_most: bool = False

    def met_by(self, measured: float) -> bool:
        return measured <= self.value if self.at_most else measured >= self.value


@dataclass(slots=True)
class Measurement:
    """One quantity, measured once in each round. ``refused`` is the reason why it has no number; None if it has one."""

    group: str
    name: str
    unit: str
    rounds: Sequence[float]
    refused: str | None = None
    target: Target | None = None
    ratios: dict[str, dict[str, Any]] = field(default_factory=dict)
    """From ``"to <name>"`` to the :func:`summary` of this measurement divided by that one, round by round."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further fields for the JSON."""

    def as_json(self) -> dict[str, Any]:
        numbers = summary([] if self.refused else self.rounds)
        result = {"group": self.group, "name": self.name, "unit": self.unit, **numbers, "refused": self.refused}
        if self.target and numbers["median"] is not None:
            result |= promise(self.target, numbers["median"])
        return result | {"ratios": self.ratios, **self.details}


def promise(target: Target, measured: float) -> dict[str, Any]:
    """The fields of a target in the JSON, and whether ``found`` meets it."""
    return {
        "target": target.value,
        "target_is": "at most" if target.at_most else "at least",
        "met": target.met_by(measured),
    }


def summary(rounds: Sequence[float]) -> dict[str, Any]:
    """Median, minimum, maximum and all rounds. Without rounds the numbers are None."""
    if not rounds:
        return {"median": None, "min": None, "max": None, "rounds": []}
    return {
        "median": statistics.median(rounds),
        "min": min(rounds),
        "max": max(rounds),
        "rounds": list(rounds),
    }


def add_ratios(
    measurements: Sequence[Measurement], to: str, *, only: str = "", targets: Mapping[str, Target] | None = None
) -> None:
    """Add their ratio to ``to`` to the measurements of its group whose names begin with ``only``.

    Ratios are taken round by round, because measurements of one round saw the same machine. If the machine's speed
    drifts, their median moves less than the ratio of two medians.
    """
    for base in [other for other in measurements if other.name == to and not other.refused]:
        for other in measurements:
            if other is base or other.refused or other.group != base.group or not other.name.startswith(only):
                continue
            ratio = summary([a / b for a, b in zip(other.rounds, base.rounds, strict=True)])
            if targets and other.name in targets:
                ratio |= promise(targets[other.name], ratio["median"])
            other.ratios[f"to {to}"] = ratio


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    say: Callable[[str], None],
    *,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """The seconds of every contender in each round. ``before`` prepares a contender and is not measured."""

    def clocked(contend: Callable[[], object]) -> float:
        began = time.perf_counter()
        contend()
        return time.perf_counter() - began

    timed = {name: (lambda contend=contend: clocked(contend)) for name, contend in contenders.items()}
    return in_turns(timed, rounds, say, before=before)


def in_turns(
    contenders: Mapping[str, Callable[[], float]],
    rounds: int,
    say: Callable[[str], None],
    *,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """What every contender returned in each round.

    Each round begins with another contender, so that the first place is not always a disadvantage for the same one.
    """
    returned: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            say(f"round {number + 1} of {rounds}: {name}")
            before(name)
            returned[name].append(contenders[name]())
    return returned


@dataclass(frozen=True, slots=True)
class Gate:
    """The lowest cosines to the reference with which a contender's speed counts."""

    least_min: float
    least_mean: float

    def refusal(self, cosine_min: float, cosine_mean: float) -> str | None:
        """The reason why the speed does not count; None if the vectors pass. NaN does not pass."""
        if cosine_min >= self.least_min and cosine_mean >= self.least_mean:
            return None
        return (
            f"cosine to the fp32 reference: min {cosine_min:.5f}, mean {cosine_mean:.5f}; "
            f"the gate is min {self.least_min}, mean {self.least_mean}"
        )


OURS = Gate(0.9999, 0.9999)
PEER = Gate(0.995, 0.999)
OUR_INT8 = Gate(0.9, 0.995)
PEER_INT8 = Gate(0.9, 0.99)
"""For int8 the mean decides. The minimum only shows a broken graph: a single text may differ by a few per cent."""


def cosines(vectors: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """``(n,)`` cosines of the rows of two ``(n, d)`` matrices, in fp64."""
    a, b = np.asarray(vectors, np.float64), np.asarray(reference, np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: NDArray[np.float64] = np.einsum("nd,nd->n", a, b) / norms
    return result


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Least-squares slope of y over x; None with fewer than three points."""
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 2 else None
