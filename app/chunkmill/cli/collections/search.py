"""`search`, `audit`, `index` and `models`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any, Literal

import click
from rich.cells import cell_len
from rich.text import Text

from chunkmill.cli import lacks
from chunkmill.cli.collections.canary import canary
from chunkmill.cli.collections.export import export
from chunkmill.cli.collections.spaces import drop
from chunkmill.cli.late import Client, Environment, read_spaces
from chunkmill.cli.models.check import check
from chunkmill.cli.models.known import choose, list_models
from chunkmill.cli.output import Group, Screen, beginning, count, duration, json_option
from chunkmill.cli.progress import Bar
from chunkmill.domain.results import Audit, SearchHit, SearchPlan

INCOMPLETE = 3
"""Exit code of `audit` if a chunk has no vector."""

PREVIEW = 120
"""Maximum number of columns of a hit's text."""
HEADING = 50
"""Maximum number of columns of the heading above a hit."""
SHORT_HEADING = 16
"""With fewer columns left, a heading gets a line of its own instead of being shortened."""


class Mix(click.ParamType[object]):
    """How vectors and keywords are mixed, as ``Client.search`` takes it."""

    name = "mix"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> bool | float | Literal["rrf"]:
        if value in ("on", "off"):
            return bool(value == "on")
        if value == "rrf":
            return "rrf"
        try:
            weight = float(value)
        except (TypeError, ValueError):
            weight = -1.0
        if not 0 <= weight <= 1:
            self.fail(f"{value!r} is not on, off, rrf or a number from 0 to 1.", param, ctx)
        return weight


@click.command()
@click.argument("query", required=False)
@click.option("-c", "--collection", required=True, help="Collection to search.")
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="Number of chunks to find.")
@click.option(
    "--filter",
    "--where",
    "where",
    metavar="JSON",
    help="""Only chunks whose metadata pass this filter, such as '{"lang": "en", "year": {"$gte": 2020}}'.""",
)
@click.option("--like", metavar="ID", help="Find the chunks nearest to this chunk, instead of to a query.")
@click.option("--min-score", type=click.FloatRange(-1, 1), help="Only chunks with this score or a higher one.")
@click.option(
    "--offset",
    type=click.IntRange(0),
    help="How many of the nearest chunks to skip. To read page after page, give 0 for the first one, so that no chunk "
    "is missing between two pages.",
)
@click.option(
    "--hybrid",
    type=Mix(),
    metavar="MIX",
    help="How much keywords count: `on`, `off`, `rrf`, or the weight of the cosine from 0 to 1. The default is what "
    "`golden tune` chose.",
)
@click.option(
    "--session",
    metavar="NAME",
    help="Name of the user or session that searches. While a collection moves to another space, all searches of one "
    "session are answered from the same space.",
)
@click.option(
    "--space",
    metavar="SPACE",
    help="The space to search: `active`, `filling`, `previous`, a model, or the beginning of a fingerprint.",
)
@click.option(
    "--on-unserved",
    type=click.Choice(["previous"]),
    help="Allow the space that the collection had before, if no worker embeds the query.",
)
@click.option("--bridge", metavar="MODEL", help="Embed the query with this model, and carry it over by its bridge.")
@click.option("--exact", is_flag=True, help="Compare the query with every vector of the collection.")
@click.option("--explain", is_flag=True, help="Also say how the chunks were found.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=30.0,
    show_default=True,
    help="How many seconds to wait for a worker.",
)
@json_option
@click.pass_obj
def search(
    screen: Screen,
    query: str | None,
    collection: str,
    k: int,
    where: str | None,
    like: str | None,
    min_score: float | None,
    offset: int | None,
    hybrid: bool | float | Literal["rrf"] | None,
    session: str | None,
    space: str | None,
    on_unserved: Literal["previous"] | None,
    bridge: str | None,
    exact: bool,
    explain: bool,
    timeout: float,
) -> None:
    """Find the chunks nearest to QUERY, best first. A worker has to run, because it embeds the query.

    With --like it finds the chunks nearest to a chunk, and needs no worker.
    """
    if (query is None) == (like is None):
        raise click.UsageError("Give either QUERY, or with --like the ID of a chunk.")
    metadata = _where(where)
    with Client.from_env() as client:
        if like is None and (lack := lacks.of_any_worker()):
            screen.hint(f"{lack} This search waits {timeout:g} s for it.")
        hits = client.search(
            query,
            collection=collection,
            k=k,
            filter=metadata,
            exact=exact,
            timeout=timeout,
            like=like,
            min_score=min_score,
            offset=offset,
            explain=explain,
            hybrid=hybrid,
            session=session,
            space=space,
            on_unserved=on_unserved,
            bridge=bridge,
        )
    plan = hits.explanation
    if screen.json:
        shown = [asdict(hit) for hit in hits]
        screen.document({"hits": shown, "plan": asdict(plan)} if plan else shown)
        return
    if hits:
        show_hits(screen, hits)
    else:
        screen.say("Nothing was found.")
    if hits.instead_of:
        screen.say(f"No worker served space {hits.instead_of[:12]}, so these are the hits of space {hits.space[:12]}.")
    if hits and hits[0].bridge:
        screen.hint(f"Found through the bridge of {hits[0].bridge!r}.")
    elif bridge and hits:
        screen.hint(f"No bridge was needed: the collection is in a space of {bridge!r}.")
    if plan:
        show_plan(screen, plan)


