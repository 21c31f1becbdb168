"""`backup` and `restore`."""

from __future__ import annotations

from pathlib import Path

import click

from chunkmill.cli.output import Screen, json_option


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@click.pass_obj
def backup(screen: Screen, file: Path) -> None:
    """Write everything that Chunkmill has in Postgres into FILE.

    The backup is the state of one moment. Producers and workers go on meanwhile. The file holds texts, vectors, jobs
    and the digests of keys, so only you can read it. It does not hold serving indexes and views, which are made again
    automatically. An existing FILE is never replaced. Redis needs no backup.

    It needs pg_dump of the server's version or a later one; the command finds those of the embedded stack and those of
    your system.
    """
    from chunkmill.cli.archives import write_backup

    write_backup(screen, file)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--replace", is_flag=True, help="Delete the installation that is in the database, with all its data.")
@click.option("--yes", is_flag=True, help="Replace it without asking.")
@json_option
@click.pass_obj
def restore(screen: Screen, file: Path, replace: bool, yes: bool) -> None:
    """Bring back what `chunkmill backup` wrote into FILE.

    The database must be new, or as `chunkmill up` or `chunkmill migrate` made it; with --replace it may hold another
    installation, which is deleted. A schema with tables of other programs is refused. Stop workers, pollers, gateways
    and producers first. It is one transaction: if it does not reach its end, nothing has changed.

    Work that was open continues. A paid lane that had open work, or that may get some, is stopped: what was sent to
    the provider after the backup is not in it, and would be paid for again.

    Restore only a file that you trust: whoever made it chose the SQL that runs.
    """
    from chunkmill.cli.archives import read_backup

    read_backup(screen, file, replace=replace, yes=yes)
