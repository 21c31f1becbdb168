"""Which route embeds a job, and why. It depends on what serves the job's space, on price, deadline and health. Pure.

A job asks for a route by its name and gets it, or for ``auto``, for which the route is chosen here. The job's space is
the same on every route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal

from chunkmill.domain.budget import dollars
from chunkmill.domain.providers import OPENAI, ProviderModel
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.errors import UnknownRoute

BATCH_TAKES = timedelta(hours=24)
"""How long the Batch API may take (its ``completion_window``)."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A route that serves the space. ``usd`` is the price of a million tokens; None if it is not known.

    ``stopped`` says why it takes no work until somebody acts. ``idle`` says that none of its workers is connected,
    which may pass.
    """

    route: Route
    usd: Decimal | None = None
    stopped: str | None = None
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A route, and in one sentence why it was chosen.

    ``instead_of`` is the route that ``auto`` would have chosen if no route were stopped; None if it is the same one.
    """

    route: Route
    because: str
    instead_of: Route | None = None


def serving(spec: SpaceSpec, model: ProviderModel | None, *, batches: bool) -> tuple[Route, ...]:
    """The routes that serve a space. ``model`` is the provider's model for it; None if the provider has none."""
    local = () if spec.provider == OPENAI else (Route.LOCAL,)
    paid = () if model is None else (Route.OPENAI, Route.OPENAI_SYNC) if batches else (Route.OPENAI_SYNC,)
    return (*local, *paid)


def require_served(asked: Route, lanes: Sequence[Route], spec: SpaceSpec) -> None:
    """Raise :class:`UnknownRoute`, which says what to do, unless the route that was asked for serves the space."""
    if asked in lanes or (asked is Route.AUTO and lanes):
        return
    others = ", ".join(repr(lane.value) for lane in (*lanes, Route.AUTO))
    if not lanes:
        what = f"no route serves model {spec.model!r} here. Describe it in OPENAI_MODELS, or name another model."
    elif asked is Route.OPENAI and Route.OPENAI_SYNC in lanes:
        what = f"the server has no Batch API (OPENAI_BATCHES is false). Use {others}."
    elif asked is Route.LOCAL:
        what = f"only the provider serves model {spec.model!r}. Use {others}, or a local model."
    else:
        what = (
            f"only local workers serve this space of model {spec.model!r}. Use {others}; or, if OPENAI_BASE_URL "
            "serves the same weights, say so with same_as in OPENAI_MODELS."
        )
    raise UnknownRoute(f"route is {asked.value!r}, and {what}")


def choose(asked: Route, offers: Sequence[Offer], *, now: datetime, deadline: datetime | None = None) -> Choice:
    """The route of a job on which no work has begun. ``offers`` is not empty, and has the route ``asked`` for.

    For ``auto`` it is the cheapest one that is neither stopped nor too late; if there is none, it is the least bad one,
    and the job waits. Without GPU_HOUR_USD local workers count as free, because they are there already. A paid route
    without a price may cost anything, so it comes after those with one.
    """
    if asked is not Route.AUTO:
        return Choice(asked, "asked for by name")
    if len(offers) == 1:
        return Choice(offers[0].route, "the only route that serves the space")
    ranked = _ranked(offers, now, deadline)
    best = ranked[0]
    rank, _ = _out(best, now, deadline)
    outs = [f"{offer.route} is out: {why}" for offer in ranked if (why := _out(offer, now, deadline)[1])]
    prices = ", ".join(f"{offer.route} {_price(offer.usd)}" for offer in ranked)
    left = sum(_out(offer, now, deadline)[0] == 0 for offer in ranked)
    lead = "the only one left" if left == 1 else _lead(best) if rank == 0 else _LEADS[rank]
    wanted = _ranked([replace(offer, stopped=None) for offer in offers], now, deadline)[0].route
    return Choice(best.route, "; ".join([f"{lead} ({prices})", *outs]), None if wanted is best.route else wanted)


def _ranked(offers: Sequence[Offer], now: datetime, deadline: datetime | None) -> list[Offer]:
    """The offers, the best first."""

    def key(offer: Offer) -> tuple[int, bool, Decimal, int]:
        rank, _ = _out(offer, now, deadline)
        return rank, offer.usd is None and offer.route.is_paid, offer.usd or Decimal(0), _ORDER[offer.route]

    return sorted(offers, key=key)


def _lead(best: Offer) -> str:
    """What to say about the best route if nothing is against it."""
    if best.usd is not None:
        return "the cheapest"
    if best.route.is_paid:
        return "no route that is left has a known price"
    return "local workers count as free while their price is not known"


def is_late(deadline: datetime | None, now: datetime) -> bool:
    """Whether the Batch API may end after the deadline."""
    return deadline is not None and deadline - now < BATCH_TAKES


_LEADS = {
    1: "it may be late, and no better route is left",
    2: "it waits for a worker, and no better route is left",
    3: "it waits, because every route is stopped",
}
"""What to say about the best route, by its rank (`_out`), if something is against it."""
_ORDER = {Route.LOCAL: 0, Route.OPENAI: 1, Route.OPENAI_SYNC: 2}


def _out(offer: Offer, now: datetime, deadline: datetime | None) -> tuple[int, str | None]:
    """The rank of an offer, 0 if nothing is against it and 3 at worst, and what is against it."""
    if offer.stopped:
        return 3, offer.stopped
    if deadline is not None and offer.idle:
        return 2, f"none of its workers is connected, and the deadline is in {_hours(deadline - now)}"
    if deadline is not None and offer.route is Route.OPENAI and is_late(deadline, now):
        return 1, f"it takes up to {_hours(BATCH_TAKES)}, and the deadline is in {_hours(deadline - now)}"
    return 0, None


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.3g} h"


def _price(usd: Decimal | None) -> str:
    return "without a known price" if usd is None else f"at {dollars(usd)} USD per million tokens"
