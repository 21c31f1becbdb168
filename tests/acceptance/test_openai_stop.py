"""A worker of the paid routes that ends while a request is with the provider.

Told to stop, it waits for the answer. Killed, another worker books what it had sent, also if nobody waits any more.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import JobState
from chunkmill.ledger.money import budget
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.acceptance.conftest import Processes
from tests.openai_server import OpenAIServer, text_hash
from tests.support import one_request
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


def test_workers_are_killed_while_their_questions_are_with_the_provider_and_nobody_waits_any_more(
    processes: Processes, settings: Settings, server: OpenAIServer
) -> None:
    """Two questions to two models, with a worker each. A third worker books both, and the budget never forgets them."""
    models = {"text-embedding-3-small": "a question", "text-embedding-3-large": "a question of three more words"}
    with server:
        mine = settings_for(settings, server, openai_monthly_budget_usd=Decimal(1))
        processes.env |= {
            "OPENAI_API_KEY": server.key,
            "OPENAI_BASE_URL": server.url,
            "OPENAI_TIMEOUT_SECONDS": str(PATIENCE),
            "OPENAI_MONTHLY_BUDGET_USD": "1",
        }
        workers = [processes.start("celery", "-A", "chunkmill_workers", "worker", "-Q", "openai") for _ in models]
        for worker in workers:
            worker.wait_for("ready.")
        db = create_db(mine.require_database_url(), role="test")
        server.control(delays={"embeddings.create": PATIENCE})
        with db.begin() as conn:
            spaces = [
                registry.register(conn, mine.provider_models[model].space(OnLong.TRUNCATE, 8)).id for model in models
            ]
        for space_id, text in zip(spaces, models.values(), strict=True):
            with db.begin() as conn:
                one_request.ask(conn, space_id=space_id, kind="query", texts=[text])

        def rows(query: str) -> dict[int, tuple[int, int]]:
            with db.begin() as conn:
                return {row.space_id: (row.contents, row.tokens) for row in conn.execute(sa.text(query))}

        def counted() -> Decimal:
            with db.begin() as conn:
                now = budget.read(conn, mine)
            return now.spent + now.committed

        sent = "SELECT space_id, sent_contents AS contents, sent_tokens AS tokens FROM provider_questions"
        until(lambda: [n for n, _ in rows(sent).values()] == [1, 1], lambda: rows(sent))
        in_flight, usd = rows(sent), counted()
        with db.begin() as conn:
            conn.execute(sa.text("DELETE FROM embed_requests"))  # as callers do that wait no longer
        assert counted() == usd > 0
        for worker in workers:
            worker.kill()
        assert counted() == usd
        third = processes.start("celery", "-A", "chunkmill_workers", "worker", "-Q", "openai")
        third.wait_for("ready.")
        with db.begin() as conn:
            conn.execute(sa.text("UPDATE provider_questions SET until = now() - interval '1 s'"))
        booked = "SELECT space_id, contents, tokens FROM adjustments WHERE kind = 'maybe_charged'"
        until(lambda: rows(booked) == in_flight, third.output)

        assert in_flight.keys() == set(spaces)
        assert (rows(sent), counted()) == ({}, usd)
        db.dispose()
