"""A worker of the paid routes that is told to stop while a request is with the provider: the answer is waited for."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.states import JobState
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.openai_server import OpenAIServer, text_hash
from tests.support.corridor import settings_for
from tests.support.waiting import PATIENCE, Call, until

HURRIED = """
import chunkmill_workers.process.drain as drain
drain.LIMIT_S = 0.5
"""
"""With this, a drain that waits for nothing is over long before the provider answers."""


@pytest.fixture
def server() -> OpenAIServer:
    return OpenAIServer()


def test_one_sigterm_during_a_plain_request_pays_nothing_twice(
    processes: Processes, settings: Settings, tmp_path: Path, server: OpenAIServer
) -> None:
    """Two jobs, and a search that is asked at the same time."""
    (tmp_path / "sitecustomize.py").write_text(HURRIED)
    with server:
        mine = settings_for(settings, server)
        processes.env |= {
            "PYTHONPATH": f"{tmp_path}:{processes.env.get('PYTHONPATH', '')}",
            "OPENAI_API_KEY": server.key,
            "OPENAI_BASE_URL": server.url,
            "OPENAI_TIMEOUT_SECONDS": "60",
        }
        worker = processes.start("celery", "-A", "chunkmill_workers", "worker", "-Q", "openai")
        processes.poller()
        worker.wait_for("ready.")
        db = create_db(mine.require_database_url(), role="client")
        with Client(db, Broker.connect(mine), mine) as client:
            server.control(delays={"embeddings.create": 4.0})
            texts = {c: {f"{c}-{i}": f"text {i} of {c}" for i in range(20)} for c in ("docs", "other")}
            jobs = [client.enqueue(texts[c].items(), collection=c, route="openai-sync") for c in texts]
            asked = Call(lambda: client.embed(["a question"], timeout=PATIENCE))

            def under_way() -> bool:
                with db.begin() as conn:
                    sent = conn.execute(sa.text("SELECT count(*) FROM provider_inputs WHERE request_no = 1"))
                    return int(sent.scalar_one()) == 40

            until(under_way, worker.output)
            assert worker.terminate() == 0

            server.control(delays={})
            processes.start("celery", "-A", "chunkmill_workers", "worker", "-Q", "openai")
            for job in jobs:
                assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED
            asked.result()
            with db.begin() as conn:
                charged = conn.execute(sa.text("SELECT sum(contents)::int FROM charges WHERE job_id <> 0")).scalar_one()
                unsure = conn.execute(sa.text("SELECT count(*) FROM adjustments")).scalar_one()
        bill = server.bill()
        assert {bill[text_hash(text)] for part in texts.values() for text in part.values()} == {1}
        assert bill[text_hash("a question")] == 1
        assert (charged, unsure) == (40, 0)
