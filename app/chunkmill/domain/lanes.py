"""The paid lanes. All workers of a paid route share the state of its lane."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from chunkmill.domain.printed import PrintedResult
from chunkmill.domain.states import Route

PAID_ROUTES = (Route.OPENAI, Route.OPENAI_SYNC)


_RESUME = re.compile(r"chunkmill lanes resume(?! openai)")


def with_lane(reason: str, route: Route) -> str:
    """The reason of a stop, with the lane behind ``chunkmill lanes resume``. Who refuses does not know the lane."""
    return _RESUME.sub(f"chunkmill lanes resume {route}", reason)


def _moment(at: datetime) -> str:
    return f"{at.astimezone():%m-%d %H:%M:%S}"


@dataclass(frozen=True, slots=True)
class Lane(PrintedResult):
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
    is_served: bool = True
    """Whether a worker of the paid routes is connected."""

    @property
    def is_stopped(self) -> bool:
        """Whether the lane sends nothing until somebody resumes it."""
        return self.stopped_at is not None

    @property
    def state(self) -> str:
        """``stopped``, ``paused``, ``held``, ``idle`` if no worker serves it, or ``running``."""
        if self.stopped_at:
            return "stopped"
        if self.paused_until:
            return "paused"
        if self.held_reason:
            return "held"
        return "running" if self.is_served else "idle"

    @property
    def why(self) -> str | None:
        """Why it does not run: since when or until when, and what to do. None if it runs, or only lacks a worker."""
        if self.stopped_at:
            reason = with_lane(self.stop_reason or "", self.route)
            resume = f"chunkmill lanes resume {self.route}"
            advice = "" if resume in reason else f"; when that is fixed: {resume}"
            return f"since {_moment(self.stopped_at)}, {self.stop_code}: {reason}{advice}"
        if self.paused_until:
            return f"until {_moment(self.paused_until)}: {self.pause_reason}"
        return self.held_reason

    @property
    def is_healthy(self) -> bool:
        """Whether it takes work now."""
        return self.stopped_at is None and self.paused_until is None
