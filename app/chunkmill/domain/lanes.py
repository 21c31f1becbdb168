"""The paid lanes. All workers of a paid route share the state of its lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from chunkmill.domain.printed import Printed
from chunkmill.domain.states import Route

PAID_ROUTES = (Route.OPENAI, Route.OPENAI_SYNC)


@dataclass(frozen=True, slots=True)
class Lane(Printed):
    """A paid route with its present state.

    A pause ends by itself, at ``paused_until``; a stop lasts until somebody resumes the lane. ``held_reason`` says why
    work waits although the lane is not stopped, for example because the budget is used up. ``open`` counts its open
    ProviderBatches by state. ``max_inputs`` and ``max_tokens`` are limits that the provider's refusals have taught: of
    the inputs of a ProviderBatch, and of the tokens that are at the provider at a time.
    """

    route: Route
    paused_until: datetime | None = None
    pause_reason: str | None = None
    stopped_at: datetime | None = None
    stop_code: str | None = None
    stop_reason: str | None = None
    held_reason: str | None = None
    max_inputs: int | None = None
    open: Mapping[str, int] | None = None
    lost_usd: Decimal = Decimal(0)
    """US dollars of this month (UTC) that were charged for results that could not be used."""
    maybe_charged_usd: Decimal = Decimal(0)
    """US dollars of this month that may have been charged."""
    max_tokens: int | None = None

    @property
    def is_stopped(self) -> bool:
        return self.stopped_at is not None

    @property
    def state(self) -> str:
        """``stopped``, ``paused``, ``held`` or ``running``."""
        if self.stopped_at:
            return "stopped"
        if self.paused_until:
            return "paused"
        return "held" if self.held_reason else "running"

    @property
    def is_healthy(self) -> bool:
        """Whether it takes work now."""
        return self.stopped_at is None and self.paused_until is None
