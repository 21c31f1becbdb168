"""Processes of the served Batch API to kill. They are forked, because ten starts of Python would take a minute.

Steps are cut into small slices that take a moment each, so that a kill can hit every one of them, and leases are short.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.gateway.app import build
from chunkmill.gateway.batches import keeper, recovery, uploads
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.keys import OneKey
from chunkmill.gateway.routes import files as file_routes
from chunkmill.ledger.served import batches, files, lines
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from tests.support import served
from tests.support.gateways import KEY
from tests.support.served import BulkWorker

PIECE_BYTES = 16 * 1024
MOMENT_S = 0.01


def cut_small() -> None:
    """Cut the steps of this process's gateway into small slices."""
    for module in (files, uploads, file_routes):
        module.PIECE_BYTES = PIECE_BYTES  # type: ignore[attr-defined]
    lines.SLICE_LINES = 25
    keeper.SLICE_LINES = 25  # type: ignore[misc]
    keeper.PAUSE_SECONDS = 0.2  # type: ignore[misc]
    recovery.LOOK_SECONDS = 0.2  # type: ignore[misc]
    batches.LEASE_SECONDS = 2
    go_on = keeper.BatchKeeper._go_on

    def slowly(self: keeper.BatchKeeper) -> None:
        time.sleep(MOMENT_S)
        go_on(self)

    keeper.BatchKeeper._go_on = slowly  # type: ignore[method-assign]


def run_gateway(settings: Settings, port: int) -> None:
    db = create_db(settings.require_database_url(), role="client")
    gateway = Gateway.over(Client(db, Broker.connect(settings), settings), db, settings, OneKey(KEY))
    config = uvicorn.Config(build(gateway), host="127.0.0.1", port=port, log_config=None, access_log=False)
    uvicorn.Server(config).run()


def run_worker(settings: Settings) -> None:
    db = create_db(settings.require_database_url(), role="worker")
    while True:
        worker = BulkWorker(db, lease_seconds=2.0)
        try:
            while True:
                if not worker.embed_next():
                    time.sleep(0.02)
        except Exception as error:  # noqa: BLE001 - Postgres is away
            print(type(error).__name__, flush=True)
            time.sleep(0.2)


def run_stuck_worker(settings: Settings) -> None:
    """A worker that never ends the first ChunkBatch that it claims."""
    db = create_db(settings.require_database_url(), role="worker")
    served.read_work = lambda *_: time.sleep(3600)  # type: ignore[assignment]
    worker = BulkWorker(db, lease_seconds=2.0)
    while not worker.embed_next():
        time.sleep(0.02)


def run(what: str, given: Mapping[str, Any], port: int, log: str) -> None:
    """Run a gateway, a worker or a poller with these settings. Its output goes to the file ``log``."""
    with open(log, "ab", buffering=0) as output:  # noqa: PTH123
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    settings = Settings.from_env(**given)
    if what == "gateway":
        cut_small()
        run_gateway(settings, port)
    elif what == "usual gateway":
        run_gateway(settings, port)
    elif what == "worker":
        run_worker(settings)
    elif what == "stuck worker":
        run_stuck_worker(settings)
    else:
        db = create_db(settings.require_database_url(), role="poller")
        Poller(db, Broker.connect(settings), settings).run(threading.Event())


def start(what: str, given: Mapping[str, Any], port: int, log: Path) -> BaseProcess:
    """Start :func:`run` in a process of its own, which has no thread and no connection of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=run, args=(what, dict(given), port, str(log)), name=what, daemon=True)
    process.start()
    return process
