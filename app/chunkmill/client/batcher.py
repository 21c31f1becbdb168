"""Gathers chunks that come one at a time, and enqueues many of them as one job."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from chunkmill.client.steps import Signal, Steps, WaitStep, run_steps
from chunkmill.domain.chunks import Chunk, prepare
from chunkmill.domain.results import Job
from chunkmill.errors import ChunkmillError, ClientClosed, InvalidChunk, WaitTimeout

logger = logging.getLogger(__name__)

KEPT_JOBS = 10_000
"""How many ids of jobs a batcher keeps, the latest ones."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""How long a batcher waits before it tries again to enqueue, at first and at most."""

Enqueue = Callable[[Sequence[object], str], Job]


class Batcher:
    """Gathers chunks and enqueues them together. ``client.batcher("docs")`` makes it::

        with client.batcher("docs") as add:
            for document in stream:
                add(document.id, document.text, {"source": document.url})

    A chunk is added by its id, text and metadata, or in one of the shapes that :meth:`Client.enqueue` takes. A chunk
    that is wrong raises :class:`InvalidChunk` at once, and the batcher goes on. A thread of the batcher enqueues, and
    all threads may add. A call waits while as many chunks as make a batch are being enqueued and as many wait.

    No chunk is lost: what was added is either enqueued or still in the batcher. If Postgres cannot be used, the thread
    tries again, and a call that finds no room raises :class:`StoreUnavailable` after ``timeout`` seconds, without
    having taken its chunk. An error that trying again does not change, such as :class:`BudgetExceeded`, is raised by
    the next call and by each further one; :meth:`flush` tries once more. The end of the ``with`` block enqueues what
    waits and raises what keeps it from that. :meth:`rest` then returns the chunks that were not enqueued. Without
    ``with``, call :meth:`close`: a process that ends before loses what waits. A child process that is forked begins
    with an empty batcher.
    """

    def __init__(
        self,
        enqueue: Enqueue,
        *,
        max_chunks: int,
        max_bytes: int,
        max_seconds: float,
        timeout: float,
        skips: bool,
    ) -> None:
        self._enqueue = enqueue
        self._max_chunks, self._max_bytes, self._max_seconds = max_chunks, max_bytes, max_seconds
        self._timeout = timeout
        self._skips = skips
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """Begin empty: at first, and in a child process, because the chunks are its parent's."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._waiting: list[object] = []
        self._waiting_bytes = 0
        self._since = math.inf
        """When the first of the waiting chunks came."""
        self._sending: tuple[str, list[object]] | None = None
        """The chunks that are being enqueued, and the key that lets it be tried again."""
        self._added = self._enqueued = self._tries = 0
        self._error: Exception | None = None
        self._try_at = 0.0
        self._wanted = 0
        """The first this many of all chunks that were added are to be enqueued now, although their batch is not
        full."""
        self._is_closed = self._is_over = False
        self._signals: list[Signal] = []
        self._jobs: deque[int] = deque(maxlen=KEPT_JOBS)

    def __repr__(self) -> str:
        return f"Batcher(added={self.added}, enqueued={self.enqueued})"

    @property
    def added(self) -> int:
        """How many chunks were added."""
        return self._added

    @property
    def enqueued(self) -> int:
        """How many of them were enqueued."""
        return self._enqueued

    @property
    def jobs(self) -> list[int]:
        """The ids of the jobs, the latest 10,000 of them, in the order in which they were enqueued."""
        with self._changed:
            return list(self._jobs)

    def rest(self) -> list[object]:
        """The chunks that were added and not enqueued, in their order. A batch whose answer was lost may be among
        them: to enqueue it again embeds nothing twice."""
        with self._changed:
            return [*(self._sending[1] if self._sending else ()), *self._waiting]

    def __call__(self, chunk: object, text: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Add a chunk: ``add(id, text)``, ``add(id, text, metadata)`` or ``add(chunk)``."""
        run_steps(self._add_steps(chunk, text, metadata))

    def flush(self) -> None:
        """Enqueue what was added until now, and return when that is done.

        Raises what keeps it from that, at the latest after ``timeout`` seconds.
        """
        run_steps(self._flush_steps())

    def close(self) -> None:
        """Enqueue what was added, and end. Raises what :meth:`flush` raises; the batcher is closed then too."""
        run_steps(self._close_steps())

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run_steps(self._exit_steps(error))

    def _exit_steps(self, error: BaseException | None) -> Steps[None]:
        """Close. An error of the block itself is the one that is raised, with a note of what was not enqueued."""
        if error is None:
            yield from self._close_steps()
            return
        try:
            yield from self._close_steps()
        except Exception as failed:  # noqa: BLE001 - it is told with the error that ends the block
            error.add_note(f"The batcher was closed, and {len(self.rest()):,} chunks were not enqueued: {failed}")

    def _add_steps(self, chunk: object, text: str | None, metadata: Mapping[str, Any] | None) -> Steps[None]:
        item, size = self._read(chunk, text, metadata)
        deadline = time.monotonic() + self._timeout
        while (signal := self._take(item, size)) is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                self._give_up("there was no room for another chunk")
            yield WaitStep(signal, left)

    def _read(self, chunk: object, text: str | None, metadata: Mapping[str, Any] | None) -> tuple[object, int]:
        """A copy of the chunk that the caller cannot change, and its size in bytes. Raises :class:`InvalidChunk`."""
        given = chunk if text is None and metadata is None else (chunk, text, metadata)
        try:
            prepared = prepare(given, self._added)
        except InvalidChunk as error:
            if not self._skips:
                raise
            return error.with_traceback(None), 0  # the dead list names it
        size = len(prepared.id) + len(prepared.text) + len(prepared.metadata)
        return Chunk(prepared.id, prepared.text.decode(), json.loads(prepared.metadata)), size

    def _take(self, item: object, size: int) -> Signal | None:
        """Add the chunk. If there is no room, the signal is given when something has changed."""
        with self._changed:
            if self._is_closed:
                raise ClientClosed("the batcher is closed. Make another one with client.batcher(…).")
            self._raise_if_final()
            if self._is_full():
                return self._new_signal()
            self._waiting.append(item)
            self._waiting_bytes += size
            self._added += 1
            if len(self._waiting) == 1:
                self._since = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="chunkmill-batcher", daemon=True)
                self._thread.start()
            elif len(self._waiting) == 1 or self._is_full():
                self._changed.notify()
            return None

    def _flush_steps(self) -> Steps[None]:
        deadline = time.monotonic() + self._timeout
        with self._changed:
            wanted = self._wanted = self._added
            tries = self._tries
            self._try_at = 0.0
            self._changed.notify()
        while True:
            with self._changed:
                if self._enqueued >= wanted:
                    return
                if self._tries > tries:
                    self._raise_if_final()
                signal = self._new_signal()
            left = deadline - time.monotonic()
            if left <= 0:
                self._give_up("not all chunks were enqueued")
            yield WaitStep(signal, left)

    def _close_steps(self) -> Steps[None]:
        with self._changed:
            if self._is_over:
                return
            self._is_closed = True
        try:
            yield from self._flush_steps()
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify()

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._max_chunks or self._waiting_bytes >= self._max_bytes

    def _new_signal(self) -> Signal:
        signal = Signal()
        self._signals.append(signal)
        return signal

    def _tell_all(self) -> None:
        signals, self._signals = self._signals, []
        for signal in signals:
            signal.give()

    def _raise_if_final(self) -> None:
        """Raise the error that trying again does not change, if there is one."""
        if self._error is not None and not _is_retryable(self._error):
            raise self._error.with_traceback(None)

    def _give_up(self, what: str) -> None:
        """Raise what has kept the thread from enqueueing."""
        with self._changed:
            if self._error is not None:
                raise self._error.with_traceback(None)
        raise WaitTimeout(
            f"{what} within {self._timeout:g} s, because an enqueue takes longer. Nothing is lost; the same call may "
            "be made again."
        )

    def _run(self) -> None:
        """Enqueue what is due, until the batcher is closed."""
        pause = FIRST_PAUSE_S
        while (sending := self._next()) is not None:
            key, chunks = sending
            try:
                job = self._enqueue(chunks, key)
            except Exception as error:  # noqa: BLE001 - the callers get it
                with self._changed:
                    self._error, self._tries = error, self._tries + 1
                    is_retryable = _is_retryable(error)
                    self._try_at = time.monotonic() + pause if is_retryable else math.inf
                    self._tell_all()
                if is_retryable:
                    logger.warning("%d chunks wait, and are tried again in %g s: %s", len(chunks), pause, error)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                pause = FIRST_PAUSE_S
                with self._changed:
                    self._error, self._sending, self._tries = None, None, self._tries + 1
                    self._enqueued += len(chunks)
                    self._jobs.append(job.id)
                    self._tell_all()

    def _next(self) -> tuple[str, list[object]] | None:
        """The chunks to enqueue, once there are some to enqueue now; None when the batcher is over."""
        with self._changed:
            while True:
                if self._is_over:
                    return None
                now = time.monotonic()
                if self._sending is not None:
                    due = self._try_at
                elif self._waiting and (self._is_full() or self._wanted > self._enqueued):
                    due = now
                else:
                    due = self._since + self._max_seconds if self._waiting else math.inf
                if due <= now:
                    break
                self._changed.wait(None if due == math.inf else due - now)
            if self._sending is None:
                self._sending = (f"batcher-{uuid.uuid4()}", self._waiting)
                self._waiting, self._waiting_bytes, self._since = [], 0, math.inf
                self._tell_all()
            return self._sending


def _is_retryable(error: Exception) -> bool:
    return isinstance(error, ChunkmillError) and error.retryable


_all: weakref.WeakSet[Batcher] = weakref.WeakSet()


def _begin_in_child() -> None:
    for batcher in list(_all):
        with contextlib.suppress(AttributeError):  # one that another thread was making
            batcher._begin()


os.register_at_fork(after_in_child=_begin_in_child)
