"""Asks the workers for the vectors of texts, in parts that wait side by side."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import psycopg
import sqlalchemy as sa

from chunkmill.client.asking.gathered import DistinctTexts
from chunkmill.client.asking.listener import PATROL_SECONDS, Mailbox, SocketAnswer
from chunkmill.client.asking.lookups import Lookups
from chunkmill.client.asking.sockets import Sockets
from chunkmill.client.steps import PauseStep, Steps, WaitStep, WorkStep
from chunkmill.db.connect import raw
from chunkmill.domain.embedded import EmbeddedText
from chunkmill.domain.frames import Question
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.states import Route
from chunkmill.errors import ChunkmillError, EngineError, WaitTimeout
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import AnswerRow
from chunkmill.monitor import present
from chunkmill.spaces.registry import Space
from chunkmill.store import read
from chunkmill.system.numbers import NDArray, np

PART_TEXTS = 32
"""How many texts one embed request has. A request keeps a worker busy for a forward pass or two."""
PART_CHARACTERS = 262_144
"""How many characters one embed request has. If texts are long, it has fewer texts, which bounds the size of its
row."""
OPEN_PARTS = 16
"""How many requests of one call are open at a time. When half of them are answered, further ones are sent."""
FEW_TEXTS, FEW_CHARACTERS = 8, 2_048
"""A call for at most this many texts goes before larger ones. If the texts are documents, they may also have at most
this many characters together, which are about 512 tokens."""
STORED_AT_ONCE = 4_096
"""How many texts one statement looks for in the store."""
LOOK_SECONDS = 2.0
"""How many seconds a call waits for the shared lookups of its event loop. Then it reads the store itself."""
SLOW_SECONDS = 5.0
"""How many seconds after the last part was sent to a worker directly the parts without an answer are left to all
workers."""
FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.002, 0.05
"""How many seconds pass between two checks for answers if no listener delivers them: at first, and later."""


class SpaceGone(Exception):
    """The space was dropped since the caller found it, and nothing was asked."""


@dataclass(slots=True)
class Inquiry:
    """What one call asks of the workers. ``texts`` gets the vectors."""

    transaction: Callable[[], AbstractContextManager[sa.Connection]]
    mailbox: Mailbox
    space: Space
    texts: DistinctTexts
    kind: str
    caller: str
    deadline: float
    """By ``time.monotonic()``."""
    sockets: Sockets | None = None
    """The workers that can be asked directly; None if all is asked through Postgres."""
    lookups: Lookups | None = None
    """Reads the store for all calls of an event loop. None if this call reads it itself, in the transaction in which it
    asks."""
    traceparent: str | None = None
    """The span of whoever called, in which workers answer."""
    _parts: list[list[bytes]] = field(default_factory=list)
    """What is still to be asked, the last part first. Texts are named by their hashes."""
    _asked: dict[int, list[bytes]] = field(default_factory=dict)
    """``request id → hashes`` of what has no answer yet."""
    _urgency: int = 0
    _asked_directly_at: float = 0.0
    _suspects: set[bytes] = field(default_factory=set)
    """Texts that were sent to a worker directly, and that may have killed it."""
    _is_left: bool = False
    """True once a worker has not answered a part that was sent to it directly."""

    def steps(self) -> Steps[None]:
        """Ask for what is missing, and wait for it. If the caller gives up in between, all requests are withdrawn.

        They block in :class:`WorkStep` alone. Raises :class:`SpaceGone`, :class:`EngineError` if a worker cannot embed
        one of the texts, and :class:`WaitTimeout`.
        """
        try:
            yield from self._begin()
            while self._asked:
                yield from self._waiting()
                self._read(self.mailbox.take())
                yield from self._require_time()
                if self._parts and (self._is_left or len(self._asked) <= OPEN_PARTS // 2):
                    yield from self._send()
        except GeneratorExit:
            self._withdraw(self._cancel())
            raise
        except BaseException:
            if rows := self._cancel():
                try:
                    yield WorkStep(partial(self._withdraw, rows))
                except GeneratorExit:
                    self._withdraw(rows)  # the withdrawal may not have begun
                    raise
            raise

    def _cancel(self) -> list[int]:
        """Let go of all requests that have no answer. Returns the ids of those that are rows."""
        left = {*self.mailbox.close(), *self._asked}
        if self.sockets is not None:
            self.sockets.cancel(request_id for request_id in left if request_id < 0)
        return sorted(request_id for request_id in left if request_id > 0)

    def _withdraw(self, rows: Sequence[int]) -> None:
        # If Postgres is away, the poller deletes the requests after ten minutes.
        with contextlib.suppress(ChunkmillError):
            if rows:
                with self.transaction() as conn:
                    embed_requests.withdraw_all(conn, rows)

    def _begin(self) -> Steps[None]:
        """Take the known vectors from the store, and send the first parts."""
        if self._may_ask_directly and self.sockets is not None and self.sockets.is_due:
            yield WorkStep(partial(self.sockets.refresh, self.transaction), is_awaited=not self.sockets.is_known)
        if self.kind == "document" and read.are_exact(self.space):
            if self.lookups is None:
                yield WorkStep(self._look_and_send)
                return
            yield from self._look_together(self.lookups)
        self._make_parts()
        yield from self._send()

    def _look_together(self, lookups: Lookups) -> Steps[None]:
        lookup = lookups.ask(self.space, list(self.texts.missing))
        until = time.monotonic() + LOOK_SECONDS
        while not lookup.signal.is_given and (left := until - time.monotonic()) > 0:
            yield WaitStep(lookup.signal, left)
        if lookup.stored is None:
            lookups.doubt(lookup)
            yield WorkStep(self._look)
            return
        for content_hash, embedded in lookup.stored:
            self.texts.add(content_hash, embedded)

    def _look(self) -> None:
        with self.transaction() as conn:
            self._read_stored(conn)

    def _look_and_send(self) -> None:
        with self.transaction() as conn:
            self._read_stored(conn)
            self._make_parts()
            if parts := self._left_to_rows():
                self._send_rows(conn, parts)

    def _make_parts(self) -> None:
        missing = self.texts.missing
        self._urgency = 0 if is_short(missing, self.kind) else 1
        self._parts = into_parts(missing)[::-1]

    def _read_stored(self, conn: sa.Connection) -> None:
        hashes = list(self.texts.missing)
        for first in range(0, len(hashes), STORED_AT_ONCE):
            try:
                stored = read.read_stored(conn, self.space, hashes[first : first + STORED_AT_ONCE])
            except sa.exc.ProgrammingError as error:
                if isinstance(error.orig, psycopg.errors.UndefinedTable):
                    raise SpaceGone from error
                raise
            for content_hash, embedded in stored:
                self.texts.add(content_hash, embedded)

    @property
    def _may_ask_directly(self) -> bool:
        return self.sockets is not None and not self._is_left and self.space.spec.provider != OPENAI

    def _send(self) -> Steps[None]:
        """Ask for as many parts as may be open: workers on this machine directly, and through Postgres for the rest."""
        if parts := self._left_to_rows():
            yield WorkStep(partial(self._send_rows_alone, parts))

    def _left_to_rows(self) -> list[list[bytes]]:
        """Send parts to workers directly, and return those of the next ones that none of them takes."""
        parts = [self._parts.pop() for _ in range(min(len(self._parts), OPEN_PARTS - len(self._asked)))]
        if self._may_ask_directly:
            parts = [part for part in parts if not self._send_directly(part)]
        return parts

    def _send_rows_alone(self, parts: Sequence[list[bytes]]) -> None:
        with self.transaction() as conn:
            self._send_rows(conn, parts)

    def _send_directly(self, part: list[bytes]) -> bool:
        """Whether a worker takes the part."""
        if self.sockets is None:
            return False
        now = time.monotonic()
        question = Question(
            self.space.id,
            self.space.spec.fingerprint,
            self.kind,
            self._urgency,
            max(0.0, self.deadline - now),
            self.caller,
            [self.texts.missing[content_hash] for content_hash in part],
            self.traceparent,
        )
        request_id = self.sockets.ask(self.space, question, self.mailbox, OPEN_PARTS // 2 if self._parts else 0)
        if request_id is None:
            return False
        self._asked[request_id] = part
        self._asked_directly_at = now
        return True

    def _send_rows(self, conn: sa.Connection, parts: Sequence[list[bytes]]) -> None:
        try:
            ids = embed_requests.ask_all(
                conn,
                space_id=self.space.id,
                fingerprint=self.space.spec.fingerprint,
                kind=self.kind,
                parts=[[self.texts.missing[content_hash] for content_hash in part] for part in parts],
                urgency=self._urgency,
                caller=self.caller,
                timeout_s=max(0.0, self.deadline - time.monotonic()),
                attempts=[int(not self._suspects.isdisjoint(part)) for part in parts],
                traceparent=self.traceparent,
            )
        except sa.exc.IntegrityError as error:
            if isinstance(error.orig, psycopg.errors.ForeignKeyViolation):
                raise SpaceGone from error
            raise
        if not ids:
            raise SpaceGone
        self._asked |= zip(ids, parts, strict=True)
        self.mailbox.expect(
            ids,
            wake_at=OPEN_PARTS // 2 if self._parts else 0,
            with_counts=embed_requests.has_columns(conn, "tokens"),
        )

    def _waiting(self) -> Steps[None]:
        """Wait until there is an answer to read, or no time is left."""
        pause = FIRST_LOOK_SECONDS
        while not self.mailbox.has_news:
            now = time.monotonic()
            signal, left = self.mailbox.signal, self.deadline - now
            if left <= 0 and not self.mailbox.open_rows:
                return
            if now - self._asked_directly_at >= SLOW_SECONDS and self._take_back():
                return
            if left <= 0 or (self.mailbox.is_adrift and self.mailbox.open_rows):
                fetch = WorkStep(self._fetch)
                yield fetch
                answers = fetch.result
                if answers or left <= 0:
                    return
                yield PauseStep(pause) if signal.is_given else WaitStep(signal, pause)
                pause = min(LAST_LOOK_SECONDS, pause * 1.5)
            else:
                # If the listener is gone and all open parts were sent to workers directly, the signal was given
                # although no answer has come.
                yield PauseStep(pause) if signal.is_given else WaitStep(signal, min(left, PATROL_SECONDS))
                self.mailbox.patrol()

    def _fetch(self) -> list[AnswerRow]:
        """Put the answers that have arrived in Postgres into the mailbox."""
        with self.transaction() as conn:
            answers = embed_requests.take_answers(
                raw(conn), self.mailbox.open_rows, with_counts=embed_requests.has_columns(conn, "tokens")
            )
        self.mailbox.collect(answers)
        return answers

    def _take_back(self) -> bool:
        """Leave to all workers what one of them has not answered for long. Returns whether there is such a part."""
        if self.sockets is None:
            return False
        slow = self.sockets.cancel(request_id for request_id in self._asked if request_id < 0)
        for request_id in slow:
            self.mailbox.forget_direct(request_id)
            self._leave(self._asked.pop(request_id))
        return bool(slow)

    def _leave(self, part: list[bytes]) -> None:
        """A worker did not answer this part. From now on the call asks through Postgres alone."""
        self._parts.append(part)
        self._is_left = True

    def _read(self, answers: Sequence[AnswerRow | SocketAnswer]) -> None:
        for row in answers:
            part = self._asked.pop(row.id, None)
            if part is None:
                continue  # it came twice, because the answer to the listener's commit was lost
            if isinstance(row, SocketAnswer):
                if row.embedded is None:
                    self._leave(part)
                    self._suspects.update(part if row.is_suspect else ())
                else:
                    made = row.embedded
                    self._add(part, made.vectors, made.tokens, made.truncated)
                continue
            answer = row.answer(self.space.spec.dimensions)
            if answer.vectors is None:
                raise EngineError(f"the worker could not embed: {answer.error}")
            n = len(part)
            tokens = np.zeros(n, np.int32) if answer.tokens is None else answer.tokens
            truncated = np.zeros(n, np.bool_) if answer.truncated is None else answer.truncated
            self._add(part, answer.vectors, tokens, truncated)

    def _add(
        self, part: list[bytes], vectors: NDArray[np.float32], tokens: NDArray[np.int32], truncated: NDArray[np.bool_]
    ) -> None:
        for content_hash, vector, n_tokens, is_cut in zip(part, vectors, tokens, truncated, strict=True):
            self.texts.add(content_hash, EmbeddedText(vector, int(n_tokens), bool(is_cut)), is_made=True)

    def _require_time(self) -> Steps[None]:
        """Raise :class:`WaitTimeout` if an answer is missing and the time is over."""
        if (self._asked or self._parts) and time.monotonic() >= self.deadline:
            look = WorkStep(self._why_late)
            yield look
            raise WaitTimeout(f"no worker answered in time. {look.result}.")

    def _why_late(self) -> str:
        """Why an answer did not come, and what to do about it."""
        try:
            with self.transaction() as conn:
                lack = present.read(conn).lack(Route.OPENAI if self.space.spec.provider == OPENAI else Route.LOCAL)
        except ChunkmillError:  # as where Postgres went away meanwhile
            lack = "Check with `chunkmill status` that one is connected"
        return (
            lack
            or "One is connected, so allow more time (timeout=), or see in `chunkmill status --watch` how busy it is"
        )


def is_short(texts: Mapping[bytes, str], kind: str) -> bool:
    """Whether a call for these texts goes before larger ones."""
    if len(texts) > FEW_TEXTS:
        return False
    return kind == "query" or sum(map(len, texts.values())) <= FEW_CHARACTERS


def into_parts(texts: Mapping[bytes, str]) -> list[list[bytes]]:
    """The hashes of the texts in parts of at most ``PART_TEXTS`` texts and ``PART_CHARACTERS`` characters.

    A longer text is a part of its own.
    """
    parts: list[list[bytes]] = []
    length = 0
    for content_hash, text in texts.items():
        length += len(text)
        if not parts or len(parts[-1]) == PART_TEXTS or length > PART_CHARACTERS:
            parts.append([])
            length = len(text)
        parts[-1].append(content_hash)
    return parts
