"""Which lane embeds a job, and why: by what serves its space, price, deadline and health. Pure.

A job asks for a route: a lane by its name, which it gets, or ``auto``, which is decided here. The choice never leaves
the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from chunkmill.domain.budget import dollars
from chunkmill.domain.providers import OPENAI, ProviderModel
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.errors import UnknownRoute

BATCH_TAKES = timedelta(hours=24)
"""The completion window of the Batch API."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A lane that serves the space. ``usd`` is for a million tokens, None where it is not known.

    ``stopped`` says why it takes no work until somebody acts; ``idle`` that no worker of it is connected, which may
    pass.
    """

    route: Route
    usd: Decimal | None = None
    stopped: str | None = None
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A lane, and in one sentence why."""

    route: Route
    because: str


def serving(spec: SpaceSpec, model: ProviderModel | None, *, batches: bool) -> tuple[Route, ...]:
    """The lanes that give vectors of a space; ``model`` is the provider's, where it has one."""
    local = () if spec.provider == OPENAI else (Route.LOCAL,)
    paid = () if model is None else (Route.OPENAI, Route.OPENAI_SYNC) if batches else (Route.OPENAI_SYNC,)
    return (*local, *paid)


def require_served(asked: Route, lanes: Sequence[Route], spec: SpaceSpec) -> None:
    """Raise :class:`UnknownRoute`, with what to do, unless a lane asked for by name serves the space."""
    if asked in lanes or (asked is Route.AUTO and lanes):
        return
    others = ", ".join(repr(lane.value) for lane in (*lanes, Route.AUTO))
    if not lanes:
        what = f"no lane serves model {spec.model!r} here: describe it in OPENAI_MODELS, or name another model."
    elif asked is Route.OPENAI and Route.OPENAI_SYNC in lanes:
        what = f"the server has no Batch API (OPENAI_BATCHES is false). Take {others}."
    elif asked is Route.LOCAL:
        what = f"model {spec.model!r} is served by the provider alone. Take {others}, or a local model."
    else:
        what = (
            f"this space of model {spec.model!r} is served by local workers alone. Take {others}; or, where "
            "OPENAI_BASE_URL serves the same weights, say so with same_as in OPENAI_MODELS."
        )
    raise UnknownRoute(f"route is {asked.value!r}, and {what}")


def choose(asked: Route, offers: Sequence[Offer], *, now: datetime, deadline: datetime | None = None) -> Choice:
    """The lane of a job that nobody works on yet. ``offers`` holds one at least, and the one ``asked`` for.

    With ``auto`` the cheapest that is neither stopped nor too late. Without GPU_HOUR_USD local workers cost nothing
    here: they are there already. Where nothing is left the least bad one, which waits.
    """
    if asked is not Route.AUTO:
        return Choice(asked, "asked for by name")
    if len(offers) == 1:
        return Choice(offers[0].route, "the only lane that serves the space")
    ranked = sorted(offers, key=lambda offer: (_out(offer, now, deadline)[0], offer.usd or 0, _ORDER[offer.route]))
    best = ranked[0]
    rank, _ = _out(best, now, deadline)
    outs = [f"{each.route} is out: {why}" for each in ranked if (why := _out(each, now, deadline)[1])]
    prices = ", ".join(f"{each.route} {_price(each.usd)}" for each in ranked)
    left = sum(_out(each, now, deadline)[0] == 0 for each in ranked)
    lead = "the only one left" if left == 1 else _LEADS[rank]
    return Choice(best.route, "; ".join([f"{lead} ({prices})", *outs]))


def is_late(deadline: datetime | None, now: datetime) -> bool:
    """Whether the Batch API may take until after the deadline."""
    return deadline is not None and deadline - now < BATCH_TAKES


_LEADS = (
    "the cheapest",
    "it may be late, and no better lane is left",
    "it waits for a worker, and no better lane is left",
    "it waits, for every lane is stopped",
)
"""By how much speaks against the best lane."""
_ORDER = {Route.LOCAL: 0, Route.OPENAI: 1, Route.OPENAI_SYNC: 2}


def _out(offer: Offer, now: datetime, deadline: datetime | None) -> tuple[int, str | None]:
    """How much speaks against a lane, 0 for nothing, and what."""
    if offer.stopped:
        return 3, offer.stopped
    if deadline is not None and offer.idle:
        return 2, f"no worker of it is connected, and the deadline is in {_hours(deadline - now)}"
    if deadline is not None and offer.route is Route.OPENAI and is_late(deadline, now):
        return 1, f"it takes up to {_hours(BATCH_TAKES)}, and the deadline is in {_hours(deadline - now)}"
    return 0, None


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.3g} h"


def _price(usd: Decimal | None) -> str:
    return "without a known price" if usd is None else f"at {dollars(usd)} USD per million tokens"
