"""`chunks`, `delete` and `export`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from chunkmill.cli.arguments import JsonObject
from chunkmill.cli.collections.prune import size
from chunkmill.cli.late import Client
from chunkmill.cli.output import Group, Screen, beginning, count, json_option
from chunkmill.cli.progress import Bar
from chunkmill.domain.stored import StoredChunk
from chunkmill.errors import InvalidInput, NotFound

PREVIEW = 60
"""Maximum number of columns of a text or of metadata in a list."""
MAX_LISTED = 10_000
"""The most chunks of one list, which is in memory. `export` has no such limit."""

where_option = click.option(
    "--filter",
    "--where",
    "where",
    type=JsonObject(),
    metavar="JSON",
    help="""Only chunks whose metadata pass this filter, such as
    '{"source": "x"}'.""",
)


@click.group(cls=Group)
@json_option
def chunks() -> None:
    """List, show and count the chunks of a collection, and change their metadata.

    `chunkmill delete` deletes chunks, and `chunkmill export` writes them into a file.
    """


@chunks.command("list")
@click.argument("collection")
@where_option
@click.option(
    "--after", metavar="ID", default="", help="Begin after this id, which is the last one of the previous list."
)
@click.option(
    "-n", "--limit", type=click.IntRange(1, MAX_LISTED), default=20, show_default=True, help="Number of chunks."
)
@json_option
@click.pass_obj
def list_chunks(screen: Screen, collection: str, where: dict[str, Any] | None, after: str, limit: int) -> None:
    """List chunks of a collection in the order of their ids."""
    with Client.from_env() as client:
        listed = list(client.chunks(collection, filter=where, after=after, limit=limit))
    following = listed[-1].id if len(listed) == limit else None
    if screen.json:
        screen.document({"chunks": [chunk_fields(chunk) for chunk in listed], "after": following})
    elif not listed:
        screen.say("There is no such chunk.")
    else:
        screen.table(
            ["chunk", "state", "cut", "metadata", "text"],
            [
                (chunk.id, chunk.state.value, chunk.truncated, beginning(_json(chunk), PREVIEW),
                 beginning(chunk.text or "", PREVIEW))
                for chunk in listed
            ],
        )  # fmt: skip
        if following is not None:
            screen.hint(f"There may be more: pass --after with the last id, {following}")


@chunks.command()
@click.argument("collection")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@json_option
@click.pass_obj
def get(screen: Screen, collection: str, ids: tuple[str, ...]) -> None:
    """Show chunks with their texts and metadata. Exits with 1 if one of them is not there."""
    with Client.from_env() as client:
        stored = client.get(collection, ids)
    missing = [chunk_id for chunk_id in ids if chunk_id not in stored]
    if screen.json:
        screen.document([chunk_fields(chunk) for chunk in stored.values()])
    for chunk in stored.values():
        screen.fields(
            {
                "chunk": chunk.id,
                "state": chunk.state.value,
                "cut": "yes, the vector stands only for its beginning" if chunk.truncated else "no",
                "content": chunk.content_hash,
                "job": str(chunk.job_id),
                "metadata": _json(chunk),
            }
        )
        # With a margin, so that no line of a text is taken for a field of this chunk or the next.
        screen.text("".join(f"| {line}\n" for line in (chunk.text or "").splitlines()))
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise NotFound(f"collection {collection!r} has no chunk {', '.join(map(repr, missing[:3]))}{more}.")


@chunks.command("count")
@click.argument("collection")
@where_option
@json_option
@click.pass_obj
def count_chunks(screen: Screen, collection: str, where: dict[str, Any] | None) -> None:
    """Count the chunks of a collection."""
    with Client.from_env() as client:
        n_chunks = client.count(collection, filter=where)
    if screen.json:
        screen.document({"collection": collection, "chunks": n_chunks})
    else:
        screen.say(f"{n_chunks:,}")


@chunks.command()
@click.argument("collection")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@where_option
@click.option("--all", "all_chunks", is_flag=True, help="Change all chunks of the collection.")
@click.option("--set", "metadata", type=JsonObject(), metavar="JSON", help="Keys and values to set.")
@click.option("--remove", multiple=True, metavar="KEY", help="Key to remove; may be given several times.")
@click.option("--replace", is_flag=True, help="Replace all metadata of a chunk by what --set gives.")
@json_option
@click.pass_obj
def update(
    screen: Screen,
    collection: str,
    ids: tuple[str, ...],
    where: dict[str, Any] | None,
    all_chunks: bool,
    metadata: dict[str, Any] | None,
    remove: tuple[str, ...],
    replace: bool,
) -> None:
    """Change the metadata of chunks, by their ids, by a filter, or of all with --all.

    Nothing is embedded again, and the next search sees the change. Keys that are not named stay as they are.
    """
    _require_one(ids, where, all_chunks=all_chunks, verb="change")
    with Client.from_env() as client, Bar(screen, f"changing chunks of {collection}", waits=True):
        changed = client.update_metadata(
            collection,
            metadata,
            ids=ids or None,
            filter=where,
            all_chunks=all_chunks,
            remove=remove,
            replace=replace,
        )
    if screen.json:
        screen.document({"collection": collection, "updated": changed})
    else:
        screen.say(f"Updated the metadata of {count(changed, 'chunk')} of {collection!r}.")


@click.command()
@click.argument("collection")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@where_option
@click.option("--all", "all_chunks", is_flag=True, help="Delete all chunks of the collection.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@json_option
@click.pass_obj
def delete(
    screen: Screen, collection: str, ids: tuple[str, ...], where: dict[str, Any] | None, all_chunks: bool, yes: bool
) -> None:
    """Delete chunks of a collection by their ids, by a filter, or all of its chunks with --all.

    A text that no chunk refers to any more is deleted with its vectors. What an enqueue writes while --filter deletes
    is kept.
    """
    _require_one(ids, where, all_chunks=all_chunks, verb="delete")
    with Client.from_env() as client:
        if not yes and not _confirmed(screen, client, collection, ids, where):
            raise SystemExit(1)
        with Bar(screen, f"deleting chunks of {collection}", waits=True):
            deleted = client.delete(collection, ids or None, filter=where, all_chunks=all_chunks)
    if screen.json:
        screen.document({"collection": collection, "deleted": deleted})
    else:
        screen.say(f"Deleted {count(deleted, 'chunk')} of {collection!r}.")


@click.command()
@click.argument("collection")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@where_option
@click.option("--text/--no-text", default=True, help="Write the texts.  [default: text]")
@click.option("--vectors/--no-vectors", default=True, help="Write the vectors.  [default: vectors]")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
@click.pass_obj
def export(
    screen: Screen,
    collection: str,
    file: Path,
    where: dict[str, Any] | None,
    text: bool,
    vectors: bool,
    force: bool,
) -> None:
    """Write the chunks of a collection with their vectors into FILE.

    Its name says the format: .parquet, or JSON lines in .jsonl, .ndjson, .jsonl.gz or .ndjson.gz. FILE appears once it
    is complete. `chunkmill enqueue FILE` takes its ids, texts and metadata.
    """
    with Client.from_env() as client, Bar(screen, f"exporting {collection}", waits=True) as bar:
        exported = client.export(
            collection,
            file,
            filter=where,
            with_text=text,
            with_vector=vectors,
            overwrite=force,
            on_progress=lambda done, total: bar.update(done, total, "chunks"),
        )
    if screen.json:
        screen.document({"collection": collection} | asdict(exported))
        return
    without = f", {exported.without_vector:,} of them without a vector" if exported.without_vector else ""
    screen.say(f"Wrote {count(exported.chunks, 'chunk')}{without} to {exported.path} ({size(exported.bytes)}).")


def chunk_fields(chunk: StoredChunk) -> dict[str, object]:
    return {name: value for name, value in asdict(chunk).items() if name != "vector"}


def _json(chunk: StoredChunk) -> str:
    return json.dumps(chunk.metadata, ensure_ascii=False)


def _require_one(ids: tuple[str, ...], where: dict[str, Any] | None, *, all_chunks: bool, verb: str) -> None:
    # A list of ids that is empty by mistake, as in $(cat ids.txt), must not mean the whole collection.
    if [bool(ids), where is not None, all_chunks].count(True) != 1:
        raise click.UsageError(
            f"Name the chunks by ID, choose them with --filter, or pass --all to {verb} all chunks of the collection."
        )


def _confirmed(
    screen: Screen, client: Client, collection: str, ids: tuple[str, ...], where: dict[str, Any] | None
) -> bool:
    if screen.asked_json or not sys.stdin.isatty():
        raise InvalidInput(
            "delete asks before it deletes, and stdin is not a terminal: pass --yes to delete without asking."
        )
    n_chunks = len(client.get(collection, ids, with_text=False)) if ids else client.count(collection, filter=where)
    return click.confirm(f"Delete {count(n_chunks, 'chunk')} of {collection!r} and their vectors?", err=True)
