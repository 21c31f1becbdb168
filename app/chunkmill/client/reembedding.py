"""Re-embeddings: a collection moves to another space without a gap, and comes back."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Literal, overload

import sqlalchemy as sa

from chunkmill.client.base import ClientPart, store_errors
from chunkmill.client.costing import counting, require_within
from chunkmill.client.paying import usd_of
from chunkmill.client.quoting import quote
from chunkmill.client.stopping import end_if_stopped
from chunkmill.domain.arguments import (
    as_flag,
    as_function,
    as_number,
    as_seconds,
    as_text,
    as_usd,
    as_word,
    require_name,
)
from chunkmill.domain.costs import Spent
from chunkmill.domain.gates import Gates
from chunkmill.domain.printed import Rows
from chunkmill.domain.reembedding import (
    KEEP_DAYS,
    RAMP,
    STEP_HOURS,
    Plan,
    Quote,
    Reembedding,
    ReembeddingState,
    as_gates,
    as_ramp,
)
from chunkmill.domain.spaces import OnLong, Precision, SpaceSpec
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import InvalidInput, WaitTimeout
from chunkmill.ledger.access import spends
from chunkmill.ledger.jobs import routing
from chunkmill.ledger.money import budget
from chunkmill.ledger.reembedding import cleaning, flipping, gating, lives, serving
from chunkmill.ledger.reembedding.flipping import Direction, FlipAttempt
from chunkmill.ledger.reembedding.lives import Life
from chunkmill.spaces import collections, registry

PAUSE_S = 0.2
"""How many seconds pass between two tries of a flip."""


class Reembeddings(ClientPart):
    """The part of the client that moves collections from one space to another."""

    @overload
    def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[True],
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Quote: ...

    @overload
    def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[False] = False,
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Reembedding: ...

    def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: bool = False,
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Quote | Reembedding:
        """Begin to move a collection to the model ``to``, or with ``dry_run`` say what that would take.

        Neither searches nor enqueues are interrupted: the stored texts are embedded into the new space as work of
        ``priority``, what is enqueued meanwhile is embedded into both, and searches go on in the old space. The new one
        must pass the ``gates``, answers the growing shares of ``ramp``, each for ``step_hours``, and becomes the active
        one at a single moment. The old one is kept up to date for ``keep_days``, so that :meth:`rollback` can return to
        it. A poller does all this; a call with the same arguments returns the re-embedding that is under way.

        ``on_long``, ``dimensions``, ``precision`` and ``route`` are as in :meth:`enqueue`. A ramp whose last share is
        not 100 stays there until somebody calls :meth:`flip` or :meth:`cancel_reembedding`, and an empty one flips as
        soon as the gates are passed. Nothing is begun if a paid route would cost more than ``max_usd``, by the estimate
        of ``dry_run``; what is enqueued afterwards costs more.

        Raises :class:`NotFound`, :class:`InvalidInput` if another re-embedding of the collection is under way or it is
        in the space already, :class:`UnknownModel`, :class:`UnknownRoute`, and :class:`BudgetExceeded`.
        """
        require_name("collection", collection)
        as_text("to", to)
        dry_run = as_flag("dry_run", dry_run)
        long = as_word(OnLong, on_long, "on_long")
        plan = Plan(
            gates=as_gates(gates),
            ramp=as_ramp(ramp),
            step_hours=step_hours,
            keep_days=keep_days,
            priority=as_word(Priority, priority, "priority"),
            route=as_word(Route, route, "route"),
            on_long=long,
        )
        limit = None if max_usd is None else as_usd("max_usd", max_usd)
        spec = self._spec(to, long, dimensions=dimensions, precision=precision)
        if dry_run:
            with store_errors(self._db):
                return quote(self._db, self._settings, collection, spec, plan)
        usd = self._expected_usd(collection, spec, plan, limit)
        with self._transaction() as conn:
            lives.require_kept(conn)
            choice = routing.decide(conn, self._settings, spec, plan.route)
            if choice.route.is_paid:
                budget.require_budget(conn, self._settings, spec)
            row = collections.find(conn, collection)
            space = registry.register_and_hold(conn, spec, storage=self._settings.vector_storage)
            reembedding_id = lives.begin(conn, row, space, plan, usd=usd)
        return self.reembedding(reembedding_id)

    def _expected_usd(self, collection: str, spec: SpaceSpec, plan: Plan, limit: Decimal | None) -> Decimal:
        """US dollars to reserve for the key of the gateway that begins a re-embedding. None are reserved if its dollars
        have no limit, or if the re-embedding is under way already, which :meth:`reembed` finds out.

        Raises :class:`BudgetExceeded` if it would cost more than ``limit``.
        """
        with self._transaction() as conn:
            choice = routing.decide(conn, self._settings, spec, plan.route)
            is_limited = spends.is_limited(conn)
            if not choice.route.is_paid or not (is_limited or limit is not None):
                return Decimal(0)
            row = collections.find(conn, collection)
            if registry.get(conn, row.space_id).spec.fingerprint == spec.fingerprint:
                return Decimal(0)
        with store_errors(self._db):
            lanes = quote(self._db, self._settings, collection, spec, plan).lanes
        lane = next(lane for lane in lanes if lane.route is choice.route)
        require_within(
            lane.usd,
            limit,
            what=f"the re-embedding of collection {collection!r}",
            advice="Nothing was begun. Raise the limit, or choose a cheaper model or route.",
        )
        return usd_of(lane) if is_limited else Decimal(0)

    def reembedding(self, which: int | str) -> Reembedding:
        """A re-embedding by its id, or the latest one of a collection by its name. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            life = _find(conn, which)
            return life.shown(serving.served(conn, life))

    def reembeddings(self, collection: str | None = None, *, limit: int = 20) -> list[Reembedding]:
        """The latest re-embeddings, newest first: of one collection, or of all. Raises :class:`NotFound`."""
        limit = as_number("limit", limit, least=0)
        if collection is not None:
            require_name("collection", collection)
        with self._transaction() as conn:
            lives.require_kept(conn)
            row = None if collection is None else collections.find(conn, collection)
            latest = lives.latest(conn, None if row is None else [row.id], limit)
        return Rows([life.shown() for life in latest], Reembedding)

    def flip(self, which: int | str, *, missing: int | None = None, timeout: float = 60.0) -> Reembedding:
        """Make the new space the active one now, without the rest of the ramp.

        No chunk that can be searched is missing afterwards: that is proved in the moment of the flip, for which writers
        wait some milliseconds. If chunks got their vector in the old space a moment ago, this waits for their vector in
        the new one, up to ``timeout`` seconds. ``missing`` chunks may be missing all the same; None means as many as
        the gates allow. The gates of quality are not checked.

        Raises :class:`NotFound`, :class:`InvalidInput` if it is not judged or ramping, and :class:`WaitTimeout`, which
        says how many chunks have no vector in the new space. Nothing is changed then.
        """
        return self._flip(which, back=False, missing=missing, timeout=timeout)

    def rollback(self, which: int | str, *, missing: int | None = None, timeout: float = 60.0) -> Reembedding:
        """Make the space that the collection left the active one again. It is :meth:`flip` backwards, with the same
        proof.

        The new space is kept up to date for ``keep_days``; after that it is dropped. Raises what :meth:`flip` raises.
        """
        return self._flip(which, back=True, missing=missing, timeout=timeout)

    def _flip(self, which: int | str, *, back: bool, missing: int | None, timeout: float) -> Reembedding:
        if missing is not None:
            missing = as_number("missing", missing, least=0)
        deadline = time.monotonic() + as_seconds("timeout", timeout)
        states = flipping.ROLL_BACK_FROM if back else flipping.FLIP_FROM
        is_held = False
        with store_errors(self._db):
            while True:
                end_if_stopped()
                with self._db.begin() as conn:
                    life = _find(conn, which)
                which = life.id  # another re-embedding may begin meanwhile
                _require_state(life, states, back=back)
                way = Direction.of(life, back=back)
                most = life.plan.gates.missing if missing is None else missing
                tried = flipping.flip_once(self._db, way, states=states, missing=most)
                if tried.done or time.monotonic() >= deadline:
                    break
                with self._db.begin() as conn:
                    flipping.let_catch_up(conn, way, tried)
                is_held = True
                self._ring_now()
                time.sleep(PAUSE_S)
            if is_held:
                with self._db.begin() as conn:
                    flipping.let_go_on(conn, way)
                self._ring_now()
        if not tried.done:
            raise WaitTimeout(_why_not(life, tried, most, back=back, timeout=timeout))
        return self.reembedding(life.id)

    def _ring_now(self) -> None:
        with self._db.connect() as conn:
            self._ring(conn)

    def judge_reembedding(
        self, which: int | str, *, timeout: float = 600.0, on_spent: Callable[[Spent], object] | None = None
    ) -> Reembedding:
        """Check the gates now, and note what they said. A poller whose role may read texts does it by itself.

        Workers embed the golden queries in both spaces, for which this waits up to ``timeout`` seconds. ``on_spent`` is
        called with what is spent, before and after each request to workers. Raises :class:`NotFound`, and
        :class:`InvalidInput` if it is not judged now.
        """
        as_function("on_spent", on_spent)
        with self._transaction() as conn:
            life = _find(conn, which)
        if life.state is not ReembeddingState.JUDGING:
            raise InvalidInput(
                f"re-embedding {life.id} of collection {life.collection!r} is {life.state.in_words}; its gates "
                "are checked once its new space is filled and indexed, and before it answers searches."
            )
        with store_errors(self._db):
            gating.judge(
                self._db,
                self._settings,
                life,
                timeout=as_seconds("timeout", timeout),
                count=counting(self._transaction, self._settings, on_spent),
            )
        return self.reembedding(life.id)

    def pause_reembedding(self, which: int | str) -> Reembedding:
        """Stop a re-embedding in its present state and share. Texts that workers already have are still embedded.

        Chunks that are enqueued meanwhile still reach both spaces. Raises :class:`NotFound`, and :class:`InvalidInput`
        if it has ended.
        """
        with self._transaction() as conn:
            life = _find(conn, which)
            lives.pause(conn, life)
        return self.reembedding(life.id)

    def resume_reembedding(
        self, which: int | str, *, gates: Gates | None = None, ramp: Sequence[int] | None = None
    ) -> Reembedding:
        """Go on with a re-embedding that was paused, has a problem, or stepped back, if you like with other ``gates``
        or another ``ramp``.

        Its gates are checked anew. Once the ramp has begun they were passed, and of other ``gates`` only ``missing``
        counts, at the flip. Raises :class:`NotFound`, and :class:`InvalidInput` if it has ended.
        """
        with self._transaction() as conn:
            life = _find(conn, which)
            plan = life.plan
            if gates is not None:
                plan = dataclasses.replace(plan, gates=as_gates(gates))
            if ramp is not None:
                plan = dataclasses.replace(plan, ramp=as_ramp(ramp))
            lives.resume(conn, life, plan)
        return self.reembedding(life.id)

    def cancel_reembedding(self, which: int | str) -> Reembedding:
        """Give up a re-embedding before its flip. Searches stay in the old space.

        Vectors of the new space that are written stay, as those that no collection refers to, until they are pruned or
        evicted. Raises :class:`NotFound`, and :class:`InvalidInput` after the flip, when :meth:`rollback` returns.
        """
        with self._transaction() as conn:
            life = _find(conn, which)
            if not lives.cancel(conn, life):
                raise InvalidInput(
                    f"re-embedding {life.id} of collection {life.collection!r} is {life.state.in_words}, so there "
                    "is nothing to cancel. After a flip, this returns to the old space: chunkmill reembed rollback "
                    f"{shlex.quote(life.collection)}"
                )
        with store_errors(self._db):
            cleaning.clean_up(self._db, life.id)
        return self.reembedding(life.id)

    def finish_reembedding(self, which: int | str) -> Reembedding:
        """Drop the space that the collection left, before ``keep_days`` are over. There is no way back after that.

        A poller deletes its vectors. Raises :class:`NotFound`, and :class:`InvalidInput` if the collection has left no
        space that is still kept.
        """
        with self._transaction() as conn:
            life = _find(conn, which)
            if not lives.let_go(conn, life):
                raise InvalidInput(
                    f"re-embedding {life.id} of collection {life.collection!r} is {life.state.in_words}, and the "
                    "collection keeps no previous space."
                )
        return self.reembedding(life.id)


