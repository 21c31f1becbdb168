"""`lanes`, and what `status` and `job --explain` say of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

import click
from rich.text import Text

from chunkmill.cli.output import Screen, json_option
from chunkmill.client import Client
from chunkmill.domain.lanes import PAID_ROUTES, Lane
from chunkmill.domain.results import Explanation
from chunkmill.domain.states import Route


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def lanes(context: click.Context) -> None:
    """The paid lanes: running, paused, stopped or held, and their open ProviderBatches."""
    if context.invoked_subcommand is None:
        with Client.from_env() as client:
            show_lanes(context.obj, client.lanes())


@lanes.command()
@click.argument("lane", type=click.Choice([route.value for route in PAID_ROUTES]))
@json_option
@click.pass_obj
def resume(screen: Screen, lane: str) -> None:
    """Let a lane that was stopped or paused take work again, once what stopped it is mended."""
    with Client.from_env() as client:
        resumed = client.resume_lane(lane)
    if screen.json:
        screen.document({"lane": lane, "resumed": resumed})
    else:
        screen.say(f"{lane} takes work again." if resumed else f"{lane} was neither stopped nor paused.")


def lane_fields(lane: Lane) -> dict[str, object]:
    return asdict(lane) | {"state": lane.state, "why": why(lane)}


def why(lane: Lane) -> str | None:
    """Why it does not run; None: it does."""
    if lane.stopped_at:
        return (
            f"since {lane.stopped_at.astimezone():%m-%d %H:%M:%S}, {lane.stop_code}: {lane.stop_reason}; when that is "
            f"mended: chunkmill lanes resume {lane.route}"
        )
    if lane.paused_until:
        return f"until {lane.paused_until.astimezone():%m-%d %H:%M:%S}: {lane.pause_reason}"
    return lane.held_reason


def lane_lines(found: Iterable[Lane]) -> dict[str, str]:
    """For `status`: those that do not run, by route."""
    return {each.route.value: f"{each.state} {reason}" for each in found if (reason := why(each)) is not None}


def show_lanes(screen: Screen, found: list[Lane]) -> None:
    if screen.json:
        screen.document([lane_fields(lane) for lane in found])
        return
    screen.table(
        ["lane", "state", "open ProviderBatches", "why"],
        [
            (lane.route.value, _styled(lane.state),
             ", ".join(f"{n:,} {state}" for state, n in sorted((lane.open or {}).items())) or None, why(lane))
            for lane in found
        ],
    )  # fmt: skip


def show_explanation(screen: Screen, told: Explanation) -> None:
    asked = told.route.value if told.route is Route.AUTO else f"{told.route}, asked for by name"
    deadline = f"{told.deadline.astimezone():%Y-%m-%d %H:%M:%S}" if told.deadline else "none"
    screen.say("")
    screen.fields({"route": asked, "deadline": deadline})
    if told.routing:
        screen.say("")
        screen.table(
            ["when", "lane", "because"],
            [(f"{step.at.astimezone():%m-%d %H:%M:%S}", step.route.value, step.because) for step in told.routing],
        )
    if told.waits:
        screen.say("")
        for line in told.waits:
            screen.say(line)
    if told.provider_batches:
        screen.say("")
        screen.table(
            ["ProviderBatch", "state", "provider says", "requests", "done", "texts", "next look", "error"],
            [
                (each.id, each.state.value, each.provider_status, each.requests, each.done, each.contents,
                 each.next_look and f"{each.next_look.astimezone():%m-%d %H:%M:%S}", each.error)
                for each in told.provider_batches
            ],
        )  # fmt: skip


def _styled(state: str) -> Text:
    return Text(state, style={"stopped": "red", "running": "green"}.get(state, "yellow"))
