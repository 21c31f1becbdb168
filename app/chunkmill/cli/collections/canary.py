"""`models canary`."""

from __future__ import annotations

from dataclasses import asdict

import click

from chunkmill.cli.late import Client, Environment, Space, canaries, create_db, forget_model, registry
from chunkmill.cli.output import Screen, count, json_option


@click.command()
@click.option("--reset", metavar="SPACE", help="Delete the reference of this space, or of all spaces of this model.")
@json_option
@click.pass_obj
def canary(screen: Screen, reset: str | None) -> None:
    """Show which worker made each space's reference vectors.

    It also shows the worker's device and its versions. A worker embeds the golden texts before it serves a space, and
    refuses to serve it if its vectors differ too much from the reference, which the first worker made. If that first
    worker was the faulty one, delete its reference with --reset, start a worker that you trust, and then start the
    others. In a space that a provider serves, --reset forgets which model answered; the next answer of the provider
    names it again.
    """
    with Client.from_env():  # checks that the database is migrated and reachable
        settings = Environment.load().settings
    db = create_db(settings.require_database_url(), role="cli", pool_size=1)
    try:
        with db.begin() as conn:
            registered = registry.all_spaces(conn)
            if reset is not None:
                of_model = [space for space in registered if space.spec.model == reset]
                chosen = of_model or [registry.find_by_prefix(conn, reset)]
                deleted = [space for space in chosen if canaries.forget(conn, space.id) + forget_model(conn, space.id)]
            else:
                kept = canaries.all_kept(conn)
    finally:
        db.dispose()
    if reset is not None:
        _show_reset(screen, chosen, deleted)
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
        screen.say("There is no reference yet. The first worker that serves a space makes it.")
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


def _show_reset(screen: Screen, chosen: list[Space], deleted: list[Space]) -> None:
    if screen.json:
        screen.document({"forgotten": [space.spec.fingerprint for space in deleted]})
    elif not deleted:
        screen.say(f"{count(len(chosen), 'space')} had no reference; nothing was changed.")
    else:
        named = ", ".join(space.spec.fingerprint[:12] for space in deleted)
        screen.say(
            f"Deleted the reference of {named}. The next worker that serves the space makes a new one: start one that "
            "you trust. In a provider's space, the model of its next answer is the reference."
        )
