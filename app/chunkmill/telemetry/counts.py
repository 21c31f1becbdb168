"""The process's own counts: plain additions, so that counting costs no package and under a microsecond."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from chunkmill.telemetry.metrics import OTHER, Kind, Metric, Role

Sample = tuple[Metric, tuple[str, ...], float]


class Counts:
    """Thread-safe. A value that a label does not have counts as ``other``: what a server says must not make series."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._values: dict[tuple[str, tuple[str, ...]], float] = {}

    def add(self, metric: Metric, amount: float = 1.0, *labels: str) -> None:
        self.add_all(((metric, amount),), *labels)

    def add_all(self, amounts: Iterable[tuple[Metric, float]], *labels: str) -> None:
        """Several counters with the same labels."""
        with self._mutex:
            for metric, amount in amounts:
                key = (metric.name, _bounded(metric, labels))
                self._values[key] = self._values.get(key, 0.0) + amount

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        with self._mutex:
            self._values[metric.name, _bounded(metric, labels)] = value

    def touch(self, metric: Metric) -> None:
        """Set it to the time of day."""
        self.set(metric, time.time())

    def replace(self, metrics: Iterable[Metric], samples: Iterable[Sample]) -> None:
        """Put what was just seen in the place of all that was said of ``metrics`` before."""
        names = {metric.name for metric in metrics}
        with self._mutex:
            for key in [key for key in self._values if key[0] in names]:
                del self._values[key]
            for metric, labels, value in samples:
                self._values[metric.name, _bounded(metric, labels)] = value

    def total(self, metric: Metric) -> float:
        """Over all labels."""
        with self._mutex:
            return sum(value for (name, _), value in self._values.items() if name == metric.name)

    def series(self, metric: Metric, roles: frozenset[Role]) -> list[tuple[tuple[str, ...], float]]:
        """What there is to serve in a process of ``roles``. A counter is there from the start, at 0: what counts from
        nothing has no rate."""
        if not metric.roles & roles:
            return []
        with self._mutex:
            found = {labels: value for (name, labels), value in self._values.items() if name == metric.name}
        if metric.kind is Kind.COUNTER:
            found = dict.fromkeys(metric.combinations(), 0.0) | found
        return sorted(found.items())


def _bounded(metric: Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
    if not labels and not metric.labels:
        return labels  # most of them
    if len(labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has {len(metric.labels)} labels, not {len(labels)}")
    return tuple(
        value if not label.values or value in label.values else OTHER
        for label, value in zip(metric.labels, labels, strict=True)
    )


COUNTS = Counts()
"""Of this process."""
