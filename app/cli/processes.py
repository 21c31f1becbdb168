"""`worker`, `poller` and `flower`: the processes that run beside the servers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import threading
from typing import NoReturn

import click

from app.broker import Broker
from app.cli.inspect import look_at_database
from app.cli.output import Screen, json_option
from app.db.connect import create_db, require_migrated
from app.environment import Environment
from app.errors import InvalidInput
from app.telemetry.logging import configure

PASS_THROUGH = {"ignore_unknown_options": True}
FLOWER_DEFAULTS = {"address": "127.0.0.1", "read_only": "True", "purge_offline_workers": "600"}
"""Flower's own defaults are all interfaces, control of the workers by anyone, and to keep every host for ever."""


@click.command(context_settings=PASS_THROUGH)
@click.argument("celery_args", nargs=-1, type=click.UNPROCESSED, metavar="[CELERY ARGS]...")
@json_option
@click.pass_obj
def worker(screen: Screen, celery_args: tuple[str, ...]) -> None:
    """Run `celery -A workers worker -Q gpu`, whose options it takes, on each GPU, else on the CPU.

    A worker that dies is started again, and what it held is taken back at once.
    """
    require_extra("worker", "torch", "a worker")
    Environment.load(start_embedded=False)  # a wrong setting is told here, where Celery would show a traceback
    _become("workers.supervisor", *celery_args)


@click.command()
@click.option("--check", is_flag=True, help="Exit with 0 if a poller is connected to the database, else with 1.")
@json_option
@click.pass_obj
def poller(screen: Screen, check: bool) -> None:
    """Ring doorbells for whatever is due, and take back what dead workers left. One is enough; more do no harm."""
    settings = Environment.load(start_embedded=False).settings
    if check:
        connections = look_at_database(settings).poller_connections
        if screen.json:
            screen.document({"connected": connections > 0, "connections": connections})
        else:
            screen.say("A poller is connected." if connections else "No poller is connected.")
        raise SystemExit(0 if connections else 1)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    configure()
    db = create_db(settings.require_database_url(), role="poller")
    broker = Broker.connect(settings)
    # By name and only here: `app` never imports `workers`, so that a producer can be installed without them.
    module = importlib.import_module("workers.poller")
    try:
        require_migrated(db)
        module.Poller(db, broker, settings).run(stop)
    finally:
        broker.close()
        db.dispose()


@click.command(context_settings=PASS_THROUGH)
@click.argument("flower_args", nargs=-1, type=click.UNPROCESSED, metavar="[FLOWER ARGS]...")
@json_option
@click.pass_obj
def flower(screen: Screen, flower_args: tuple[str, ...]) -> None:
    """Run Flower, Celery's monitor, on 127.0.0.1:5555, read-only. Takes Flower's options.

    It shows doorbells and workers; `chunkmill status` and `jobs` show the work itself.
    """
    require_extra("flower", "flower", "Flower")
    Environment.load(start_embedded=False)
    _become("celery", "-A", "workers", "flower", *flower_defaults(flower_args), *flower_args)


def flower_defaults(given: tuple[str, ...]) -> list[str]:
    """Our defaults for the options that neither the arguments nor Flower's environment variables set."""
    named = {arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in given}
    return [
        f"--{name}={value}"
        for name, value in FLOWER_DEFAULTS.items()
        if name not in named and f"FLOWER_{name.upper()}" not in os.environ
    ]


def require_extra(extra: str, module: str, what: str) -> None:
    """Raise :class:`InvalidInput` with the command that installs ``extra`` unless its ``module`` is there."""
    if importlib.util.find_spec(module) is None:
        raise InvalidInput(f"{what} needs more than what is installed. Run: pip install 'chunkmill[{extra}]'")


def _become(module: str, *arguments: str) -> NoReturn:
    """Replace this process by ``module``, so that the signals of whoever started this one reach it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - no shell is wanted
