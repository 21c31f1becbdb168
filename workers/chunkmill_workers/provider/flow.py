"""What may interrupt any step or request of the paid routes: a delay, a released lease, a lane that pauses or stops."""

from __future__ import annotations

import logging
from typing import Any

from chunkmill.domain.lanes import with_lane
from chunkmill.domain.states import Route
from chunkmill.errors import ProviderBusy, ProviderSilent, ProviderStopped
from chunkmill.ledger.provider import provider_lanes
from chunkmill.openai.plan.endings import backoff
from chunkmill.openai.plan.refusals import RESUME
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.health import HOPELESS

logger = logging.getLogger(__name__)

LEAST_PAUSE_S = 1.0
"""A lane pauses for at least this long. Otherwise ``Retry-After: 0`` would send requests without any pause."""


class StepDelayed(Exception):
    """The step cannot go on now and is due again after ``delay_s``.

    ``failed`` says what went wrong, and is None if nothing did. ``columns`` are noted in the ProviderBatch's row.
    """

    def __init__(self, delay_s: float, failed: str | None = None, **columns: Any) -> None:
        self.delay_s = delay_s
        self.failed = failed
        self.columns = columns
        super().__init__(failed or f"due again in {delay_s:g} s")


class StepReleased(Exception):
    """The step's lease was given back in the same transaction that changed its ProviderBatch."""


def pause_lane(context: ProviderContext, route: Route, busy: ProviderBusy, *, tries: int) -> float:
    """Pause a lane for all workers after a limit was met ``tries`` times in a row. Returns the seconds of the pause."""
    delay_s = max(LEAST_PAUSE_S, backoff(tries, busy.retry_after_s))
    context.transact(
        lambda conn: provider_lanes.pause(conn, route, seconds=delay_s, reason=str(busy)), "pause the lane"
    )
    return delay_s


def pause_failing_lane(context: ProviderContext, route: Route, silent: ProviderSilent) -> float | None:
    """Pause a lane for all workers if its requests get no answers. Returns the seconds of the pause; None if the lane
    is not failing.

    The pauses grow until some work is answered. If only probes get answers, the lane is stopped in the end.
    """
    pauses = context.health.pause(route)
    if pauses is None:
        return None
    if context.health.is_hopeless(route):
        advice = f"Look at the server, and at OPENAI_REQUEST_INPUTS and OPENAI_TIMEOUT_SECONDS. {RESUME}"
        message = f"{HOPELESS} requests in a row got no answer, although one word did. The last: {silent.brief}"
        context.health.answered(route)  # the fault may be fixed when somebody resumes the lane
        stop_lane(context, route, ProviderStopped(message, advice=advice, provider_code=silent.code))
        return None
    delay_s = max(LEAST_PAUSE_S, backoff(pauses))
    reason = f"requests got no answer, so one word is sent before anything else. The last: {silent}"
    context.health.forget()
    context.transact(
        lambda conn: provider_lanes.pause_failing(conn, route, seconds=delay_s, reason=reason), "pause a failing lane"
    )
    logger.warning("lane %s pauses %.0f s because its requests get no answers: %s", route, delay_s, silent.brief)
    return delay_s


def stop_lane(context: ProviderContext, route: Route, stopped: ProviderStopped) -> None:
    """Stop a lane for all workers until somebody resumes it. The first worker that does so logs the reason."""
    reason = with_lane(str(stopped), route)
    first = context.transact(
        lambda conn: provider_lanes.stop(conn, route, code=stopped.provider_code, reason=reason), "stop the lane"
    )
    context.health.forget()
    if first:
        logger.error("lane %s is stopped: %s", route, with_lane(stopped.brief, route))
