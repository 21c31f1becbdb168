"""What the client says of money: frozen pictures of what something would cost, and of what it did."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import StrEnum

from chunkmill.domain.budget import Budget
from chunkmill.domain.prices import MILLION
from chunkmill.domain.states import Route


@dataclass(frozen=True, slots=True)
class LaneEstimate:
    """What one lane would take for the contents to embed.

    ``tokens`` are those it would be sent, long texts treated by their policy; ``refused`` contents it would not take.
    ``usd`` and ``seconds`` of engine time, where they can be known. ``unknown`` says why something is None.
    """

    route: Route
    tokens: int | None
    refused: int | None
    usd: Decimal | None
    seconds: float | None = None
    unknown: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an enqueue would do, before it does anything.

    Of ``chunks`` there are ``contents`` distinct texts: ``cached`` have a vector in the space, ``in_flight`` are at a
    provider for another job, and ``to_embed`` are left. ``route`` is the lane the job would get, ``because`` why;
    ``tokens`` and ``usd`` are that lane's. ``lanes`` has all that serve the space.
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

    @property
    def chosen(self) -> LaneEstimate:
        return next(lane for lane in self.lanes if lane.route is self.route)

    @property
    def tokens(self) -> int | None:
        return self.chosen.tokens

    @property
    def usd(self) -> Decimal | None:
        return self.chosen.usd


class CostsBy(StrEnum):
    """What costs are summed by. Days and months are those of UTC."""

    DAY = "day"
    MONTH = "month"
    MODEL = "model"
    ROUTE = "route"
    JOB = "job"


@dataclass(frozen=True, slots=True)
class Cost:
    """One group's cost on one route.

    ``key`` is a day, a month, a model, a route or a job's id; job 0 is whoever waited for an answer, as a search
    does. ``usd`` of a paid route is what was charged; of the local one its ``engine_seconds`` by GPU_HOUR_USD, None
    without it.
    """

    key: str
    route: Route
    contents: int
    tokens: int
    usd: Decimal | None
    engine_seconds: float | None

    @property
    def usd_per_million(self) -> Decimal | None:
        """US dollars per million tokens, as it came out."""
        return None if self.usd is None or not self.tokens else self.usd * MILLION / self.tokens


@dataclass(frozen=True, slots=True)
class Costs:
    """What was embedded since a day (None: ever), and what it cost; and the month's budget."""

    by: CostsBy
    since: date | None
    rows: tuple[Cost, ...]
    budget: Budget
