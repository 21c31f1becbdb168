"""One GPU per worker process, by the real driver; and the whole system on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import torch

from chunkmill import Chunk, Client, JobState
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
from chunkmill_workers.engine import Engine
from chunkmill_workers.host.gpu import visible_gpus
from tests.acceptance.conftest import Processes
from tests.engine.conftest import stdlib_docstrings
from tests.support.checkout import PYTHONPATH
from tests.support.waiting import PATIENCE, running, until

from .conftest import DEVICE, cosines

pytestmark = pytest.mark.gpu

HOLDER = """
import os, sys
from pathlib import Path
from chunkmill.errors import DeviceUnavailable
from chunkmill_workers.host.gpu import claim_device
try:
    claimed = claim_device("cuda", share=False, lock_dir=Path(sys.argv[1]))
except DeviceUnavailable as error:
    print("refused", error, flush=True)
    sys.exit()
import torch
torch.ones(1, device=claimed.device).item()
print(torch.cuda.device_count(), claimed.device, os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that claims a device and computes on it; what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_the_driver_lists_what_torch_sees(cuda: torch.device) -> None:
    assert len(visible_gpus()) == torch.cuda.device_count()


def test_a_device_has_one_process_and_is_free_when_that_is_killed(tmp_path: Path, cuda: torch.device) -> None:
    gpus = visible_gpus()
    held = []
    for _ in gpus[:-1]:
        claim = holder(tmp_path)
        held.append(claim)
        claim.__enter__()
    try:
        with holder(tmp_path) as (last, said):
            assert said.split()[:2] == ["1", "cuda:0"], "a process sees its own device alone"
            assert said.split()[2] in gpus
            with holder(tmp_path) as (_, refused):
                assert refused.startswith("refused every NVIDIA device is taken")
                assert str(last.pid) in refused
            last.kill()
            last.wait(PATIENCE)
            with holder(tmp_path) as (_, again):
                assert again == said
    finally:
        for claim in held:
            claim.__exit__(None, None, None)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(create_db(settings.require_database_url(), role="client"), Broker.connect(settings), settings) as made:
        yield made


def documents() -> list[Chunk]:
    """Enough that a worker is killed in the middle of them."""
    texts, copies = stdlib_docstrings()[:800], 60 if DEVICE == "cuda" else 3
    return [Chunk(f"{copy}-{at}", f"{copy} {text}") for copy in range(copies) for at, text in enumerate(texts)]


def written(db: sa.Engine) -> int:
    with db.begin() as conn:
        return int(conn.execute(sa.text("SELECT count(*) FROM vectors_1")).scalar_one())


def test_the_main_job_on_a_worker_that_is_killed_and_one_that_follows(
    processes: Processes, client: Client, settings: Settings, db: sa.Engine, minilm: Engine
) -> None:
    """Enqueue, embed, SIGKILL, embed on, audit, search: text to committed, searchable rows."""
    chunks = documents()
    start = {"EMBEDDING_DEVICE": DEVICE}
    processes.poller()
    first = processes.worker(**start)

    def kill_at_the_first_vectors() -> None:
        until(lambda: written(db) > 0, first.output)
        first.kill()

    with running(kill_at_the_first_vectors):
        job = client.enqueue(chunks, collection="docs")
    assert 0 < written(db) < len(chunks), "it was not killed in the middle"

    second = processes.worker(**start)
    job = client.wait(job.id, timeout=PATIENCE)

    assert (job.state, job.embedded, job.dead) == (JobState.COMPLETED, len(chunks), 0)
    assert client.audit("docs").complete
    assert client.search(chunks[123].text, collection="docs", k=1, timeout=PATIENCE)[0].chunk_id == chunks[123].id
    stored = client.vectors("docs")
    some = chunks[::100]
    expected = minilm.embed([chunk.text for chunk in some]).vectors
    assert cosines(np.stack([stored[chunk.id] for chunk in some]), expected).min() >= 0.9999
    if DEVICE == "cuda":
        assert "on cuda:0 as float16" in second.output()
        assert "no GPU in use" not in second.output()
    assert second.terminate() == 0


def test_a_worker_too_many_is_refused(processes: Processes, db: sa.Engine, cuda: torch.device) -> None:
    workers = [processes.worker(EMBEDDING_DEVICE="cuda") for _ in visible_gpus()]

    one_more = processes.worker(ready=False, EMBEDDING_DEVICE="cuda")

    assert one_more.popen.wait(PATIENCE) != 0
    assert "every NVIDIA device is taken" in one_more.output()
    assert "Traceback" not in one_more.output()
    assert all(worker.terminate() == 0 for worker in workers)
