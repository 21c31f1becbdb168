"""`worker` and `poller`."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import click

from chunkmill.cli.late import (
    Broker,
    ClientPart,
    Deliverer,
    Environment,
    Gauges,
    Indexer,
    MetricsServer,
    Poller,
    Process,
    Reembedder,
    Settings,
    create_db,
    read_database,
    require_migrated,
)
from chunkmill.cli.output import Screen, json_option
from chunkmill.errors import InvalidInput, install_command
from chunkmill.system.python import module_command
from chunkmill.telemetry.logging import configure
from chunkmill.telemetry.metrics import Role

logger = logging.getLogger(__name__)

LAST_SECONDS = 2.0
"""How long a poller that ends waits for its threads."""
PASS_THROUGH = {"ignore_unknown_options": True}


@click.command(context_settings=PASS_THROUGH)
@click.argument("celery_args", nargs=-1, type=click.UNPROCESSED, metavar="[CELERY ARGS]...")
@json_option
@click.pass_obj
def worker(screen: Screen, celery_args: tuple[str, ...]) -> None:
    """Run one worker for each GPU or, if there is no GPU, one worker on the CPU.

    A worker is `celery -A chunkmill_workers worker -Q gpu`; CELERY ARGS are passed on to it. A worker that dies is
    started again, and the ChunkBatches that it held go to other workers at once.
    """
    require_extra("worker", "torch", "a worker")
    Environment.load()  # reports a wrong setting here, because Celery would show a traceback
    _become("chunkmill_workers.supervisor.supervisor", *celery_args)


@click.command()
@click.option(
    "--check",
    is_flag=True,
    help="Only check: exit with 0 if any poller is connected to the database, otherwise with 1.",
)
@click.option(
    "--heartbeat",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Touch this file in each round, also while Postgres or Redis is away. If it gets older than two minutes, this "
    "poller hangs.",
)
@json_option
@click.pass_obj
def poller(screen: Screen, check: bool, heartbeat: Path | None) -> None:
    """Run a poller, which queues work that is due or was lost, and takes back the work of dead workers.

    One poller is enough, and any number is safe.
    """
    settings = Environment.load().settings
    if check:
        connections = read_database(settings).connections.pollers
        if screen.json:
            screen.document({"connected": connections > 0, "connections": connections})
        else:
            screen.say("A poller is connected." if connections else "No poller is connected.")
        raise SystemExit(0 if connections else 1)
    beat = _beating(heartbeat)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    configure(settings.log_level, settings.log_format)
    if settings.provider_problem is not None:
        logger.error("%s", settings.provider_problem)
    db = create_db(settings.require_database_url(), role="poller")
    broker = Broker.connect(settings)
    try:
        require_migrated(db)
        with _with_metrics(settings):
            threads = [
                *Indexer(db, settings).start(stop),
                *Reembedder(db, settings).start(stop),
                Deliverer(db, settings, ClientPart(db, broker, settings)._ring).start(stop),
            ]
            try:
                Poller(db, broker, settings, beat).run(stop)
            finally:
                stop.set()
                _await(threads)
    finally:
        broker.close()
        db.dispose()


def _await(threads: Iterable[threading.Thread]) -> None:
    """Wait for threads that were told to end, because Python may fail in a thread that still works while it exits.

    What takes longer, such as the build of an index, ends with the process and is left to the next poller.
    """
    until = time.monotonic() + LAST_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _beating(file: Path | None) -> Callable[[], None]:
    """What touches ``file``. Raises :class:`InvalidInput` if it cannot be written."""
    if file is None:
        return lambda: None
    try:
        file.touch()
    except OSError as error:
        raise InvalidInput(
            f"--heartbeat {file}: {error.strerror}. Name a file in a folder that this process may write."
        ) from None

    def beat() -> None:
        with contextlib.suppress(OSError):  # whoever looks at the file's age will see it
            file.touch()

    return beat


@contextlib.contextmanager
def _with_metrics(settings: Settings) -> Iterator[None]:
    """Serve the metrics of this poller and of the ledger meanwhile, if METRICS_PORT is set."""
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
    """Raise :class:`InvalidInput` with the command that installs ``extra`` if its ``module`` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise InvalidInput(f"{what} needs packages that are not installed. Run: {install_command(extra)}")


def _become(module: str, *arguments: str) -> NoReturn:
    """Replace this process with ``module``, so that signals that are meant for this process reach it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, module_command(module, *arguments))  # noqa: S606 - no shell is needed
