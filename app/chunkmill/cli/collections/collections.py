"""`collections`: list, `drop`, `rename`, `alias`, `unalias`, `outdated`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click
from rich.text import Text

from chunkmill.cli.late import Client
from chunkmill.cli.output import Group, Screen, count, json_option
from chunkmill.cli.progress import Bar
from chunkmill.domain.collections import CollectionInfo
from chunkmill.errors import InvalidInput, NotFound


@click.group(cls=Group, invoke_without_command=True)
@click.option("--exact", is_flag=True, help="Count the chunks of large collections too.")
@json_option
@click.pass_context
def collections(context: click.Context, exact: bool) -> None:
    """List the collections, with what is in them and how they are served.

    A number with ~ is estimated from a sample; --exact counts. Every command takes an alias in place of a
    collection's name.
    """
    if context.invoked_subcommand is not None:
        return
    screen: Screen = context.obj
    with Client.from_env() as client:
        infos = client.collections(exact=exact)
    if screen.json:
        screen.document([asdict(info) for info in infos])
    elif not infos:
        screen.say("There are no collections yet. The first enqueue creates one.")
    else:
        screen.table(
            ["collection", "aliases", "space", "model", "chunks", "embedded", "pending", "dead", "index", "rows",
             "tail", "index MB", "created", "last enqueue"],
            [_row(info) for info in infos],
            optional=["rows", "tail", "index MB", "created", *([] if any(i.aliases for i in infos) else ["aliases"]),
                      "space", "model", "embedded"],
        )  # fmt: skip
        if not all(info.counted for info in infos):
            screen.say(("~ is an estimate; --exact counts.", "dim"))


def _row(info: CollectionInfo) -> tuple[object, ...]:
    """The cells of a collection."""
    about = "" if info.counted else "~"
    last = info.last_enqueue_at
    return (
        info.name,
        ", ".join(info.aliases) or None,
        info.space[:12],
        info.model,
        Text(f"{about}{info.chunks:,}", justify="right"),
        Text(f"{about}{info.embedded:,}", justify="right"),
        info.pending,
        info.dead,
        "ready" if info.index.is_ready else "building" if info.index.rows or info.index.tail else None,
        info.index.rows,
        info.index.tail,
        Text(f"{info.index.bytes / 1e6:,.1f}", justify="right"),
        f"{info.created_at.astimezone():%Y-%m-%d}",
        None if last is None else f"{last.astimezone():%Y-%m-%d %H:%M}",
    )


@collections.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Drop without asking.")
@click.option("--no-wait", is_flag=True, help="Leave the deletion of the chunks to a poller.")
@json_option
@click.pass_obj
def drop(screen: Screen, name: str, yes: bool, no_wait: bool) -> None:
    """Drop a collection with all of its chunks, texts, vectors, its index and its view.

    The name is free at once. Open jobs are cancelled; what is at a provider is followed to its end and booked. Jobs and
    their costs stay until `chunkmill prune` deletes them.
    """
    with Client.from_env() as client:
        if not yes and not _confirmed(screen, client, name):
            raise SystemExit(1)
        with Bar(screen, f"dropping {name}", waits=True) as bar:
            dropped = client.drop_collection(
                name, wait=not no_wait, on_progress=lambda deleted: bar.update(deleted, None, "chunks")
            )
    if screen.json:
        screen.document(asdict(dropped))
    elif dropped.complete:
        screen.say(f"Dropped {name!r} with {count(dropped.chunks, 'chunk')}.")
    else:
        screen.say(f"Dropped {name!r}. A poller deletes what is left of its chunks.")


@collections.command()
@click.argument("name")
@click.argument("to")
@json_option
@click.pass_obj
def rename(screen: Screen, name: str, to: str) -> None:
    """Give collection NAME the name TO. Its jobs, aliases and index stay."""
    with Client.from_env() as client:
        client.rename_collection(name, to)
    if screen.json:
        screen.document({"collection": to, "was": name})
    else:
        screen.say(f"{name!r} is now {to!r}.")


@collections.command()
@click.argument("alias")
@click.argument("collection")
@json_option
@click.pass_obj
def alias(screen: Screen, alias: str, collection: str) -> None:
    """Make ALIAS one more name of COLLECTION, or move it there from another collection."""
    with Client.from_env() as client:
        client.set_alias(alias, collection)
    if screen.json:
        screen.document({"alias": alias, "collection": collection})
    else:
        screen.say(f"{alias!r} is an alias of {collection!r}.")


@collections.command()
@click.argument("alias")
@json_option
@click.pass_obj
def unalias(screen: Screen, alias: str) -> None:
    """Remove ALIAS. Its collection stays."""
    with Client.from_env() as client:
        client.remove_alias(alias)
    if screen.json:
        screen.document({"alias": alias, "collection": None})
    else:
        screen.say(f"{alias!r} is an alias no longer.")


@collections.command()
@click.argument("collection")
@click.option(
    "--serve/--hide",
    default=None,
    help="Find replaced chunks by their old vectors from now on, or stop that. Without it nothing is changed.",
)
@json_option
@click.pass_obj
def outdated(screen: Screen, collection: str, serve: bool | None) -> None:
    """Say whether searches find a replaced chunk by its old text until its new text is embedded.

    By default such a chunk cannot be found until a worker has embedded its new text. A hit that shows an old text is
    marked.
    """
    with Client.from_env() as client:
        made = client.outdated(collection, serve=serve)
    if screen.json:
        screen.document(asdict(made))
    elif made.is_served:
        screen.say(
            f"Searches of {made.collection!r} find a replaced chunk by its old text until its new text is embedded. "
            f"{count(made.waiting, 'chunk')} {'is' if made.waiting == 1 else 'are'} found so now."
        )
    else:
        screen.say(
            f"Searches of {made.collection!r} do not find a replaced chunk until its new text is embedded. "
            "With --serve they find it by its old text."
        )


def _confirmed(screen: Screen, client: Client, name: str) -> bool:
    if screen.asked_json or not sys.stdin.isatty():
        raise InvalidInput(
            "collections drop asks before it drops, and stdin is not a terminal: pass --yes to drop without asking."
        )
    info = next((info for info in client.collections() if name in (info.name, *info.aliases)), None)
    if info is None:
        raise NotFound(f"there is no collection {name!r}; `chunkmill collections` lists the ones that exist.")
    about = "" if info.counted else "about "
    return click.confirm(
        f"Drop {info.name!r} with {about}{count(info.chunks, 'chunk')}, their texts and their vectors?", err=True
    )
