"""`cost`, `cost adjustments`, `cost correct`, and the estimate that `enqueue --dry-run` prints."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import click
from click.core import ParameterSource

from chunkmill.cli.arguments import picture_file
from chunkmill.cli.late import Client
from chunkmill.cli.output import Group, Screen, count, duration, json_option
from chunkmill.cli.paid import plot as plots
from chunkmill.cli.watch.plot import COLUMNS, PIPE_COLUMNS
from chunkmill.domain.budget import Budget, dollars
from chunkmill.domain.costs import (
    USD_PLACES,
    Adjustment,
    AdjustmentKind,
    Cost,
    Costs,
    CostsBy,
    Estimate,
    LaneEstimate,
)
from chunkmill.domain.lanes import PAID_ROUTES
from chunkmill.errors import InvalidInput

DAY = click.DateTime(["%Y-%m-%d"])


@click.group(cls=Group, invoke_without_command=True)
@click.option(
    "--by",
    type=click.Choice([by.value for by in CostsBy]),
    default="month",
    show_default=True,
    help="What each row stands for.",
)
@click.option("--since", type=DAY, metavar="YYYY-MM-DD", help="First day (UTC) that is counted.")
@click.option("--plot", is_flag=True, help="Draw tokens and dollars as bars, by day if --by does not say otherwise.")
@click.option(
    "--picture", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), callback=picture_file,
    help="Also write the drawing of --plot into a .png or .svg file.",
)  # fmt: skip
@json_option
@click.pass_context
def cost(context: click.Context, by: str, since: datetime | None, plot: bool, picture: Path | None) -> None:
    """Show what was embedded and what it cost.

    Paid routes cost what the provider charged or may have charged. `lost` was charged for results that could not be
    used, `maybe charged` may be on the invoice or not, and `corrected` is what `cost correct` booked; all three are
    parts of USD. Local work costs engine time, which has a price if GPU_HOUR_USD says what an hour of a worker's
    machine costs. Job 0 stands for texts that were embedded at once, such as the query of a search.
    """
    if context.invoked_subcommand is not None:
        return
    screen: Screen = context.obj
    plot = plot or picture is not None
    if plot and context.get_parameter_source("by") is ParameterSource.DEFAULT:
        by = CostsBy.DAY
    with Client.from_env() as client:
        costs = client.usage(by, since=since.date() if since else None)
    if picture is not None and costs.rows:
        from chunkmill.domain.figures import written

        picture.write_bytes(written(plots.figure(costs), picture.suffix.lower().removeprefix(".")))
    if screen.json:
        screen.document(cost_fields(costs) | ({} if picture is None else {"picture": str(picture)}))
        return
    if costs.rows and plot:
        for line in plots.draw(costs, min(COLUMNS, screen.out.width) if screen.out.is_terminal else PIPE_COLUMNS):
            screen.out.print(line, soft_wrap=True)
        if picture is not None:
            screen.say(f"The picture is in {picture}.")
    elif costs.rows:
        heads = [by, "route", "texts", "tokens", "engine time", "USD", "USD per million"]
        parts = [part for part in _PARTS if any(getattr(row, part) for row in costs.rows)]
        screen.table([*heads, *(_PARTS[part] for part in parts)], [_row(row, parts) for row in costs.rows])
    else:
        screen.say("Nothing has been embedded since then." if since else "Nothing has been embedded yet.")
    show_budget(screen, costs.budget)
    if any(row.engine_seconds is not None and row.usd is None for row in costs.rows):
        screen.hint("Set GPU_HOUR_USD to see what local work costs.")
    if any(row.lost_usd or row.maybe_charged_usd for row in costs.rows):
        screen.hint("`chunkmill cost adjustments` says why money was lost or may have been charged.")


_PARTS = {"lost_usd": "lost", "maybe_charged_usd": "maybe charged", "corrected_usd": "corrected"}
"""The columns of what no answer confirmed. One that is 0 everywhere is not shown."""


@cost.command()
@click.option("--kind", type=click.Choice([kind.value for kind in AdjustmentKind]), help="Only those of this kind.")
@click.option("--since", type=DAY, metavar="YYYY-MM-DD", help="First day (UTC) that is listed.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many to list, newest first.")
@json_option
@click.pass_obj
def adjustments(screen: Screen, kind: str | None, since: datetime | None, limit: int) -> None:
    """List what no answer confirmed, and why: money that was lost or may have been charged, and corrections."""
    with Client.from_env() as client:
        listed = client.adjustments(kind, since=since.date() if since else None, limit=limit)
    if screen.json:
        screen.document([asdict(adjustment) for adjustment in listed])
    elif not listed:
        screen.say("There are no adjustments: all that is booked was confirmed by the provider's answers.")
    else:
        screen.table(
            ["id", "day", "kind", "route", "model", "job", "texts", "tokens", "USD", "who", "reason"],
            map(_adjustment_row, listed),
        )


@cost.command()
@click.option("--usd", required=True, metavar="AMOUNT", help="US dollars to add; negative to take back, such as -1.25.")
@click.option(
    "--route", required=True, type=click.Choice([route.value for route in PAID_ROUTES]), help="Route of the charge."
)
@click.option("--month", type=click.DateTime(["%Y-%m"]), metavar="YYYY-MM", help="Month (UTC) that is corrected.")
@click.option("--day", type=DAY, metavar="YYYY-MM-DD", help="Day (UTC) that is corrected, in place of --month.")
@click.option("--reason", required=True, help="Why; it is kept.")
@click.option("--who", help="Who makes the correction; it is kept.  [default: your name on this machine]")
@click.option("--model", help="Model of the charge.")
@click.option("--job", type=click.IntRange(1), help="Job of the charge.")
@click.option("--key", help="Name of the correction. A second one of the same name is not booked.")
@click.option("--yes", is_flag=True, help="Book without asking.")
@json_option
@click.pass_obj
def correct(
    screen: Screen,
    usd: str,
    route: str,
    month: datetime | None,
    day: datetime | None,
    reason: str,
    who: str | None,
    model: str | None,
    job: int | None,
    key: str | None,
    yes: bool,
) -> None:
    """Correct what is booked, when the provider's invoice says something else.

    It asks before it writes. The same command can be run again, for example after an error: it corrects once. Give a
    second correction that is equal to the first another --reason, or a --key.
    """
    moment = month or day
    if moment is None or (month and day):
        raise click.UsageError("Say when: either --month or --day.")
    what = (
        f"{usd} USD on route {route} in {moment:%Y-%m}" if month else f"{usd} USD on route {route} on {moment:%Y-%m-%d}"
    )
    if not yes:
        if screen.asked_json or not sys.stdin.isatty():
            raise InvalidInput("this command asks before it writes, and stdin is not a terminal: pass --yes.")
        click.confirm(f"Book {what}, because: {reason}?", abort=True, err=True)
    with Client.from_env() as client:
        correction = client.correct_charge(
            usd,
            route=route,
            day=moment.date(),
            reason=reason,
            author=who or getpass.getuser(),
            model=model,
            job_id=job or 0,
            key=key,
        )
    booked = correction.adjustment
    if screen.json:
        screen.document(asdict(booked) | {"is_new": correction.is_new})
    elif correction.is_new:
        screen.say(f"Booked {what} as adjustment {booked.id}.")
    else:
        screen.say(f"Nothing was booked: adjustment {booked.id} of {booked.created_at:%Y-%m-%d} is this correction.")


def _adjustment_row(row: Adjustment) -> tuple[object, ...]:
    return (
        row.id, f"{row.day}", row.kind.value, row.route.value, row.model, row.job_id, row.contents, row.tokens,
        dollars(row.usd), row.author, row.reason,
    )  # fmt: skip


def show_budget(screen: Screen, budget: Budget) -> None:
    if budget.limit is not None or budget.spent or budget.committed:
        share = "" if budget.percent is None else f": {budget.percent} %"
        screen.say("")
        screen.say(budget.sentence(), share)


def cost_fields(costs: Costs) -> dict[str, object]:
    rows = [asdict(row) | {"usd_per_million": _rounded(row.usd_per_million)} for row in costs.rows]
    return {"by": costs.by, "since": costs.since, "rows": rows, "budget": budget_fields(costs.budget)}


def budget_fields(budget: Budget) -> dict[str, object]:
    return asdict(budget) | {"month": f"{budget.month:%Y-%m}", "percent": budget.percent, "headroom": budget.headroom}


def show_estimate(screen: Screen, estimate: Estimate) -> None:
    if screen.json:
        beside = [_estimate_fields(other) for other in estimate.beside]
        screen.document(_estimate_fields(estimate) | {"budget": budget_fields(estimate.budget), "beside": beside})
        return
    _show_space(screen, estimate)
    for other in estimate.beside:
        screen.say("")
        screen.say("The collection moves to another model, so the same texts go into this space as well:")
        _show_space(screen, other)
    show_budget(screen, estimate.budget)
    if estimate.route.is_paid and estimate.budget.is_used_up:
        screen.hint(f"An enqueue would be refused: {estimate.budget.refusal()}")
    screen.hint("Nothing was enqueued, because this was a dry run.")


def _estimate_fields(estimate: Estimate) -> dict[str, object]:
    """What is known of one space, without the budget, which is that of all."""
    fields = asdict(estimate) | {"tokens": estimate.tokens, "usd": estimate.usd}
    return {name: value for name, value in fields.items() if name not in ("budget", "beside")}


def _show_space(screen: Screen, estimate: Estimate) -> None:
    in_flight = f", {estimate.in_flight:,} at a provider for another job" if estimate.in_flight else ""
    screen.fields(
        {
            "model": estimate.model,
            "space": estimate.space[:12],
            "chunks": f"{estimate.chunks:,}, with {count(estimate.contents, 'distinct text')}",
            **({} if estimate.deleted is None else {"to delete": count(estimate.deleted, "chunk")}),
            "texts": f"{estimate.to_embed:,} to embed, {estimate.cached:,} from the cache{in_flight}",
            "route": f"{estimate.route}: {estimate.because}",
        }
    )
    screen.say("")
    screen.table(["lane", "tokens", "refused", "engine time", "USD", "note"], map(lane_row, estimate.lanes))


def _row(row: Cost, parts: Sequence[str]) -> tuple[object, ...]:
    time = None if row.engine_seconds is None else duration(row.engine_seconds)
    amounts = (_usd(row.usd), _usd(row.usd_per_million), *(_usd(getattr(row, part)) for part in parts))
    return row.key, row.route.value, row.contents, row.tokens, time, *amounts


def _rounded(usd: Decimal | None) -> Decimal | None:
    return None if usd is None else usd.quantize(USD_PLACES)


def lane_row(lane: LaneEstimate) -> tuple[object, ...]:
    """The cells of an estimate's lane."""
    time = None if lane.seconds is None else duration(lane.seconds)
    return lane.route.value, lane.tokens, lane.refused, time, _usd(lane.usd), lane.unknown


def _usd(usd: Decimal | None) -> str | None:
    return None if usd is None else dollars(usd)
