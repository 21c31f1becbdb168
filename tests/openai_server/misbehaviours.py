"""Which misbehaviours are asked for, and which of them strikes now."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tests.openai_server.kinds import KINDS

Subject = dict[str, Any]
"""What is known where a misbehaviour may strike: endpoint, id, filename, batch, purpose, metadata."""


@dataclass
class Misbehaviour:
    number: int
    kind: str
    times: int | None
    after: int
    where: Subject
    options: dict[str, Any]
    fired: list[Subject] = field(default_factory=list)
    passed: int = 0

    def meets(self, subject: Subject) -> bool:
        return all(_agrees(subject.get(name), wanted) for name, wanted in self.where.items())

    @property
    def spent(self) -> bool:
        return self.times is not None and len(self.fired) >= self.times

    def take(self, subject: Subject) -> bool:
        """A chance: it strikes, or passes one more of those it lets pass, or is spent."""
        if self.spent:
            return False
        if self.passed < self.after:
            self.passed += 1
            return False
        self.fired.append({name: value for name, value in subject.items() if value is not None})
        return True

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "kind": self.kind,
            "times": self.times,
            "after": self.after,
            "where": self.where,
            "options": self.options,
            "fired": self.fired,
        }


def _agrees(actual: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(actual, dict) and wanted.items() <= actual.items()
    if isinstance(wanted, str) and isinstance(actual, str):
        return fnmatchcase(actual, wanted)
    return bool(actual == wanted)


class LineStrikes:
    """The misbehaviours that may strike lines of one batch, or one sync request: a chance once they meet a line."""

    def __init__(self, wished: list[Misbehaviour], subject: Subject, mutex: threading.Lock) -> None:
        self._wished = wished
        self._subject = subject
        self._mutex = mutex
        self._taken: dict[int, bool] = {}

    def on(self, position: int, texts: list[str]) -> dict[str, dict[str, Any]]:
        """What strikes this line, kind to options. ``position`` counts the lines executed, from 0."""
        return {
            misbehaviour.kind: misbehaviour.options
            for misbehaviour in reversed(self._wished)
            if self._strikes(misbehaviour, position, texts)
        }

    def _strikes(self, misbehaviour: Misbehaviour, position: int, texts: list[str]) -> bool:
        if not _chosen(misbehaviour.options, position, texts):
            return False
        if misbehaviour.number not in self._taken:
            with self._mutex:
                self._taken[misbehaviour.number] = misbehaviour.take(self._subject)
        return self._taken[misbehaviour.number]


def _chosen(options: dict[str, Any], position: int, texts: list[str]) -> bool:
    if options["marker"] is not None:
        return any(options["marker"] in text for text in texts)
    if options["every"] is not None:
        return bool(position % options["every"] == 0)
    return bool(position < options["lines"])


class Misbehaviours:
    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self.all: list[Misbehaviour] = []
        self._calm_up_to = 0

    def ask(
        self, kind: str, times: int | None, after: int, where: Subject, options: dict[str, Any], endpoints: list[str]
    ) -> int:
        if kind not in KINDS:
            raise ValueError(f"no misbehaviour {kind!r}; known are {sorted(KINDS)}")
        if unknown := set(options) - set(KINDS[kind]):
            raise ValueError(f"{kind} has no option {sorted(unknown)}; it has {sorted(KINDS[kind])}")
        endpoint = where.get("endpoint", "*")
        if not any(fnmatchcase(pattern, endpoint) for pattern in endpoints):
            raise ValueError(f"no endpoint {endpoint!r}; known are {sorted(endpoints)}")
        with self._mutex:
            number = len(self.all) + 1
            self.all.append(Misbehaviour(number, kind, times, after, where, {**KINDS[kind], **options}))
        return number

    def calm(self) -> None:
        with self._mutex:
            self._calm_up_to = len(self.all)

    def strike(self, kind: str, subject: Subject) -> dict[str, Any] | None:
        """The options of the first one of this kind that strikes here, which is one of its times; or None."""
        with self._mutex:
            for misbehaviour in self.all[self._calm_up_to :]:
                if misbehaviour.kind == kind and misbehaviour.meets(subject) and misbehaviour.take(subject):
                    return misbehaviour.options
        return None

    def for_lines(self, kinds: dict[str, dict[str, Any]], subject: Subject) -> LineStrikes:
        with self._mutex:
            wished = [
                misbehaviour
                for misbehaviour in self.all[self._calm_up_to :]
                if misbehaviour.kind in kinds and misbehaviour.meets(subject)
            ]
        return LineStrikes(wished, subject, self._mutex)

    def as_json(self) -> list[dict[str, Any]]:
        with self._mutex:
            return [misbehaviour.as_json() for misbehaviour in self.all]
