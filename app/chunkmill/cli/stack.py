"""`up`, `down`, `status` and `migrate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chunkmill.cli.arguments import DAYS, Quantity, picture_file, watch_options
from chunkmill.cli.late import (
    Environment,
    Fault,
    Settings,
    Stack,
    StackStatus,
    Status,
    connected_processes,
    create_db,
    read_database,
    read_status,
    sa,
    unconfirmed_line,
    user_name,
    write_migrations,
)
from chunkmill.cli.late import migrate as run_migrations
from chunkmill.cli.output import Screen, beginning, count, json_option
from chunkmill.cli.paid.lanes import lane_fields, lane_lines
from chunkmill.domain.lanes import Lane
from chunkmill.errors import InvalidInput, InvalidSetting, StoreUnavailable
from chunkmill.telemetry.logging import without_passwords

if TYPE_CHECKING:
    from chunkmill.monitor.present import Presence
    from chunkmill.monitor.reports import Kind

SHOWN_FAULTS, FAULT_COLUMNS = 5, 160
SHOWN_WORKERS = 4


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="TCP port on 127.0.0.1 at which Postgres listens too. Every user of this machine can reach it. The port is "
    "remembered; 0 forgets it.",
)
@click.option(
    "--redis-port", type=click.IntRange(0, 65535),
    help="TCP port on 127.0.0.1 at which Redis listens too. Every user of this machine can reach it. The port is "
    "remembered; 0 forgets it.",
)  # fmt: skip
@json_option
@click.pass_obj
def up(screen: Screen, port: int | None, redis_port: int | None) -> None:
    """Start the embedded Postgres and Redis, and create or update the tables.

    The servers keep running after this command; `chunkmill down` stops them. Servers that already run are left as
    they are. The data is kept in CHUNKMILL_HOME or, if that is not set, in the user's data folder; root's is
    /var/lib/chunkmill-stack, and its servers run as the system user chunkmill.

    Without a port, only you can connect. Every user of this machine can reach a port, so it asks for a password. The
    password is made once and written into addresses.env in the data folder, a file that only you can read. Whoever has
    it can read and change everything in this stack, but is not a superuser: they can neither write files nor run
    programs.
    """
    settings = Settings.from_env()
    stack = Stack(settings.chunkmill_home, port=port, redis_port=redis_port)
    before = stack.status()
    status = stack.up()
    run_migrations(_addressed(status).require_database_url())
    _show_stack(screen, status, before=before)
    if settings.database_url or settings.redis_url:
        screen.hint("DATABASE_URL or REDIS_URL is set, so the other commands do not use this stack.")
    elif not screen.json:
        screen.say("")
        screen.say("Every command finds these servers by itself while they run.")
        screen.say("Next, start ", ("chunkmill worker", "bold"), " and, in another terminal, ",
                   ("chunkmill poller", "bold"))  # fmt: skip


@click.command()
@json_option
@click.pass_obj
def down(screen: Screen) -> None:
    """Stop the embedded Postgres and Redis. The data is kept for the next `up`."""
    stack = Stack(Settings.from_env().chunkmill_home)
    was_up = stack.status()
    connected = _still_connected(was_up)
    status = stack.down()
    if screen.json:
        screen.document(_stack_fields(status) | {"were_connected": connected})
        return
    for before in (was_up.postgres, was_up.redis):
        pid = f" (pid {before.pid})" if before.pid else ""
        screen.say(f"{before.name:<8}  ", "stopped" if before.pid else "was not running", pid)
    screen.say(("data      ", "dim"), f"kept in {status.home}")
    if connected:
        said = ", ".join(count(n, role) for role, n in connected.items())
        screen.say("")
        screen.hint(
            f"These connections of Chunkmill were open, and are cut: {said}. Workers and pollers wait for the servers, "
            "and go on when they are up again: chunkmill up"
        )


def _still_connected(status: StackStatus) -> dict[str, int]:
    """How many connections each kind of process has to the database. None if it does not answer."""
    if not status.postgres.running:
        return {}
    db = create_db(status.database_url, role="down", pool_size=1)
    try:
        with db.connect() as conn:
            return connected_processes(conn)
    except sa.exc.DBAPIError:
        return {}  # it is to be stopped anyway, and who was connected is only said
    finally:
        db.dispose()


@click.command()
@click.option(
    "--watch", "watching", is_flag=True, help="Show lanes, rates, jobs, money and faults, and keep them up to date."
)
@watch_options
@click.option("--plot", is_flag=True, help="Draw tokens, padding and waiting times of the last day.")
@click.option(
    "--last",
    type=Quantity("time span", DAYS, "s", "90min, 24h or 7d"),
    metavar="SPAN",
    help="How far --plot looks back.  [default: 24h, or less if the first work was later]",
)
@click.option(
    "--picture", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), callback=picture_file,
    help="Also write the drawing of --plot into a .png or .svg file.",
)  # fmt: skip
@json_option
@click.pass_obj
def status(
    screen: Screen,
    watching: bool,
    every: float,
    times: int | None,
    plot: bool,
    last: float | None,
    picture: Path | None,
) -> None:
    """Show the servers, the migration, workers, doorbells and open jobs. Nothing is started."""
    if plot and watching:
        raise click.UsageError("--plot and --watch exclude each other.")
    settings = Settings.from_env()
    if bool(settings.database_url) != bool(settings.redis_url):
        raise InvalidSetting(
            "Only one of DATABASE_URL and REDIS_URL is set. Set both, or neither to use the embedded stack."
        )
    if watching:
        from chunkmill.cli.watch.watch import watch

        embedded = None if settings.database_url else Stack(settings.chunkmill_home).status()
        watch(screen, _addressed(embedded) if embedded else settings, every=every, times=times)
        return
    if plot or picture is not None:
        from chunkmill.cli.watch.plot import plot as draw_history

        draw_history(screen, Environment.load().settings, seconds=last, picture=picture)
        return
    if not settings.database_url:
        stack = Stack(settings.chunkmill_home).status()
        if not stack.running:
            _show_stack(screen, stack)
            if not screen.json:
                screen.say("")
                screen.say("To start it: ", ("chunkmill up", "bold"))
            return
        _show_stack(screen, stack, read_status(_addressed(stack)))
        return
    live = read_status(settings)
    urls = {
        "database_url": _for_psql(without_passwords(settings.require_database_url())),
        "redis_url": without_passwords(settings.require_redis_url()),
    }
    if screen.json:
        screen.document({"embedded": False, **urls, **_status_fields(live)})
        return
    screen.fields({"DATABASE_URL": urls["database_url"], "REDIS_URL": urls["redis_url"]})
    _show_status(screen, live)


@click.command()
@click.option("--revision", default="head", show_default=True, help="Name of the migration to upgrade to.")
@click.option(
    "--sql", "as_sql", is_flag=True,
    help="Do not connect to a database, but write the SQL for psql. It is for an empty database. For one that was "
    "migrated before, name its revision too: --revision 0008:head.",
)  # fmt: skip
@json_option
@click.pass_obj
def migrate(screen: Screen, revision: str, as_sql: bool) -> None:
    """Update the database's tables to this version.

    This is safe while workers run, and from several machines at once. If a newer release has migrated the database,
    nothing is done. Exits with 75 if that release does not allow this one beside it.
    """
    from alembic.util import CommandError

    try:
        if as_sql:
            write_migrations(revision, Settings.from_env().database_schema)
            return
        settings = Environment.load().settings
        before = read_database(settings)
        try:
            run_migrations(settings.require_database_url(), revision)
        except StoreUnavailable as error:
            if not before.is_newer:
                raise
            screen.error(error.code, str(error))
            raise SystemExit(os.EX_TEMPFAIL) from None
    except CommandError as error:
        raise InvalidInput(
            f"the migration {revision!r} cannot be found or reached: {error}. Name an existing later one, or leave "
            "--revision out."
        ) from None
    after = read_database(settings).migration
    if screen.json:
        screen.document({"before": before.migration, "after": after})
    elif before.is_newer:
        screen.say(
            f"The database is at migration {after}, which is newer than this release ({before.head}) and allows it: "
            "there is nothing to do."
        )
    elif before.migration == after:
        screen.say(f"The database is already at migration {after}.")
    else:
        screen.say(f"Migrated from {before.migration or 'an empty database'} to {after}.")


def _addressed(status: StackStatus) -> Settings:
    return Settings.from_env(database_url=status.database_url, redis_url=status.redis_url)


def _stack_fields(status: StackStatus) -> dict[str, object]:
    servers = {
        s.name: {
            "running": s.running,
            "pid": s.pid,
            "version": s.version,
            "url": _for_psql(without_passwords(s.url)),
            "log": s.log,
        }
        for s in (status.postgres, status.redis)
    }
    return {
        "embedded": True,
        "home": status.home,
        "running": status.running,
        "addresses": status.addresses,
        **servers,
    }


def _show_stack(
    screen: Screen, status: StackStatus, live: Status | None = None, *, before: StackStatus | None = None
) -> None:
    """``before`` is what ran before this command: which servers it started is said too."""
    servers = (status.postgres, status.redis)
    ran = {s.pid for s in (before.postgres, before.redis) if s.running} if before else set()
    if screen.json:
        started = {"started": [s.name for s in servers if s.pid not in ran]} if before else {}
        screen.document(_stack_fields(status) | started | (_status_fields(live) if live else {}))
        return
    screen.say(("Embedded stack ", "bold"), f"in {status.home}")
    screen.say("")
    states = [
        _state(s.running, s.pid) if before is None else "ran already" if s.pid in ran else "started" for s in servers
    ]
    rows = [(s.name, state, s.version, str(s.pid) if s.pid else None) for s, state in zip(servers, states, strict=True)]
    screen.table(["server", "state", "version", "pid"], rows)
    screen.say("")
    addresses = {
        "DATABASE_URL": _for_psql(without_passwords(status.database_url)),
        "REDIS_URL": without_passwords(status.redis_url),
    }
    if status.addresses:
        addresses["with passwords"] = str(status.addresses)
    screen.fields({**addresses, "logs": status.postgres.log, "": status.redis.log})
    if status.addresses:
        screen.say("")
        screen.hint(
            "Every user of this machine can reach these ports, and whoever has the password of one can read and change "
            f"everything behind it. Only {user_name(os.geteuid())} can read the file with the passwords."
        )
    if live is not None:
        _show_status(screen, live)


def _for_psql(url: str) -> str:
    """The address as psql takes it too; SQLAlchemy adds the driver to it."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)


