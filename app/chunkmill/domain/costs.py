"""What the client returns about money: what something would cost, and what it did cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Final

from chunkmill.domain.budget import Budget
from chunkmill.domain.prices import MILLION
from chunkmill.domain.printed import PrintedResult
from chunkmill.domain.states import Route


@dataclass(frozen=True, slots=True)
class LaneEstimate(PrintedResult):
    """What one route would take to embed the contents.

    ``tokens`` is how many tokens would be sent, after long texts are treated by their policy; ``refused`` is how many
    contents the route would not take. ``usd`` and ``seconds`` (of engine time) are None if they cannot be known;
    ``unknown`` then says why.
    """

    route: Route
    tokens: int | None
    refused: int | None
    usd: Decimal | None
    seconds: float | None = None
    unknown: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate(PrintedResult):
    """What an enqueue would do, before it does anything.

    The ``chunks`` have ``contents`` distinct texts: ``cached`` of them have a vector in the space, ``in_flight`` are
    at a provider for another job, and ``to_embed`` are left. ``route`` is the route that the job would get, and
    ``because`` says why; ``tokens`` and ``usd`` are those of this route. ``lanes`` has every route that serves the
    space.

    ``beside`` has the same for each other space of the collection, because an enqueue goes into all of them while the
    collection moves to another model. The numbers of this one are those of the active space alone.
    """

    model: str
    space: str
    chunks: int
    contents: int
    cached: int
    in_flight: int
    to_embed: int
    route: Route
    because: str
    lanes: tuple[LaneEstimate, ...]
    budget: Budget
    beside: tuple[Estimate, ...] = ()
    deleted: int | None = None
    """How many chunks would be deleted because the source does not have them; None if nothing is to be replaced."""

    @property
    def chosen(self) -> LaneEstimate:
        """The estimate for ``route``."""
        return next(lane for lane in self.lanes if lane.route is self.route)

    @property
    def tokens(self) -> int | None:
        """The tokens on the chosen route; None if they are not known."""
        return self.chosen.tokens

    @property
    def usd(self) -> Decimal | None:
        """The US dollars on the chosen route; None if the price is not known."""
        return self.chosen.usd


class CostsBy(StrEnum):
    """What costs are summed by. Days and months are in UTC."""

    DAY = "day"
    MONTH = "month"
    MODEL = "model"
    ROUTE = "route"
    JOB = "job"


class AdjustmentKind(StrEnum):
    """What an adjustment of the bill is: money that no answer confirmed, or what a person says about it."""

    LOST = "lost"
    """It was charged, and its result cannot be used."""
    MAYBE_CHARGED = "maybe_charged"
    """It was sent, and nobody can tell whether it was charged."""
    CORRECTION = "correction"
    """A person corrects what was booked. It may be negative."""


@dataclass(frozen=True, slots=True)
class Cost(PrintedResult):
    """The cost of one group on one route.

    ``key`` is a day, a month, a model, a route or a job's id. Job 0 stands for calls that waited for their answer, such
    as searches, and for corrections that name no job. On a paid route, ``usd`` is what was charged or may have been; on
    the local one, it is ``engine_seconds`` at GPU_HOUR_USD, and None if that is not set.
    """

    key: str
    route: Route
    contents: int
    """How many were embedded."""
    tokens: int
    usd: Decimal | None
    """The whole amount, with the three parts below."""
    engine_seconds: float | None
    lost_usd: Decimal = Decimal(0)
    """The part of ``usd`` that was charged for results that could not be used."""
    maybe_charged_usd: Decimal = Decimal(0)
    """The part that may have been charged: nobody can tell until the invoice comes."""
    corrected_usd: Decimal = Decimal(0)
    """The sum of the corrections in ``usd``, negative if they lowered it."""

    @property
    def usd_per_million(self) -> Decimal | None:
        """The actual US dollars per million tokens; None if the cost is not known or there are no tokens."""
        return None if self.usd is None or not self.tokens else self.usd * MILLION / self.tokens


@dataclass(frozen=True, slots=True)
class Spent(PrintedResult):
    """What a call has spent so far, at most: what workers have embedded for it, and what they have under way."""

    texts: int
    tokens: int
    """As the workers counted them, and of texts that are under way as many as were expected."""
    usd: Decimal | None
    """0 for local models. None if a provider's model has no price."""
    known_usd: Decimal
    """The part of it that is known: that of the models with a price."""


@dataclass(frozen=True, slots=True)
class Costs(PrintedResult):
    """What was embedded since a day (None: since the beginning), what it cost, and the budget of this month."""

    by: CostsBy
    since: date | None
    rows: tuple[Cost, ...]
    budget: Budget


@dataclass(frozen=True, slots=True)
class AdjustedSums:
    """Parts of a sum of US dollars that no answer confirmed."""

    lost: Decimal = Decimal(0)
    maybe_charged: Decimal = Decimal(0)
    corrected: Decimal = Decimal(0)

    @property
    def total(self) -> Decimal:
        return self.lost + self.maybe_charged + self.corrected


@dataclass(frozen=True, slots=True)
class Adjustment(PrintedResult):
    """A part of the bill that no answer confirmed, and its reason."""

    id: int
    created_at: datetime
    day: date
    """The day in UTC on which it counts."""
    kind: AdjustmentKind
    route: Route
    model: str | None
    """None for a correction that names neither a model nor a job."""
    job_id: int
    """0 if it belongs to no job."""
    contents: int
    tokens: int
    usd: Decimal
    reason: str
    author: str | None
    """Who corrects; None if no person booked it."""
    key: str | None
    """What tells a correction from every other one."""


@dataclass(frozen=True, slots=True)
class Correction(PrintedResult):
    """What :meth:`Client.correct_charge` did. ``is_new`` is False if the correction had been booked before."""

    adjustment: Adjustment
    is_new: bool


def sum_of(amounts: Iterable[Decimal | None]) -> Decimal | None:
    """US dollars; None if one of the amounts is not known."""
    given = list(amounts)
    return None if None in given else known_sum(given)


def known_sum(amounts: Iterable[Decimal | None]) -> Decimal:
    """US dollars of those of the amounts that are known. This is what limits are held against, because an amount that
    nobody knows must not hide the others."""
    return sum(filter(None, amounts), Decimal(0))


USD_PLACES: Final = Decimal("1e-10")
"""To how many places a price of computed time is rounded. What is booked is never rounded."""


def machine_usd(engine_seconds: float, gpu_hour_usd: Decimal | None) -> Decimal | None:
    """US dollars for ``engine_seconds`` of a local worker; None if GPU_HOUR_USD is not set."""
    if gpu_hour_usd is None:
        return None
    return (gpu_hour_usd * Decimal(repr(float(engine_seconds))) / 3600).quantize(USD_PLACES)
