"""What runs beside a test: a worker, a poller, and what delivers enqueues within transactions."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.client.outbox import Deliverer
from chunkmill.db.connect import create_db
from chunkmill.poller.poller import Poller
from chunkmill.poller.reembedding import Reembedder
from chunkmill.settings import Settings
from chunkmill.testing.worker import Worker


@dataclass(frozen=True, slots=True)
class RunningStack:
    """A client of a database in which a worker and a poller are at work."""

    settings: Settings
    client: Client
    worker: Worker


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[RunningStack]:
    """A worker and a poller in threads of this process, and a client, until the end of the block.

    Raises what ended the worker, if something did.
    """
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            Client(create_db(settings.require_database_url(), role="client"), Broker.connect(settings), settings)
        )
        db = create_db(settings.require_database_url(), role="poller")
        stack.callback(db.dispose)
        broker = Broker.connect(settings)
        stack.callback(broker.close)
        threads = [
            threading.Thread(target=Poller(db, broker, settings).run, args=(stop,), daemon=True),
            threading.Thread(target=Deliverer(db, settings, client._ring).run, args=(stop,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        threads += Reembedder(db, settings).start(stop)
        worker = Worker(settings)
        worker.start()
        try:
            yield RunningStack(settings, client, worker)
        finally:
            stop.set()
            try:
                worker.stop()
            finally:
                for thread in threads:
                    thread.join()
