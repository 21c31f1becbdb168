"""`lanes`, and what `status` and `job --explain` print about lanes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from decimal import Decimal

import click
from rich.text import Text

from chunkmill.cli.late import Client
from chunkmill.cli.output import Group, Screen, count, json_option
from chunkmill.domain.budget import dollars
from chunkmill.domain.lanes import PAID_ROUTES, Lane
from chunkmill.domain.results import Explanation
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput


@click.group(cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def lanes(context: click.Context) -> None:
    """Show the state of the paid lanes (running, idle, paused, stopped or held) and their open ProviderBatches.

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


@lanes.command()
@click.argument("provider_batch_id", metavar="ID", type=click.IntRange(1, 2**63 - 1))
@click.option("--yes", is_flag=True, help="Abandon it without asking.")
@json_option
@click.pass_obj
def abandon(screen: Screen, provider_batch_id: int, yes: bool) -> None:
    """Let go of ProviderBatch ID, which does not end, so that its texts can be sent again.

    ID is in `chunkmill job JOB --explain`. What the provider charged for it, or may have charged, is booked, and the
    provider is asked to cancel it. Without --yes, this command asks first.
    """
    with Client.from_env() as client:
        if not yes and not _confirmed(screen, provider_batch_id):
            screen.say("Nothing was changed.")
            return
        abandoned = client.abandon(provider_batch_id)
    if screen.json:
        screen.document(asdict(abandoned))
        return
    charged = "They may have been charged, and are booked." if abandoned.may_be_charged else "None of them was sent."
    screen.say(
        f"ProviderBatch {abandoned.provider_batch_id} is abandoned. {count(abandoned.contents, 'text')} of it can be "
        f"sent again. {charged}"
    )


def _confirmed(screen: Screen, provider_batch_id: int) -> bool:
    if screen.asked_json or not sys.stdin.isatty():
        raise InvalidInput(
            "lanes abandon asks before it lets go of a ProviderBatch, and stdin is not a terminal: pass --yes to do it "
            "without asking."
        )
    return click.confirm(
        f"Let go of ProviderBatch {provider_batch_id}? If the provider has charged it, its texts are paid for again.",
        err=True,
    )


def lane_fields(lane: Lane) -> dict[str, object]:
    return asdict(lane) | {"state": lane.state, "why": lane.why}


def lane_lines(lanes: Iterable[Lane]) -> dict[str, str]:
    """The lanes that do not run, by route, for `status`."""
    return {lane.route.value: f"{lane.state} {reason}" for lane in lanes if (reason := lane.why) is not None}


def show_lanes(screen: Screen, listed: list[Lane]) -> None:
    if screen.json:
        screen.document([lane_fields(lane) for lane in listed])
        return
    screen.table(
        ["lane", "state", "open ProviderBatches", "lost", "maybe charged", "why"],
        [
            (lane.route.value, _styled(lane.state),
             ", ".join(f"{n:,} {state}" for state, n in sorted((lane.open or {}).items())) or None,
              _usd(lane.lost_usd), _usd(lane.maybe_charged_usd), lane.why or _learnt(lane) or _no_worker(lane))
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


def _no_worker(lane: Lane) -> str | None:
    from chunkmill.monitor.present import START_PROVIDER_WORKER

    return None if lane.is_served else f"no worker serves it; to start one: {START_PROVIDER_WORKER}"


def _learnt(lane: Lane) -> str | None:
    """What the provider's refusals have taught about a lane that runs."""
    if lane.max_tokens is None:
        return None
    return f"at most {lane.max_tokens:,} tokens are sent at a time, because the provider refused more"


def _styled(state: str) -> Text:
    return Text(state, style={"stopped": "red", "running": "green", "idle": "dim"}.get(state, "yellow"))
