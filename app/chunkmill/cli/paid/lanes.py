"""`lanes`, and what `status` and `job --explain` print about lanes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from decimal import Decimal

import click
from rich.text import Text

from chunkmill.cli.output import Screen, json_option
from chunkmill.client import Client
from chunkmill.domain.budget import dollars
from chunkmill.domain.lanes import PAID_ROUTES, Lane
from chunkmill.domain.results import Explanation
from chunkmill.domain.states import Route


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def lanes(context: click.Context) -> None:
    """Show the state of the paid lanes (running, paused, stopped or held) and their open ProviderBatches.

    `lost` and `maybe charged` are of this month (UTC); `chunkmill cost adjustments` says why.
    """
    if context.invoked_subcommand is None:
        with Client.from_env() as client:
            show_lanes(context.obj, client.lanes())


@lanes.command()
@click.argument("lane", type=click.Choice([route.value for route in PAID_ROUTES]))
@json_option
@click.pass_obj
def resume(screen: Screen, lane: str) -> None:
    """Let a stopped or paused LANE take work again.

    Fix the problem that stopped it first; `chunkmill lanes` shows it.
    """
    with Client.from_env() as client:
        resumed = client.resume_lane(lane)
    if screen.json:
        screen.document({"lane": lane, "resumed": resumed})
    else:
        screen.say(f"{lane} takes work again." if resumed else f"{lane} was neither stopped nor paused.")


def lane_fields(lane: Lane) -> dict[str, object]:
    return asdict(lane) | {"state": lane.state, "why": why(lane)}


def why(lane: Lane) -> str | None:
    """Why a lane does not run; None if it runs."""
    if lane.stopped_at:
        return (
            f"since {lane.stopped_at.astimezone():%m-%d %H:%M:%S}, {lane.stop_code}: {lane.stop_reason}; when that is "
            f"fixed: chunkmill lanes resume {lane.route}"
        )
    if lane.paused_until:
        return f"until {lane.paused_until.astimezone():%m-%d %H:%M:%S}: {lane.pause_reason}"
    return lane.held_reason


def lane_lines(lanes: Iterable[Lane]) -> dict[str, str]:
    """The lanes that do not run, by route, for `status`."""
    return {lane.route.value: f"{lane.state} {reason}" for lane in lanes if (reason := why(lane)) is not None}


def show_lanes(screen: Screen, listed: list[Lane]) -> None:
    if screen.json:
        screen.document([lane_fields(lane) for lane in listed])
        return
    screen.table(
        ["lane", "state", "open ProviderBatches", "lost", "maybe charged", "why"],
        [
            (lane.route.value, _styled(lane.state),
             ", ".join(f"{n:,} {state}" for state, n in sorted((lane.open or {}).items())) or None,
             _usd(lane.lost_usd), _usd(lane.maybe_charged_usd), why(lane))
            for lane in listed
        ],
    )  # fmt: skip


def show_explanation(screen: Screen, explanation: Explanation) -> None:
    asked = explanation.route.value if explanation.route is Route.AUTO else f"{explanation.route}, asked for by name"
    deadline = f"{explanation.deadline.astimezone():%Y-%m-%d %H:%M:%S}" if explanation.deadline else "none"
    screen.say("")
    screen.fields({"route": asked, "deadline": deadline})
    if explanation.routing:
        screen.say("")
        screen.table(
            ["when", "lane", "because"],
            [
                (f"{step.at.astimezone():%m-%d %H:%M:%S}", step.route.value, step.because)
                for step in explanation.routing
            ],
        )
    if explanation.waits:
        screen.say("")
        for line in explanation.waits:
            screen.say(line)
    if explanation.provider_batches:
        screen.say("")
        screen.table(
            ["ProviderBatch", "state", "provider says", "requests", "done", "texts", "next look", "error"],
            [
                (b.id, b.state.value, b.provider_status, b.requests, b.done, b.contents,
                 b.next_look and f"{b.next_look.astimezone():%m-%d %H:%M:%S}", b.error)
                for b in explanation.provider_batches
            ],
        )  # fmt: skip


def _usd(usd: Decimal) -> str | None:
    return f"{dollars(usd)} USD" if usd else None


def _styled(state: str) -> Text:
    return Text(state, style={"stopped": "red", "running": "green"}.get(state, "yellow"))