@click.command()
@click.argument("collection", required=False)
@json_option
@click.pass_obj
def audit(screen: Screen, collection: str | None) -> None:
    """Check that every chunk of a collection, or of all collections, has its vector.

    It compares the chunks with the vectors themselves, and does not rely on what jobs say. Exits with 3 if a vector is
    missing.
    """
    with Client.from_env() as client:
        names = [info.name for info in client.collections()] if collection is None else [collection]
        with Bar(screen, "auditing", waits=True) as bar:
            audits: list[Audit] = []
            for name in names:
                bar.stage(f"auditing {name}")
                audits.append(client.audit(name))
    if screen.json:
        documents = [audit_fields(one) for one in audits]
        screen.document(documents if collection is None else documents[0])
    elif not audits:
        screen.say("There are no collections yet.")
    else:
        show_audits(screen, audits)
    if not all(one.complete for one in audits):
        raise SystemExit(INCOMPLETE)


@click.command()
@click.argument("collection")
@json_option
@click.pass_obj
def index(screen: Screen, collection: str) -> None:
    """Build the collection's serving index now.

    The poller builds it by itself as the collection grows. Writers and searches go on meanwhile.
    """
    began = time.monotonic()
    with Client.from_env() as client, Bar(screen, f"building the index of {collection}", waits=True):
        built = client.index(collection)
    seconds = time.monotonic() - began
    if screen.json:
        screen.document(asdict(built) | {"seconds": round(seconds, 3)})
    elif not built.is_ready:
        screen.say(f"{collection} has few chunks. It needs no serving index, because its searches are exact and fast.")
    else:
        screen.say(
            f"{collection} is served by {count(built.segments, 'segment')} with {built.rows:,} rows, "
            f"{built.graph_rows:,} of them in graphs, and {built.tail:,} newer rows: {built.bytes / 1e6:,.1f} MB "
            f"({duration(seconds)})."
        )


