"""The limits of a gateway: of each key, and of what waits in this process.

The application calls :meth:`Limits.begin` and :meth:`Limits.end` for every request. Whoever lets texts be embedded does
it in ``async with gateway.limits.using(caller, …) as use`` and says there what was used.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.keys import KeyLimits
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.exchange import current
from chunkmill.gateway.limits.buckets import Bucket
from chunkmill.gateway.limits.months import Months
from chunkmill.gateway.limits.room import BYTES_PER_TOKEN, SMALL_BYTES, SMALL_TEXTS, Hold, WaitingRoom
from chunkmill.ledger.access.usage import Demand, UsageBooking
from chunkmill.settings import Settings

FORGET_KEYS = 10_000
"""The state of so many keys is kept at most. Those that are least recent go, which gives them full buckets."""


@dataclass(slots=True)
class _KeyState:
    limits: KeyLimits
    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0


@dataclass(slots=True)
class Use:
    """What is embedded for a request. ``tokens`` and ``usd`` are estimates until the caller of ``using`` replaces them
    with what was used; if it raises, nothing was."""

    tokens: int
    usd: Decimal
    price: Decimal
    """US dollars for one token."""

    def settle(self, tokens: int, paid: int | None = None) -> None:
        """Book this number of tokens as used. Dollars are those of the ``paid`` ones, or of all."""
        self.tokens = tokens
        self.usd = (tokens if paid is None else paid) * self.price


class Limits:
    """All its methods run in the event loop."""

    def __init__(self, db: sa.Engine, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.room = WaitingRoom(settings.gateway_waiting_texts, settings.gateway_waiting_tokens)
        self._months = Months(db)
        self._keys: dict[int, _KeyState] = {}
        self._clock = clock

    def begin(self, caller: Caller) -> None:
        """Count a request of the caller. Raises :class:`Refusal` if there are too many; then it is not to be ended."""
        if caller.key_id is None:
            return
        state, now = self._state(caller), self._clock()
        most = state.limits.parallel_requests
        if most is not None and state.running >= most:
            message = f"this API key may have {most:,} requests at once. Wait for one to end."
            raise Refusal(429, "rate_limit_exceeded", message, retry_after=1.0, headers=self.headers(caller))
        if state.requests is not None and (wait := state.requests.take(1, now)):
            message = f"this API key may make {state.requests.per_minute:,} requests a minute at this gateway."
            raise Refusal(429, "rate_limit_exceeded", message, retry_after=wait, headers=self.headers(caller))
        state.running += 1
        self._months.book(caller.key_id, None, UsageBooking(requests=1))

    def end(self, caller: Caller) -> None:
        """The request is over."""
        if caller.key_id is not None and (state := self._keys.get(caller.key_id)) is not None:
            state.running -= 1

    def hold_body(self, n_bytes: int) -> Hold:
        """Room for a body of so many bytes whose texts are not counted yet. Raises :class:`Refusal`."""
        hold = self.room.take(1, n_bytes // BYTES_PER_TOKEN, is_small=n_bytes <= SMALL_BYTES)
        if hold is None:
            raise self._overloaded()
        return hold

    def grow(self, hold: Hold, n_bytes: int) -> None:
        """The body has so many bytes by now. Raises :class:`Refusal`."""
        tokens = n_bytes // BYTES_PER_TOKEN
        is_small = n_bytes <= SMALL_BYTES
        if tokens > hold.tokens and not self.room.resize(hold, hold.texts, tokens, is_small=is_small):
            raise self._overloaded()

    def release(self, hold: Hold, *, answered: bool) -> None:
        self.room.leave(hold, self._clock(), answered=answered)

    @contextlib.asynccontextmanager
    async def using(
        self, caller: Caller, *, texts: int, tokens: int, price: Decimal = Decimal(0)
    ) -> AsyncIterator[Use]:
        """Embed so many texts meanwhile, with about so many ``tokens``, each of which costs ``price`` US dollars.

        Raises :class:`Refusal` if this gateway is full or the key's limits do not allow it. Call ``use.settle`` with
        the true number.
        """
        exchange = current()
        hold = None if exchange is None else exchange.hold
        is_small = texts <= SMALL_TEXTS
        own = None
        if hold is not None:
            if not self.room.resize(hold, texts, tokens, is_small=is_small):
                raise self._overloaded()
        else:
            own = self.room.take(texts, tokens, is_small=is_small)
            if own is None:
                raise self._overloaded()
        is_answered = False
        try:
            async with self._counted(caller, Use(tokens, tokens * price, price)) as use:
                yield use
            is_answered = True
        finally:
            if own is not None:
                self.release(own, answered=is_answered)

    @contextlib.asynccontextmanager
    async def spending(self, caller: Caller, *, tokens: int, usd: Decimal) -> AsyncIterator[Use]:
        """Let workers embed meanwhile what takes no room in this gateway, such as the texts of a comparison.

        If it fails, the estimate counts for the key all the same, because a part of it may have been done. If surely
        nothing was, call ``use.settle(0)``. Raises :class:`Refusal` if the key's limits do not allow it.
        """
        async with self._counted(caller, Use(tokens, usd, Decimal(0)), counts_failures=True) as use:
            yield use

    @contextlib.asynccontextmanager
    async def _counted(self, caller: Caller, use: Use, *, counts_failures: bool = False) -> AsyncIterator[Use]:
        tokens = use.tokens
        if caller.key_id is None:
            yield use
            return
        state = self._state(caller)
        self._take_tokens(caller, state, tokens)
        month: date | None = None
        reserved = UsageBooking()
        used = UsageBooking()
        try:
            if state.limits.has_month:
                asked = Demand(caller.key_id, state.limits, tokens, use.usd)
                month, against = await self._reserved(asked)
                if against is not None:
                    raise _quota(state.limits, against)
                reserved = UsageBooking(0, asked.tokens, asked.usd)
            is_counted = counts_failures
            try:
                yield use
                is_counted = True
            finally:
                if is_counted:
                    used = UsageBooking(0, use.tokens, use.usd)
        finally:
            # Whatever happens here is only noted, so that a caller who hangs up ends at once.
            if state.tokens is not None:
                state.tokens.correct(used.tokens - tokens, self._clock())
            owed = used.plus(UsageBooking(0, -reserved.tokens, -reserved.usd))
            if owed != UsageBooking():
                self._months.book(caller.key_id, month, owed)

    async def _reserved(self, asked: Demand) -> tuple[date, str | None]:
        """A reservation. If the caller hangs up meanwhile, what was reserved is given back."""
        reserving = asyncio.ensure_future(self._months.reserve(asked))
        try:
            return await asyncio.shield(reserving)
        except asyncio.CancelledError:
            reserving.add_done_callback(lambda done: self._give_back(asked, done))
            raise

    def _give_back(self, asked: Demand, done: object) -> None:
        if not isinstance(done, asyncio.Future) or done.cancelled() or done.exception() is not None:
            return
        month, against = done.result()
        if against is None:
            self._months.book(asked.key_id, month, UsageBooking(0, -asked.tokens, -asked.usd))

    def headers(self, caller: Caller) -> dict[str, str]:
        """``x-ratelimit-…`` for an answer to the caller: what its limits of a minute have left at this gateway."""
        if caller.key_id is None or (state := self._keys.get(caller.key_id)) is None:
            return {}
        now, said = self._clock(), {}
        for name, bucket in (("requests", state.requests), ("tokens", state.tokens)):
            if bucket is not None:
                said[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                said[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining(now))
                said[f"x-ratelimit-reset-{name}"] = f"{bucket.reset(now):.3f}s"
        return said

    async def close(self) -> None:
        """Write what is not written yet."""
        await self._months.close()

    def _take_tokens(self, caller: Caller, state: _KeyState, tokens: int) -> None:
        if state.tokens is None or not (wait := state.tokens.take(tokens, self._clock())):
            return
        message = (
            f"this API key may use {state.tokens.per_minute:,} tokens a minute at this gateway, and this request needs "
            f"about {tokens:,}."
        )
        raise Refusal(429, "rate_limit_exceeded", message, retry_after=wait, headers=self.headers(caller))

    def _state(self, caller: Caller) -> _KeyState:
        key_id = caller.key_id or 0
        state = self._keys.pop(key_id, None)
        if state is None or state.limits != caller.limits:
            limits = caller.limits
            requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute)
            tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute)
            state = _KeyState(limits, requests, tokens, 0 if state is None else state.running)
        self._keys[key_id] = state  # the most recent one is the last
        if len(self._keys) > FORGET_KEYS:
            idle = next((other for other, kept in self._keys.items() if not kept.running), None)
            if idle is not None:
                del self._keys[idle]
        return state

    def _overloaded(self) -> Refusal:
        message = "too many texts wait in this gateway. Try again later, or ask another one."
        return Refusal(429, "overloaded", message, retry_after=self.room.retry_after(self._clock()))


def _quota(limits: KeyLimits, against: str) -> Refusal:
    much = f"{limits.tokens_per_month:,} tokens" if against == "tokens" else f"{limits.usd_per_month} US dollars"
    message = f"this API key may use {much} a month (UTC), and there is too little left for this request."
    return Refusal(429, "insufficient_quota", message, should_retry=False)
