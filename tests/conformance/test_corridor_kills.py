"""Our own paid corridor with a gateway of ours as its provider, which is killed and started again all the time."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from chunkmill.db.connect import create_db
from chunkmill.domain.states import JobState
from chunkmill.embedded import StackStatus
from chunkmill.settings import Settings
from tests.conftest import fresh_settings
from tests.support import served_process
from tests.support.corridor import MODEL, Corridor, settings_for
from tests.support.gateways import KEY, tokens_of, vector_of
from tests.support.served import MODEL as LOCAL
from tests.support.served import bulk_worker, rows
from tests.support.waiting import PATIENCE, until

DIMENSIONS = 384
SEEDS = range(3)
KILLS = 12
CONTENTS = 300

pytestmark = [pytest.mark.conformance, pytest.mark.slow]


class Provider:
    """A process of a gateway that serves the local model under OpenAI's name, at the same address after each kill.

    A poller takes up what a killed gateway has left.
    """

    key = KEY

    def __init__(self, settings: Settings, folder: Path) -> None:
        chosen = {name: getattr(settings, name) for name in settings.model_fields_set}
        self._given = {**chosen, "gateway_model_aliases": {MODEL: LOCAL}, "chunk_batch_size": 32}
        self._given |= {"database_url": settings.require_database_url(), "redis_url": settings.require_redis_url()}
        self._log = folder / "gateway.log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"
        self._process = self._start()
        self._poller = served_process.start("poller", self._given, 0, folder / "poller.log")

    def _start(self) -> BaseProcess:
        return served_process.start("gateway", self._given, self._port, self._log)

    def wait(self) -> None:
        def answers() -> bool:
            assert self._process.is_alive(), self._log.read_text()[-5000:]
            try:
                return httpx2.get(f"http://127.0.0.1:{self._port}/live", trust_env=False).status_code == 200
            except httpx2.TransportError:
                return False

        until(answers, self._log.read_text)

    def stop(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join(PATIENCE)

    def kill(self) -> None:
        self.stop()
        self._process = self._start()

    def close(self) -> None:
        for process in (self._process, self._poller):
            process.kill()
            process.join(PATIENCE)


class Hurried(Corridor):
    """Whatever waits, for a backoff or a pause, is due at each turn."""

    def turn(self) -> None:
        with self.db.begin() as conn:
            for table in ("provider_batches", "chunk_batches"):
                conn.exec_driver_sql(f"UPDATE {table} SET not_before = now() WHERE not_before > now()")
        super().turn()


@pytest.fixture
def provider(stack: StackStatus, tmp_path: Path) -> Iterator[tuple[Provider, Settings]]:
    with fresh_settings(stack) as settings:
        made = Provider(settings, tmp_path)
        try:
            made.wait()
            yield made, settings
        finally:
            made.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gateway_killed_while_it_is_the_provider_costs_each_text_once_on_both_sides(
    seed: int, settings: Settings, provider: tuple[Provider, Settings]
) -> None:
    gateway, theirs = provider
    chance = random.Random(seed)
    over = threading.Event()
    kills = 0

    def ruin() -> None:
        nonlocal kills
        while kills < KILLS and not over.wait(chance.uniform(0.05, 1.0)):
            gateway.kill()
            kills += 1
            gateway.wait()

    texts = {f"c{n}": f"text number {n % CONTENTS} of a longer document" for n in range(CONTENTS + 50)}
    more: dict[str, Any] = {
        "embedding_dimensions": DIMENSIONS, "openai_request_inputs": 4, "openai_batch_max_inputs": 40,
        "chunk_batch_size": 20, "openai_timeout_seconds": 30.0,
    }  # fmt: skip
    caller = Hurried(settings_for(settings, gateway, **more), gateway)  # type: ignore[arg-type]
    db = create_db(theirs.require_database_url(), role="test")
    ruins = threading.Thread(target=ruin, name="ruin")
    try:
        with bulk_worker(db) as worker:
            job = caller.client.enqueue(texts.items(), collection="docs", route="openai")
            ruins.start()
            (job,) = caller.finish(job)
            over.set()
            ruins.join(PATIENCE)
        assert kills >= 3
        assert (job.state, job.dead) == (JobState.COMPLETED, 0)
        vectors = caller.client.vectors("docs")
        assert vectors.keys() == texts.keys()
        for chunk_id, text in texts.items():
            np.testing.assert_allclose(vectors[chunk_id], vector_of(text, "document", DIMENSIONS), atol=1e-6)
        once = Counter(dict.fromkeys(texts.values(), 1))
        assert Counter(worker.embedded) == once
        charged = caller.rows("SELECT sum(contents)::int AS contents, sum(tokens)::int AS tokens FROM charges")
        assert charged == [{"contents": CONTENTS, "tokens": sum(map(tokens_of, once))}]
        # No batch was created twice: each that the caller knows is one of the provider's, and there are no others.
        ours = {row["batch_id"] for row in caller.batches()}
        served = {name for (name,) in rows(db, "SELECT name FROM served_batches")}
        assert served == ours
        assert rows(db, "SELECT count(*) FROM served_batches WHERE state <> 'completed'") == [(0,)]
    finally:
        over.set()
        if ruins.ident is not None:
            ruins.join(PATIENCE)
        caller.close()
        db.dispose()
