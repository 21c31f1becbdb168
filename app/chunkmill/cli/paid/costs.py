"""`cost`, and the estimate that `enqueue --dry-run` prints."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from decimal import Decimal

import click

from chunkmill.cli.output import Screen, count, duration, json_option
from chunkmill.client import Client
from chunkmill.domain.budget import Budget, dollars
from chunkmill.domain.costs import Cost, Costs, CostsBy, Estimate, LaneEstimate


@click.command()
@click.option(
    "--by",
    type=click.Choice([by.value for by in CostsBy]),
    default="month",
    show_default=True,
    help="What each row stands for.",
)
@click.option(
    "--since", type=click.DateTime(["%Y-%m-%d"]), metavar="YYYY-MM-DD", help="First day (UTC) that is counted."
)
@json_option
@click.pass_obj
def cost(screen: Screen, by: str, since: datetime | None) -> None:
    """Show what was embedded and what it cost.

    Paid routes cost what the provider charged. Local work costs engine time, which has a price if GPU_HOUR_USD says
    what an hour of a worker's machine costs. Job 0 stands for texts that were embedded at once, such as the query of
    a search.
    """
    with Client.from_env() as client:
        costs = client.usage(by, since=since.date() if since else None)
    if screen.json:
        screen.document(cost_fields(costs))
        return
    if costs.rows:
        screen.table([by, "route", "texts", "tokens", "engine time", "USD", "USD per million"], map(_row, costs.rows))
    else:
        screen.say("Nothing has been embedded since then." if since else "Nothing has been embedded yet.")
    show_budget(screen, costs.budget)
    if any(row.engine_seconds is not None and row.usd is None for row in costs.rows):
        screen.hint("Set GPU_HOUR_USD to see what local work costs.")


def show_budget(screen: Screen, budget: Budget) -> None:
    if budget.limit is not None or budget.spent or budget.committed:
        share = "" if budget.percent is None else f": {budget.percent} %"
        screen.say("")
        screen.say(budget.sentence(), share)


def cost_fields(costs: Costs) -> dict[str, object]:
    rows = [asdict(row) | {"usd_per_million": row.usd_per_million} for row in costs.rows]
    return {"by": costs.by, "since": costs.since, "rows": rows, "budget": budget_fields(costs.budget)}


def budget_fields(budget: Budget) -> dict[str, object]:
    return asdict(budget) | {"month": f"{budget.month:%Y-%m}", "percent": budget.percent, "headroom": budget.headroom}


def show_estimate(screen: Screen, estimate: Estimate) -> None:
    if screen.json:
        chosen = {"tokens": estimate.tokens, "usd": estimate.usd}
        screen.document(asdict(estimate) | chosen | {"budget": budget_fields(estimate.budget)})
        return
    in_flight = f", {estimate.in_flight:,} at a provider for another job" if estimate.in_flight else ""
    screen.fields(
        {
            "model": estimate.model,
            "space": estimate.space[:12],
            "chunks": f"{estimate.chunks:,} of {count(estimate.contents, 'distinct text')}",
            "texts": f"{estimate.to_embed:,} to embed, {estimate.cached:,} from the cache{in_flight}",
            "route": f"{estimate.route}: {estimate.because}",
        }
    )
    screen.say("")
    screen.table(["lane", "tokens", "refused", "engine time", "USD", "note"], map(_lane_row, estimate.lanes))
    show_budget(screen, estimate.budget)
    if estimate.route.is_paid and estimate.budget.is_used_up:
        screen.hint(f"An enqueue would be refused: {estimate.budget.refusal()}")
    screen.hint("Nothing was enqueued, because this was a dry run.")


def _row(row: Cost) -> tuple[object, ...]:
    time = None if row.engine_seconds is None else duration(row.engine_seconds)
    return row.key, row.route.value, row.contents, row.tokens, time, _usd(row.usd), _usd(row.usd_per_million)


def _lane_row(lane: LaneEstimate) -> tuple[object, ...]:
    time = None if lane.seconds is None else duration(lane.seconds)
    return lane.route.value, lane.tokens, lane.refused, time, _usd(lane.usd), lane.unknown


def _usd(usd: Decimal | None) -> str | None:
    return None if usd is None else dollars(usd)
