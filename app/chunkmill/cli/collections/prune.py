"""`prune`, `cache` and `cache evict`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict

import click

from chunkmill.cli.arguments import BYTES, DAYS, Quantity
from chunkmill.cli.late import Client
from chunkmill.cli.output import Group, Screen, count, json_option
from chunkmill.cli.progress import Bar
from chunkmill.domain.retention import CacheSpace, OnProgress, Pruned
from chunkmill.errors import InvalidInput

AGE = Quantity("age", DAYS, "d", "30d")
SIZE = Quantity("size", BYTES | {"b": 1.0}, "b", "50GB")

dry_run_option = click.option("--dry-run", is_flag=True, help="Only count what would be deleted.")
yes_option = click.option("--yes", is_flag=True, help="Delete without asking.")


@click.command()
@click.option(
    "--older-than", type=AGE, default="30d", show_default=True, metavar="AGE", help="Minimum age, such as 90d or 12h."
)
@dry_run_option
@yes_option
@json_option
@click.pass_obj
def prune(screen: Screen, older_than: float, dry_run: bool, yes: bool) -> None:
    """Delete jobs that finished more than --older-than ago, and texts and vectors that no collection refers to.

    It first counts, and asks before it deletes. It is safe while workers run. Deleting a job also deletes its
    attempts, its usage, its dead list and its idempotency key; charges are kept, because they are the bill. A failed
    or cancelled job is kept as long as one of its chunks has no vector. Spaces that nothing refers to any more are
    dropped. Postgres reuses the freed pages; only VACUUM FULL returns them to the disk.
    """
    with Client.from_env() as client:
        _run(
            screen,
            lambda dry, progress: client.prune(older_than, dry_run=dry, on_progress=progress),
            dry_run=dry_run,
            yes=yes,
        )


@click.group(cls=Group, invoke_without_command=True)
@click.option(
    "--recent", type=AGE, default="7d", show_default=True, metavar="AGE", help="Age up to which a hit counts as recent."
)
@json_option
@click.pass_context
def cache(ctx: click.Context, recent: float) -> None:
    """Show the number and size of each space's vectors, and how often an enqueue found vectors that it needed.

    "unreferenced" is what `chunkmill cache evict` can delete: vectors whose text is in no chunk of a collection of
    that space. Hits are counted over the jobs that have not been deleted.
    """
    if ctx.invoked_subcommand is not None:
        return
    screen: Screen = ctx.obj
    with Client.from_env() as client:
        spaces = client.cache(recent=recent)
    if screen.json:
        screen.document({"spaces": [_fields(space) for space in spaces]})
    elif not spaces:
        screen.say("No space is registered yet. The first enqueue or the first worker registers one.")
    else:
        heads = ["space", "model", "vectors", "table", "index", "unreferenced", "size", "oldest", "hits", "rate",
                 f"last {recent:g} days"]  # fmt: skip
        screen.table(heads, map(_row, spaces))


@cache.command()
@click.option(
    "--older-than", type=AGE, metavar="AGE", help="Evict texts that were stored longer ago than this, such as 90d."
)
@click.option(
    "--max-size", type=SIZE, metavar="SIZE", help="Evict the oldest until no more than this is left, such as 50GB."
)
@click.option("--space", metavar="SPACE", help="Evict only from the space whose fingerprint starts with this.")
@dry_run_option
@yes_option
@json_option
@click.pass_obj
def evict(
    screen: Screen, older_than: float | None, max_size: float | None, space: str | None, dry_run: bool, yes: bool
) -> None:
    """Delete vectors and texts that no collection refers to.

    It deletes the oldest until the age or the size is reached. It first counts, and asks before it deletes. It is safe
    while workers run. The age of a text counts from when it was first stored.
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
        if screen.asked_json or not sys.stdin.isatty():
            raise InvalidInput(
                "this command asks before it deletes, and stdin is not a terminal: pass --yes to delete at once, or "
                "--dry-run."
            )
        planned = act(True, None)
        _show(screen, planned)
        if not planned.total.rows and not planned.spaces:
            return
        click.confirm("Delete this?", abort=True, err=True)
    with Bar(screen, "pruning") as bar:
        pruned = act(False, lambda what, done, total: bar.update(done, total, what))
    _show(screen, pruned)


def _show(screen: Screen, pruned: Pruned) -> None:
    if screen.json:
        screen.document(asdict(pruned) | {"total": pruned.total})
        return
    deleted = {table: amount for table, amount in pruned.amounts.items() if amount.rows}
    if not deleted and not pruned.spaces:
        screen.say("Nothing is old enough." if pruned.before else "Nothing is left to evict.")
    if deleted:
        total = pruned.total
        rows = [(table, amount.rows, size(amount.bytes)) for table, amount in deleted.items()]
        screen.table(
            ["table", "would be deleted" if pruned.dry_run else "deleted", "size"],
            [*rows, ("", total.rows, size(total.bytes))],
        )
    if pruned.spaces:
        screen.say(
            f"{count(len(pruned.spaces), 'space')} that nothing refers to {'would be' if pruned.dry_run else 'were'} "
            f"dropped: {', '.join(fingerprint[:12] for fingerprint in pruned.spaces)}"
        )
    if pruned.kept_jobs:
        screen.hint(
            f"{count(pruned.kept_jobs, 'old job')} kept, because some chunks have no vector: run "
            "`chunkmill retry JOB`, `chunkmill dead drop --job JOB` or `chunkmill delete COLLECTION` first."
        )


def _fields(space: CacheSpace) -> dict[str, object]:
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
    """`0 B`, `1.5 MB`, `12 GB`, in powers of 1,000, as `--max-size` reads them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 10 else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("the last unit returned")
