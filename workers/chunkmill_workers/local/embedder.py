"""The requests that somebody waits for: which of them are embedded together, and in which order.

It knows no database. Whoever takes requests from somewhere submits them here, as ``chunkmill_workers.local.responder``
does with those that wait in Postgres.

There is no timer. What came while a pass ran is embedded together in the next one, so that an idle worker answers at
once and a busy one in large passes. A large request is cut into slices, and interactive requests go between them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from chunkmill.domain.embedded import EmbeddedTexts, estimated_tokens
from chunkmill.domain.reasons import reason_of
from chunkmill.errors import DeviceFailed, EngineError
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry import tracing
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.loop import URGENT_RUN, Rank
from chunkmill_workers.engine.matryoshka import shorten
from chunkmill_workers.engine.results import TokenBatchResult

logger = logging.getLogger(__name__)

Kind = Literal["document", "query"]

SLICE_TEXTS, SLICE_TOKENS = 32, 4_096
"""The most texts and estimated tokens of a slice of larger requests. Whether somebody still waits is checked before
each slice, and callers take turns slice by slice."""
TOGETHER_TEXTS, TOGETHER_TOKENS = 256, 16_384
"""The most texts and estimated tokens of interactive requests that are embedded together."""
INTERACTIVE_TOKENS = 4_096
"""The most estimated tokens of an interactive request."""
SLICES = 2
"""How many slices of each class are under way at a time: the answers of one are written while another is computed."""
ASK_AGAIN_SECONDS = 0.25
"""How often it is asked during a slice whether somebody still waits."""


class NobodyWaits(Exception):
    """The request is past its deadline, or was withdrawn."""


class WorkerLeaves(Exception):
    """The worker leaves, or its device is broken, and this request still waited."""


@dataclass(frozen=True, slots=True, eq=False)
class AwaitedRequest:
    """A request. One of its callbacks is called once, by a thread of the embedder; they must not take long."""

    space: Space
    kind: Kind
    texts: Sequence[str]
    on_answer: Callable[[EmbeddedTexts], None]
    on_error: Callable[[Exception], None]
    """Gets the reason why there are no vectors: what the engine or the load of the model raised, :class:`EngineError`
    if a text got none, :class:`NobodyWaits`, :class:`WorkerLeaves`, or :class:`DeviceFailed`."""
    urgency: int = 0
    """0 for a few short texts, and 1 for others. A request of many or long texts counts as 1 in any case."""
    caller: str = ""
    """Callers take turns. A request without a caller has a turn of its own."""
    deadline: float | None = None
    """Nobody waits after this moment, by ``time.monotonic``."""
    is_wanted: Callable[[], bool] = lambda: True
    """Whether somebody still waits. It is asked before each slice, without a lock."""
    traceparent: str | None = None
    """The caller's span, below which this request has one of its own."""


class Models(Protocol):
    """Where the engines come from: a ``WorkerContext``."""

    def ready_engine(self, space: Space) -> Engine | None:
        """The engine of a space if it can be used at once, else None. It does not wait."""

    def engine_for(self, space: Space) -> Engine:
        """The engine of a space, which may have to be loaded first. Raises whatever keeps it from being used."""


@dataclass(slots=True, eq=False)
class _Item:
    """A request with what is known of its texts so far."""

    asked: AwaitedRequest
    number: int
    rank: Rank
    next: int = 0
    """The first text that no slice has taken yet."""
    is_over: bool = False
    """A callback was called."""
    engine: Engine | None = None
    """The engine that was loaded for it, which may have been dropped since."""
    answer: EmbeddedTexts | None = None
    """Its arrays are filled as passes land."""
    missing: NDArray[np.bool_] | None = None
    """(n,) bool: which texts have no vector yet."""
    span: tracing.OpenSpan | None = None
    """The request from here to its answer; None if its caller has no trace."""

    @classmethod
    def of(cls, asked: AwaitedRequest, number: int) -> _Item:
        is_small = asked.urgency == 0 and len(asked.texts) <= SLICE_TEXTS
        is_small = is_small and sum(map(estimated_tokens, asked.texts)) <= INTERACTIVE_TOKENS
        item = cls(asked, number, Rank.INTERACTIVE if is_small else Rank.SYNCHRONOUS)
        if asked.traceparent is not None:
            attributes = {"space": asked.space.id, "texts": len(asked.texts)}
            item.span = tracing.begin("chunkmill.embed_request", attributes, kind="CONSUMER", parent=asked.traceparent)
        return item

    @property
    def left(self) -> int:
        """How many texts no slice has taken yet."""
        return len(self.asked.texts) - self.next

    def take_in(
        self, at: NDArray[np.int64], vectors: NDArray[np.float32], n_tokens: NDArray[np.int32], cut: NDArray[np.bool_]
    ) -> bool:
        """Put what landed into its places, ``at``. Returns whether all texts have their vectors now."""
        if self.answer is None or self.missing is None:
            count = len(self.asked.texts)
            empty = np.empty((count, vectors.shape[1]), np.float32)
            self.answer = EmbeddedTexts(empty, np.empty(count, np.int32), np.empty(count, np.bool_))
            self.missing = np.ones(count, np.bool_)
        self.answer.vectors[at], self.answer.tokens[at], self.answer.truncated[at] = vectors, n_tokens, cut
        self.missing[at] = False
        return not self.missing.any()


