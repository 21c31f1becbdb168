"""The `chunkmill` command: the list of commands, and what becomes of their errors."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import click

from chunkmill.cli.output import Screen, json_option, prepare_streams
from chunkmill.errors import ChunkmillError

SECTIONS = {
    "Begin": {
        "demo": ("start.demo", "See it work: a real model on Python's own documentation."),
        "doctor": ("start.doctor", "Check this machine and its servers; say what to mend."),
        "bench": ("start.bench", "Measure this machine, beside other libraries."),
        "tune": ("tune.command", "Find this machine's best settings for a model."),
    },
    "Embedded stack": {
        "up": ("stack", "Start Postgres and Redis in a data folder, and migrate."),
        "down": ("stack", "Stop them; the data stays."),
        "status": ("stack", "Servers, migration, workers, doorbells, open jobs."),
        "migrate": ("stack", "Bring the database's tables up to this version."),
    },
    "Jobs": {
        "enqueue": ("jobs.jobs", "Read chunks from files and have them embedded."),
        "jobs": ("jobs.jobs", "The latest jobs."),
        "job": ("jobs.jobs", "One job, and why chunks of it are dead."),
        "cancel": ("jobs.jobs", "Stop a job; vectors already written stay."),
        "retry": ("jobs.jobs", "Try again what a job left without a vector."),
        "dead": ("jobs.dead", "Chunks without a vector: list, show, retry or drop."),
    },
    "Paid routes": {
        "cost": ("paid.costs", "What was embedded and what it cost, beside local work."),
        "lanes": ("paid.lanes", "What paid lanes do or wait for; resume one."),
    },
    "Collections": {
        "search": ("collections.search", "The chunks nearest to a query."),
        "audit": ("collections.search", "Has every chunk of a collection its vector?"),
        "index": ("collections.search", "Build the HNSW index of a collection's space."),
        "models": ("collections.search", "The embedding spaces in the database."),
        "delete": ("collections.search", "Delete chunks, or all of a collection's."),
    },
    "Retention": {
        "prune": ("collections.prune", "Drop old jobs, and what no collection refers to."),
        "cache": ("collections.prune", "Vectors by space: size, hits; evict what is old."),
    },
    "Processes": {
        "worker": ("processes.processes", "Run a worker per GPU; start it again when it dies."),
        "poller": ("processes.processes", "Run the loop that rings for what is due."),
        "flower": ("processes.flower", "Run Flower on 127.0.0.1, read-only, with a password."),
    },
}
"""Section → command → (module, one line). A command's module is imported when it is called."""

COMMANDS = {name: where for section in SECTIONS.values() for name, where in section.items()}


class Cli(click.Group):
    """Imports a command's module on demand, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"chunkmill.cli.{COMMANDS[cmd_name][0]}"), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"chunkmill.cli.{COMMANDS[cmd_name][0]}.{cmd_name} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                # One width for all sections, so that the second columns stand below each other.
                formatter.write_dl([(f"{name:<8}", line) for name, (_, line) in commands.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Seen here and not by the command's own option, so that a usage error of the command is JSON too.
        as_json = "--json" in itertools.takewhile(lambda arg: arg != "--", args)
        ctx.obj = Screen(as_json=as_json)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        screen: Screen = ctx.obj
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            screen.hint("interrupted")
            ctx.exit(130)
        except click.UsageError as error:
            if not screen.json:
                raise
            screen.error("usage", error.format_message())
            ctx.exit(2)
        except Exception as error:
            code, message = _known(error)
            if code is None:
                raise
            screen.error(code, message)
            ctx.exit(1)


def _known(error: Exception) -> tuple[str | None, str]:
    """Code and message of an error that needs no traceback; code None for any other."""
    if isinstance(error, ChunkmillError):
        return error.code, str(error)
    import redis
    import sqlalchemy as sa

    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        first = str(error.orig).strip().splitlines()[0]
        return "store_unavailable", f"Postgres went away: {first}. `chunkmill doctor` shows more."
    if isinstance(error, sa.exc.ProgrammingError) and getattr(error.orig, "sqlstate", None) == "42501":
        first = str(error.orig).strip().splitlines()[0]
        return "not_allowed", f"Postgres refuses: {first}. Run this as the role that owns the tables: docs/security.md."
    if isinstance(error, sa.exc.DBAPIError):
        # Without a traceback on purpose: below its first line Postgres may quote rows, which hold texts.
        first = str(error.orig).strip().splitlines()[0]
        return "store_refused", f"Postgres refused ({type(error.orig).__name__}): {first}."
    if isinstance(error, redis.RedisError):
        return "redis_unavailable", f"Redis cannot be used: {error}. `chunkmill doctor` shows more."
    return None, ""


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Servers: DATABASE_URL and REDIS_URL, or, with neither set, the embedded stack.",
)
@json_option
@click.version_option(package_name="chunkmill", message="%(prog)s %(version)s")
def cli() -> None:
    """Text chunks in, complete searchable vectors in Postgres."""


def main() -> None:
    prepare_streams()
    cli(prog_name="chunkmill")


if __name__ == "__main__":
    main()
