"""The Celery application that ``celery -A chunkmill_workers`` finds. Only a worker that starts loads a model."""

from __future__ import annotations

import logging
from typing import Any

import click
from celery import signals
from celery.apps import worker as celerys
from click.core import ParameterSource

from chunkmill.broker import QUEUE, make_celery
from chunkmill.embedded.environment import Environment
from chunkmill.messages.transport import use_our_transport
from chunkmill.system.python import collect_garbage_rarely
from chunkmill.telemetry import tracing
from chunkmill.telemetry.logging import configure, log_in_handler, without_passwords
from chunkmill_workers import tasks
from chunkmill_workers.process.worker import WorkerProcess, fatal_errors, host_name, require_usable

logger = logging.getLogger(__name__)

collect_garbage_rarely()
use_our_transport()
with fatal_errors():
    # Flower and `celery inspect` come here, too, and need only Redis.
    environment = Environment.load(needs_database=False)
    app = make_celery(environment.settings)
    app.conf.worker_consumer = "chunkmill_workers.process.consumer:Consumer"
tasks.register(app)
worker = WorkerProcess(environment.settings, {QUEUE})
"""This process, if Celery starts it as a worker."""


def _is_typed(option: str) -> bool:
    """Whether ``option`` was given on Celery's command line."""
    command = click.get_current_context(silent=True)
    return command is not None and command.get_parameter_source(option) is ParameterSource.COMMANDLINE


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _set_up_logging(loglevel: int | str | None = None, **_: Any) -> None:
    settings = environment.settings
    # Only a typed level counts: Celery's own default, WARNING, would hide the line that says that the worker is ready.
    typed = loglevel if _is_typed("loglevel") else None
    configure(settings.log_level if typed is None else typed, settings.log_format)


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _begin(instance: Any = None, options: dict[str, Any] | None = None, **_: Any) -> None:
    """Take the worker's queues and name: the queues say what it does, and the name says which device it uses."""
    given = options or {}
    chosen = given.get("queues") or [QUEUE]
    worker.queues = set(chosen.split(",") if isinstance(chosen, str) else chosen)
    configure(environment.settings.log_level, environment.settings.log_format)
    with fatal_errors():
        Environment.load()  # a worker needs both addresses
        require_usable(worker.queues, autoscale=given.get("autoscale"), pool=given.get("pool"))
        worker.leave_out_provider()
        tracing.configure("chunkmill-worker")
        if QUEUE in worker.queues:
            worker.claim_device()
    if instance is not None:
        instance.hostname = host_name(instance.hostname, worker.name)


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _start(sender: Any = None, **_: Any) -> None:
    sender.quiet = True  # a log has no room for Celery's banner; what it would say is said below
    # Without -Q, Celery would also take the doorbells of the other queue, which this process cannot answer.
    app.amqp.queues.select(worker.queues)
    # Celery has set the number from its configuration or from -c by now. The number from -c stays.
    if click.get_current_context(silent=True) is not None and not _is_typed("concurrency"):
        sender.concurrency = worker.concurrency
    with fatal_errors():
        worker.start(sender.hostname)
    queues = " and ".join(sorted(worker.queues))
    logger.info("takes work of queue %s from %s; tasks at a time: %s", queues, _broker_address(), sender.concurrency)


def _broker_address() -> str:
    return without_passwords(environment.settings.require_redis_url())


def _say_safely(message: str, _: Any = None) -> None:
    log_in_handler(celerys.__name__, message)


# Celery's signal handlers would write their sentences between the lines of the log.
celerys.safe_say = _say_safely


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _watch(**_: Any) -> None:
    worker.watch()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _drain(**_: Any) -> None:
    worker.drain()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _close(**_: Any) -> None:
    worker.close()