@dataclass(frozen=True, slots=True)
class _Part:
    """Texts of one request that are embedded together: ``item.asked.texts[first:end]``."""

    item: _Item
    first: int
    end: int


class _Turns:
    """The waiting requests of one class, space and kind. Their callers take turns."""

    def __init__(self) -> None:
        self._callers: deque[str] = deque()
        self._items: dict[str, deque[_Item]] = {}

    def __len__(self) -> int:
        return len(self._callers)

    def __iter__(self) -> Iterator[_Item]:
        return itertools.chain.from_iterable(self._items.values())

    def add(self, item: _Item) -> None:
        caller = item.asked.caller or f"\0{item.number}"
        if caller not in self._items:
            self._items[caller] = deque()
            self._callers.append(caller)
        self._items[caller].append(item)

    def oldest(self) -> int:
        return min(self._items[caller][0].number for caller in self._callers)

    def take(self, texts: int, tokens: int, *, cut: bool) -> list[_Part]:
        """The texts of the next slice. With ``cut``, a request may give a part of its texts."""
        parts: list[_Part] = []
        while self._callers:
            caller = self._callers[0]
            item = self._items[caller][0]
            if item.is_over:
                self._remove_first(caller)
                continue
            end = item.next
            room = tokens
            while end < len(item.asked.texts) and end - item.next < texts:
                room -= estimated_tokens(item.asked.texts[end])
                if room < 0 and (parts or end > item.next):
                    break
                end += 1
            if end == item.next or (parts and not cut and end < len(item.asked.texts)):
                break
            if not cut:
                end = len(item.asked.texts)
            parts.append(_Part(item, item.next, end))
            texts -= end - item.next
            tokens = max(room, 0)
            item.next = end
            if not item.left:
                self._remove_first(caller)
            if caller in self._items:
                self._callers.rotate(-1)
        return parts

    def _remove_first(self, caller: str) -> None:
        self._items[caller].popleft()
        if not self._items[caller]:
            del self._items[caller]
            self._callers.remove(caller)

    def remove_all(self) -> list[_Item]:
        items = list(self)
        self._items.clear()
        self._callers.clear()
        return items


@dataclass(frozen=True, slots=True)
class _Slice:
    rank: Rank
    space: Space
    kind: Kind
    engine: Engine
    parts: list[_Part]


_Key = tuple[int, Kind]


