"""The device's own thread: one per engine, fed by the streams of all callers.

Rows of every stream wait in one queue, sorted by length, so a TokenBatch may hold texts of several ChunkBatches
and the device does not wait at a ChunkBatch's edge. One thread starts all passes: OpenMP keeps one team of
threads, and on a GPU two passes are under way while the host gathers the next.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from workers.engine.budget import Budget
from workers.engine.packing import choose
from workers.engine.run import Outcome, Pass, Runner, TokenBatch
from workers.engine.windows import Ids

logger = logging.getLogger(__name__)

# So many urgent TokenBatches may go before a waiting bulk one; then one bulk TokenBatch passes, so that a flood of
# queries slows a job down and never stops it.
URGENT_RUN = 8
# Passes under way at a time on a device that computes while the host goes on: one computes, one waits.
IN_FLIGHT = 2
# An idle thread ends, so that a dropped engine leaves nothing behind; the next text starts another. It is no daemon,
# because the interpreter ends those in the middle of torch's C++; so it looks whether the program is over.
IDLE_SECONDS = 10.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Done:
    """What one TokenBatch finished of one stream."""

    at: NDArray[np.int32]
    """(m,) int32: positions in the rows that the stream added."""
    outcome: Outcome
    seconds: float
    """The stream's share of the pass, by tokens."""
    tokens: int
    padded_tokens: int


class Stream:
    """The rows of one caller. Made by :meth:`DeviceLoop.open`; its caller alone reads it."""

    def __init__(self, *, urgent: bool) -> None:
        self.urgent = urgent
        self.added = 0
        self.taken = 0
        self.results: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()


@dataclass(slots=True)
class _Waiting:
    """Rows that wait, longest first; three arrays of one length, and the rows themselves."""

    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    owners: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    at: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def add(self, lengths: NDArray[np.int32], owner: int, first: int) -> None:
        every = np.concatenate((self.lengths, lengths))
        order = np.argsort(-every, kind="stable")
        self.lengths = every[order]
        self.owners = np.concatenate((self.owners, np.full(len(lengths), owner)))[order]
        self.at = np.concatenate((self.at, np.arange(first, first + len(lengths), dtype=np.int32)))[order]

    def keep(self, which: NDArray[np.bool_]) -> None:
        self.lengths, self.owners, self.at = self.lengths[which], self.owners[which], self.at[which]


@dataclass(slots=True)
class _Source:
    """What the loop knows of a stream."""

    stream: Stream
    rows: list[Ids] = field(default_factory=list)
    windows: list[bool] = field(default_factory=list)
    skip: int = 0
    waiting: int = 0


@dataclass(slots=True)
class _Flight:
    """A pass under way, and whose rows are in it."""

    running: Pass
    owners: NDArray[np.int64]
    at: NDArray[np.int32]
    lengths: NDArray[np.int32]
    started: float


