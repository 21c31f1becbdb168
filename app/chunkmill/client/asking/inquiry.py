"""Asks the workers for the vectors of texts, in parts that wait side by side."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import psycopg
import sqlalchemy as sa

from chunkmill.client.asking.gathered import Gathered
from chunkmill.client.asking.listener import PATROL_SECONDS, Mailbox
from chunkmill.client.steps import Pause, Steps, Wait
from chunkmill.db.connect import raw
from chunkmill.domain.embedded import EmbeddedText
from chunkmill.domain.providers import OPENAI
from chunkmill.errors import ChunkmillError, EngineError, WaitTimeout
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import AnswerRow
from chunkmill.spaces.registry import Space
from chunkmill.store import read

PART_TEXTS = 32
"""How many texts one embed request has. A worker that has begun with one is busy for a forward pass or two."""
PART_CHARACTERS = 262_144
"""A request whose texts are longer has fewer of them, which bounds the size of its row."""
OPEN_PARTS = 16
"""How many requests of one call are open at a time. When half of them are answered, further ones are sent."""
FEW_TEXTS, FEW_CHARACTERS = 8, 2_048
"""A call for at most so many texts goes before larger ones. Documents may have so many characters together, which are
about 512 tokens."""
STORED_AT_ONCE = 4_096
"""How many texts one statement looks for in the store."""
FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.002, 0.05
"""How often a call looks for answers that no listener brings: at first, and later."""


class SpaceGone(Exception):
    """The space was dropped since the caller found it, and nothing was asked."""


@dataclass(slots=True)
class Inquiry:
    """What one call asks of the workers. ``texts`` gets the vectors."""

    transaction: Callable[[], AbstractContextManager[sa.Connection]]
    mailbox: Mailbox
    space: Space
    texts: Gathered
    kind: str
    caller: str
    deadline: float
    """By ``time.monotonic()``."""
    _parts: list[list[bytes]] = field(default_factory=list)
    """What is still to be asked, the last part first. Texts are named by their hashes."""
    _asked: dict[int, list[bytes]] = field(default_factory=dict)
    """``request id → hashes`` of what has no answer yet."""
    _urgency: int = 0

    def steps(self) -> Steps[None]:
        """Ask for what is missing, and wait for it. Whoever gives up in between withdraws all requests.

        Raises :class:`SpaceGone`, :class:`EngineError` if a worker cannot embed one of the texts, and
        :class:`WaitTimeout`.
        """
        try:
            self._begin()
            while self._asked:
                yield from self._waiting()
                self._read(self.mailbox.take())
                self._require_time()
                if self._parts and len(self._asked) <= OPEN_PARTS // 2:
                    with self.transaction() as conn:
                        self._send(conn)
        except BaseException:
            left = {*self.mailbox.close(), *self._asked}
            # If Postgres is away, the poller deletes the requests after ten minutes.
            with contextlib.suppress(ChunkmillError):
                if left:
                    with self.transaction() as conn:
                        embed_requests.withdraw_all(conn, sorted(left))
            raise

    def _begin(self) -> None:
        """Take from the store what is there, and send the first parts, in one transaction."""
        with self.transaction() as conn:
            if self.kind == "document" and read.are_exact(self.space):
                self._read_stored(conn)
            missing = self.texts.missing
            self._urgency = 0 if is_short(missing, self.kind) else 1
            self._parts = cut(missing)[::-1]
            if self._parts:
                self._send(conn)

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

    def _send(self, conn: sa.Connection) -> None:
        """Ask for as many parts as may be open."""
        parts = [self._parts.pop() for _ in range(min(len(self._parts), OPEN_PARTS - len(self._asked)))]
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
            signal, left = self.mailbox.signal, self.deadline - time.monotonic()
            if left <= 0 or self.mailbox.is_adrift:
                with self.transaction() as conn:
                    answers = embed_requests.take_answers(
                        raw(conn), self.mailbox.open, with_counts=embed_requests.has_columns(conn, "tokens")
                    )
                self.mailbox.collect(answers)
                if answers or left <= 0:
                    return
                yield Pause(pause) if signal.is_given else Wait(signal, pause)
                pause = min(LAST_LOOK_SECONDS, pause * 1.5)
            else:
                yield Wait(signal, min(left, PATROL_SECONDS))
                self.mailbox.patrol()

    def _read(self, answers: Sequence[AnswerRow]) -> None:
        for row in answers:
            part = self._asked.pop(row.id, None)
            if part is None:
                continue  # it came twice, because the answer to the listener's commit was lost
            answer = row.answer(self.space.spec.dimensions)
            if answer.vectors is None:
                raise EngineError(f"the worker could not embed: {answer.error}")
            n = len(part)
            tokens = np.zeros(n, np.int32) if answer.tokens is None else answer.tokens
            truncated = np.zeros(n, np.bool_) if answer.truncated is None else answer.truncated
            for content_hash, vector, n_tokens, is_cut in zip(part, answer.vectors, tokens, truncated, strict=True):
                self.texts.add(content_hash, EmbeddedText(vector, int(n_tokens), bool(is_cut)))

    def _require_time(self) -> None:
        """Raise :class:`WaitTimeout` if an answer is missing and the time is over."""
        if not self._asked or time.monotonic() < self.deadline:
            return
        queue = "openai" if self.space.spec.provider == OPENAI else "gpu"
        raise WaitTimeout(f"no worker answered in time. Start one with: celery -A chunkmill_workers worker -Q {queue}")


def is_short(texts: Mapping[bytes, str], kind: str) -> bool:
    """Whether a call for these texts goes before larger ones."""
    if len(texts) > FEW_TEXTS:
        return False
    return kind == "query" or sum(map(len, texts.values())) <= FEW_CHARACTERS


def cut(texts: Mapping[bytes, str]) -> list[list[bytes]]:
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
