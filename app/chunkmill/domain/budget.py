"""The month's budget of the paid routes: what is left, what to warn of, and what to say when it is used up. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from chunkmill.domain.printed import PrintedResult


@dataclass(frozen=True, slots=True)
class Budget(PrintedResult):
    """The money of one calendar month (UTC), in US dollars.

    ``spent`` is what providers charged or may have charged, with corrections. ``lost``, ``maybe_charged`` and
    ``corrected`` are the parts of it that no answer confirmed. ``committed`` is the estimate for what is at a provider
    and not charged yet. ``limit`` is None if there is no limit.
    """

    month: date
    """The first day of the month."""
    spent: Decimal
    committed: Decimal
    limit: Decimal | None = None
    lost: Decimal = Decimal(0)
    maybe_charged: Decimal = Decimal(0)
    corrected: Decimal = Decimal(0)

    @property
    def headroom(self) -> Decimal | None:
        """How much new work may cost; None if there is no limit."""
        if self.limit is None:
            return None
        return max(Decimal(0), self.limit - self.spent - self.committed)

    @property
    def is_used_up(self) -> bool:
        """Whether nothing is left for new work. False if there is no limit."""
        return self.headroom == 0

    def exceeds(self, usd: Decimal = Decimal(0)) -> bool:
        """Whether the limit is exceeded once ``usd`` more is committed."""
        return self.limit is not None and self.spent + self.committed + usd > self.limit

    @property
    def percent(self) -> int | None:
        """The share that is spent or committed, rounded down. It is 100 if the limit is 0."""
        if self.limit is None:
            return None
        return int(100 * (self.spent + self.committed) / self.limit) if self.limit else 100

    @property
    def ends(self) -> date:
        """The first day of the next month, whose budget begins at 00:00 UTC."""
        return date(self.month.year + self.month.month // 12, self.month.month % 12 + 1, 1)

    def sentence(self) -> str:
        """One sentence with what is spent, what of it no answer confirmed, what is committed, and the limit."""
        limit = "" if self.limit is None else f" of {self.limit:f} USD (OPENAI_MONTHLY_BUDGET_USD)"
        return (
            f"{self.month:%Y-%m} (UTC): {dollars(self.spent)} USD spent{self._parts()} and about "
            f"{dollars(self.committed)} USD committed to work at the provider{limit}"
        )

    def _parts(self) -> str:
        parts = (("lost", self.lost), ("maybe charged", self.maybe_charged), ("of corrections", self.corrected))
        shown = [f"{dollars(usd)} {what}" for what, usd in parts if usd]
        return f" (with {', '.join(shown)})" if shown else ""

    def refusal(self) -> str:
        """Why new paid work is refused, and what to do."""
        return (
            f"the budget for paid routes is used up: {self.sentence()}. Raise the limit, wait until {self.ends} "
            "00:00 UTC, or use route='local' if local workers serve the model."
        )


def due_percents(budget: Budget, warn_percent: int) -> tuple[int, ...]:
    """The thresholds that are reached, the highest last. They are ``warn_percent`` and the limit itself."""
    percent = budget.percent
    return () if percent is None else tuple(sorted(due for due in {warn_percent, 100} if due <= percent))


def dollars(usd: Decimal) -> str:
    """An amount with cents; a small amount has more places, so that it does not look like 0."""
    if not usd:
        return "0.00"
    places = max(2, min(8, 1 - usd.adjusted()))
    return f"{usd:,.{places}f}"
