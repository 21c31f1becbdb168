"""Who owns a key: the database says so, and its answer counts for some seconds."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import sqlalchemy as sa

from chunkmill.client.base import store_errors
from chunkmill.domain.keys import PREFIX, Scope, digest_of, new_secret, parse_key
from chunkmill.errors import ChunkmillError
from chunkmill.gateway.batching import QuestionBatcher
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.keys.listening import KeyListener
from chunkmill.ledger.access import keys
from chunkmill.ledger.access.keys import StoredKey

CACHE_SECONDS = 10.0
"""How long a look into the database counts, also that there is no such key. A revoked key is forgotten at once where
notifications arrive; behind a pooler that swallows them, after this time."""
MOST_CACHED = 10_000
"""How many ids are kept at most, so that a caller who guesses ids cannot fill the memory."""
NOTED_SECONDS = 60.0
"""``last_used_at`` is written at most so often."""


class KeyRing(Protocol):
    async def caller(self, key: str) -> Caller | None:
        """Who owns the key; None if nobody does. Raises :class:`StoreUnavailable`."""

    async def close(self) -> None: ...


class OneKey:
    """The key that a gateway on loopback generates for itself while the database has none."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key or f"{PREFIX}_local_{new_secret()}"
        self._digest = digest_of(self.key)

    async def caller(self, key: str) -> Caller | None:
        if not hmac.compare_digest(digest_of(key), self._digest):
            return None
        return Caller(None, "local", "local", frozenset(Scope))

    async def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True, slots=True)
class _LookedUpKey:
    """What the database said, and until when (monotonic seconds) that counts."""

    stored: StoredKey | None
    caller: Caller | None
    until: float


class StoredKeys:
    """The keys in the database. ``own`` is asked first, if there is one.

    Ids that are not cached are looked up together, so strangers with invented keys cost one statement at a time.
    """

    def __init__(
        self, db: sa.Engine, own: OneKey | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._db = db
        self._own = own
        self._clock = clock
        self._looked: OrderedDict[int, _LookedUpKey] = OrderedDict()
        self._changes = 0
        self._noted: dict[int, float] = {}
        self._ask: QuestionBatcher[int, StoredKey | None] = QuestionBatcher(self._read)
        self._note: QuestionBatcher[int, None] = QuestionBatcher(self._write_used)
        self._notes: set[asyncio.Task[None]] = set()
        self._listening: KeyListener | None = None

    def listen(self) -> None:
        """Hear from now on which keys are revoked. Without it a revoked key is known for ``CACHE_SECONDS``."""
        self._listening = KeyListener(self._db, keys.CHANNEL, self.forget)

    async def caller(self, key: str) -> Caller | None:
        if self._own is not None and (caller := await self._own.caller(key)) is not None:
            return caller
        parsed = parse_key(key)
        if parsed is None:
            return None
        key_id, secret = parsed
        looked = self._looked.get(key_id)
        if looked is None or looked.until <= self._clock():
            looked = await self._look(key_id)
        if looked.stored is None or not hmac.compare_digest(digest_of(secret), looked.stored.sha256):
            return None
        expires_at = looked.stored.key.expires_at
        if expires_at is not None and expires_at <= datetime.now(UTC):
            return None
        self._note_used(key_id)
        return looked.caller

    def forget(self, payload: str | None = None) -> None:
        """Look the key with this id up again at its next request; with None, all keys. It is called in the loop."""
        self._changes += 1
        if payload is None:
            self._looked.clear()
        elif payload.isascii() and payload.isdigit() and len(payload) < 20:  # any role of the database may notify
            self._looked.pop(int(payload), None)

    async def close(self) -> None:
        if self._listening is not None:
            await self._listening.close()
        await self._ask.close()
        await self._note.close()
        if self._own is not None:
            await self._own.close()

    async def _look(self, key_id: int) -> _LookedUpKey:
        changes, now = self._changes, self._clock()
        stored = await self._ask(key_id)
        looked = _LookedUpKey(stored, None if stored is None else caller_of(stored), now + CACHE_SECONDS)
        # What was read before a key changed must not be remembered after it.
        if changes == self._changes:
            self._looked[key_id] = looked
            self._looked.move_to_end(key_id)
            while len(self._looked) > MOST_CACHED:
                self._looked.popitem(last=False)
        return looked

    def _read(self, ids: Sequence[int]) -> list[StoredKey | None]:
        wanted = set(ids)
        with store_errors(self._db), self._db.begin() as conn:
            stored = keys.read(conn, wanted)
        return [stored.get(key_id) for key_id in ids]

    def _note_used(self, key_id: int) -> None:
        now = self._clock()
        if now - self._noted.get(key_id, now - NOTED_SECONDS) < NOTED_SECONDS:
            return
        self._noted[key_id] = now
        task = asyncio.create_task(self._note(key_id))  # nobody waits for it
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    def _write_used(self, ids: Sequence[int]) -> list[None]:
        # It is no reason to refuse a request, if for example the server takes no writes at this moment.
        with contextlib.suppress(ChunkmillError), store_errors(self._db), self._db.begin() as conn:
            keys.note_used(conn, set(ids), seconds=NOTED_SECONDS)
        return [None] * len(ids)


def caller_of(stored: StoredKey) -> Caller:
    key = stored.key
    return Caller(
        key.id,
        key.name,
        key.tenant,
        frozenset(key.scopes),
        None if key.models is None else frozenset(key.models),
        None if key.collections is None else frozenset(key.collections),
        key.limits,
    )
