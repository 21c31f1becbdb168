"""The counts of this process. Counting is a plain addition: it needs no package and takes less than a microsecond."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from chunkmill.system.forks import renew_in_child
from chunkmill.telemetry.metrics import OTHER, Kind, Metric, Role

Sample = tuple[Metric, tuple[str, ...], float]


class Counts:
    """The values of all metrics. It is thread-safe.

    A value that a label does not list counts as ``other``, so that no answer of a server can create a series.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._values: dict[tuple[str, tuple[str, ...]], float] = {}

    def add(self, metric: Metric, amount: float = 1.0, *labels: str) -> None:
        self.add_all(((metric, amount),), *labels)

    def add_all(self, amounts: Iterable[tuple[Metric, float]], *labels: str) -> None:
        """Add to several counters with the same labels."""
        with self._mutex:
            for metric, amount in amounts:
                key = (metric.name, _bounded(metric, labels))
                self._values[key] = self._values.get(key, 0.0) + amount

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        with self._mutex:
            self._values[metric.name, _bounded(metric, labels)] = value

    def touch(self, metric: Metric) -> None:
        """Set the gauge to the present Unix time."""
        self.set(metric, time.time())

    def replace(self, metrics: Iterable[Metric], samples: Iterable[Sample]) -> None:
        """Replace all values of ``metrics`` with ``samples``."""
        names = {metric.name for metric in metrics}
        with self._mutex:
            for key in [key for key in self._values if key[0] in names]:
                del self._values[key]
            for metric, labels, value in samples:
                self._values[metric.name, _bounded(metric, labels)] = value

    def total(self, metric: Metric) -> float:
        """The sum over all labels."""
        with self._mutex:
            return sum(value for (name, _), value in self._values.items() if name == metric.name)

    def series(self, metric: Metric, roles: frozenset[Role]) -> list[tuple[tuple[str, ...], float]]:
        """The label values and values that a process of ``roles`` serves. A counter starts at 0, because a series that
        appears with its first count has no rate."""
        if not metric.roles & roles:
            return []
        with self._mutex:
            values = {labels: value for (name, labels), value in self._values.items() if name == metric.name}
        if metric.kind is Kind.COUNTER:
            values = dict.fromkeys(metric.combinations(), 0.0) | values
        return sorted(values.items())


def _bounded(metric: Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
    if not labels and not metric.labels:
        return labels  # the fast way out for most metrics
    if len(labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has {len(metric.labels)} labels, not {len(labels)}")
    return tuple(
        value if not label.values or value in label.values else OTHER
        for label, value in zip(metric.labels, labels, strict=True)
    )


COUNTS = Counts()
"""The counts of this process."""

renew_in_child(COUNTS, "_mutex")
