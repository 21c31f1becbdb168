"""Chooses among the models that people use by what a machine and a collection allow. Pure.

Speed and memory are those that `chunkmill tune` measured on this machine. For a model that was not measured here they
are estimated from the measured model of the nearest size, and never better than that one's: time grows with the
parameters that each token passes through, memory with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from chunkmill.models.known import KnownModel

Preference = Literal["quality", "speed", "memory"]
Basis = Literal["measured", "estimated", "weights"]

PREFERENCES: Final[tuple[Preference, ...]] = ("quality", "speed", "memory")
_MIB: Final = 2**20
_FP32_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Requirements:
    """What the model has to meet. None means no limit."""

    memory_mib: float | None = None
    """The most memory: of the engine's process on a CPU, of torch on a GPU."""
    latency_ms: float | None = None
    """The longest time for one short text."""
    throughput: float | None = None
    """The fewest tokens per second."""
    dimensions: int | None = None
    """The most numbers in a vector."""
    tokens: int | None = None
    """The fewest tokens that it must read of a text."""
    multilingual: bool = False
    commercial: bool = False
    paid: bool = False
    """Whether models that are paid for may be chosen."""

    @property
    def needs_measurements(self) -> bool:
        """Whether it can be answered only if something was measured on this machine."""
        return self.latency_ms is not None or self.throughput is not None


@dataclass(frozen=True, slots=True)
class Yardstick:
    """A model of the table that was measured on this machine with its best settings."""

    model: KnownModel
    tokens_per_second: float
    latency_ms: float
    peak_mib: float
    bytes_per_number: int
    """Of the number format that it was measured in."""


@dataclass(frozen=True, slots=True)
class Option:
    """A model and what is expected of it here."""

    model: KnownModel
    dimensions: int
    """Those of its vectors, cut if that is wanted and the model was trained for it."""
    memory_mib: float | None
    latency_ms: float | None
    tokens_per_second: float | None
    basis: Basis | None
    """Where the numbers come from: ``measured`` here, ``estimated`` from another model that was, or the size of the
    ``weights`` in fp32 alone. None for a model that is paid for."""
    failures: tuple[str, ...]
    """The wishes that it does not meet: memory, latency, throughput, dimensions, tokens, languages, licence, paid."""


def options(
    models: Sequence[KnownModel], yardsticks: Sequence[Yardstick], wanted: Requirements, prefer: Preference = "quality"
) -> list[Option]:
    """All models, best first; those that do not meet the wishes come last, with what they fail.

    ``quality`` is by MTEB's average and then, for models without one, by size. ``speed`` and ``memory`` are by what is
    expected here.
    """
    judged = [_judge(model, yardsticks, wanted) for model in models]
    return sorted(judged, key=lambda option: (bool(option.failures), *_rank(option, prefer)))


def _rank(option: Option, prefer: Preference) -> tuple[float, ...]:
    model = option.model
    worse = (0.0, -model.score) if model.score is not None else (1.0, -float(model.computed or 0))
    if prefer == "speed":
        return (float(math.inf if model.computed is None else model.computed), *worse)
    if prefer == "memory":
        return (math.inf if option.memory_mib is None else option.memory_mib, float(option.dimensions), *worse)
    return worse


def _judge(model: KnownModel, yardsticks: Sequence[Yardstick], wanted: Requirements) -> Option:
    memory, latency, speed, basis = _expected(model, yardsticks)
    dimensions = model.dimensions if wanted.dimensions is None else model.most_dimensions(wanted.dimensions)
    checks = {
        "memory": wanted.memory_mib is None or model.runs == "paid" or _at_most(memory, wanted.memory_mib),
        "latency": wanted.latency_ms is None or _at_most(latency, wanted.latency_ms),
        "throughput": wanted.throughput is None or (speed is not None and speed >= wanted.throughput),
        "dimensions": dimensions is not None,
        # A StaticEmbedding reads a text of any length.
        "tokens": wanted.tokens is None or model.runs == "static" or (model.max_tokens or 0) >= wanted.tokens,
        "languages": not wanted.multilingual or model.languages == "many",
        "licence": not wanted.commercial or model.is_commercial,
        "paid": wanted.paid or model.runs != "paid",
    }
    failures = tuple(name for name, met in checks.items() if not met)
    return Option(model, dimensions or model.dimensions, memory, latency, speed, basis, failures)


def _at_most(number: float | None, most: float) -> bool:
    return number is not None and number <= most


def _expected(
    model: KnownModel, yardsticks: Sequence[Yardstick]
) -> tuple[float | None, float | None, float | None, Basis | None]:
    """Memory in MiB, latency in ms, tokens per second, and where they come from."""
    own = next((measured for measured in yardsticks if measured.model.name == model.name), None)
    if own is not None:
        return own.peak_mib, own.latency_ms, own.tokens_per_second, "measured"
    if model.parameters is None or model.computed is None:
        return None, None, None, None
    if not yardsticks:
        return model.parameters * _FP32_BYTES / _MIB, None, None, "weights"
    nearest = min(yardsticks, key=lambda measured: abs(math.log(_ratio(model, measured))))
    ratio = max(1.0, _ratio(model, nearest))
    more = max(0, model.parameters - (nearest.model.parameters or 0)) * nearest.bytes_per_number / _MIB
    return nearest.peak_mib + more, nearest.latency_ms * ratio, nearest.tokens_per_second / ratio, "estimated"


def _ratio(model: KnownModel, measured: Yardstick) -> float:
    """How many times the computing of a token costs; models that only look tokens up count as one parameter."""
    return max(1, model.computed or 0) / max(1, measured.model.computed or 0)
