"""`reembed`: `start`, `list`, `show`, `judge`, `flip`, `rollback`, `pause`, `resume`, `cancel`, `finish`."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from typing import Any

import click

from chunkmill.cli import lacks
from chunkmill.cli.arguments import usd_option
from chunkmill.cli.late import Client, Gates
from chunkmill.cli.output import Group, Screen, count, json_option
from chunkmill.cli.paid.costs import budget_fields, lane_row, show_budget
from chunkmill.cli.progress import Bar
from chunkmill.domain.reembedding import KEEP_DAYS, RAMP, STEP_HOURS, Quote, Reembedding, ReembeddingState
from chunkmill.domain.spaces import OnLong, Precision, told_apart
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import InvalidInput

LOOK_SECONDS = 1.0
"""How often `--wait` looks."""
STOPPED = 3
"""Exit code of `--wait` if the new space is not the active one at its end: a gate is not passed, somebody cancelled it,
or the collection has returned, for example."""


class Limit(click.ParamType[object]):
    """A number, or `off`."""

    name = "number|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if value == "off" or value is None:
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor off.", param, ctx)


class Shares(click.ParamType[tuple[int, ...]]):
    """Percentages with commas between them, or `none`."""

    name = "shares"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if value == "none":
            return ()
        try:
            return tuple(int(share) for share in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of percentages such as 10,25,50,90,100, and not none.", param, ctx)


def _gate_options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--missing", type=click.IntRange(0), help="Maximum number of chunks missing in the new space."),
        click.option(
            "--ndcg-loss", type=Limit(), help="Maximum loss of nDCG@10, at the lower bound of its 95 % interval."
        ),
        click.option("--queries", type=click.IntRange(2), help="Minimum number of golden queries."),
        click.option("--recall", type=Limit(), help="Minimum recall@10 of the new serving index."),
        click.option(
            "--p95-ratio", type=Limit(), help="How many times as long as in the old space the slowest 5 % may take."
        ),
        click.option("--price", type=Limit(), help="Maximum price in US dollars for a million tokens."),
        click.option("--no-canary", is_flag=True, help="Do not require golden texts of the new space."),
        click.option("--ramp", type=Shares(), help="Shares of the sessions in percent, such as 10,50,100, or none."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _gates(given: dict[str, Any], before: Gates) -> Gates:
    """The gates of the options that were given, and of ``before`` for the others."""
    changes: dict[str, Any] = {}
    for name in ("missing", "queries"):
        if given[name] is not None:
            changes[name] = given[name]
    for name in ("ndcg_loss", "recall", "p95_ratio", "price"):
        if given[name] is not None:
            changes[name] = None if given[name] == "off" else given[name]
    if changes.get("price") is not None:
        changes["price"] = Decimal(str(changes["price"]))
    if given["no_canary"]:
        changes["canary"] = False
    return dataclasses.replace(before, **changes)


class ReembeddingName(click.ParamType[object]):
    """The number of a re-embedding, or the name of a collection."""

    name = "id|collection"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> object:
        return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


@click.group(cls=Group)
@json_option
def reembed() -> None:
    """Move a collection to another model, without a gap, and come back.

    `start --dry-run` says what it takes. A poller fills the new space from the stored texts, checks the gates, lets the
    new space answer a growing share of the searches, and makes it the active one. The old space is kept up to date for
    some days, so that `rollback` can return to it. (`chunkmill migrate` updates the database's tables.)
    """


@reembed.command()
@click.argument("collection")
@click.argument("model")
@click.option(
    "--dry-run", is_flag=True, help="Only show what would be embedded, how long that takes, and what it costs."
)
@click.option(
    "--on-long",
    type=click.Choice([word.value for word in OnLong]),
    default="truncate",
    show_default=True,
    help="What to do with a text that is too long for MODEL: truncate it, reject it, or split it for embedding.",
)
@click.option(
    "--dimensions",
    type=click.IntRange(1),
    help="Number of dimensions to shorten the vectors to, if the model was trained for that.",
)
@click.option("--precision", type=click.Choice([str(word) for word in Precision]), help="The precision of MODEL.")
@click.option(
    "--route",
    type=click.Choice([word.value for word in Route]),
    default="auto",
    show_default=True,
    help="Where to embed: local is your workers, openai the Batch API, openai-sync plain requests; auto chooses.",
)
@click.option(
    "--priority",
    type=click.Choice([word.value for word in Priority]),
    default="low",
    show_default=True,
    help="Work of a higher priority is embedded first.",
)
@click.option(
    "--step-hours",
    type=float,
    default=STEP_HOURS,
    show_default=True,
    help="How many hours each share of the ramp lasts.",
)
@click.option(
    "--keep-days", type=float, default=KEEP_DAYS, show_default=True, help="How many days a rollback stays possible."
)
@click.option(
    "--max-usd",
    metavar="USD",
    callback=usd_option,
    help="Begin nothing if a paid route would cost more than this, by the estimate of --dry-run.",
)
@click.option(
    "--wait", is_flag=True, help="Show the progress until the flip (exit code 0), or until somebody has to act (3)."
)
@_gate_options
@json_option
@click.pass_obj
def start(
    screen: Screen,
    /,
    collection: str,
    model: str,
    *,
    dry_run: bool,
    wait: bool,
    max_usd: Decimal | None,
    ramp: tuple[int, ...] | None,
    **given: Any,
) -> None:
    """Begin to move COLLECTION to MODEL."""
    gates = _gates(given, Gates())
    asked = {name: given[name] for name in ("on_long", "dimensions", "precision", "route", "priority", "step_hours",
                                            "keep_days")}  # fmt: skip
    with Client.from_env() as client:
        shares = RAMP if ramp is None else ramp
        if dry_run:
            with Bar(screen, f"counting the texts of {collection}", waits=True):
                quote = client.reembed(collection, to=model, dry_run=True, gates=gates, ramp=shares, **asked)
            show_quote(screen, quote)
            return
        before = {one.id for one in client.reembeddings(collection, limit=1)}
        begun = client.reembed(collection, to=model, gates=gates, ramp=shares, max_usd=max_usd, **asked)
        if begun.id in before:
            screen.hint(f"It is under way since {_time(begun.created_at)}, and nothing else was begun.")
        if wait:
            begun = _wait(screen, client, begun)
    _show(screen, begun)
    if wait and not begun.state.is_moved:
        raise SystemExit(STOPPED)
    if not wait:
        lacking = _lacks(begun)
        for lack in lacking:
            screen.hint(lack)
        screen.hint(f"{'' if lacking else 'A poller does the rest. '}Look with: chunkmill reembed show {begun.id}")


@reembed.command(name="list")
@click.argument("collection", required=False)
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="Maximum number of re-embeddings to list."
)
@json_option
@click.pass_obj
def list_(screen: Screen, collection: str | None, limit: int) -> None:
    """List the latest re-embeddings, of COLLECTION or of all collections."""
    with Client.from_env() as client:
        latest = client.reembeddings(collection, limit=limit)
    if screen.json:
        screen.document([asdict(one) for one in latest])
    elif not latest:
        screen.say("No collection was moved to another space. Begin with: chunkmill reembed start COLLECTION MODEL")
    else:
        screen.table(["id", "collection", "state", "from", "to", "filled", "share", "since"], map(_row, latest))
        for one in latest:
            if one.problem is not None:  # a sentence, which a column would break into a tower of syllables
                screen.hint(f"{one.id}: {one.problem}")
        if any(one.state.is_before_flip and one.paused_at is None for one in latest) and (lack := lacks.of_a_poller()):
            screen.hint(lack)


@reembed.command()
@click.argument("which", type=ReembeddingName())
@click.option(
    "--wait", is_flag=True, help="Show the progress until the flip (exit code 0), or until somebody has to act (3)."
)
@json_option
@click.pass_obj
def show(screen: Screen, which: int | str, *, wait: bool) -> None:
    """Show a re-embedding by its number, or the latest one of a collection."""
    with Client.from_env() as client:
        shown = client.reembedding(which)
        if wait:
            shown = _wait(screen, client, shown)
    _show(screen, shown)
    if not wait:
        for lack in _lacks(shown) if shown.paused_at is None else ():
            screen.hint(lack)
    elif not shown.state.is_moved:
        raise SystemExit(STOPPED)


@reembed.command()
@click.argument("which", type=ReembeddingName())
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for workers.")
@json_option
@click.pass_obj
def judge(screen: Screen, which: int | str, timeout: float) -> None:
    """Check the gates now. A poller does it by itself if its role may read texts."""
    with Client.from_env() as client, Bar(screen, "judging by the golden queries", waits=True):
        judged = client.judge_reembedding(which, timeout=timeout)
    _show(screen, judged)
    if not all(gate.passed for gate in judged.gates):
        raise SystemExit(STOPPED)


@reembed.command()
@click.argument("which", type=ReembeddingName())
@click.option("--missing", type=click.IntRange(0), help="Chunks that may be missing afterwards.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait for missing vectors.")
@json_option
@click.pass_obj
def flip(screen: Screen, which: int | str, missing: int | None, timeout: float) -> None:
    """Make the new space the active one now, without the rest of the ramp and whatever the gates of quality say."""
    with Client.from_env() as client, Bar(screen, "waiting for missing vectors", waits=True):
        flipped = client.flip(which, missing=missing, timeout=timeout)
    _show(screen, flipped)
    failed = [gate.name for gate in flipped.gates if not gate.passed]
    if failed or not flipped.gates:
        what = f"These gates were not passed: {', '.join(failed)}." if failed else "No gate was checked before."
        screen.hint(f"{what} If searches are worse, return with: chunkmill reembed rollback {flipped.id}")


@reembed.command()
@click.argument("which", type=ReembeddingName())
@click.option("--missing", type=click.IntRange(0), help="Chunks that may be missing afterwards.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait for missing vectors.")
@json_option
@click.pass_obj
def rollback(screen: Screen, which: int | str, missing: int | None, timeout: float) -> None:
    """Make the collection's previous space the active one again."""
    with Client.from_env() as client, Bar(screen, "waiting for missing vectors", waits=True):
        back = client.rollback(which, missing=missing, timeout=timeout)
    _show(screen, back)


@reembed.command()
@click.argument("which", type=ReembeddingName())
@json_option
@click.pass_obj
def pause(screen: Screen, which: int | str) -> None:
    """Stop a re-embedding where it is, until `resume`. Its share of the searches stays."""
    with Client.from_env() as client:
        _show(screen, client.pause_reembedding(which))


@reembed.command()
@click.argument("which", type=ReembeddingName())
@_gate_options
@json_option
@click.pass_obj
def resume(screen: Screen, /, which: int | str, *, ramp: tuple[int, ...] | None, **given: Any) -> None:
    """Continue a re-embedding that was paused, has a problem or stepped back, also with other gates or another ramp."""
    with Client.from_env() as client:
        before = client.reembedding(which)
        gates = _gates(given, before.limits)
        _show(screen, client.resume_reembedding(before.id, gates=gates, ramp=ramp))


@reembed.command()
@click.argument("which", type=ReembeddingName())
@json_option
@click.pass_obj
def cancel(screen: Screen, which: int | str) -> None:
    """Give up a re-embedding before its flip. Searches stay in the old space."""
    with Client.from_env() as client:
        _show(screen, client.cancel_reembedding(which))


@reembed.command()
@click.argument("which", type=ReembeddingName())
@click.option("--yes", is_flag=True, help="Finish without asking.")
@json_option
@click.pass_obj
def finish(screen: Screen, which: int | str, *, yes: bool) -> None:
    """Drop the collection's previous space now. No rollback is possible after that."""
    with Client.from_env() as client:
        shown = client.reembedding(which)
        if not yes and shown.dropped_at is not None:
            if screen.asked_json or not sys.stdin.isatty():
                raise InvalidInput(
                    "reembed finish asks before it drops a space, and stdin is not a terminal: pass --yes to drop it "
                    "without asking."
                )
            left = shown.to_model if shown.state is ReembeddingState.ROLLED_BACK else shown.from_model
            click.confirm(f"Drop the vectors of {shown.collection!r} in the space of {left!r}?", abort=True, err=True)
        _show(screen, client.finish_reembedding(shown.id))


def _wait(screen: Screen, client: Client, shown: Reembedding) -> Reembedding:
    """Show the progress until it is flipped, ends, is paused, stays in its share, or has a problem."""
    with Bar(screen, f"{shown.collection}: {shown.state.in_words}") as bar:
        for lack in _lacks(shown):
            bar.note(lack)
        said = said_step = None
        while True:
            shown = client.reembedding(shown.id)
            is_at_rest = shown.state is ReembeddingState.RAMPING and shown.ramp[-1:] == (shown.share,) != (100,)
            if not shown.state.is_before_flip or shown.paused_at is not None or shown.problem is not None or is_at_rest:
                return shown
            if shown.state is not said:
                bar.stage(f"{shown.collection}: {shown.state.in_words}")
                said = shown.state
            if shown.state is ReembeddingState.RAMPING:
                if (step := shown.next_step_at) is not None and step != said_step:
                    bar.note(f"The new space answers {shown.share} % of the sessions until {_time(step)} at least.")
                    said_step = step
                bar.update(shown.share, 100, "% of the sessions")
            elif shown.state is ReembeddingState.FILLING and shown.coverage is not None:
                coverage = shown.coverage
                bar.update(coverage.contents - coverage.missing, coverage.contents, "texts")
            time.sleep(LOOK_SECONDS)


def show_quote(screen: Screen, quote: Quote) -> None:
    """Print what a re-embedding would take."""
    if screen.json:
        chosen = {"tokens": quote.tokens, "usd": quote.usd, "hours": quote.hours}
        screen.document(asdict(quote) | chosen | {"budget": budget_fields(quote.budget)})
        return
    in_flight = f", {quote.in_flight:,} at a provider" if quote.in_flight else ""
    whole = "" if quote.sampled == quote.to_embed else f" (estimated from {quote.sampled:,} of them)"
    screen.fields(
        {
            "from": f"{quote.from_model} ({quote.from_space[:12]})",
            "to": f"{quote.to_model} ({quote.to_space[:12]}), {quote.dimensions} dimensions",
            "chunks": f"{quote.chunks:,}, with {count(quote.contents, 'distinct text')}",
            "texts": f"{quote.to_embed:,} to embed, {quote.cached:,} embedded before{in_flight}",
            "route": f"{quote.route}: {quote.because}",
            "disk": f"{_megabytes(quote.vector_bytes)} of vectors and {_megabytes(quote.index_bytes)} of index are new",
            "kept": f"{_megabytes(quote.kept_bytes)} of the old space stay for {quote.keep_days:g} days after the flip",
        }
    )
    screen.say("")
    screen.table(["lane", "tokens", "refused", "engine time", "USD", "note"], map(lane_row, quote.lanes))
    if whole:
        screen.say(f"The tokens are those of the texts to embed{whole}.")
    show_budget(screen, quote.budget)
    screen.hint("Nothing was begun, because this was a dry run.")


def _show(screen: Screen, shown: Reembedding) -> None:
    if screen.json:
        screen.document(asdict(shown))
        return
    fields: dict[str, object] = {
        "re-embedding": shown.id,
        "collection": shown.collection,
        "from": f"{shown.from_model} ({shown.from_space[:12]})",
        "to": f"{shown.to_model} ({shown.to_space[:12]})",
        "state": f"{shown.state.in_words}, since {_time(shown.state_since)}" + (", paused" if shown.paused_at else ""),
        "share": f"{shown.share} % of the sessions; ramp {', '.join(map(str, shown.ramp)) or 'none'}",
    }
    if shown.next_step_at is not None:
        fields["next step"] = f"not before {_time(shown.next_step_at)}"
    if shown.coverage is not None:
        coverage = shown.coverage
        dead = f", {coverage.dead:,} dead" if coverage.dead else ""
        fields["filled"] = f"{coverage.share:.1%} of {count(coverage.contents, 'text')}{dead}"
    if shown.state is ReembeddingState.ROLLED_BACK:
        kept = f"are kept until {_time(shown.dropped_at)}" if shown.dropped_at is not None else "are dropped"
        fields["new space"] = f"its vectors {kept}"
    elif shown.dropped_at is not None:
        fields["way back"] = f"kept until {_time(shown.dropped_at)}"
    elif shown.state is ReembeddingState.FINISHED:
        fields["way back"] = "none: the vectors of the space that the collection left are dropped"
    screen.fields(fields)
    if shown.gates:
        screen.say("")
        rows = [("passed" if gate.passed else "not passed", gate.name, gate.sentence) for gate in shown.gates]
        screen.table(["gate", "name", "because"], rows)
    if shown.served:
        screen.say("")
        screen.table(
            ["space", "searches", "errors", "p50", "p95", "chosen hits"],
            [
                (one.space[:12], one.searches, one.errors, _milliseconds(one.p50), _milliseconds(one.p95), one.liked)
                for one in shown.served
            ],
        )
    if shown.problem is not None:
        screen.hint(shown.problem)


def _lacks(shown: Reembedding) -> list[str]:
    """A sentence for each kind of process that is not there and has to do the next step."""
    if not shown.state.is_before_flip:
        return []
    fills = shown.state in (ReembeddingState.PLANNED, ReembeddingState.FILLING)
    return lacks.of_reembedding(shown.route, shown.to_model if fills else None)


def _row(shown: Reembedding) -> tuple[object, ...]:
    # What was counted in a space that is dropped is there no more.
    left = shown.state is ReembeddingState.ROLLED_BACK and shown.dropped_at is None
    is_there = not left and shown.state is not ReembeddingState.CANCELLED
    return (
        str(shown.id),
        shown.collection,
        f"{shown.state.in_words}{' (paused)' if shown.paused_at else ''}",
        *told_apart((shown.from_model, shown.from_space), (shown.to_model, shown.to_space)),
        f"{shown.coverage.share:.0%}" if shown.coverage is not None and is_there else None,
        f"{shown.share} %",
        _time(shown.state_since),
    )


def _time(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1e3:,.1f} ms"
