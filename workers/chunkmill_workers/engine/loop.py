"""The device threads, which run the rows of all callers.

The rows of every stream wait in one queue, sorted by length. So a TokenBatch may hold texts of several ChunkBatches,
and the device does not wait at the end of a ChunkBatch. A GPU has one device thread, which keeps two passes running. A
CPU has one device thread for each core, or for each few cores, because a pass on all cores needs a barrier between them
after every operation, and a pass on each core needs none.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from chunkmill.machine import core_blocks, cores
from chunkmill_workers.engine.packing import RowQueue, choose
from chunkmill_workers.engine.run import Pass, PassResult, Runner, TokenBatch
from chunkmill_workers.engine.steps import StepClock
from chunkmill_workers.engine.token_limit import TokenLimit
from chunkmill_workers.engine.windows import Ids

logger = logging.getLogger(__name__)

# How many TokenBatches of more urgent classes may run while a less urgent one waits. Then one of its class runs, so a
# flood of queries slows a job down and never stops it.
URGENT_RUN = 8
# How long after a query less urgent passes stay short, as if somebody waited: the next query may come while
# one of them runs. They have as many tokens as the device thread computes in SHORT_PASS_SECONDS, and not fewer than
# SHORT_PASS_TOKENS, with which a CPU keeps six sevenths of its speed. docs/benchmarks.md has what longer ones cost.
WAITED_SECONDS = 1.0
SHORT_PASS_SECONDS = 0.05
SHORT_PASS_TOKENS = 256
# Passes that a GPU's device thread starts before it waits for the first: one computes, and the next is ready.
IN_FLIGHT = 2
# The most device threads of a CPU. More of them would wait for Python, which takes 1 to 2 ms of every pass, and would
# need more waiting rows to be busy.
MOST_DEVICE_THREADS = 8
# The least tokens of a pass that may use all cores. A text of 13 tokens takes 8.9 ms on one core, and 7.5 to 15 ms on
# two, depending on where the scheduler puts them.
ALL_CORES_FROM = 128
# An idle device thread ends, so that an engine that is not used any more leaves no thread behind; the next text starts
# another thread. It is not a daemon, because the interpreter ends those in the middle of torch's C++. So it has to
# check itself whether the program is over, every _LOOK_SECONDS.
IDLE_SECONDS = 10.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class StreamResult:
    """The rows of one stream that one pass finished."""

    at: NDArray[np.int32]
    """(m,) int32: positions in the rows that the stream added."""
    rows: PassResult
    seconds: float
    """The stream's share of the time that the pass took on the device, by tokens."""
    tokens: int
    padded_tokens: int
    under_way: int
    """How many rows of the stream are in other passes at this moment."""


class Rank(IntEnum):
    """The classes of work, in order: the most urgent comes first."""

    INTERACTIVE = 0
    """Somebody waits for a few short texts."""
    SYNCHRONOUS = 1
    """Somebody waits for many texts."""
    BULK = 2


