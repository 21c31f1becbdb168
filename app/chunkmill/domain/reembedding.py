"""A re-embedding: the way of a collection from one space to another, and back. Pure.

It is called for as a :class:`Plan`, goes through the states of :class:`ReembeddingState`, and is shown as a
:class:`Reembedding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

from chunkmill.domain.arguments import as_items, as_number
from chunkmill.domain.budget import Budget
from chunkmill.domain.costs import LaneEstimate
from chunkmill.domain.gates import GateResult, Gates
from chunkmill.domain.printed import PrintedResult
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import InvalidInput


class SpaceRole(StrEnum):
    """What a space other than the active one is to a collection."""

    FILLING = "filling"
    """It gets the vectors of all chunks, and may answer a share of the searches."""
    PREVIOUS = "previous"
    """The collection left it, and it is kept up to date, so that the collection can come back."""


class ReembeddingState(StrEnum):
    """The states of a re-embedding, in the order in which it goes through them, and the two other ends."""

    PLANNED = "planned"
    """It is written down. Nothing was sent to a worker."""
    FILLING = "filling"
    """Workers embed the stored texts into the new space."""
    INDEXING = "indexing"
    """Every chunk has a vector, or is dead in the new space, and the serving index is built."""
    JUDGING = "judging"
    """The gates are checked. It stays here if one of them is not passed."""
    RAMPING = "ramping"
    """The new space answers a growing share of the searches."""
    FLIPPED = "flipped"
    """The new space is the active one. The old one is kept up to date."""
    FINISHED = "finished"
    """The old space is no longer kept."""
    CANCELLED = "cancelled"
    ROLLED_BACK = "rolled_back"

    @property
    def in_words(self) -> str:
        """The state as it stands in a sentence."""
        return self.value.replace("_", " ")

    @property
    def is_end(self) -> bool:
        """Whether the re-embedding is over: finished, cancelled or rolled back."""
        return self in (ReembeddingState.FINISHED, ReembeddingState.CANCELLED, ReembeddingState.ROLLED_BACK)

    @property
    def is_before_flip(self) -> bool:
        """Whether the old space is still the active one, and the new one is on its way to become it."""
        state = ReembeddingState
        return self in (state.PLANNED, state.FILLING, state.INDEXING, state.JUDGING, state.RAMPING)

    @property
    def is_moved(self) -> bool:
        """Whether the new space is the active one."""
        return self in (ReembeddingState.FLIPPED, ReembeddingState.FINISHED)


RAMP = (10, 25, 50, 90, 100)
"""The share of the search sessions, in percent, that the new space answers in each step, if nothing else is said."""
STEP_HOURS = 1.0
KEEP_DAYS = 14.0
MOST_DAYS = 3650.0
ERROR_SHARE = 0.01
"""How much larger the share of failed searches may be in the new space than in the old one, from 0.0 to 1.0."""
FEWEST_SEARCHES = 100
"""A step of the ramp is judged once each of both spaces has answered so many searches in it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for. It is stored as JSON, and a field that a later release adds has a default."""

    gates: Gates = field(default_factory=Gates)
    ramp: tuple[int, ...] = RAMP
    """Growing percentages. The flip follows if the last one is 100, or if there are none; otherwise the last share
    stays until somebody flips or cancels, as an A/B test."""
    step_hours: float = STEP_HOURS
    """How long each step of the ramp lasts at least."""
    keep_days: float = KEEP_DAYS
    """How long the space that the collection left is kept up to date."""
    priority: Priority = Priority.LOW
    route: Route = Route.AUTO
    on_long: str = "truncate"

    def __post_init__(self) -> None:
        """Raise :class:`InvalidInput`, which names the argument."""
        if any(isinstance(share, bool) or not isinstance(share, int) for share in self.ramp) or (
            list(self.ramp) != sorted(set(self.ramp)) or any(not 1 <= share <= 100 for share in self.ramp)
        ):
            raise InvalidInput(
                f"ramp is {tuple(self.ramp)!r}; it must be growing whole numbers from 1 to 100, such as {RAMP}, or "
                "empty for a flip without a ramp."
            )
        _require_number("step_hours", self.step_hours, most=24 * MOST_DAYS)
        _require_number("keep_days", self.keep_days, most=MOST_DAYS)

    @property
    def flips_by_itself(self) -> bool:
        return not self.ramp or self.ramp[-1] == 100

    def as_json(self) -> dict[str, Any]:
        """The plan in types of JSON."""
        plan = dataclasses.asdict(self)
        plan["ramp"] = list(self.ramp)
        price = self.gates.price
        plan["gates"]["price"] = None if price is None else str(price)
        return plan

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """The plan of a row. Fields that a newer release has added are left out."""
        known = _fields_of(cls, stored)
        gates = _fields_of(Gates, known.get("gates") or {})
        if gates.get("price") is not None:
            gates["price"] = Decimal(gates["price"])
        known["gates"] = Gates(**gates)
        if "ramp" in known:
            known["ramp"] = tuple(known["ramp"])
        if "priority" in known:
            known["priority"] = Priority(known["priority"])
        if "route" in known:
            known["route"] = Route(known["route"])
        return cls(**known)


def _fields_of(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in stored.items() if name in names}


def _require_number(argument: str, given: object, *, most: float) -> None:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= most:
        raise InvalidInput(f"{argument} is {given!r}; it must be a number from 0 to {most:,.0f}.")


def as_gates(given: Gates | None) -> Gates:
    """The gates of a call, or the usual ones. Raises :class:`InvalidInput`."""
    if given is not None and not isinstance(given, Gates):
        raise InvalidInput(f"gates is of type {type(given).__name__}; it must be Gates(…).")
    return given or Gates()


def as_ramp(given: Iterable[int]) -> tuple[int, ...]:
    """The shares of a call. Raises :class:`InvalidInput`."""
    return tuple(as_number("a share of ramp", share) for share in as_items("ramp", given))


@dataclass(frozen=True, slots=True)
class Coverage(PrintedResult):
    """How much of a collection has a vector in a space, when it was last counted."""

    chunks: int
    contents: int
    """Distinct texts of these chunks."""
    missing: int
    """Contents without a vector."""
    pending: int
    """Those of the missing ones that wait in an open ChunkBatch."""
    dead: int
    """Those of the missing ones that stand on the dead list of the space."""
    at: datetime | None = None

    @property
    def share(self) -> float:
        """The share of the contents that have a vector, from 0.0 to 1.0."""
        return 1.0 - self.missing / self.contents if self.contents else 1.0


@dataclass(frozen=True, slots=True)
class ServedBy(PrintedResult):
    """What the searches of one space of a collection were like since a moment, without their texts."""

    space: str
    """The fingerprint of the space."""
    searches: int
    errors: int
    p50: float | None
    """Seconds that half of the searches took at most; None if there were none."""
    p95: float | None
    """Seconds that 95 % of the searches took at most."""
    liked: int = 0
    """How often somebody said by :meth:`Client.feedback` that a hit was the right one."""

    @property
    def error_share(self) -> float:
        """The share of the searches that failed, from 0 to 1; 0 if there were none."""
        return self.errors / self.searches if self.searches else 0.0


@dataclass(frozen=True, slots=True)
class Reembedding(PrintedResult):
    """The way of a collection from one space to another, and how far it is."""

    id: int
    collection: str
    state: ReembeddingState
    from_space: str
    """The fingerprint of the space that was active when it began."""
    from_model: str
    to_space: str
    """The fingerprint of the new space."""
    to_model: str
    share: int
    """The percentage of the search sessions that the new space answers now."""
    ramp: tuple[int, ...]
    """The shares that it goes through. If the last one is not 100, it stays there until somebody flips."""
    step_hours: float
    """How many hours each step of the ramp lasts at least."""
    keep_days: float
    """How many days the space that the collection left is kept up to date."""
    priority: Priority
    route: Route
    limits: Gates
    """What the new space must show before it answers searches."""
    gates: tuple[GateResult, ...]
    """What the gates said when they were last checked; empty before."""
    coverage: Coverage | None
    """What the collection had in the new space when it was last counted; None before."""
    served: tuple[ServedBy, ...]
    """What the searches of the old and the new space were like in this step of the ramp."""
    problem: str | None
    """Why it does not go on, as a sentence that says what to do; None if it does."""
    paused_at: datetime | None
    """When somebody paused it; None if it is not paused."""
    job_id: int | None
    """The job that embeds the stored texts into the new space."""
    created_at: datetime
    state_since: datetime
    flipped_at: datetime | None
    finished_at: datetime | None
    """When it ended; None while it is open."""
    dropped_at: datetime | None
    """When the space that the collection left is dropped, or was; None if none is kept."""
    share_since: datetime | None = None
    """When the new space began to answer its present share; None if the collection is not on its way into it."""

    @property
    def next_step_at(self) -> datetime | None:
        """When the next step of the ramp, or the flip after its last one, comes at the earliest. None if it is not
        ramping, is paused, or stays at its share."""
        is_last = self.ramp[-1:] == (self.share,) != (100,)
        if self.state is not ReembeddingState.RAMPING or self.paused_at or is_last or self.share_since is None:
            return None
        return self.share_since + timedelta(hours=self.step_hours)

    @property
    def is_open(self) -> bool:
        """Whether it has not ended. A collection has at most one open re-embedding."""
        return self.finished_at is None

    @property
    def progress(self) -> float:
        """The share of the contents that have a vector in the new space, from 0.0 to 1.0, when it was last counted."""
        return self.coverage.share if self.coverage else 0.0


@dataclass(frozen=True, slots=True)
class Quote(PrintedResult):
    """What a re-embedding would take, before it does anything.

    The ``chunks`` have ``contents`` distinct texts: ``cached`` of them have a vector in the new space already,
    ``in_flight`` are at a provider for it, and ``to_embed`` are left. These four are exact. The tokens of the lanes are
    estimated from ``sampled`` texts, which are all of them if that equals ``to_embed``.
    """

    collection: str
    from_space: str
    from_model: str
    to_space: str
    """The fingerprint of the new space. It is not registered by a quote."""
    to_model: str
    dimensions: int
    chunks: int
    contents: int
    cached: int
    in_flight: int
    to_embed: int
    sampled: int
    """How many texts the tokens are counted of. They are drawn by their hash, so that each is as likely as another."""
    route: Route
    because: str
    """Why it is this route."""
    lanes: tuple[LaneEstimate, ...]
    """Every route that serves the space, with tokens, US dollars, and seconds of engine time."""
    vector_bytes: int
    """About how many bytes the new vectors take in Postgres."""
    index_bytes: int
    """About how many bytes the serving index of the new space takes, with its graph."""
    kept_bytes: int
    """About how many bytes the old space goes on taking for ``keep_days`` after the flip, with its index."""
    keep_days: float
    budget: Budget

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

    @property
    def hours(self) -> float | None:
        """About how many hours one local worker takes, or None if its speed is not known or the route is paid."""
        return None if self.chosen.seconds is None else self.chosen.seconds / 3600


@dataclass(frozen=True, slots=True)
class RampStep:
    """What to do in a state of the ramp: the next ``share``, or a flip, or nothing."""

    share: int
    flips: bool = False
    problem: str | None = None


def next_share(ramp: Sequence[int], share: int) -> int | None:
    """The step of the ramp that follows ``share``; None after the last one."""
    return next((step for step in ramp if step > share), None)


def previous_share(ramp: Sequence[int], share: int) -> int:
    """The step of the ramp that comes before ``share``, or 0."""
    return max((step for step in ramp if step < share), default=0)


def step_of_ramp(
    plan: Plan, share: int, *, lasted: timedelta, old: ServedBy | None, new: ServedBy | None, is_held: bool = False
) -> RampStep:
    """What the ramp does after a step of ``share`` percent, by how long it has lasted and how it was served.

    It steps back as soon as the errors or the slowest twentieth of the searches cross their gate, and says so in a
    problem; such a ramp ``is_held`` until somebody resumes it. It goes on once the step has lasted long enough.
    """
    if new is not None and (problem := _why_back(plan, old, new)):
        back = previous_share(plan.ramp, share)
        return RampStep(back, problem=f"{problem} The share is {back} % again. Resume it once this is repaired.")
    if is_held or lasted < timedelta(hours=plan.step_hours):
        return RampStep(share)
    following = next_share(plan.ramp, share)
    if following is not None:
        return RampStep(following)
    return RampStep(share, flips=plan.flips_by_itself)


def _why_back(plan: Plan, old: ServedBy | None, new: ServedBy) -> str | None:
    if new.searches < FEWEST_SEARCHES:
        return None
    usual = old.error_share if old is not None and old.searches >= FEWEST_SEARCHES else 0.0
    if new.error_share > usual + ERROR_SHARE:
        return (
            f"{new.errors:,} of {new.searches:,} searches failed in the new space ({new.error_share:.1%}; in the old "
            f"one {usual:.1%})."
        )
    most = plan.gates.p95_ratio
    if most is None or old is None or old.searches < FEWEST_SEARCHES or not old.p95 or new.p95 is None:
        return None
    ratio = new.p95 / old.p95
    if ratio > most:
        return (
            f"95 % of the searches take at most {new.p95 * 1e3:,.0f} ms in the new space and {old.p95 * 1e3:,.0f} ms "
            f"in the old one, which is {ratio:.2f} times as long; {most:g} times are allowed."
        )
    return None


@dataclass(frozen=True, slots=True)
class Report:
    """What was seen so far. It is stored as JSON."""

    coverage: Coverage | None = None
    judgement: Mapping[str, Any] = field(default_factory=dict)
    """What the gates said, with what was measured; empty before they were checked."""
    judged_at: datetime | None = None

    @property
    def gates(self) -> tuple[GateResult, ...]:
        return tuple(GateResult(**_fields_of(GateResult, result)) for result in self.judgement.get("gates", ()))

    def as_json(self) -> dict[str, Any]:
        """The report in types of JSON."""
        coverage = None
        if self.coverage is not None:
            at = self.coverage.at
            coverage = dataclasses.asdict(self.coverage) | {"at": None if at is None else at.isoformat()}
        judged_at = None if self.judged_at is None else self.judged_at.isoformat()
        return {"coverage": coverage, "judgement": dict(self.judgement), "judged_at": judged_at}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Report:
        """The report of a row. Fields that a newer release has added are left out."""
        coverage = None
        if stored.get("coverage"):
            known = _fields_of(Coverage, stored["coverage"])
            known["at"] = _time(known.get("at"))
            coverage = Coverage(**known)
        return cls(coverage, stored.get("judgement") or {}, _time(stored.get("judged_at")))


def _time(stored: str | None) -> datetime | None:
    return None if stored is None else datetime.fromisoformat(stored)