@click.group(cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def models(context: click.Context) -> None:
    """List the embedding spaces in the database; choose and check models."""
    if context.invoked_subcommand is None:
        _show_models(context.obj)


models.add_command(canary)
models.add_command(check)
models.add_command(choose)
models.add_command(list_models)
models.add_command(export)
models.add_command(drop)


def _show_models(screen: Screen) -> None:
    with Client.from_env():  # checks that the database is migrated and reachable
        spaces = read_spaces(Environment.load().settings)
    if screen.json:
        screen.document(
            [
                {"id": s.id, "fingerprint": s.spec.fingerprint, "storage": s.storage, "collections": names}
                | asdict(s.spec)
                for s, names in spaces
            ]
        )
    elif not spaces:
        screen.say("No space is registered yet. The first enqueue or the first worker registers one.")
    else:
        screen.table(
            ["space", "model", "dims", "max tokens", "pooling", "long texts", "precision", "column", "collections"],
            [
                (s.spec.fingerprint[:12], s.spec.model, s.spec.dimensions, s.spec.max_tokens, str(s.spec.pooling),
                 s.spec.long_text.value, s.spec.precision.value, s.storage, ", ".join(names) or None)
                for s, names in spaces
            ],
        )  # fmt: skip


def show_hits(screen: Screen, hits: list[SearchHit]) -> None:
    """Print each hit on two lines, so that a long id and the text do not take each other's place."""
    width = max(20, min(PREVIEW, screen.out.width - 8))
    for hit in hits:
        cut = [("  (cut)", "yellow")] if hit.truncated else []
        mixed = [] if hit.mixed is None else [(f"  mixed {hit.mixed:.3f}", "dim")]
        old = [("  (old text)", "yellow")] if hit.outdated else []
        used = 8 + cell_len(hit.chunk_id) + (13 if mixed else 0) + (7 if cut else 0) + (12 if old else 0)
        room = screen.out.width - used - 2 if screen.out.is_terminal else HEADING
        place = [(f"  {where}", "dim")] if (where := _place(hit, room)) else []
        screen.say((f"{hit.score:6.3f}  ", "green"), (hit.chunk_id, "bold"), *mixed, *cut, *old, *place, indent=8)
        # A chunk that was cut often begins with a heading or the end of a sentence, so all of it is one paragraph here.
        text = " ".join(hit.text[: 8 * width].split()) if "document" in hit.metadata else hit.text
        screen.say(" " * 8, beginning(text, width))
    if any(hit.truncated for hit in hits):
        screen.say(
            "(cut): the text is longer than the model reads, so its end counted for nothing. "
            "To find that too, enqueue it with --chunk: docs/documents.md"
        )
    if any(hit.outdated for hit in hits):
        screen.say("(old text): the chunk was replaced, and its new text is not embedded yet.")


def _place(hit: SearchHit, room: int) -> str:
    """Where in its document a chunk stands, if `enqueue --chunk` cut it: under which heading, on which page.

    The heading is shortened to what is left of the line, ``room`` columns, if that is enough to know it again.
    """
    if "document" not in hit.metadata:
        return ""
    headings, page = hit.metadata.get("headings"), hit.metadata.get("page")
    paged = [f"page {page}"] if isinstance(page, int) else []
    room -= len(", ".join(["", *paged]))
    limit = min(HEADING, room) if room >= SHORT_HEADING else HEADING
    said = [beginning(str(headings[-1]), limit)] if isinstance(headings, list) and headings else []
    return ", ".join(said + paged)


def show_plan(screen: Screen, plan: SearchPlan) -> None:
    screen.say("")
    screen.say(("Exact" if plan.is_exact else "Through the serving index", "bold"), f": {plan.because}")
    if plan.is_exact:
        screen.say(f"{count(plan.candidates, 'chunk')} compared with the query.")
        return
    beam = "" if plan.beam is None else f", the graphs with a beam of {plan.beam:,}"
    screen.say(
        f"{count(plan.candidates, 'candidate')} from {count(plan.segments, 'segment')} ({plan.graphs:,} with a graph) "
        f"and {plan.tail:,} rows of the tail{beam}."
    )


def show_audits(screen: Screen, audits: list[Audit]) -> None:
    screen.table(
        ["collection", "chunks", "texts", "embedded", "missing", "pending", "dead", "truncated", "complete"],
        [
            (a.collection, a.chunks, a.contents, a.embedded, a.missing, a.pending, a.dead, a.truncated,
             Text("yes", style="green") if a.complete else Text("no", style="red"))
            for a in audits
        ],
    )  # fmt: skip
    for audit in audits:
        if audit.missing_ids:
            screen.say("")
            screen.say((f"Missing in {audit.collection}:", "red"))
            for chunk_id in audit.missing_ids:
                screen.say("  ", chunk_id)
            if more := audit.missing - len(audit.missing_ids):
                screen.say(f"  and {more:,} more")


def audit_fields(audit: Audit) -> dict[str, object]:
    return asdict(audit) | {"complete": audit.complete}


def _where(given: str | None) -> dict[str, Any] | None:
    if given is None:
        return None
    try:
        metadata = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"not valid JSON: {error}", param_hint="--filter") from None
    if not isinstance(metadata, dict):
        raise click.BadParameter('it must be a JSON object, such as {"source": "x"}', param_hint="--filter")
    return metadata
