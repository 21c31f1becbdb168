"""The jobs of served batches go on although no poller runs: a gateway takes back leases, rings, and ends them."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.gateway.batches import recovery
from chunkmill.gateway.batches.recovery import JobRecovery
from chunkmill.settings import Settings
from tests.integration.conftest import QUEUES, chunk_batch_of
from tests.integration.hands import Hands
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.served import TwoTenants, ended, line, openai_client, rows, start
from tests.support.waiting import until


@pytest.fixture
def gateway(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningGateway]:
    monkeypatch.setattr(recovery, "LOOK_SECONDS", 3600.0)  # this test looks itself
    small = settings.model_copy(update={"chunk_batch_size": 2})
    with running_gateway(small, keys=TwoTenants()) as running:
        yield running


@pytest.fixture
def api(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai_client(gateway, "cmk_first") as client:
        yield client


@pytest.fixture
def at_work(gateway: RunningGateway, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobRecovery]:
    db = create_db(settings.require_database_url(), role="client")
    broker = Broker.connect(settings)
    made = JobRecovery(db, broker, settings)
    monkeypatch.setattr(made._poller, "_patience", 0.0)  # the server has started just now
    yield made
    broker.close()
    db.dispose()


def in_progress(api: openai.OpenAI, *texts: str) -> str:
    batch = start(api, *(line(text, text) for text in texts))
    until(lambda: api.batches.retrieve(batch.id).status == "in_progress")
    return str(batch.id)


EXPIRE = "UPDATE chunk_batches SET lease_until = now() - interval '1 s' WHERE state = 'running'"


def test_what_a_killed_worker_held_is_taken_back_and_rung_for_and_the_batch_completes(
    api: openai.OpenAI, at_work: JobRecovery, hands: Hands, client: Client
) -> None:
    batches = [in_progress(api, "a", "b", "c"), in_progress(api, "d")]
    lost = hands.due()[0]
    hands.claim(lost)
    rows(hands.db, EXPIRE)
    client._broker.client.flushdb()  # the bell was answered
    rows(hands.db, "UPDATE chunk_batches SET rung_at = now() WHERE rung_at IS NULL AND state = 'available'")
    assert at_work.look()
    assert rows(hands.db, "SELECT state, deaths, rung_at IS NULL FROM chunk_batches WHERE id = :id", id=lost) == [
        ("available", 1, False)
    ]
    bells = [bell for queue in QUEUES for bell in client._broker.client.lrange(queue, 0, -1)]
    assert lost in map(chunk_batch_of, bells)
    hands.work()
    assert [ended(api, batch).status for batch in batches] == ["completed", "completed"]
    assert not at_work.look()


def test_a_job_whose_worker_died_before_it_ended_it_is_ended(
    api: openai.OpenAI, at_work: JobRecovery, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [in_progress(api, "a", "b", "c"), in_progress(api, "d")]
    monkeypatch.setattr(hands, "finish", lambda _: None)
    hands.work()
    assert [api.batches.retrieve(batch).status for batch in batches] == ["in_progress", "in_progress"]
    assert at_work.look()
    assert [ended(api, batch).status for batch in batches] == ["completed", "completed"]


def test_a_gateway_leaves_it_to_a_poller_that_is_connected_and_without_batches_does_nothing(
    api: openai.OpenAI, at_work: JobRecovery, hands: Hands, client: Client, settings: Settings
) -> None:
    client.enqueue([("a", "a text of a job that is none of a batch")], collection="docs")
    hands.claim(hands.due()[0])
    rows(hands.db, EXPIRE)
    assert not at_work.look()
    in_progress(api, "b")
    poller = create_db(settings.require_database_url(), role="poller")
    with poller.connect() as conn:
        conn.execute(sa.text("SELECT 1"))
        assert not at_work.look()
        assert rows(hands.db, "SELECT count(*) FROM chunk_batches WHERE state = 'running'") == [(1,)]
    poller.dispose()
    until(at_work.look)
    assert rows(hands.db, "SELECT count(*) FROM chunk_batches WHERE state = 'running'") == [(0,)]


def test_after_an_outage_live_workers_get_time_to_renew_their_leases(
    api: openai.OpenAI, at_work: JobRecovery, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_progress(api, "a")
    hands.claim(hands.due()[0])
    rows(hands.db, EXPIRE)
    monkeypatch.setattr(at_work._poller, "_patience", 1e9)
    assert at_work.look()
    assert rows(hands.db, "SELECT state FROM chunk_batches") == [("running",)]