class Stream:
    """Counts and results of one caller's rows. Made by :meth:`DeviceLoop.open`; only its caller reads it."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.added = 0
        self.landed = 0
        self.taken = 0
        self.results: queue.SimpleQueue[StreamResult | BaseException] = queue.SimpleQueue()


@dataclass(slots=True)
class _Source:
    """A stream with the rows that it added."""

    stream: Stream
    rows: list[Ids] = field(default_factory=list)
    windows: list[bool] = field(default_factory=list)
    skip: int = 0
    waiting: int = 0
    """How many of the rows no pass has taken yet."""


@dataclass(frozen=True, slots=True)
class _Selection:
    """A TokenBatch, the streams that own its rows, and the threads of torch that it may use."""

    batch: TokenBatch
    owners: NDArray[np.int64]
    at: NDArray[np.int32]
    lengths: NDArray[np.int32]
    threads: int


@dataclass(slots=True)
class _Flight:
    """A pass that is running. ``started`` is in seconds of `time.perf_counter`."""

    running: Pass
    selection: _Selection
    started: float


class DeviceLoop:
    """Feeds the rows of all streams to one :class:`Runner`.

    ``token_limit`` is asked before every pass, because it may have shrunk. ``threads`` are torch's on a CPU: the
    device threads share them, and a pass that runs alone has all of them. If the engine has the whole machine, each
    device thread keeps to cores of its own, because a scheduler may put two threads on one core and leave another idle.
    """

    def __init__(self, runner: Runner, token_limit: TokenLimit, *, threads: int = 1) -> None:
        self._token_limit = token_limit
        self._total = threads
        self._most_threads = min(threads, MOST_DEVICE_THREADS) if runner.backend.concurrent else 1
        self._runner = runner
        self._changed = threading.Condition()
        self._sources: dict[int, _Source] = {}  # in the order in which the streams were opened
        self._names = itertools.count()
        self._queues = {rank: RowQueue() for rank in Rank}
        self._passed = dict.fromkeys(Rank, 0)
        """How many TokenBatches of more urgent classes have run while rows of this one waited."""
        self._waited_at = -math.inf
        """When somebody last waited for a query, by ``time.monotonic``."""
        self._rate = math.inf
        """The tokens per second of one device thread, as they were lately."""
        self._threads: dict[threading.Thread, int] = {}
        self._blocks = core_blocks(self._most_threads) if self._most_threads > 1 and threads == cores() else []
        self._everywhere = set().union(*self._blocks)
        self._idle = 0
        self._stopped = False
        self._computing = 0
        self.passes = StepClock()
        """The passes that are running, each from the moment when its rows were taken."""
        self._most_in_flight = IN_FLIGHT if runner.backend.device.type == "cuda" else 1

    def open(self, *, urgent: bool = False, large: bool = False) -> int:
        """Open a stream and return its number.

        Urgent streams are served before the others, and of these the ``large`` ones last.
        """
        rank = (Rank.SYNCHRONOUS if large else Rank.INTERACTIVE) if urgent else Rank.BULK
        with self._changed:
            name = next(self._names)
            self._sources[name] = _Source(Stream(rank))
            return name

    def add(self, name: int, rows: Sequence[Ids], windows: NDArray[np.bool_], skip: int) -> None:
        """Queue ``rows``, each (length,) int32, for a device thread.

        ``windows`` is (n,) bool, and ``skip`` a number of leading tokens: see :class:`TokenBatch`.
        """
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
            self._queues[source.stream.rank].add(lengths, name, first)
            self._start_thread()
            self._changed.notify_all()

    def results(self, name: int) -> Iterator[StreamResult]:
        """Yield the results of the rows that were added so far, as passes finish. Raises what broke the device."""
        stream = self._sources[name].stream
        while stream.taken < stream.added:
            result = stream.results.get()
            if isinstance(result, BaseException):
                stream.added = stream.taken  # nothing more will come
                raise result
            stream.taken += len(result.at)
            yield result

    def close(self, name: int) -> list[StreamResult]:
        """Take back the stream's waiting rows, and return the results of those that were running."""
        with self._changed:
            source = self._sources.get(name)
            if source is None:
                return []
            waiting = self._queues[source.stream.rank]
            waiting.keep(waiting.owners != name)
            source.stream.added -= source.waiting
            source.waiting = 0
        try:
            return list(self.results(name))
        finally:
            with self._changed:
                self._sources.pop(name, None)

    def stop(self, seconds: float) -> None:
        """End the device threads once no rows wait, and wait for that for ``seconds`` at most.

        Streams that are open go on, and a stream that is opened later still works: no thread stays idle any more.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            threads = list(self._threads)
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    @property
    def waiting(self) -> int:
        """How many rows no pass has taken yet."""
        with self._changed:
            return sum(len(waiting.lengths) for waiting in self._queues.values())

    def _start_thread(self) -> None:
        """Start one more device thread if rows wait and no thread is free to take them."""
        if not self._idle and len(self._threads) < self._most_threads and self._any_waiting():
            thread = threading.Thread(target=self._run, name="device")
            self._threads[thread] = next(free for free in itertools.count() if free not in self._threads.values())
            thread.start()

    def _run(self) -> None:
        """The work of a device thread: start as many passes as may run at a time, then finish the oldest."""
        flying: deque[_Flight] = deque()
        try:
            while True:
                selection = self._next(block=not flying)
                if selection is not None:
                    flying.append(self._launch(selection))
                elif not flying:
                    return
                if selection is None or len(flying) >= self._most_in_flight:
                    self._land(flying.popleft(), then=flying[0] if flying else None)
        except BaseException as error:
            # This is a defect of ours. Every caller that waits must get the error, because otherwise it would wait for
            # ever.
            logger.exception("a device thread failed because of a defect in Chunkmill")
            with self._changed:
                self._threads.pop(threading.current_thread(), None)
                self._queues = {rank: RowQueue() for rank in Rank}
                for source in self._sources.values():
                    source.waiting = 0
                    source.stream.results.put(error)

    def _next(self, *, block: bool) -> _Selection | None:
        """Take the rows of the next TokenBatch; None if no rows wait. With ``block``, None ends the device thread."""
        with self._changed:
            if block and not self._wait():
                del self._threads[threading.current_thread()]
                return None
            if not self._any_waiting():
                return None
            rank = self._next_rank()
            waiting = self._queues[rank]
            # The oldest stream is finished first. The rows of other streams fill its passes.
            oldest = next(
                name for name, source in self._sources.items() if source.stream.rank is rank and source.waiting
            )
            anchor = int((waiting.owners == oldest).argmax())
            span = choose(waiting.lengths, anchor, self._most_tokens(rank), packed=self._runner.backend.packed)
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
            self._start_thread()
            return _Selection(batch, owners, at, lengths, self._share(int(lengths.sum())))

    def _share(self, tokens: int) -> int:
        """How many of torch's threads the next pass gets: all of them if it is large enough and runs alone."""
        if self._most_threads == 1:
            return self._total
        if self._computing == 1 and not self._any_waiting() and tokens >= ALL_CORES_FROM:
            return self._total
        return max(self._total // self._most_threads, 1)

    def _wait(self) -> bool:
        """Wait for rows. False if none came within IDLE_SECONDS, or if the program ends."""
        idle_until = time.monotonic() + IDLE_SECONDS
        self._idle += 1
        try:
            while not self._any_waiting():
                if self._stopped or time.monotonic() >= idle_until or not threading.main_thread().is_alive():
                    return False
                self._changed.wait(min(_LOOK_SECONDS, IDLE_SECONDS))
            return True
        finally:
            self._idle -= 1

    def _any_waiting(self) -> bool:
        return any(len(waiting.lengths) for waiting in self._queues.values())

    def _next_rank(self) -> Rank:
        """The class of the next TokenBatch: the most urgent one, unless another has been passed over too often."""
        waiting = [rank for rank in Rank if len(self._queues[rank].lengths)]
        chosen = next((rank for rank in reversed(waiting) if self._passed[rank] >= URGENT_RUN), waiting[0])
        for rank in Rank:
            if rank not in waiting or rank is chosen:
                self._passed[rank] = 0
            elif rank > chosen:
                self._passed[rank] += 1
        if Rank.INTERACTIVE in waiting:
            self._waited_at = time.monotonic()
        return chosen

    def _most_tokens(self, rank: Rank) -> int:
        """The most tokens of the next TokenBatch, of this class."""
        most = self._token_limit.tokens
        if rank is Rank.INTERACTIVE or time.monotonic() - self._waited_at > WAITED_SECONDS:
            return most
        return int(min(most, max(SHORT_PASS_TOKENS, self._rate * SHORT_PASS_SECONDS)))

    def _launch(self, selection: _Selection) -> _Flight:
        started = time.perf_counter()
        if self._runner.backend.device.type == "cpu":
            self._use(selection.threads)
        return _Flight(self._runner.launch(selection.batch), selection, started)

    def _use(self, threads: int) -> None:
        """Set torch's threads for this device thread's next pass, and the cores that they may run on."""
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)  # for this device thread alone
        if self._blocks:
            # torch's threads inherit the cores of the device thread that starts them. So before a pass on all cores,
            # this thread must be allowed on all cores.
            own = self._blocks[self._threads[threading.current_thread()]]
            os.sched_setaffinity(0, self._everywhere if threads == self._total else own)

    def _land(self, flight: _Flight, *, then: _Flight | None) -> None:
        """Finish a pass and give each stream its rows. ``then`` is the pass that is running behind it."""
        try:
            result: PassResult | BaseException = self._runner.finish(flight.running)
        except Exception as error:  # noqa: BLE001 - the streams raise it
            result = error
        selection = flight.selection
        elapsed = seconds = time.perf_counter() - flight.started
        if self._most_threads > 1:
            seconds *= selection.threads / self._total  # other device threads have the rest of the device
        tokens = int(selection.lengths.sum())
        padding = 1.0
        if not self._runner.backend.packed:
            padding = int(selection.lengths.max()) * len(selection.lengths) / tokens
        with self._changed:
            self._computing -= 1
            if isinstance(result, PassResult):
                self._note_rate(tokens, elapsed)
            self.passes.end(id(selection.batch))
            if then is not None:
                # The next pass has computed only since this one ended, however early it was started.
                then.started = max(then.started, time.perf_counter())
            for owner in dict.fromkeys(selection.owners.tolist()):
                source = self._sources.get(owner)
                if source is None:
                    continue
                if isinstance(result, BaseException):
                    self._fail(owner, source, result)
                    continue
                mine = np.flatnonzero(selection.owners == owner)
                part = result.part(mine)
                own = int(selection.lengths[mine].sum())
                share = own / tokens
                stream = source.stream
                stream.landed += len(mine)
                under_way = stream.added - source.waiting - stream.landed
                stream.results.put(
                    StreamResult(selection.at[mine], part, seconds * share, own, round(own * padding), under_way)
                )

    def _note_rate(self, tokens: int, seconds: float) -> None:
        """Note how fast a pass was. A short one says little, because it is mostly the start of a pass."""
        if tokens < SHORT_PASS_TOKENS // 2:
            return
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if math.isinf(self._rate) else 0.8 * self._rate + 0.2 * rate

    def _fail(self, owner: int, source: _Source, error: BaseException) -> None:
        """End a stream whose device is broken: take its rows from the queue, and make its caller raise ``error``."""
        waiting = self._queues[source.stream.rank]
        waiting.keep(waiting.owners != owner)
        source.waiting = 0
        source.stream.results.put(error)
