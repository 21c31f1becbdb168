"""``celery -A chunkmill_workers`` finds ``app`` here. Importing this file loads no model; starting a worker does."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import click
from celery import signals
from click.core import ParameterSource

from chunkmill.broker import PROVIDER_QUEUE, QUEUE, Broker, make_celery
from chunkmill.embedded.environment import Environment
from chunkmill.errors import ChunkmillError
from chunkmill.settings import Settings
from chunkmill.telemetry import tracing
from chunkmill.telemetry.exposition import MetricsServer
from chunkmill.telemetry.logging import configure
from chunkmill_workers import tasks

logger = logging.getLogger(__name__)

# sysexits.h: a supervisor may restart after the first, and would only meet the second again.
EX_TEMPFAIL, EX_CONFIG = 75, 78
_state: dict[str, Any] = {}


@contextlib.contextmanager
def _fatal_errors() -> Iterator[None]:
    """End the process with the error's message alone: it is meant for a person, and a traceback hides it.

    Celery logs and swallows what a signal handler raises, except SystemExit.
    """
    try:
        yield
    except ChunkmillError as error:
        logger.error("%s", error)  # noqa: TRY400
        raise SystemExit(EX_TEMPFAIL if error.retryable else EX_CONFIG) from None
    except Exception:
        # A worker that went on without its engine would take doorbells from those that can answer them.
        logger.exception("the worker cannot start")
        raise SystemExit(EX_TEMPFAIL) from None


with _fatal_errors():
    environment = Environment.load(start_embedded=False)
    app = make_celery(environment.settings)
tasks.register(app)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _set_up_logging(loglevel: int | str | None = None, **_: Any) -> None:
    settings = environment.settings
    # Celery's own default is WARNING, which would hide that the worker is ready: only what was typed counts.
    typed = loglevel if _is_typed("loglevel") else None
    configure(settings.log_level if typed is None else typed, settings.log_format)


def _is_typed(option: str) -> bool:
    """Whether Celery's command line gives ``option``."""
    command = click.get_current_context(silent=True)
    return command is not None and command.get_parameter_source(option) is ParameterSource.COMMANDLINE


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _begin(instance: Any = None, options: dict[str, Any] | None = None, **_: Any) -> None:
    """What the worker is for follows from its queues, and its name from what it works with."""
    chosen = (options or {}).get("queues") or [QUEUE]
    _state["queues"] = set(chosen.split(",") if isinstance(chosen, str) else chosen)
    _state["settings"] = environment.settings
    configure(environment.settings.log_level, environment.settings.log_format)
    with _fatal_errors():
        tracing.configure("chunkmill-worker")
    if QUEUE in _state["queues"]:
        _claim_device(instance)
    elif instance is not None and instance.hostname == f"celery@{socket.gethostname()}":
        instance.hostname = f"{PROVIDER_QUEUE}@{socket.gethostname()}"


def _claim_device(instance: Any) -> None:
    """Take a GPU and set threads before torch is imported; name the worker after it: two on a host need two names."""
    from chunkmill_workers.host.gpu import claim_device
    from chunkmill_workers.tuning.tuned import process_settings, use_threads

    settings = environment.settings
    with _fatal_errors():
        claimed = claim_device(settings.embedding_device, share=settings.embedding_share_gpu)
        settings = process_settings(settings, claimed.device)
    use_threads(settings.embedding_threads, claimed.device)
    _state["device"], _state["settings"] = claimed, settings
    if instance is not None and instance.hostname == f"celery@{socket.gethostname()}":
        instance.hostname = f"{claimed.worker_name}@{socket.gethostname()}"


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _start(sender: Any = None, **_: Any) -> None:
    from chunkmill_workers.process.drain import Drain
    from chunkmill_workers.process.reporting import Reporter

    settings, queues = _state["settings"], _state["queues"]
    # Celery has put the configuration's number here by now, or that of -c, which stays.
    command = click.get_current_context(silent=True)
    if command is not None and not _is_typed("concurrency"):
        tasks_at_a_time = {
            QUEUE: settings.embedding_parallel_batches,
            PROVIDER_QUEUE: settings.openai_parallel_requests,
        }
        sender.concurrency = sum(n for queue, n in tasks_at_a_time.items() if queue in queues) or 1
    contexts: list[Any] = []
    lanes: list[Any] = []
    with _fatal_errors():
        _serve_metrics(sender.hostname)
        for queue, start in ((QUEUE, _start_local), (PROVIDER_QUEUE, _start_provider)):
            if queue in queues:
                context, lane = start(settings)
                contexts.append(context)
                lanes.append(lane)
    lanes.append(Reporter.of(contexts, sender.hostname, _state.get("device")))
    for lane in lanes:
        lane.start()
    _state["contexts"], _state["lanes"], _state["drain"] = contexts, lanes, Drain(contexts)


def _serve_metrics(label: str) -> None:
    """Before the model is loaded: that takes time, and a port that cannot be had is told at once."""
    from chunkmill_workers.process.reporting import this_process

    me = this_process(_state["queues"], label, _state.get("device"))
    _state["metrics"] = MetricsServer.start(_state["settings"], me)


def _start_local(settings: Settings) -> tuple[Any, Any]:
    from chunkmill_workers.local.context import WorkerContext
    from chunkmill_workers.local.embed_requests import EmbedRequestLane

    device = _state["device"].device
    if device == "cpu":
        logger.info("no GPU in use: embedding on the CPU")
    context = _state["local"] = WorkerContext.start(settings, device)
    return context, EmbedRequestLane(context)


def _start_provider(settings: Settings) -> tuple[Any, Any]:
    from chunkmill_workers.provider.context import ProviderContext
    from chunkmill_workers.provider.waiting import WaitingLane

    context = ProviderContext.start(settings)
    logger.info("paid routes: %s", context.provider.server)
    return context, WaitingLane(context)


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _watch(**_: Any) -> None:
    """Not before the worker takes work: until then a hang is the start's, and a notice finds nothing to save."""
    from chunkmill_workers.host.preemption import PreemptionWatcher

    settings, drain = _state["settings"], _state["drain"]
    _state["watchers"] = []
    if "local" in _state:
        from chunkmill_workers.local.watchdog import Watchdog

        _state["watchers"].append(Watchdog(_state["local"], Broker.connect(settings), drain))
    if watcher := PreemptionWatcher.from_settings(settings, lambda _: drain.tell_itself()):
        _state["watchers"].append(watcher)
    for thread in _state["watchers"]:
        thread.start()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _drain(**_: Any) -> None:
    if "drain" in _state:
        _state["drain"].begin()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _close(**_: Any) -> None:
    from chunkmill_workers.process.drain import leave

    for thread in _state.get("watchers", []):
        thread.stop()
    if "contexts" not in _state:
        return
    for lane in _state["lanes"]:
        lane.stop()
    for context in _state["contexts"]:
        context.close()
    if any(context.stopping.is_set() for context in _state["contexts"]):
        # Drained: nothing is held any more. Python's own end takes seconds with a model in memory, which a machine
        # that is being taken does not have, and Redis may be away when Celery says good-bye.
        tracing.flush()
        leave(os.EX_OK)