class DeviceLoop:
    """Feeds one :class:`Runner`. ``budget`` is asked before every pass: it may shrink meanwhile."""

    def __init__(self, runner: Runner, budget: Budget) -> None:
        self._budget = budget
        self._runner = runner
        self._changed = threading.Condition()
        self._sources: dict[int, _Source] = {}  # in order of arrival
        self._names = itertools.count()
        self._queues = {True: _Waiting(), False: _Waiting()}
        self._urgent_run = 0
        self._thread: threading.Thread | None = None
        self._flying: deque[_Flight] = deque()
        self._most_in_flight = IN_FLIGHT if runner.backend.device.type == "cuda" else 1

    def open(self, *, urgent: bool = False) -> int:
        """A new stream's number; urgent ones go before the others."""
        with self._changed:
            name = next(self._names)
            self._sources[name] = _Source(Stream(urgent=urgent))
            return name

    def add(self, name: int, rows: Sequence[Ids], windows: NDArray[np.bool_], skip: int) -> None:
        """Rows to run: (length,) int32 each; ``windows`` (n,) bool and ``skip`` as in :class:`TokenBatch`."""
        if not len(rows):
            return
        with self._changed:
            source = self._sources[name]
            first = len(source.rows)
            source.rows += rows
            source.windows += windows.tolist()
            source.skip = skip
            source.waiting += len(rows)
            source.stream.added += len(rows)
            lengths = np.array([len(row) for row in rows], np.int32)
            self._queues[source.stream.urgent].add(lengths, name, first)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="device")
                self._thread.start()
            self._changed.notify_all()

    def results(self, name: int) -> Iterator[Done]:
        """What is finished of the rows added so far, as it comes. Raises what broke the device."""
        stream = self._sources[name].stream
        while stream.taken < stream.added:
            found = stream.results.get()
            if isinstance(found, BaseException):
                stream.added = stream.taken  # nothing more will come
                raise found
            stream.taken += len(found.at)
            yield found

    def close(self, name: int) -> list[Done]:
        """Take the stream's waiting rows back; what is under way is finished and returned."""
        with self._changed:
            source = self._sources.get(name)
            if source is None:
                return []
            waiting = self._queues[source.stream.urgent]
            waiting.keep(waiting.owners != name)
            source.stream.added -= source.waiting
            source.waiting = 0
        try:
            return list(self.results(name))
        finally:
            with self._changed:
                self._sources.pop(name, None)

    @property
    def waiting(self) -> int:
        """Rows that no pass has taken yet."""
        with self._changed:
            return sum(len(waiting.lengths) for waiting in self._queues.values())

    def _run(self) -> None:
        """The thread: start what fits, then finish the oldest."""
        try:
            while True:
                batch = self._next(block=not self._flying)
                if batch is not None:
                    self._launch(*batch)
                if not self._flying:
                    if batch is None:
                        return
                    continue
                if batch is None or len(self._flying) >= self._most_in_flight:
                    self._land(self._flying.popleft())
        except BaseException as error:
            # A defect of ours. Whoever waits must hear of it instead of waiting for ever.
            logger.exception("the device's thread failed")
            with self._changed:
                self._thread = None
                self._flying.clear()
                self._queues = {True: _Waiting(), False: _Waiting()}
                for source in self._sources.values():
                    source.stream.results.put(error)

    def _next(
        self, *, block: bool
    ) -> tuple[TokenBatch, NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]] | None:
        """Choose a TokenBatch; None when nothing waits. With ``block``, None ends the thread."""
        with self._changed:
            if block and not self._wait():
                self._thread = None
                return None
            if not self._any_waiting():
                return None
            urgent = self._urgent_next()
            self._urgent_run = self._urgent_run + 1 if urgent and len(self._queues[False].lengths) else 0
            waiting = self._queues[urgent]
            # The stream that came first is finished first; the others' rows fill its passes.
            oldest = next(name for name, each in self._sources.items() if each.stream.urgent is urgent and each.waiting)
            anchor = int((waiting.owners == oldest).argmax())
            chosen = choose(waiting.lengths, anchor, self._budget.tokens, packed=self._runner.backend.packed)
            lengths, owners, at = waiting.lengths[chosen], waiting.owners[chosen], waiting.at[chosen]
            left = np.ones(len(waiting.lengths), np.bool_)
            left[chosen] = False
            waiting.keep(left)
            pairs = list(zip(owners.tolist(), at.tolist(), strict=True))
            for owner, _ in pairs:
                self._sources[owner].waiting -= 1
            batch = TokenBatch(
                [self._sources[owner].rows[row] for owner, row in pairs],
                np.array([self._sources[owner].windows[row] for owner, row in pairs]),
                np.array([self._sources[owner].skip for owner, _ in pairs], np.int32),
            )
        return batch, owners, at, lengths

    def _wait(self) -> bool:
        """Until rows wait; False when none came for a while, or the program ends."""
        idle_until = time.monotonic() + IDLE_SECONDS
        while not self._changed.wait_for(self._any_waiting, min(_LOOK_SECONDS, IDLE_SECONDS)):
            if time.monotonic() >= idle_until or not threading.main_thread().is_alive():
                return False
        return True

    def _any_waiting(self) -> bool:
        return any(len(waiting.lengths) for waiting in self._queues.values())

    def _urgent_next(self) -> bool:
        if not len(self._queues[True].lengths):
            return False
        return not (len(self._queues[False].lengths) and self._urgent_run >= URGENT_RUN)

    def _launch(
        self, batch: TokenBatch, owners: NDArray[np.int64], at: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> None:
        started = time.perf_counter()
        self._flying.append(_Flight(self._runner.launch(batch), owners, at, lengths, started))

    def _land(self, flight: _Flight) -> None:
        try:
            outcome: Outcome | BaseException = self._runner.finish(flight.running)
        except Exception as error:  # noqa: BLE001 - the streams raise it
            outcome = error
        seconds = time.perf_counter() - flight.started
        tokens = int(flight.lengths.sum())
        padding = 1.0
        if not self._runner.backend.packed:
            padding = int(flight.lengths.max()) * len(flight.lengths) / tokens
        with self._changed:
            if self._flying and isinstance(outcome, Outcome):
                # The next pass computes since this one ended, however early it was started.
                self._flying[0].started = max(self._flying[0].started, time.perf_counter())
            for owner in dict.fromkeys(flight.owners.tolist()):
                source = self._sources.get(owner)
                if source is None:
                    continue
                if isinstance(outcome, BaseException):
                    self._fail(owner, source, outcome)
                    continue
                mine = np.flatnonzero(flight.owners == owner)
                part = outcome.part(mine)
                own = int(flight.lengths[mine].sum())
                share = own / tokens
                source.stream.results.put(Done(flight.at[mine], part, seconds * share, own, round(own * padding)))

    def _fail(self, owner: int, source: _Source, error: BaseException) -> None:
        """The device is broken: nothing of this stream will come any more."""
        waiting = self._queues[source.stream.urgent]
        waiting.keep(waiting.owners != owner)
        source.waiting = 0
        source.stream.results.put(error)