class RequestEmbedder:
    """Embeds what was submitted, in threads of its own or in the thread that calls :meth:`settle`.

    ``on_landed`` is called after the callbacks of each pass, so that the answers of a pass can be sent together.
    ``on_room`` is called when work was taken, so that more can be fetched while it is computed.
    """

    def __init__(
        self,
        models: Models,
        *,
        on_landed: Callable[[], None] = lambda: None,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._models = models
        self._on_landed = on_landed
        self._on_room = on_room
        mutex = threading.RLock()
        self._changed = threading.Condition(mutex)
        self._work_came = threading.Condition(mutex)
        """Wakes one of the embedder's threads. Each looks for work before it waits, and wakes the next one if it takes
        some."""
        self._waiting: dict[Rank, dict[_Key, _Turns]] = {Rank.INTERACTIVE: {}, Rank.SYNCHRONOUS: {}}
        self._under_way = dict.fromkeys(self._waiting, 0)
        self._passed = 0
        """How many interactive slices have been taken while others waited."""
        self._loading: dict[int, list[_Item]] = {}
        """The requests of each space whose model is being loaded."""
        self._numbers = itertools.count()
        self._open: dict[int, _Item] = {}
        self._loads = 0
        """How many threads load models, or end the requests of a model that could not be loaded."""
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._tokens_per_second = 0.0

    def start(self) -> None:
        """Start the threads."""
        for number in range(SLICES * len(self._waiting)):
            thread = threading.Thread(target=self._work, name=f"embedder-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def submit(self, asked: AwaitedRequest) -> None:
        """Take a request, to be answered through its callbacks. A closed embedder says :class:`WorkerLeaves`."""
        item = _Item.of(asked, next(self._numbers))
        with self._changed:
            is_closed = self._is_closed
            if asked.texts and not is_closed:
                self._open[item.number] = item
                self._add(item)
                self._work_came.notify()
                self._changed.notify_all()
                return
        if is_closed:
            self._end(item, error=WorkerLeaves())
        else:
            nothing = np.empty((0, asked.space.spec.dimensions), np.float32)
            self._end(item, EmbeddedTexts(nothing, np.empty(0, np.int32), np.empty(0, np.bool_)))
        self._landed()

    def close(self) -> None:
        """Give back what waits, as :class:`WorkerLeaves`. A request whose last slice is being computed is answered."""
        with self._changed:
            self._is_closed = True
            items = [item for by_key in self._waiting.values() for turns in by_key.values() for item in turns]
            for by_key in self._waiting.values():
                by_key.clear()
            items += itertools.chain.from_iterable(self._loading.values())
            self._loading = {space: [] for space in self._loading}
            self._work_came.notify_all()
            self._changed.notify_all()
        for item in items:
            self._end(item, error=WorkerLeaves())
        if items:
            self._landed()

    def join(self, seconds: float) -> None:
        """Wait for the threads of a closed embedder."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def settle(self) -> None:
        """Compute in this thread until all that was submitted has been answered."""
        while True:
            with self._changed:
                chosen = self._take()
                if chosen is None:
                    if not self._open and not self._loads:
                        return
                    self._changed.wait()
                    continue
            self._compute(chosen)

    def drop_late(self) -> None:
        """Let go of the requests that are past their deadline, also while the model of their space is loaded."""
        now = time.monotonic()
        with self._changed:
            late = [item for item in self._open.values() if not item.next and _is_late(item, now)]
        for item in late:
            self._end(item, error=NobodyWaits())
        if late:
            self._landed()

    def wait_until_idle(self, seconds: float) -> bool:
        """Whether nothing is under way. It waits at most this long for that."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(self._under_way.values()), seconds)

    @property
    def n_open(self) -> int:
        """How many requests have no answer yet."""
        with self._changed:
            return len(self._open)

    @property
    def loading(self) -> list[int]:
        """The ids of the spaces whose model is being loaded."""
        with self._changed:
            return list(self._loading)

    @property
    def tokens_per_second(self) -> float:
        """How fast slices were computed lately; 0.0 before the first."""
        return self._tokens_per_second

    def waiting(self, rank: Rank) -> list[AwaitedRequest]:
        """The requests of a class with texts that no slice has taken yet."""
        with self._changed:
            by_key = self._waiting[rank].values()
            return [item.asked for turns in by_key for item in turns if not item.is_over]

    def _add(self, item: _Item) -> None:
        if item.asked.space.id in self._loading:
            self._loading[item.asked.space.id].append(item)
        else:
            key = (item.asked.space.id, item.asked.kind)
            self._waiting[item.rank].setdefault(key, _Turns()).add(item)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (chosen := self._take()) is None:
                    if self._is_closed and not self._loads:
                        return
                    self._work_came.wait()
            self._compute(chosen)

    def _take(self) -> _Slice | None:
        """The next slice; None if there is none, or enough are under way. The caller has the lock."""
        for rank in self._order():
            if self._under_way[rank] >= SLICES:
                continue
            while (key := self._oldest(rank)) is not None:
                turns = self._waiting[rank][key]
                first = next((item for item in turns if not item.is_over), None)
                if first is None:
                    turns.remove_all()
                    continue
                engine = first.engine or self._ready(first.asked.space)
                if engine is None:
                    self._load(first.asked.space)
                    continue
                if rank is Rank.INTERACTIVE:
                    parts = turns.take(TOGETHER_TEXTS, TOGETHER_TOKENS, cut=False)
                else:
                    parts = turns.take(SLICE_TEXTS, SLICE_TOKENS, cut=True)
                if not parts:
                    continue
                others = self._waiting[Rank.SYNCHRONOUS]
                self._passed = self._passed + 1 if rank is Rank.INTERACTIVE and any(others.values()) else 0
                self._under_way[rank] += 1
                self._work_came.notify()
                return _Slice(rank, first.asked.space, first.asked.kind, engine, parts)
        return None

    def _ready(self, space: Space) -> Engine | None:
        """The engine, if it can be used at once. If that cannot be told, the load of the model says why not."""
        try:
            return self._models.ready_engine(space)
        except Exception as error:  # noqa: BLE001 - a thread of the embedder that ended would never answer again
            logger.warning("cannot find out whether the model of space %s is loaded: %s", space.id, reason_of(error))
            return None

    def _order(self) -> list[Rank]:
        ranks = list(self._waiting)
        return ranks[::-1] if self._passed >= URGENT_RUN else ranks

    def _oldest(self, rank: Rank) -> _Key | None:
        """The space and kind whose turn it is: that of the request that has waited longest."""
        by_key = self._waiting[rank]
        for key in [key for key, turns in by_key.items() if not len(turns)]:
            del by_key[key]
        return min(by_key, key=lambda key: by_key[key].oldest(), default=None)

    def _load(self, space: Space) -> None:
        """Let a thread of its own load the model of a space, and put the space's requests aside. The caller has the
        lock."""
        aside: list[_Item] = []
        for by_key in self._waiting.values():
            for key in [key for key in by_key if key[0] == space.id]:
                aside += by_key.pop(key).remove_all()
        self._loads += 1
        self._loading[space.id] = sorted(aside, key=lambda item: item.number)
        threading.Thread(target=self._load_aside, args=(space,), name=f"load-{space.id}", daemon=True).start()

    def _load_aside(self, space: Space) -> None:
        try:
            engine, problem = self._models.engine_for(space), None
        except Exception as error:  # noqa: BLE001 - whoever waits must get a reason
            engine, problem = None, error
        with self._changed:
            items = [item for item in self._loading.pop(space.id) if not item.is_over]
            if engine is not None:
                for item in items:
                    item.engine = engine
                    self._add(item)
            self._work_came.notify()
            self._changed.notify_all()
        if problem is not None:
            for item in items:
                self._end(item, error=problem)
            self._landed()
        with self._changed:
            self._loads -= 1
            self._work_came.notify_all()
            self._changed.notify_all()
        self._quietly(self._on_room)

    def _compute(self, chosen: _Slice) -> None:
        self._quietly(self._on_room)
        try:
            parts = [part for part in chosen.parts if self._is_wanted(part.item)]
            if parts:
                self._embed(chosen, parts)
        finally:
            with self._changed:
                self._under_way[chosen.rank] -= 1
                self._changed.notify_all()
            self._landed()

    def _is_wanted(self, item: _Item) -> bool:
        """Whether somebody still waits. Who does not is told so."""
        if item.is_over:
            return False
        try:
            is_wanted = not _is_late(item, time.monotonic()) and item.asked.is_wanted()
        except Exception:
            logger.exception("cannot find out whether somebody still waits for a request, so it is answered")
            return True
        if not is_wanted:
            self._end(item, error=NobodyWaits())
        return is_wanted

    def _embed(self, chosen: _Slice, parts: list[_Part]) -> None:
        """Embed the texts together. If that fails as a whole, embed those of each request by themselves."""
        began = time.monotonic()
        try:
            with _traced(parts) as span:
                tokens = self._stream(chosen, parts)
                span.set({"tokens": int(tokens)})
        except DeviceFailed as broken:
            for part in parts:
                self._end(part.item, error=broken)
        except Exception as error:  # noqa: BLE001 - whoever waits must get a reason
            parts = [part for part in parts if not part.item.is_over]
            if len({part.item.number for part in parts}) > 1:
                problem = "requests are embedded one by one, because embedding them together failed: %s"
                logger.warning(problem, reason_of(error))
                for part in parts:
                    self._embed(chosen, [part])
            else:
                for part in parts:
                    self._end(part.item, error=error)
        else:
            rate = tokens / max(time.monotonic() - began, 1e-6)
            self._tokens_per_second = (
                rate if not self._tokens_per_second else 0.8 * self._tokens_per_second + 0.2 * rate
            )

    def _stream(self, chosen: _Slice, parts: list[_Part]) -> int:
        """Embed the texts of all parts, and answer each request with the pass of its last text. Returns the tokens."""
        texts = [text for part in parts for text in part.item.asked.texts[part.first : part.end]]
        starts = np.cumsum([0, *(part.end - part.first for part in parts)])
        items = {part.item.number: part.item for part in parts}
        asked_at, tokens = time.monotonic(), 0

        def stop() -> bool:
            nonlocal asked_at
            if time.monotonic() - asked_at < ASK_AGAIN_SECONDS:
                return False
            asked_at = time.monotonic()
            wanted = [self._is_wanted(item) for item in items.values()]  # all of them, so that each is dropped
            return not any(wanted)

        spec = chosen.space.spec
        COUNTS.add_all(((m.EMBED_SLICES, 1), (m.EMBED_SLICE_REQUESTS, len(parts))))
        for result in chosen.engine.stream(
            texts,
            kind=chosen.kind,
            on_long=spec.long_text.policy,
            stop=stop,
            urgent=True,
            large=chosen.rank is Rank.SYNCHRONOUS,
        ):
            tokens += result.tokens
            _count(result)
            if self._land(chosen, parts, starts, result):
                self._landed()
        return tokens

    def _land(self, chosen: _Slice, parts: list[_Part], starts: NDArray[np.int64], result: TokenBatchResult) -> bool:
        """Give each request its vectors. Returns whether one of them has got its answer."""

        def owner(at: NDArray[np.int32]) -> NDArray[np.int64]:
            return np.searchsorted(starts, at, side="right") - 1

        for failure in result.failures:
            place = int(owner(np.array([failure.index], np.int32))[0])
            part = parts[place]
            at, count = failure.index - int(starts[place]) + part.first, len(part.item.asked.texts)
            told = f"text {at} of {count} got no vector: {failure.code}, {failure.reason}"
            self._end(part.item, error=EngineError(told))
        spec = chosen.space.spec
        vectors = shorten(result.vectors, spec.dimensions, normalize=spec.normalize)
        owners, is_one_done = owner(result.indices), bool(result.failures)
        for place in np.unique(owners).tolist():
            part, mine = parts[place], owners == place
            positions = result.indices[mine] - starts[place] + part.first
            with self._changed:  # another slice of the same request may land at this moment
                is_done = part.item.take_in(positions, vectors[mine], result.n_tokens[mine], result.truncated[mine])
            if is_done:
                self._end(part.item, part.item.answer)
                is_one_done = True
        return is_one_done

    def _end(self, item: _Item, answer: EmbeddedTexts | None = None, *, error: Exception | None = None) -> None:
        """Call one of the request's callbacks, unless it has been done."""
        with self._changed:
            if item.is_over:
                return
            item.is_over = True
            self._open.pop(item.number, None)
            self._changed.notify_all()
        with self._guarded():
            if item.span is not None:
                _end_span(item.span, error)
        with self._guarded():
            if answer is not None:
                item.asked.on_answer(answer)
            elif error is not None:
                item.asked.on_error(error)

    def _landed(self) -> None:
        self._quietly(self._on_landed)

    def _quietly(self, callback: Callable[[], None]) -> None:
        with self._guarded():
            callback()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What a callback raises is logged, and ends neither the thread nor other requests."""
        try:
            yield
        except Exception:
            logger.exception("an answer could not be handed over")


@contextlib.contextmanager
def _traced(parts: Sequence[_Part]) -> Iterator[tracing.Span]:
    """A span around what embeds these texts. It is below that of the one request that is traced, or linked to those of
    several, because a span has one parent."""
    spans = {part.item.number: part.item.span for part in parts if part.item.span is not None}
    parents = [span.traceparent for span in spans.values() if span.traceparent is not None]
    if not parents:
        yield tracing.Span()
        return
    attributes = {"requests": len(parts), "contents": sum(part.end - part.first for part in parts)}
    with tracing.root("embed", attributes, parents=parents) as span:
        yield span


def _end_span(span: tracing.OpenSpan, error: Exception | None) -> None:
    if isinstance(error, NobodyWaits):
        span.set({"outcome": "dropped"})
    elif isinstance(error, WorkerLeaves):
        span.set({"outcome": "left"})
    elif error is not None:
        span.fail(type(error).__name__)
    span.end()


def _is_late(item: _Item, now: float) -> bool:
    return item.asked.deadline is not None and now >= item.asked.deadline


def _count(result: TokenBatchResult) -> None:
    COUNTS.add_all(
        (
            (m.URGENT_TEXTS, len(result.indices)),
            (m.TOKEN_BATCHES, result.tokens > 0),
            (m.TOKENS, result.tokens),
            (m.PADDED_TOKENS, result.padded_tokens),
            (m.ENGINE_SECONDS, result.seconds),
            (m.TOKENIZE_SECONDS, result.tokenize_seconds),
        )
    )
