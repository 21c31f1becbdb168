"""Chooses the engine's best settings on a machine from measurements and constraints. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

# Two runs of the same setting on a quiet machine differ by this share, so smaller differences mean nothing.
NOISE: Final = 0.03


Backend = Literal["native", "transformers", "onnx", "openvino"]
Dtype = Literal["float32", "bfloat16", "float16"]
SHORT: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings that are tuned."""

    backend: Backend
    dtype: Dtype
    batch_tokens: int
    threads: int
    parallel_batches: int
    """How many ChunkBatches are in work at a time. A large pass is filled from several of them."""

    @property
    def kind(self) -> str:
        return f"{self.backend} {SHORT[self.dtype]}"


@dataclass(frozen=True, slots=True)
class SetupMeasurement:
    """What was measured of a setup. Cosines are to fp32 on the same texts."""

    cosine_min: float
    cosine_mean: float
    tokens_per_second: float | None = None
    """From text to NumPy array, the median of the rounds. None if the cosine is too low for the speed to matter."""
    latency_ms: float | None = None
    """The median time for one short text."""
    peak_mib: float | None = None
    """The most memory that the process held on a CPU, or torch on a GPU."""
    rounds: int = 0
    """The number of passes over the texts. From the second on they are interleaved with those of other setups."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setup with its measurements, or with the ``problem`` that prevented them."""

    setup: Setup
    measured: SetupMeasurement | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the winner has to meet. None means no limit."""

    min_cosine: float
    of_mean: bool = False
    """Whether ``min_cosine`` applies to the mean over the texts, as for int8, and not to the lowest cosine."""
    max_memory_mib: float | None = None
    max_latency_ms: float | None = None
    min_throughput: float | None = None

    def passes_gate(self, cosine_min: float, cosine_mean: float) -> bool:
        """Whether the cosines are high enough. NaN is not."""
        return (cosine_mean if self.of_mean else cosine_min) >= self.min_cosine

    def failures(self, candidate: Candidate) -> tuple[str, ...]:
        """The constraints that it breaks: ``cosine``, ``memory``, ``latency``, ``throughput``, or only ``problem``."""
        measured = candidate.measured
        if candidate.problem is not None or measured is None:
            return ("problem",)
        if not self.passes_gate(measured.cosine_min, measured.cosine_mean):
            return ("cosine",)
        limits = (
            ("memory", _over(measured.peak_mib, self.max_memory_mib)),
            ("latency", _over(measured.latency_ms, self.max_latency_ms)),
            ("throughput", _over(self.min_throughput, measured.tokens_per_second)),
        )
        return tuple(name for name, broken in limits if broken)


def choose(candidates: Sequence[Candidate], constraints: Constraints) -> Candidate | None:
    """The fastest candidate that meets all constraints; None if none does.

    Only those that were measured in the most rounds are compared, so that one lucky pass does not beat a median. Of
    equally fast ones it is the one with less memory, then with the lower latency, then with fewer tokens in a pass.
    """
    fitting = [candidate for candidate in candidates if not constraints.failures(candidate)]
    return max(fitting, key=lambda candidate: (_rounds(candidate), *_merit(candidate)), default=None)


def ranked(candidates: Sequence[Candidate], constraints: Constraints) -> list[Candidate]:
    """The candidates that have a speed, best first: those that meet all constraints, then the faster ones."""
    running = [
        candidate for candidate in candidates if candidate.measured is not None and candidate.measured.tokens_per_second
    ]
    return sorted(
        running, key=lambda candidate: (not constraints.failures(candidate), *_merit(candidate)), reverse=True
    )


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats, which would be better in speed, latency or memory and worse in none of them.
    Differences within the noise do not count."""
    running = [
        candidate for candidate in candidates if candidate.measured is not None and candidate.measured.tokens_per_second
    ]
    costs = [_costs(candidate) for candidate in running]
    return [
        candidate
        for candidate, mine in zip(running, costs, strict=True)
        if not any(_beats(other, mine) for other in costs)
    ]


def _merit(candidate: Candidate) -> tuple[float, float, float, int]:
    measured = candidate.measured
    assert measured is not None  # noqa: S101 - only of candidates that were measured
    speed, memory, latency = measured.tokens_per_second or 0.0, measured.peak_mib or 0.0, measured.latency_ms or 0.0
    return speed, -memory, -latency, -candidate.setup.batch_tokens


def _rounds(candidate: Candidate) -> int:
    return candidate.measured.rounds if candidate.measured is not None else 0


def _costs(candidate: Candidate) -> tuple[int, ...]:
    """The time per token, the time for one text and the memory, in steps of the noise."""
    speed, memory, latency, _ = _merit(candidate)
    return tuple(round(math.log(max(cost, 1e-9)) / math.log1p(NOISE)) for cost in (1 / speed, -latency, -memory))


def _beats(mine: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return mine != other and all(a <= b for a, b in zip(mine, other, strict=True))


def _over(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit
