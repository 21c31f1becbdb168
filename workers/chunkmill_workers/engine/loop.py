"""The device's own threads, fed by the streams of all callers.

Rows of every stream wait in one queue, sorted by length, so a TokenBatch may hold texts of several ChunkBatches
and the device does not wait at a ChunkBatch's edge. A GPU has one thread, which keeps two passes under way. A CPU
has one lane per core, or per few cores: a pass of its own on each core needs no barrier between the cores after
every operation, and one pass on all of them does.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill.machine import core_blocks, cores
from chunkmill_workers.engine.budget import Budget
from chunkmill_workers.engine.packing import choose
from chunkmill_workers.engine.run import Outcome, Pass, Runner, TokenBatch
from chunkmill_workers.engine.under_way import UnderWay
from chunkmill_workers.engine.windows import Ids

logger = logging.getLogger(__name__)

# So many urgent TokenBatches may go before a waiting bulk one; then one bulk TokenBatch passes, so that a flood of
# queries slows a job down and never stops it.
URGENT_RUN = 8
# Passes under way at a time on a device that computes while the host goes on: one computes, one waits.
IN_FLIGHT = 2
# Lanes of a CPU. More would wait for Python, which takes 1 to 2 ms of every pass, and need more rows at hand.
MOST_LANES = 8
# Tokens of a pass that is shared out over all cores. A text of 13 tokens takes 8.9 ms on one core and 7.5 to 15 on two,
# by where the scheduler puts them.
ALL_CORES_FROM = 128
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
    under_way: int
    """Rows of the stream that other passes have at this moment."""


class Stream:
    """The rows of one caller. Made by :meth:`DeviceLoop.open`; its caller alone reads it."""

    def __init__(self, *, urgent: bool) -> None:
        self.urgent = urgent
        self.added = 0
        self.landed = 0
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


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A TokenBatch, and whose rows are in it."""

    batch: TokenBatch
    owners: NDArray[np.int64]
    at: NDArray[np.int32]
    lengths: NDArray[np.int32]
    threads: int


@dataclass(slots=True)
class _Flight:
    """A pass under way."""

    running: Pass
    chosen: _Chosen
    started: float


class DeviceLoop:
    """Feeds one :class:`Runner`. ``budget`` is asked before every pass: it may shrink meanwhile.

    ``threads`` are torch's, on a CPU: the lanes share them, and a pass that runs alone has them all. Lanes that have
    the whole machine keep to cores of their own: a scheduler may put two of them on one core and leave the other idle.
    """

    def __init__(self, runner: Runner, budget: Budget, *, threads: int = 1) -> None:
        self._budget = budget
        self._total = threads
        self._most_lanes = min(threads, MOST_LANES) if runner.backend.concurrent else 1
        self._runner = runner
        self._changed = threading.Condition()
        self._sources: dict[int, _Source] = {}  # in order of arrival
        self._names = itertools.count()
        self._queues = {True: _Waiting(), False: _Waiting()}
        self._urgent_run = 0
        self._lanes: dict[threading.Thread, int] = {}
        self._blocks = core_blocks(self._most_lanes) if self._most_lanes > 1 and threads == cores() else []
        self._everywhere = set().union(*self._blocks)
        self._idle = 0
        self._computing = 0
        self.passes = UnderWay()
        """Each from when it was taken."""
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
            self._open_lane()
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

    def _open_lane(self) -> None:
        """One more thread, if rows wait that none is free to take."""
        if not self._idle and len(self._lanes) < self._most_lanes and self._any_waiting():
            lane = threading.Thread(target=self._run, name="device")
            self._lanes[lane] = next(free for free in itertools.count() if free not in self._lanes.values())
            lane.start()

    def _run(self) -> None:
        """A lane: start what fits, then finish the oldest."""
        flying: deque[_Flight] = deque()
        try:
            while True:
                chosen = self._next(block=not flying)
                if chosen is not None:
                    flying.append(self._launch(chosen))
                elif not flying:
                    return
                if chosen is None or len(flying) >= self._most_in_flight:
                    self._land(flying.popleft(), then=flying[0] if flying else None)
        except BaseException as error:
            # A defect of ours. Whoever waits must hear of it instead of waiting for ever.
            logger.exception("a thread of the device failed")
            with self._changed:
                self._lanes.pop(threading.current_thread(), None)
                self._queues = {True: _Waiting(), False: _Waiting()}
                for source in self._sources.values():
                    source.waiting = 0
                    source.stream.results.put(error)

    def _next(self, *, block: bool) -> _Chosen | None:
        """Choose a TokenBatch; None when nothing waits. With ``block``, None ends the lane."""
        with self._changed:
            if block and not self._wait():
                del self._lanes[threading.current_thread()]
                return None
            if not self._any_waiting():
                return None
            urgent = self._urgent_next()
            self._urgent_run = self._urgent_run + 1 if urgent and len(self._queues[False].lengths) else 0
            waiting = self._queues[urgent]
            # The stream that came first is finished first; the others' rows fill its passes.
            oldest = next(name for name, each in self._sources.items() if each.stream.urgent is urgent and each.waiting)
            anchor = int((waiting.owners == oldest).argmax())
            span = choose(waiting.lengths, anchor, self._budget.tokens, packed=self._runner.backend.packed)
            lengths, owners, at = waiting.lengths[span], waiting.owners[span], waiting.at[span]
            left = np.ones(len(waiting.lengths), np.bool_)
            left[span] = False
            waiting.keep(left)
            pairs = list(zip(owners.tolist(), at.tolist(), strict=True))
            for owner, _ in pairs:
                self._sources[owner].waiting -= 1
            batch = TokenBatch(
                [self._sources[owner].rows[row] for owner, row in pairs],
                np.array([self._sources[owner].windows[row] for owner, row in pairs]),
                np.array([self._sources[owner].skip for owner, _ in pairs], np.int32),
            )
            self._computing += 1
            self.passes.begin(id(batch))
            self._open_lane()
            return _Chosen(batch, owners, at, lengths, self._share(int(lengths.sum())))

    def _share(self, tokens: int) -> int:
        """torch's threads for the next pass: all of them where nothing else wants them, from so many tokens on."""
        if self._most_lanes == 1:
            return self._total
        if self._computing == 1 and not self._any_waiting() and tokens >= ALL_CORES_FROM:
            return self._total
        return max(self._total // self._most_lanes, 1)

    def _wait(self) -> bool:
        """Until rows wait; False when none came for a while, or the program ends."""
        idle_until = time.monotonic() + IDLE_SECONDS
        self._idle += 1
        try:
            while not self._changed.wait_for(self._any_waiting, min(_LOOK_SECONDS, IDLE_SECONDS)):
                if time.monotonic() >= idle_until or not threading.main_thread().is_alive():
                    return False
            return True
        finally:
            self._idle -= 1

    def _any_waiting(self) -> bool:
        return any(len(waiting.lengths) for waiting in self._queues.values())

    def _urgent_next(self) -> bool:
        if not len(self._queues[True].lengths):
            return False
        return not (len(self._queues[False].lengths) and self._urgent_run >= URGENT_RUN)

    def _launch(self, chosen: _Chosen) -> _Flight:
        started = time.perf_counter()
        if self._runner.backend.device.type == "cpu":
            self._use(chosen.threads)
        return _Flight(self._runner.launch(chosen.batch), chosen, started)

    def _use(self, threads: int) -> None:
        """So many threads for this lane's next pass, and the cores they may run on."""
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)  # of this thread
        if self._blocks:
            # torch's threads inherit the cores of the lane that starts them, so those of a pass on all cores are
            # started from all cores.
            own = self._blocks[self._lanes[threading.current_thread()]]
            os.sched_setaffinity(0, self._everywhere if threads == self._total else own)

    def _land(self, flight: _Flight, *, then: _Flight | None) -> None:
        try:
            outcome: Outcome | BaseException = self._runner.finish(flight.running)
        except Exception as error:  # noqa: BLE001 - the streams raise it
            outcome = error
        chosen = flight.chosen
        seconds = time.perf_counter() - flight.started
        if self._most_lanes > 1:
            seconds *= chosen.threads / self._total  # of the device, which other lanes share
        tokens = int(chosen.lengths.sum())
        padding = 1.0
        if not self._runner.backend.packed:
            padding = int(chosen.lengths.max()) * len(chosen.lengths) / tokens
        with self._changed:
            self._computing -= 1
            self.passes.end(id(chosen.batch))
            if then is not None:
                # The next pass computes since this one ended, however early it was started.
                then.started = max(then.started, time.perf_counter())
            for owner in dict.fromkeys(chosen.owners.tolist()):
                source = self._sources.get(owner)
                if source is None:
                    continue
                if isinstance(outcome, BaseException):
                    self._fail(owner, source, outcome)
                    continue
                mine = np.flatnonzero(chosen.owners == owner)
                part = outcome.part(mine)
                own = int(chosen.lengths[mine].sum())
                share = own / tokens
                stream = source.stream
                stream.landed += len(mine)
                under_way = stream.added - source.waiting - stream.landed
                stream.results.put(Done(chosen.at[mine], part, seconds * share, own, round(own * padding), under_way))

    def _fail(self, owner: int, source: _Source, error: BaseException) -> None:
        """The device is broken: nothing of this stream will come any more."""
        waiting = self._queues[source.stream.urgent]
        waiting.keep(waiting.owners != owner)
        source.waiting = 0
        source.stream.results.put(error)
