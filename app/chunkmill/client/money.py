"""The client's methods for money and lanes: estimates, costs, and what the paid routes wait for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from chunkmill.client.base import ClientPart, store_errors
from chunkmill.client.estimate import EstimateRequest, estimate
from chunkmill.client.stopping import stoppable
from chunkmill.db.connect import require_at_least
from chunkmill.domain.arguments import as_deadline, as_items, as_number, as_on_invalid, as_usd, as_word, require_name
from chunkmill.domain.chosen import as_replaced
from chunkmill.domain.chunks import prepare_all, prepare_or_skip
from chunkmill.domain.costs import Adjustment, AdjustmentKind, Correction, Costs, CostsBy, Estimate
from chunkmill.domain.lanes import Lane
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import Abandoned, Explanation
from chunkmill.domain.shapes import rows_of
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput
from chunkmill.ledger.jobs import explain
from chunkmill.ledger.money import adjustments, budget, charges
from chunkmill.ledger.provider import provider_endings, provider_lanes
from chunkmill.monitor import present
from chunkmill.openai.catalogue import read_twins


class Money(ClientPart):
    """The part of the client that is about routes and what they cost."""

    def estimate(
        self,
        chunks: Iterable[object],
        *,
        model: str | None = None,
        route: Route | str = Route.AUTO,
        collection: str | None = None,
        on_long: OnLong | str = OnLong.TRUNCATE,
        on_invalid: Literal["raise", "skip"] = "raise",
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        deadline: datetime | timedelta | float | None = None,
        replace: bool | Mapping[str, Any] = False,
    ) -> Estimate:
        """What :meth:`enqueue` with the same arguments would send, and what it would cost on each route.

        Nothing is written. Memory stays constant; a temporary table in Postgres holds the hash of each distinct text
        while this runs. Tokens are counted on this machine, with the tokenizer of each route. With ``replace``, which
        needs a ``collection``, ``Estimate.deleted`` says how many chunks an enqueue would delete. Raises what
        :meth:`enqueue` raises except :class:`BudgetExceeded`, because the answer contains the budget.
        """
        on_long, route = as_word(OnLong, on_long, "on_long"), as_word(Route, route, "route")
        if collection is not None:
            require_name("collection", collection)
        on_invalid = as_on_invalid(on_invalid)
        replaces = as_replaced(replace)
        if replaces is not None and collection is None:
            raise InvalidInput("replace needs a collection, from which an enqueue would delete.")
        chunks = self._while_open(stoppable(rows_of(as_items("chunks", chunks))))
        due = None if deadline is None else as_deadline(deadline, datetime.now(UTC))
        spec = self._spec(model, on_long, dimensions=dimensions, precision=precision)
        request = EstimateRequest(spec, route, due, on_long, collection, replaces)
        prepared = prepare_all(chunks) if on_invalid == "raise" else prepare_or_skip(chunks)
        with store_errors(self._db):
            return estimate(self._db, self._settings, request, prepared)

    def usage(self, by: CostsBy | str = CostsBy.MONTH, *, since: date | None = None) -> Costs:
        """What was embedded and what it cost, by day, month, model, route or job, since a day in UTC.

        The provider counted what the paid routes cost, except for what was lost, may have been charged, or was
        corrected; each row says how much that is. What the local route costs is its engine's time multiplied by
        GPU_HOUR_USD.
        """
        by = as_word(CostsBy, by, "by")
        since = _day_or_none("since", since)
        settings = self._settings
        read_twins(settings)
        with self._transaction() as conn:
            rows = charges.report(conn, by, since=since, gpu_hour_usd=settings.gpu_hour_usd)
            return Costs(by, since, rows, budget.read(conn, settings))

    def adjustments(
        self, kind: AdjustmentKind | str | None = None, *, since: date | None = None, limit: int = 100
    ) -> list[Adjustment]:
        """The parts of the bill that no answer confirmed, with their reasons: the latest ``limit``, newest first.

        ``kind`` selects those that were ``lost``, that were ``maybe_charged``, or that are a ``correction``, which
        :meth:`correct_charge` booked. None means all.
        """
        kind = None if kind is None else as_word(AdjustmentKind, kind, "kind")
        limit = as_number("limit", limit, least=1)
        with self._transaction() as conn:
            listed = adjustments.listed(conn, kind=kind, since=_day_or_none("since", since), limit=limit)
            return Rows(listed, Adjustment)

    def correct_charge(
        self,
        usd: Decimal | int | str,
        *,
        route: Route | str,
        day: date,
        reason: str,
        author: str,
        model: str | None = None,
        job_id: int = 0,
        key: str | None = None,
    ) -> Correction:
        """Add ``usd`` (which is negative for money that was not charged) to what is booked on a paid route on a day.

        The budget counts it in the month of that day, in UTC. ``reason`` and ``author`` are kept. A correction has a
        ``key``, and a second call with the same key books nothing. Without one, the key is made of the amount, route,
        day, reason, model and job, so the same call may be made again after an error.

        Raises :class:`InvalidInput` if an argument is wrong, if more is taken back than the month has on that route (or
        the job has there), if the day has not begun, or if the key is that of another correction; and
        :class:`NotFound` if there is no such model.
        """
        route = as_word(Route, route, "route")
        if not route.is_paid:
            raise InvalidInput(f"route is {route.value!r}; charges are booked on openai and openai-sync.")
        amount = as_usd("usd", usd)
        given_day = _day_or_none("day", day)
        if given_day is None:
            raise InvalidInput("day is None; it must be a date.")
        job_id = as_number("job_id", job_id, least=0)
        for argument, text in (("reason", reason), ("author", author)):
            require_name(argument, text)
        for argument, name in (("model", model), ("key", key)):
            if name is not None:
                require_name(argument, name)
        made = (f"{amount:f}", route.value, given_day.isoformat(), reason, model, job_id)
        with self._transaction() as conn:
            return adjustments.correct(
                conn,
                amount,
                route=route,
                day=given_day,
                reason=reason,
                author=author,
                key=key or hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16],
                model=model,
                job_id=job_id,
            )

    def explain(self, job_id: int) -> Explanation:
        """Why a job is embedded where it is, and what it waits for. Raises :class:`NotFound`."""
        job_id = as_number("job_id", job_id)
        with self._transaction() as conn:
            told = explain.explain(conn, job_id)
            return replace(told, lanes=tuple(present.served(told.lanes, present.read(conn))))

    def lanes(self) -> list[Lane]:
        """The paid lanes: running, idle (no worker serves them), paused, stopped or held, and why."""
        with self._transaction() as conn:
            return Rows(present.served(provider_lanes.lanes(conn), present.read(conn)), Lane)

    def abandon(self, provider_batch_id: int) -> Abandoned:
        """Let go of a ProviderBatch that does not end. Jobs that wait for its contents send them again.

        If they may have been charged, that is booked, and the provider is asked to cancel it. If its files cannot be
        deleted, a second call closes it all the same. Raises :class:`NotFound`, and :class:`InvalidInput` if it is
        closed.
        """
        provider_batch_id = as_number("provider_batch_id", provider_batch_id)
        read_twins(self._settings)
        with self._transaction() as conn:
            require_at_least(conn, "0011")
            return provider_endings.abandon(conn, self._settings, provider_batch_id)

    def resume_lane(self, route: Route | str) -> bool:
        """Let a stopped or paused lane take work again, and forget limits that the provider's refusals have taught.

        Returns False if there was nothing to do.
        """
        route = as_word(Route, route, "route")
        if not route.is_paid:
            raise InvalidInput(f"route is {route.value!r}; the lanes that can stop are openai and openai-sync.")
        with self._transaction() as conn:
            return provider_lanes.resume(conn, route)


def _day_or_none(argument: str, given: date | None) -> date | None:
    """A day. Raises :class:`InvalidInput` for anything else, also for a moment, which may be on two days."""
    if given is not None and (isinstance(given, datetime) or not isinstance(given, date)):
        raise InvalidInput(f"{argument} is of type {type(given).__name__}; it must be a date.")
    return given
