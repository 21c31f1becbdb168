"""`prune` and `cache`: what is old leaves, and what the cache holds and is worth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict

import click

from chunkmill.cli.arguments import BYTES, DAYS, Quantity
from chunkmill.cli.output import Screen, count, json_option
from chunkmill.cli.progress import Bar
from chunkmill.client import Client
from chunkmill.domain.retention import CacheSpace, OnProgress, Pruned
from chunkmill.errors import InvalidInput

AGE = Quantity("age", DAYS, "d", "30d")
SIZE = Quantity("size", BYTES | {"b": 1.0}, "b", "50GB")

dry_run_option = click.option("--dry-run", is_flag=True, help="Only count what would go.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@click.command()
@click.option("--older-than", type=AGE, default="30d", show_default=True, metavar="AGE", help="Such as 90d or 12h.")
@dry_run_option
@yes_option
@json_option
@click.pass_obj
def prune(screen: Screen, older_than: float, dry_run: bool, yes: bool) -> None:
    """Drop jobs that ended so long ago, and texts and vectors that no collection refers to. Safe under load.

    It counts first, and asks. With a job go its attempts, its usage, its dead list and its idempotency key; charges
    stay, for they are the bill. A failed or cancelled job stays while a chunk of it has no vector. The space is used
    again by new rows; only VACUUM FULL gives it back to the disk.
    """
    with Client.from_env() as client:
        _run(
            screen,
            lambda dry, progress: client.prune(older_than, dry_run=dry, on_progress=progress),
            dry_run=dry_run,
            yes=yes,
        )


@click.group(invoke_without_command=True)
@click.option("--recent", type=AGE, default="7d", show_default=True, metavar="AGE", help="What counts as recent.")
@json_option
@click.pass_context
def cache(ctx: click.Context, recent: float) -> None:
    """Each space's vectors, their size, and how often an enqueue found what it needed. `cache evict` makes room.

    "unreferenced" is what can be evicted: vectors whose text is in no chunk of a collection of that space. Hits are
    those of the jobs that are still there.
    """
    if ctx.invoked_subcommand is not None:
        return
    screen: Screen = ctx.obj
    with Client.from_env() as client:
        spaces = client.cache(recent=recent)
    if screen.json:
        screen.document({"spaces": [_facts(space) for space in spaces]})
    elif not spaces:
        screen.say("No space is registered yet: the first enqueue or the first worker does it.")
    else:
        heads = ["space", "model", "vectors", "table", "index", "unreferenced", "size", "oldest", "hits", "rate",
                 f"last {recent:g} days"]  # fmt: skip
        screen.table(heads, map(_row, spaces))


@cache.command()
@click.option("--older-than", type=AGE, metavar="AGE", help="What was stored so long ago; such as 90d.")
@click.option("--max-size", type=SIZE, metavar="SIZE", help="The oldest, until so much is left; such as 50GB.")
@click.option("--space", metavar="SPACE", help="Of one space, by the beginning of its fingerprint.")
@dry_run_option
@yes_option
@json_option
@click.pass_obj
def evict(
    screen: Screen, older_than: float | None, max_size: float | None, space: str | None, dry_run: bool, yes: bool
) -> None:
    """Drop vectors that no collection refers to, and their texts, the oldest first. Safe under load.

    It counts first, and asks. An age counts from when a text was first stored.
    """
    if (older_than is None) == (max_size is None):
        raise click.UsageError("Say what to evict: either --older-than or --max-size.")
    size = None if max_size is None else int(max_size)
    with Client.from_env() as client:
        _run(
            screen,
            lambda dry, progress: client.evict(
                older_than=older_than, max_bytes=size, space=space, dry_run=dry, on_progress=progress
            ),
            dry_run=dry_run,
            yes=yes,
        )


def _run(screen: Screen, act: Callable[[bool, OnProgress | None], Pruned], *, dry_run: bool, yes: bool) -> None:
    if dry_run:
        _show(screen, act(True, None))
        return
    if not yes:
        if screen.json or not sys.stdin.isatty():
            raise InvalidInput("this asks before it deletes, and there is nobody to ask: pass --yes, or --dry-run.")
        planned = act(True, None)
        _show(screen, planned)
        if not planned.total.rows:
            return
        click.confirm("Delete this?", abort=True, err=True)
    with Bar(screen, "pruning") as bar:
        pruned = act(False, lambda what, done, total: bar.update(done, total, what))
    _show(screen, pruned)


def _show(screen: Screen, pruned: Pruned) -> None:
    if screen.json:
        screen.document(asdict(pruned) | {"total": pruned.total})
        return
    gone = {table: amount for table, amount in pruned.amounts.items() if amount.rows}
    if not gone:
        screen.say("Nothing is that old." if pruned.before else "Nothing is left to evict.")
    else:
        total = pruned.total
        rows = [(table, amount.rows, size(amount.bytes)) for table, amount in gone.items()]
        screen.table(
            ["table", "would go" if pruned.dry_run else "gone", "size"], [*rows, ("", total.rows, size(total.bytes))]
        )
    if pruned.kept_jobs:
        screen.hint(
            f"{count(pruned.kept_jobs, 'job')} of that age stay, for chunks of theirs have no vector: "
            "`chunkmill retry`, `chunkmill dead drop` or `chunkmill delete` settles that."
        )


def _facts(space: CacheSpace) -> dict[str, object]:
    return asdict(space) | {"hit_rate": space.hit_rate, "recent_hit_rate": space.recent_hit_rate}


def _row(space: CacheSpace) -> tuple[object, ...]:
    return (
        space.space[:12], space.model, space.vectors, size(space.table_bytes), size(space.index_bytes),
        space.unreferenced.rows, size(space.unreferenced.bytes),
        None if space.oldest is None else f"{space.oldest.astimezone():%Y-%m-%d}",
        space.hits, _percent(space.hit_rate), _percent(space.recent_hit_rate),
    )  # fmt: skip


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def size(n_bytes: float) -> str:
    """`0 B`, `1.5 MB`, `12 GB`: powers of 1,000, as `--max-size` reads them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 10 else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("the last unit returned")
