"""`worker` and `poller`: the processes that run beside the servers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import click

from chunkmill.broker import Broker
from chunkmill.cli.output import Screen, json_option
from chunkmill.db.connect import create_db, require_migrated
from chunkmill.embedded.environment import Environment
from chunkmill.errors import InvalidInput
from chunkmill.monitor.gauges import Gauges
from chunkmill.monitor.servers import read_database
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.telemetry.exposition import MetricsServer, Process
from chunkmill.telemetry.logging import configure
from chunkmill.telemetry.metrics import Role

PASS_THROUGH = {"ignore_unknown_options": True}


@click.command(context_settings=PASS_THROUGH)
@click.argument("celery_args", nargs=-1, type=click.UNPROCESSED, metavar="[CELERY ARGS]...")
@json_option
@click.pass_obj
def worker(screen: Screen, celery_args: tuple[str, ...]) -> None:
    """Run `celery -A chunkmill_workers worker -Q gpu`, whose options it takes, on each GPU, else on the CPU.

    A worker that dies is started again, and what it held is taken back at once.
    """
    require_extra("worker", "torch", "a worker")
    Environment.load(start_embedded=False)  # a wrong setting is told here, where Celery would show a traceback
    _become("chunkmill_workers.supervisor.supervisor", *celery_args)


@click.command()
@click.option("--check", is_flag=True, help="Exit with 0 if a poller is connected to the database, else with 1.")
@json_option
@click.pass_obj
def poller(screen: Screen, check: bool) -> None:
    """Ring doorbells for whatever is due, and take back what dead workers left. One is enough; more do no harm."""
    settings = Environment.load(start_embedded=False).settings
    if check:
        connections = read_database(settings).connections.pollers
        if screen.json:
            screen.document({"connected": connections > 0, "connections": connections})
        else:
            screen.say("A poller is connected." if connections else "No poller is connected.")
        raise SystemExit(0 if connections else 1)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    configure(settings.log_level, settings.log_format)
    db = create_db(settings.require_database_url(), role="poller")
    broker = Broker.connect(settings)
    try:
        require_migrated(db)
        with _with_metrics(settings):
            Poller(db, broker, settings).run(stop)
    finally:
        broker.close()
        db.dispose()


@contextlib.contextmanager
def _with_metrics(settings: Settings) -> Iterator[None]:
    """With metrics of this poller and of the ledger, where METRICS_PORT asks for them."""
    process = Process(frozenset({Role.POLLER}), f"{socket.gethostname()}:{os.getpid()}", "poller")
    server = MetricsServer.start(settings, process)
    if server is None:
        yield
        return
    gauges = Gauges(settings)
    gauges.start()
    try:
        yield
    finally:
        gauges.stop()
        server.stop()


def require_extra(extra: str, module: str, what: str) -> None:
    """Raise :class:`InvalidInput` with the command that installs ``extra`` unless its ``module`` is there."""
    if importlib.util.find_spec(module) is None:
        raise InvalidInput(f"{what} needs more than what is installed. Run: pip install 'chunkmill[{extra}]'")


def _become(module: str, *arguments: str) -> NoReturn:
    """Replace this process by ``module``, so that the signals of whoever started this one reach it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - no shell is wanted
