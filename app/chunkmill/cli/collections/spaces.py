"""`models drop`."""

from __future__ import annotations

import sys

import click

from chunkmill.cli.late import Client
from chunkmill.cli.output import Screen, json_option
from chunkmill.errors import InvalidInput


@click.command()
@click.argument("space")
@click.option("--yes", is_flag=True, help="Drop without asking.")
@json_option
@click.pass_obj
def drop(screen: Screen, space: str, yes: bool) -> None:
    """Drop SPACE, the beginning of a fingerprint, with the vectors that are left in it.

    Only a space that nothing refers to is dropped: no collection, no job, nothing at a provider, and no line of the
    bill. `chunkmill prune` drops such spaces by itself once they have no vector.
    """
    if not yes:
        if screen.asked_json or not sys.stdin.isatty():
            raise InvalidInput(
                "models drop asks before it drops, and stdin is not a terminal: pass --yes to drop without asking."
            )
        click.confirm(f"Drop space {space!r} and all of its vectors?", abort=True, err=True)
    with Client.from_env() as client:
        client.drop_space(space)
    if screen.json:
        screen.document({"dropped": space})
    else:
        screen.say(f"Dropped space {space}.")