def _state(running: bool, pid: int | None) -> str:
    return "running" if running else "down" if pid is None else "not answering"


def _status_fields(status: Status) -> dict[str, object]:
    """The JSON of a status."""
    from chunkmill.broker import QUEUE

    database: dict[str, object] = {"error": status.database_error}
    if status.database:
        there = status.database.present
        connections = there.connections
        lanes, faults = _lanes_and_faults(status)
        database = {
            "version": status.database.version,
            "migration": status.database.migration,
            "head": status.database.head,
            "workers": there.count("local"),
            "provider_workers": there.count("provider"),
            "worker_connections": connections.workers,
            "provider_connections": connections.provider_workers,
            "poller_connections": connections.pollers,
            "open_jobs": status.open_jobs,
            "undelivered_jobs": status.undelivered_jobs,
            "lanes": [lane_fields(lane) for lane in lanes],
            "faults": [asdict(fault) for fault in faults],
            "money_usd": asdict(status.snapshot.money) if status.snapshot else None,
        }
    broker: dict[str, object] = {"error": status.redis_error}
    if status.redis and status.doorbells is not None:
        broker = {"version": status.redis.version, "doorbells": status.doorbells[QUEUE]}
    return {"database": database, "broker": broker}


def _show_status(screen: Screen, status: Status) -> None:
    from chunkmill.broker import QUEUE
    from chunkmill.monitor.present import START_POLLER, START_PROVIDER_WORKER, START_WORKER

    shown: dict[str, object] = {}
    database = status.database
    lanes, faults = _lanes_and_faults(status)
    if database is None:
        shown["Postgres"] = status.database_error
    else:
        level = database.migration or "none"
        if database.is_migrated:
            shown["migration"] = f"{level}, up to date"
        elif database.is_newer:
            shown["migration"] = f"{level}, newer than this release ({database.head})"
        else:
            shown["migration"] = f"{level}, needs {database.head}: chunkmill migrate"
        there = database.present
        shown["workers"] = _workers(there, "local", START_WORKER)
        if there.has("provider") or any(lane.open for lane in lanes):
            shown["openai"] = _workers(there, "provider", START_PROVIDER_WORKER)
        shown["pollers"] = "connected" if there.connections.pollers else f"none connected; to start one: {START_POLLER}"
        waits = f"{status.undelivered_jobs:,} in the outbox" if status.undelivered_jobs else None
        shown["open jobs"] = f"{status.open_jobs:,}, of which {waits}" if waits else status.open_jobs
        shown |= lane_lines(lanes)
        if status.snapshot and (unconfirmed := unconfirmed_line(status.snapshot.money)):
            shown["money"] = unconfirmed
    if status.doorbells is None:
        shown["Redis"] = status.redis_error
    else:
        shown["doorbells"] = f"{status.doorbells[QUEUE]:,} in Redis"
    screen.say("")
    screen.fields(shown)
    if faults:
        screen.say("")
        screen.table(
            ["when", "fault", "where and why"],
            [
                (f"{fault.at.astimezone():%m-%d %H:%M:%S}", fault.what, beginning(fault.line, FAULT_COLUMNS))
                for fault in faults[:SHOWN_FAULTS]
            ],
        )


def _lanes_and_faults(status: Status) -> tuple[Sequence[Lane], Sequence[Fault]]:
    return (status.snapshot.lanes, status.snapshot.faults) if status.snapshot else ((), ())


def _workers(there: Presence, kind: Kind, command: str) -> str:
    """How many workers serve a queue, and the names of a few."""
    from chunkmill.monitor.present import READY_SECONDS

    ready = [worker.label for worker in there.live if worker.serves(kind)]
    if ready:
        more = f" and {len(ready) - SHOWN_WORKERS:,} more" if len(ready) > SHOWN_WORKERS else ""
        return f"{len(ready):,} ready: {', '.join(ready[:SHOWN_WORKERS])}{more}"
    if there.has(kind) or (kind == "local" and there.is_starting):
        return f"none ready yet; one is starting, which takes some {READY_SECONDS} s"
    return f"none connected; to start one: {command}"
