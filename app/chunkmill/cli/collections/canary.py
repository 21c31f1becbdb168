"""`models canary`: the reference that every worker's golden texts are compared with, and who made it."""

from __future__ import annotations

from dataclasses import asdict

import click

from chunkmill.cli.output import Screen, count, json_option
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.embedded.environment import Environment
from chunkmill.spaces import canaries, registry
from chunkmill.spaces.registry import Space


@click.command()
@click.option("--reset", metavar="SPACE", help="Forget the reference of a space, or of all spaces of a model.")
@json_option
@click.pass_obj
def canary(screen: Screen, reset: str | None) -> None:
    """Who made the reference of each space, on what and with which versions.

    A worker embeds the golden texts before it serves a space, and refuses where they differ from the reference. The
    first worker made it. If that one was the odd one out: --reset, start a worker you trust, then the others.
    """
    with Client.from_env():  # migrated and reachable
        settings = Environment.load(start_embedded=False).settings
    db = create_db(settings.require_database_url(), role="cli", pool_size=1)
    try:
        with db.begin() as conn:
            registered = registry.all_spaces(conn)
            if reset is not None:
                of_model = [space for space in registered if space.spec.model == reset]
                chosen = of_model or [registry.find_by_prefix(conn, reset)]
                forgotten = [space for space in chosen if canaries.forget(conn, space.id)]
            else:
                kept = canaries.all_kept(conn)
    finally:
        db.dispose()
    if reset is not None:
        _show_reset(screen, chosen, forgotten)
    else:
        _show(screen, {space.id: space for space in registered}, kept)


def _show(screen: Screen, by_id: dict[int, Space], kept: list[canaries.KeptCanary]) -> None:
    if screen.json:
        screen.document(
            [
                {"fingerprint": by_id[k.space_id].spec.fingerprint, "model": by_id[k.space_id].spec.model} | asdict(k)
                for k in kept
            ]
        )
    elif not kept:
        screen.say("No reference is kept yet: the first worker that serves a space makes it.")
    else:
        screen.table(
            ["space", "model", "golden texts", "made", "by", "on", "dtype", "with"],
            [
                (by_id[k.space_id].spec.fingerprint[:12], by_id[k.space_id].spec.model, f"version {k.version}",
                 f"{k.created_at:%Y-%m-%d %H:%M}", k.made_by.worker, k.made_by.device, k.made_by.dtype,
                 ", ".join(f"{package} {version}" for package, version in k.made_by.versions.items()))
                for k in kept
            ],
        )  # fmt: skip


def _show_reset(screen: Screen, chosen: list[Space], forgotten: list[Space]) -> None:
    if screen.json:
        screen.document({"forgotten": [space.spec.fingerprint for space in forgotten]})
    elif not forgotten:
        screen.say(f"{count(len(chosen), 'space')} had no reference; nothing was changed.")
    else:
        named = ", ".join(space.spec.fingerprint[:12] for space in forgotten)
        screen.say(
            f"Forgot the reference of {named}. The next worker that serves it makes it anew: start one you trust."
        )
