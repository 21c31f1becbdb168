"""The `chunkmill` command: the list of its commands, and how their errors are shown."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from types import TracebackType
from typing import Any

import click

from chunkmill.cli.output import Screen, json_option, prepare_streams
from chunkmill.domain.shown import shown
from chunkmill.errors import ChunkmillError
from chunkmill.system.python import collect_garbage_rarely, keep_children_out_of_the_folder
from chunkmill.telemetry.logging import told

NO_ARGUMENTS: tuple[type[click.UsageError], ...] = tuple(
    filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)])  # since click 8.2
)
SECTIONS = {
    "Getting started": {
        "demo": ("start.demo", "Embed and search Python's own documentation, to see it work."),
        "doctor": ("start.doctor", "Check this machine and its servers, and say what to fix."),
        "bench": ("start.bench", "Measure how fast this machine embeds, beside other libraries."),
        "tune": ("tune.command", "Find the fastest settings of this machine for a model."),
    },
    "Embedded stack": {
        "up": ("stack", "Start Postgres and Redis, and create or update the tables."),
        "down": ("stack", "Stop both servers. The data is kept."),
        "status": ("stack", "Show servers, migration, workers, doorbells and open jobs."),
        "migrate": ("stack", "Update the database's tables to this version."),
        "backup": ("backup", "Write everything that is in Postgres into one file."),
        "restore": ("backup", "Bring a backup back, here or on another machine."),
    },
    "Jobs": {
        "enqueue": ("jobs.jobs", "Read chunks from files and have them embedded."),
        "jobs": ("jobs.jobs", "List the latest jobs."),
        "job": ("jobs.jobs", "Show one job, and why chunks of it are dead."),
        "cancel": ("jobs.jobs", "Stop a job. Vectors that are already written are kept."),
        "retry": ("jobs.jobs", "Embed again what a failed or cancelled job left undone."),
        "dead": ("jobs.dead", "List, show, retry or drop the chunks that got no vector."),
    },
    "Paid routes": {
        "cost": ("paid.costs", "Show what was embedded, and what it cost."),
        "lanes": ("paid.lanes", "Show the state of the paid lanes, and resume one."),
    },
    "Collections": {
        "collections": ("collections.collections", "List the collections; drop, rename or alias one."),
        "search": ("collections.search", "Find the chunks nearest to a query."),
        "audit": ("collections.search", "Check that every chunk of a collection has its vector."),
        "index": ("collections.search", "Build a collection's serving index now."),
        "keywords": ("collections.hybrid", "Show, create or drop the keywords of a collection."),
        "golden": ("collections.hybrid", "Judge and tune searches by queries with known answers."),
        "compare": ("collections.compare", "Judge a model on a collection's own texts and queries."),
        "bridge": ("collections.bridge", "Answer queries of another model in the space of a collection."),
        "map": ("collections.map", "Draw the vectors of a collection in two dimensions."),
        "models": ("collections.search", "List the embedding spaces in the database."),
        "chunks": ("collections.chunks", "List, show and count chunks, and change their metadata."),
        "delete": ("collections.chunks", "Delete some or all chunks of a collection."),
        "reembed": ("collections.reembed", "Move a collection to another model, and come back."),
        "export": ("collections.chunks", "Write chunks and vectors into a Parquet or JSON lines file."),
    },
    "Retention": {
        "prune": ("collections.prune", "Delete old jobs, and texts and vectors that nothing uses."),
        "cache": ("collections.prune", "Show the size of each space's vectors, and evict old ones."),
    },
    "Processes": {
        "worker": ("processes.processes", "Run one worker per GPU, and restart a worker that dies."),
        "poller": ("processes.processes", "Re-queue work that is due and recover it from dead workers."),
        "gateway": ("processes.gateway", "Serve embeddings, searches, jobs and batches over HTTP."),
        "keys": ("processes.keys", "Create, list and revoke the keys of the gateway."),
        "flower": ("processes.flower", "Run Flower on 127.0.0.1, read-only and with a password."),
    },
}
"""Section → command → (module, one line). A command's module is imported when it is called."""

COMMANDS = {name: where for section in SECTIONS.values() for name, where in section.items()}


class Cli(click.Group):
    """Imports a command's module when it is called, and turns errors into one line and an exit code."""

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
                # One width for all sections, so that their second columns line up.
                formatter.write_dl([(f"{name:<8}", line) for name, (_, line) in commands.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # This is read here and not by the command's own option, so that a usage error of the command is JSON too.
        as_json = "--json" in itertools.takewhile(lambda arg: arg != "--", args)
        chosen = os.environ.get("CHUNKMILL_OUTPUT") or "auto"
        if chosen not in ("auto", "table"):
            raise click.UsageError(
                f"CHUNKMILL_OUTPUT is {shown(chosen)!r}; it must be auto, or table for tables also in a pipe."
            )
        ctx.obj = Screen(as_json=as_json, json_in_pipes=chosen == "auto")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        screen: Screen = ctx.obj
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            screen.hint("interrupted")
            ctx.exit(130)
        except click.UsageError as error:
            if not screen.asked_json:
                if isinstance(error, NO_ARGUMENTS):
                    raise  # its message is the help of a command that has commands below it
                # It quotes what was typed, or pasted.
                raise click.UsageError(shown(error.format_message()), error.ctx) from None
            screen.error("usage", error.format_message())
            ctx.exit(2)
        except (click.exceptions.Exit, click.ClickException):
            raise  # the end of --help, for which _known would import what it never needs
        except Exception as error:
            code, message = _known(error)
            if code is None:
                raise
            screen.error(code, message)
            ctx.exit(1)


def _known(error: Exception) -> tuple[str | None, str]:
    """The code and the message of an error that needs no traceback; for any other error the code is None."""
    if isinstance(error, ChunkmillError):
        return error.code, str(error)
    import redis
    import sqlalchemy as sa

    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        first = str(error.orig).strip().splitlines()[0]
        return "store_unavailable", f"Postgres went away: {first}. `chunkmill doctor` shows more."
    if isinstance(error, sa.exc.ProgrammingError) and getattr(error.orig, "sqlstate", None) == "42501":
        first = str(error.orig).strip().splitlines()[0]
        return (
            "not_allowed",
            f"Postgres refused: {first}. Use a login that may do it; docs/security.md says what each may do.",
        )
    if isinstance(error, sa.exc.DBAPIError):
        # There is no traceback on purpose: below its first line Postgres may quote rows, and rows contain texts.
        first = str(error.orig).strip().splitlines()[0]
        return "store_refused", f"Postgres refused ({type(error.orig).__name__}): {first}."
    if isinstance(error, redis.RedisError):
        return "redis_unavailable", f"Redis cannot be used: {error}. `chunkmill doctor` shows more."
    return None, ""


def _show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that nobody expected, without passwords and without the rows of Postgres."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        click.echo(shown(told(error), lines=True), err=True)


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The servers are those of DATABASE_URL and REDIS_URL or, if neither is set, the embedded stack.",
)
@json_option
@click.version_option(package_name="chunkmill", message="%(prog)s %(version)s")
def cli() -> None:
    """Turn chunks of text into vectors that are complete and searchable in Postgres."""


def main() -> None:
    collect_garbage_rarely()
    keep_children_out_of_the_folder()
    prepare_streams()
    sys.excepthook = _show_uncaught
    cli(prog_name="chunkmill")


if __name__ == "__main__":
    main()
