"""One worker process, from its start to its end. ``chunkmill_workers.celery`` passes Celery's signals on to it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

from chunkmill.broker import PROVIDER_QUEUE, QUEUE, Broker
from chunkmill.errors import ChunkmillError, InvalidSetting
from chunkmill.settings import Settings
from chunkmill.telemetry import tracing
from chunkmill.telemetry.exposition import MetricsServer
from chunkmill_workers.process.context import QueueContext
from chunkmill_workers.process.drain import Drain, leave

logger = logging.getLogger(__name__)

# From sysexits.h. A restart may help after the first; after the second it would meet the same error.
EX_TEMPFAIL, EX_CONFIG = 75, 78


@contextlib.contextmanager
def fatal_errors() -> Iterator[None]:
    """End the process and log only the error's message: it is meant for a person, and a traceback would hide it.

    Celery logs and swallows what a signal handler raises, except SystemExit.
    """
    try:
        yield
    except ChunkmillError as error:
        logger.error("%s", error)  # noqa: TRY400
        raise SystemExit(EX_TEMPFAIL if error.retryable else EX_CONFIG) from None
    except Exception:
        # A worker that went on without its engine would take doorbells from workers that can answer them.
        logger.exception("the worker cannot start")
        raise SystemExit(EX_TEMPFAIL) from None


def require_usable(queues: set[str], *, autoscale: object = None, pool: object = None) -> None:
    """Raise :class:`InvalidSetting` for options of Celery with which a worker would start, and fail at its work.

    ``pool`` is the class of the pool, or its name.
    """
    if unknown := sorted(queues - {QUEUE, PROVIDER_QUEUE}):
        raise InvalidSetting(f"there is no queue {unknown[0]!r}: give -Q {QUEUE}, -Q {PROVIDER_QUEUE}, or both.")
    if autoscale:
        raise InvalidSetting(
            "--autoscale works only with processes, and a worker has threads: leave it out, and set the number of "
            "tasks with -c, EMBEDDING_PARALLEL_BATCHES or OPENAI_PARALLEL_REQUESTS."
        )
    if pool is not None and "thread" not in f"{getattr(pool, '__module__', '')} {pool}":
        raise InvalidSetting("a worker runs its tasks in threads, which share its model and its leases: leave -P out.")


class WorkerProcess:
    """The queues that one process serves, and the threads that run beside its tasks.

    The modules of a queue are imported only if it is served, so that a worker of the paid routes needs no torch.
    """

    def __init__(self, settings: Settings, queues: set[str]) -> None:
        self.settings = settings
        self.queues = queues
        self._claimed: Any = None  # a ClaimedDevice, whose module only a worker with a device imports
        self._contexts: list[QueueContext] = []
        self._responders: list[Any] = []  # threads that are started and stopped with the worker
        self._watchers: list[Any] = []
        self._local: Any = None
        self._drain: Drain | None = None
        self._metrics: MetricsServer | None = None

    def leave_out_provider(self) -> None:
        """Take no work of the paid routes if this worker has another queue, and what the routes need is wrong here.

        A worker of queue ``openai`` alone ends with the same error when it starts.
        """
        if self.queues != {QUEUE, PROVIDER_QUEUE}:
            return
        from chunkmill_workers.provider.context import make_provider

        try:
            make_provider(self.settings).close()
        except InvalidSetting as error:
            logger.error("queue %s is left to other workers: %s", PROVIDER_QUEUE, error)  # noqa: TRY400
            self.queues = {QUEUE}

    def claim_device(self) -> None:
        """Claim a GPU and set the number of threads. Call it before torch is imported.

        Raises DeviceUnavailable if there is no GPU as asked for, or torch cannot use the one that was claimed.
        """
        from chunkmill_workers.host.cuda import require_cuda
        from chunkmill_workers.host.gpu import claim_device
        from chunkmill_workers.tuning.tuned import process_settings, use_threads

        self._claimed = claim_device(self.settings.embedding_device, share=self.settings.embedding_share_gpu)
        if self._claimed.device != "cpu":
            require_cuda()
        self.settings = process_settings(self.settings, self._claimed.device)
        use_threads(self.settings.embedding_threads, self._claimed.device)

    @property
    def name(self) -> str:
        """What distinguishes this worker from others on its host: its device, or its queue if it has none."""
        return self._claimed.worker_name if self._claimed else PROVIDER_QUEUE

    @property
    def concurrency(self) -> int:
        """How many tasks run at a time on all queues together."""
        tasks_at_a_time = {
            QUEUE: self.settings.embedding_parallel_batches,
            PROVIDER_QUEUE: self.settings.openai_parallel_requests,
        }
        return sum(number for queue, number in tasks_at_a_time.items() if queue in self.queues) or 1

    def start(self, label: str) -> None:
        """Connect, load the default model and start to answer those who wait.

        ``label`` is the worker's name in Celery.
        """
        from chunkmill_workers.process.reporting import Reporter, this_process

        # Before the model is loaded, because that takes time and a port in use should be reported at once.
        self._metrics = MetricsServer.start(self.settings, this_process(self.queues, label, self._claimed))
        if QUEUE in self.queues:
            self._start_local()
        if PROVIDER_QUEUE in self.queues:
            self._start_provider()
        self._responders.append(Reporter.of(self._contexts, label, self._claimed))
        for thread in self._responders:
            thread.start()
        self._drain = Drain(self._contexts)

    def _start_local(self) -> None:
        from chunkmill_workers.local.context import WorkerContext
        from chunkmill_workers.local.responder import EmbedResponder

        if self._claimed.device == "cpu":
            logger.info("no GPU in use: embedding on the CPU")
        self._local = WorkerContext.start(self.settings, self._claimed.device)
        self._contexts.append(self._local)
        responder = EmbedResponder(self._local)
        self._responders.append(responder)
        if self.settings.worker_socket != "off":
            from chunkmill_workers.local.sockets import WorkerSocketServer

            self._responders.append(WorkerSocketServer(self._local, responder.embedder, self.settings.worker_socket))

    def _start_provider(self) -> None:
        from chunkmill_workers.provider.context import ProviderContext
        from chunkmill_workers.provider.responder import ProviderResponder

        context = ProviderContext.start(self.settings)
        logger.info("paid routes: %s", context.provider.server)
        self._contexts.append(context)
        self._responders.append(ProviderResponder(context))

    def watch(self) -> None:
        """Start the watchdog and the watch for preemption.

        They start only when the worker takes work: before that there is nothing to save, and the start may take long.
        """
        from chunkmill_workers.host.preemption import PreemptionWatcher

        drain = self._drain
        if drain is None:
            raise RuntimeError("watch() comes after start()")
        if self._local is not None:
            from chunkmill_workers.local.watchdog import Watchdog

            self._watchers.append(Watchdog(self._local, Broker.connect(self.settings), drain))
        if watcher := PreemptionWatcher.from_settings(self.settings, lambda _: drain.tell_itself()):
            self._watchers.append(watcher)
        for thread in self._watchers:
            thread.start()

    def drain(self) -> None:
        """Start to leave, or leave at once if the worker is leaving already; see ``Drain.begin``."""
        if self._drain is not None:
            self._drain.begin()

    def close(self) -> None:
        """Stop all threads and close all connections. A process that drained ends here."""
        if self._drain is None:
            return  # the start failed, and the process ends with that error
        for thread in self._watchers + self._responders:
            thread.stop()
        for context in self._contexts:
            context.close()
        if any(context.stopping.is_set() for context in self._contexts):
            # Nothing is held any more. Python's own exit takes seconds with a model in memory, and a machine that is
            # being taken may not have them. Celery's exit needs Redis, which may be away.
            tracing.flush()
            leave(os.EX_OK)


def host_name(celery_name: str, worker_name: str) -> str:
    """The worker's name in Celery. Celery's default is replaced, because two workers on a host need two names."""
    host = socket.gethostname()
    return f"{worker_name}@{host}" if celery_name == f"celery@{host}" else celery_name
