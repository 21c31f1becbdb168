"""`compare`: judge a model on a collection's own texts and queries."""

from __future__ import annotations

import os
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

import click

from chunkmill.cli import lacks
from chunkmill.cli.arguments import quote_options
from chunkmill.cli.collections.compare_picture import picture
from chunkmill.cli.late import Change, Client, Comparison, ComparisonQuote, Contender, as_json
from chunkmill.cli.output import Screen, count, in_dollars, json_option
from chunkmill.cli.progress import Bar
from chunkmill.domain.spaces import Precision


def _in_a_folder(_: click.Context, __: click.Parameter, file: Path | None) -> Path | None:
    """Refuse a file whose folder is missing, before the workers are asked, which may take an hour and cost money."""
    if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise click.BadParameter(f"the folder {str(file.parent)!r} does not exist, or you may not write there.")
    return file


@click.command()
@click.argument("collection")
@click.argument("model")
@click.option(
    "--against", metavar="MODEL",
    help="Compare with this model, in the precision of EMBEDDING_PRECISION, instead of the model of the collection.",
)  # fmt: skip
@click.option(
    "--sample", type=click.IntRange(1), default=20_000, show_default=True, help="Maximum number of texts to search."
)
@click.option(
    "--queries",
    type=click.IntRange(2),
    default=2_000,
    show_default=True,
    help="Maximum number of golden queries.",
)
@click.option("--dimensions", type=int, help="Number of dimensions to shorten the vectors of MODEL to.")
@click.option("--precision", type=click.Choice([str(one) for one in Precision]), help="The precision of MODEL.")
@quote_options
@click.option(
    "--picture", "file", metavar="FILE", type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_in_a_folder, help="Also write the result as a picture, in SVG.",
)  # fmt: skip
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=3600.0,
    show_default=True,
    help="How many seconds the workers may take.",
)
@json_option
@click.pass_obj
def compare(
    screen: Screen,
    collection: str,
    model: str,
    against: str | None,
    sample: int,
    queries: int,
    dimensions: int | None,
    precision: str | None,
    max_usd: Decimal | None,
    dry_run: bool,
    file: Path | None,
    timeout: float,
) -> None:
    """Judge MODEL against the model of a collection, on a sample of its texts and by its golden queries.

    Workers embed what has no vector yet, and nothing is stored. A worker must serve each model. If the collection has
    no golden queries, the first lines and sentences of its chunks are asked.
    """
    with Client.from_env() as client:
        if dry_run:
            with Bar(screen, f"counting the texts of {collection}", waits=True):
                quote = client.quote_comparison(
                    collection, model, against=against, sample=sample, queries=queries, dimensions=dimensions,
                    precision=precision,
                )  # fmt: skip
            if screen.json:
                screen.document(asdict(quote) | {"usd": quote.usd})
            else:
                show_quote(screen, quote)
            return
        for lack in lacks.of_models(model, against):
            screen.hint(lack)
        with Bar(screen, f"comparing {model}", waits=True) as bar:
            told = client.compare(
                collection, model, against=against, sample=sample, queries=queries, dimensions=dimensions,
                precision=precision, max_usd=max_usd, timeout=timeout,
                on_progress=lambda compared: bar.update(compared, None, "texts compared"),
            )  # fmt: skip
    if file is not None:
        file.write_text(picture(told), encoding="utf-8")
    if screen.json:
        screen.document(fields(told))
    else:
        show(screen, told)
        if file is not None:
            screen.say(f"The picture is in {file}.")


def fields(told: Comparison) -> dict[str, object]:
    """The comparison as JSON."""
    document: dict[str, object] = as_json(asdict(told) | {"sentence": told.sentence})
    return document


def show_quote(screen: Screen, quote: ComparisonQuote) -> None:
    screen.table(
        ["model", "texts to embed", "USD"],
        [
            ("old", quote.old_to_embed, in_dollars(quote.old_usd)),
            ("new", quote.new_to_embed, in_dollars(quote.new_usd)),
        ],
    )
    screen.say(
        f"{count(quote.queries, 'query', 'queries')} would be asked in a sample of {count(quote.contents, 'text')}, "
        "in both models"
        + (f", about {count(quote.tokens, 'token')}." if quote.tokens else ".")  # an older gateway does not say
    )


def show(screen: Screen, told: Comparison) -> None:
    changes = told.changes
    rows: list[tuple[str, Change]] = [
        ("nDCG@10", changes.ndcg), ("recall@10", changes.recall), ("recall@100", changes.deep_recall),
        ("MRR@10", changes.mrr),
    ]  # fmt: skip
    screen.table(
        ["measure", "old", "new", "change", "95 % from", "to"],
        [
            (name, one.old, one.new, f"{one.difference:+.4f}", f"{one.low:+.4f}", f"{one.high:+.4f}")
            for name, one in rows
        ],
    )
    screen.say("")
    both = (told.old, told.new)
    screen.table(
        ["", "old", "new"],
        [
            ("model", *(one.model for one in both)),
            ("space", *(one.space[:12] for one in both)),
            ("dimensions", *(one.dimensions for one in both)),
            ("query alone, p50 ms", *(_ms(one.query_p50_ms) for one in both)),
            ("query alone, p95 ms", *(_ms(one.query_p95_ms) for one in both)),
            ("tokens/s", *(_speed(one) for one in both)),
            ("USD per million tokens", *(in_dollars(one.usd_per_million) for one in both)),
            ("USD for the collection", *(in_dollars(one.collection_usd) for one in both)),
            ("bytes of a vector", *(one.vector_bytes for one in both)),
            ("MB of the collection", *(f"{one.collection_bytes / 1e6:,.1f}" for one in both)),
        ],
    )
    screen.say("")
    left_out = f"; {told.left_out:,} were left out" if told.left_out else ""
    made = ", made of first lines and sentences" if told.made_of_titles else ""
    screen.say(
        f"{count(changes.queries, 'query', 'queries')}{made} in {told.sample:,} of {count(told.contents, 'text')}"
        f"{left_out}. The first ten hits overlap by {changes.overlap:.0%} (RBO {changes.rbo:.2f}), which says how much "
        "changes and not whether it is better."
    )
    screen.say(told.sentence)
    if changes.worst:
        screen.say("The queries that lose most:")
        screen.table(["query", "old nDCG@10", "new"], [(one.id, one.old, one.new) for one in changes.worst])


def _ms(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else f"{milliseconds:,.1f}"


def _speed(one: Contender) -> str | None:
    return None if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"