def _find(conn: sa.Connection, which: int | str) -> Life:
    lives.require_kept(conn)
    if isinstance(which, str):
        require_name("which", which)
    else:
        which = as_number("which", which)
    return lives.find(conn, which)


def _require_state(life: Life, states: Sequence[ReembeddingState], *, back: bool) -> None:
    if life.is_dropped:
        raise InvalidInput(f"the collection of re-embedding {life.id} was dropped.")
    if life.state in states:
        return
    what = "roll back" if back else "flip"
    advice = "There is nothing to return to." if back else "Wait until its new space is filled and indexed."
    if life.state.is_end or (not back and life.state is ReembeddingState.FLIPPED):
        advice = "The flip is done."
        if life.state.is_end:
            advice = f"Begin another one: chunkmill reembed start {shlex.quote(life.collection)} MODEL"
    raise InvalidInput(
        f"re-embedding {life.id} of collection {life.collection!r} cannot {what}, because it is "
        f"{life.state.in_words}. {advice}"
    )


def _why_not(life: Life, tried: FlipAttempt, most: int, *, back: bool, timeout: float) -> str:
    to = life.names["from_model"] if back else life.names["to_model"]
    if tried.open_contents:
        reason = (
            f"more than {tried.open_contents - 1:,} texts have no vector in it yet. Wait until they are embedded: "
            f"chunkmill audit {shlex.quote(life.collection)}"
        )
    elif tried.missing:
        reason = (
            f"{tried.missing:,} chunks that can be searched have no vector in it, and {most:,} may be missing. See "
            f"with `chunkmill dead list` whether they are dead, and with `chunkmill status` whether a worker serves "
            f"that model; or accept it with missing={tried.missing}"
        )
    else:
        reason = "writers left no moment for it. Look in pg_stat_activity (xact_start) for a long transaction"
    return (
        f"collection {life.collection!r} was not moved to the space of {to!r} within {timeout:g} s, because {reason}. "
        "Nothing was changed, and the same call may be made again."
    )
