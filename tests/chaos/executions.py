"""What the slow engines wrote down: how often each text was embedded, and which fault made it more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False, slots=True)
class Pass:
    """One TokenBatch of one attempt. ``ended`` None: its worker died in it."""

    pid: int
    stream: int
    hashes: tuple[str, ...]
    begun: float
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class Blow:
    """A fault as far as it explains work that was done again. Times are the wall clock's."""

    number: int
    struck: float
    healed: float
    pids: frozenset[int] = frozenset()


@dataclass(slots=True)
class Count:
    """``recomputed`` counts executions of a text after its first; ``duplicates`` the TokenBatches with a text in them
    that another attempt had embedded before. ``by_fault`` names the fault behind each; None where there was none."""

    executed: int = 0
    distinct: int = 0
    recomputed: int = 0
    duplicates: int = 0
    recomputed_by_fault: Counter[int | None] = field(default_factory=Counter)
    duplicates_by_fault: Counter[int | None] = field(default_factory=Counter)


def read_passes(folder: Path) -> list[Pass]:
    """All TokenBatches in the order in which they began."""
    passes = []
    for path in folder.glob("*.executions"):
        pid = int(path.stem)
        under_way: dict[tuple[int, tuple[str, ...]], Pass] = {}
        for line in path.read_text().splitlines():
            event, at, stream, listed = line.split()
            key = (int(stream), tuple(listed.split(",")))
            if event == "begin":
                under_way[key] = Pass(pid, *key, begun=float(at))
                passes.append(under_way[key])
            else:
                under_way.pop(key).ended = float(at)
    return sorted(passes, key=lambda one_pass: one_pass.begun)


def count(passes: Iterable[Pass], blows: Sequence[Blow]) -> Count:
    """Pure."""
    counted = Count()
    last: dict[str, Pass] = {}
    for one_pass in passes:
        counted.executed += len(one_pass.hashes)
        duplicate_of: Pass | None = None
        for content_hash in one_pass.hashes:
            before = last.get(content_hash)
            last[content_hash] = one_pass
            if before is None:
                continue
            counted.recomputed += 1
            counted.recomputed_by_fault[_cause(before, one_pass, blows)] += 1
            if before.ended is not None and before.ended <= one_pass.begun:
                duplicate_of = before
        if duplicate_of is not None:
            counted.duplicates += 1
            counted.duplicates_by_fault[_cause(duplicate_of, one_pass, blows)] += 1
    counted.distinct = len(last)
    return counted


def _cause(before: Pass, again: Pass, blows: Sequence[Blow]) -> int | None:
    """The last fault in between that hit the first execution's worker, else the last in between at all."""
    between = [blow for blow in blows if blow.struck <= again.begun and blow.healed >= before.begun]
    on_its_worker = [blow for blow in between if before.pid in blow.pids]
    culprit = max(on_its_worker or between, key=lambda blow: blow.struck, default=None)
    return culprit.number if culprit else None
