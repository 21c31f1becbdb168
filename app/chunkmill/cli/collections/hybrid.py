"""`keywords`, and `golden` with `load`, `titles`, `list`, `clear` and `tune`."""

from __future__ import annotations

from dataclasses import asdict

import click

from chunkmill.cli.late import Client
from chunkmill.cli.output import Group, Screen, count, json_option
from chunkmill.cli.progress import Bar
from chunkmill.domain.results import SearchTuning


@click.command()
@click.argument("collection")
@click.option("--language", metavar="NAME", help="Create keywords in this language, such as english or simple.")
@click.option("--drop", is_flag=True, help="Delete the keywords, so that searches go by vectors alone.")
@json_option
@click.pass_obj
def keywords(screen: Screen, collection: str, language: str | None, drop: bool) -> None:
    """Show, create or drop the keywords of a collection, which hybrid searches need.

    With --language it returns when all chunks have their keywords: about a minute for 100,000. Writers and searches go
    on meanwhile. A language is a text search configuration of Postgres; an unknown one is answered with the list.
    """
    if drop and language:
        raise click.UsageError("Pass --language or --drop, not both.")
    with Client.from_env() as client:
        if drop:
            dropped = client.drop_keywords(collection)
            if screen.json:
                screen.document({"collection": collection, "dropped": dropped})
            else:
                screen.say(
                    f"Dropped the keywords of {collection!r}." if dropped else f"{collection!r} had no keywords."
                )
            return
        with Bar(screen, f"making the keywords of {collection}", waits=True):
            made = client.keywords(collection, language=language)
    if screen.json:
        screen.document(None if made is None else asdict(made))
    elif made is None:
        screen.say(f"{collection!r} has no keywords. To create them: chunkmill keywords --language english COLLECTION")
    else:
        ready = "ready" if made.is_ready else "being filled by the poller"
        screen.say(
            f"The keywords of {collection!r} ({made.language.removeprefix('pg_catalog.')}) are {ready}: about "
            f"{count(made.texts, 'text')}, {made.bytes / 1e6:,.1f} MB."
        )


@click.group(cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def golden(ctx: click.Context) -> None:
    """Judge and tune the searches of a collection by golden queries, which are queries whose answers are known.

    Without a command it shows how many golden queries each collection has.
    """
    if ctx.invoked_subcommand is None:
        screen: Screen = ctx.obj
        with Client.from_env() as client:
            counts = {one.name: client.golden(one.name).count() for one in client.collections()}
        if screen.json:
            screen.document([{"collection": name, "queries": n} for name, n in counts.items()])
        elif counts:
            screen.table(["collection", "golden queries"], list(counts.items()))
        else:
            screen.say("There are no collections yet.")


@golden.command()
@click.argument("collection")
@click.argument("queries")
@click.argument("qrels")
@json_option
@click.pass_obj
def load(screen: Screen, collection: str, queries: str, qrels: str) -> None:
    """Store the golden queries of two files of a BEIR data set.

    A line of QUERIES is {"_id": "q1", "text": "…"}; QRELS has the columns query id, chunk id and grade with tabs
    between them. A query that has the id of an earlier one replaces it.
    """
    with Client.from_env() as client:
        loaded = client.golden(collection).load(queries, qrels)
    if screen.json:
        screen.document(asdict(loaded))
    else:
        screen.say(f"Stored {count(loaded.queries, 'query', 'queries')} with {count(loaded.judgements, 'judgement')}.")
        if loaded.without_judgement:
            screen.hint(f"{count(loaded.without_judgement, 'query has', 'queries have')} no judgement.")
        if loaded.unknown_chunks:
            screen.hint(
                f"{count(loaded.unknown_chunks, 'judgement names', 'judgements name')} no chunk of the collection."
            )


@golden.command()
@click.argument("collection")
@click.option("-n", type=click.IntRange(1), default=500, show_default=True, help="Maximum number of queries.")
@json_option
@click.pass_obj
def titles(screen: Screen, collection: str, n: int) -> None:
    """Make golden queries of the titles of chunks: their first lines or sentences.

    They replace those that were made of titles before.
    """
    with Client.from_env() as client:
        made = client.golden(collection).from_titles(n)
    if screen.json:
        screen.document({"collection": collection, "queries": made})
    else:
        screen.say(f"Stored {count(made, 'query', 'queries')}.")


@golden.command(name="list")
@click.argument("collection")
@json_option
@click.pass_obj
def list_queries(screen: Screen, collection: str) -> None:
    """List the golden queries of a collection."""
    with Client.from_env() as client:
        queries = client.golden(collection).list()
    if screen.json:
        screen.document([asdict(query) for query in queries])
    elif queries:
        rows = [(query.id, query.text, len(query.relevant), query.is_title) for query in queries]
        screen.table(["query", "text", "judged chunks", "title"], rows)
    else:
        screen.say(f"{collection!r} has no golden queries.")


@golden.command()
@click.argument("collection")
@json_option
@click.pass_obj
def clear(screen: Screen, collection: str) -> None:
    """Delete all golden queries of a collection."""
    with Client.from_env() as client:
        n = client.golden(collection).clear()
    if screen.json:
        screen.document({"collection": collection, "deleted": n})
    else:
        screen.say(f"Deleted {count(n, 'golden query', 'golden queries')} of {collection!r}.")


@golden.command()
@click.argument("collection")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=600.0,
    show_default=True,
    help="How many seconds to wait for a worker, which embeds the queries.",
)
@json_option
@click.pass_obj
def tune(screen: Screen, collection: str, timeout: float) -> None:
    """Choose how much keywords count in a collection's searches, by its golden queries.

    Keywords are used only if searches are better with them even at the lower bound of a 95 % confidence interval.
    Searches use the result from then on.
    """
    with Client.from_env() as client, Bar(screen, f"tuning the searches of {collection}", waits=True):
        tuning = client.tune_search(collection, timeout=timeout)
    if screen.json:
        screen.document(asdict(tuning))
    else:
        show_tuning(screen, tuning)


def show_tuning(screen: Screen, tuning: SearchTuning) -> None:
    screen.table(
        ["search", "nDCG@10", "gain", "95 % from", "to"],
        [
            ("vectors alone", tuning.dense, None, None, None),
            ("keywords alone", tuning.keyword, None, None, None),
            ("reciprocal ranks", tuning.rrf, None, None, None),
            ("mix, held out", tuning.mix, tuning.gain, tuning.low, tuning.high),
        ],
    )
    left_out = f"; {tuning.left_out:,} were left out" if tuning.left_out else ""
    screen.say(f"{count(tuning.n, 'query was', 'queries were')} judged{left_out}.")
    screen.say(tuning.because)
    if tuning.alpha is None:
        screen.say("Searches go by vectors alone.")
    else:
        screen.say(
            f"Searches are mixed from now on: {tuning.alpha:g} of the cosine, {1 - tuning.alpha:.2g} of keywords."
        )
