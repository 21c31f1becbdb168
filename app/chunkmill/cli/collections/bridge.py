"""`bridge`, with `learn` and `drop`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from decimal import Decimal
from typing import Any

import click

from chunkmill.cli import lacks
from chunkmill.cli.arguments import quote_options
from chunkmill.cli.late import Client
from chunkmill.cli.output import Group, Screen, count, in_dollars, json_option
from chunkmill.cli.progress import Bar
from chunkmill.domain.bridges import Bridge, BridgeQuote
from chunkmill.domain.spaces import Precision


@click.group(cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def bridge(ctx: click.Context) -> None:
    """Answer queries of another model in the space that a collection has.

    A bridge carries their vectors into that space. It is used only by searches that name it: chunkmill search --bridge.
    It ends by itself when the collection moves to another space. Without a command this lists all bridges.
    """
    if ctx.invoked_subcommand is None:
        screen: Screen = ctx.obj
        with Client.from_env() as client:
            known = client.bridges()
        if screen.json:
            screen.document([as_document(one) for one in known])
        elif known:
            screen.table(
                [
                    "collection",
                    "model of the queries",
                    "space of the queries",
                    "kind",
                    "full nDCG@10",
                    "nDCG@10",
                    "same hits",
                    "queries",
                    "pairs",
                ],
                [
                    (
                        one.collection,
                        one.name,
                        one.query_space[:12],
                        str(one.kind),
                        one.full_ndcg,
                        one.ndcg,
                        one.same_hits,
                        one.queries,
                        one.pairs,
                    )
                    for one in known
                ],
            )
        else:
            screen.say("There are no bridges. To learn one: chunkmill bridge learn COLLECTION MODEL")


@bridge.command()
@click.argument("collection")
@click.argument("model")
@click.option(
    "--dimensions", type=click.IntRange(1), help="Number of dimensions to shorten the vectors of the queries to."
)
@click.option("--precision", type=click.Choice([str(one) for one in Precision]), help="The precision of MODEL.")
@click.option(
    "--sample", type=click.IntRange(32), default=5_000, show_default=True, help="Maximum number of texts to learn from."
)
@click.option(
    "--queries",
    type=click.IntRange(2),
    default=500,
    show_default=True,
    help="Maximum number of queries that judge the bridge.",
)
@click.option("--compare-old", is_flag=True, help="Also judge the queries with the collection's own model.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=3_600.0,
    show_default=True,
    help="How many seconds to wait for workers, which embed the sample and the queries.",
)
@quote_options
@json_option
@click.pass_obj
def learn(
    screen: Screen,
    collection: str,
    model: str,
    dimensions: int | None,
    precision: str | None,
    sample: int,
    queries: int,
    compare_old: bool,
    timeout: float,
    max_usd: Decimal | None,
    dry_run: bool,
) -> None:
    """Learn a bridge from stored texts, judge it by golden queries or titles, and store it.

    Texts of the sample that have no vector of MODEL are embedded, which costs money if it is a paid model.
    """
    asked: dict[str, Any] = {
        "dimensions": dimensions, "precision": precision, "sample": sample, "queries": queries,
        "compare_old": compare_old,
    }  # fmt: skip
    with Client.from_env() as client:
        if dry_run:
            with Bar(screen, f"counting the texts of {collection}", waits=True):
                quote = client.quote_bridge(collection, model, **asked)
            if screen.json:
                screen.document(asdict(quote))
            else:
                show_quote(screen, quote)
            return
        for lack in lacks.of_models(model):
            screen.hint(lack)
        before = {one.name: one.query_space for one in client.bridges(collection)}
        with Bar(screen, f"learning a bridge for {model}", waits=True) as bar:
            made = client.bridge(
                collection,
                model,
                **asked,
                max_usd=max_usd,
                timeout=timeout,
                on_progress=lambda spent: bar.update(spent.texts, None, "texts sent"),
            )
    if screen.json:
        screen.document(as_document(made))
    else:
        show_bridge(screen, made)
        if before.get(made.name, made.query_space) != made.query_space:
            screen.hint(
                f"It replaces the collection's bridge of the same model in another space, {before[made.name][:12]}, "
                "because a collection has one bridge of each model."
            )


@bridge.command()
@click.argument("collection")
@click.argument("name")
@json_option
@click.pass_obj
def drop(screen: Screen, collection: str, name: str) -> None:
    """Delete the bridge of a collection for the model NAME. Searches that name it are refused from then on."""
    with Client.from_env() as client:
        dropped = client.drop_bridge(collection, name)
    if screen.json:
        screen.document({"collection": collection, "name": name, "dropped": dropped})
    else:
        screen.say(f"Dropped the bridge of {collection!r}." if dropped else f"{collection!r} had no such bridge.")


def as_document(one: Bridge) -> dict[str, Any]:
    return asdict(one) | {"created_at": one.created_at.isoformat() if one.created_at else None}


def show_quote(screen: Screen, quote: BridgeQuote) -> None:
    screen.table(
        ["model of the queries", "queries", "texts", "texts to embed", "tokens", "USD"],
        [(quote.name, quote.queries, quote.texts, quote.to_embed, f"about {quote.tokens:,}", in_dollars(quote.usd))],
    )
    screen.say("Nothing was sent. Without --dry-run the bridge is learnt.")


def show_bridge(screen: Screen, one: Bridge) -> None:
    rows: list[tuple[object, ...]] = [("full re-embedding", one.full_ndcg, one.full_recall, 1.0, None)]
    if one.old_ndcg is not None:
        rows.append(("the collection's model", one.old_ndcg, None, None, None))
    rows += [
        (f"{trial.kind}, chosen" if trial.kind is one.kind else str(trial.kind),
         trial.ndcg, trial.recall, trial.same_hits, f"{trial.bytes / 1e6:,.1f} MB")
        for trial in one.trials
    ]  # fmt: skip
    screen.say(f"Queries of {one.name} go from space {one.query_space[:12]} to space {one.space[:12]}.")
    screen.table(["queries through", "nDCG@10", "recall@10", "same hits", "size"], rows)
    of = "golden queries" if one.queries_from == "golden" else "titles of chunks"
    screen.say(
        f"Learnt from {count(one.pairs, 'text')} ({one.embedded:,} embedded for it), and judged by {one.queries:,} "
        f"{of} among {count(one.ranked, 'chunk')}."
    )
    screen.say(one.because)
    screen.say(
        f"To search through it: chunkmill search --bridge {shlex.quote(one.name)} "
        f"-c {shlex.quote(one.collection)} QUERY"
    )
