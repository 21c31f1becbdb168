"""What a gateway says about itself: /live, /ready, /health and /info."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

import chunkmill
from chunkmill.db.connect import create_db
from chunkmill.gateway import health
from chunkmill.models import DEFAULT_SPEC
from chunkmill.settings import Settings
from tests.support.gateways import RunningGateway, StandInWorker, running_gateway, stand_in_worker
from tests.support.waiting import until


@pytest.fixture(autouse=True)
def look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request looks for itself."""
    monkeypatch.setattr(health, "KEEP_SECONDS", -1.0)


@pytest.fixture
def gateway(settings: Settings) -> Iterator[RunningGateway]:
    with running_gateway(settings) as running:
        yield running


@pytest.fixture
def poller(settings: Settings) -> Iterator[None]:
    """A connection as a poller has one."""
    engine = create_db(settings.require_database_url(), role="poller")
    with engine.connect():
        yield
    engine.dispose()


def without_key(gateway: RunningGateway, path: str) -> tuple[int, dict[str, object]]:
    with gateway.client(None) as http:
        answer = http.get(path)
    return answer.status_code, answer.json()


def test_a_gateway_with_all_it_needs_is_healthy(gateway: RunningGateway, db: sa.Engine, poller: None) -> None:
    with stand_in_worker(db):
        status, said = without_key(gateway, "/health")
    assert (status, said) == (
        200,
        {
            "status": "healthy",
            "model": "all-MiniLM-L6-v2",
            "device": "cpu",
            "embedding_dimension": 384,
            "workers": 1,
            "queue": 0,
            "problems": [],
        },
    )
    assert without_key(gateway, "/ready")[0] == 200


def test_a_gateway_without_a_worker_is_unhealthy_and_still_ready(gateway: RunningGateway, poller: None) -> None:
    status, said = without_key(gateway, "/health")
    assert (status, said["status"], said["workers"], said["device"]) == (503, "unhealthy", 0, None)
    assert said["problems"] == ["no worker has reported lately"]
    assert without_key(gateway, "/ready")[0] == 200


def test_a_worker_that_fell_silent_is_no_worker(gateway: RunningGateway, db: sa.Engine, poller: None) -> None:
    StandInWorker(db).report()
    assert without_key(gateway, "/health")[0] == 200
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE worker_reports SET seen_at = now() - interval '21 seconds'"))
    status, said = without_key(gateway, "/health")
    assert (status, said["status"], said["workers"]) == (503, "unhealthy", 0)


def test_a_worker_of_the_paid_routes_does_not_serve_a_local_model(
    gateway: RunningGateway, db: sa.Engine, poller: None
) -> None:
    StandInWorker(db).report()
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE worker_reports SET kind = 'provider'"))
    assert without_key(gateway, "/health")[0] == 503


def test_without_redis_or_a_poller_it_is_degraded(settings: Settings, db: sa.Engine) -> None:
    nowhere = settings.model_copy(update={"redis_url": "unix:///nowhere/redis.sock?db=0"})
    with running_gateway(nowhere) as gateway, stand_in_worker(db):
        status, said = without_key(gateway, "/health")
    assert (status, said["status"]) == (200, "degraded")
    assert said["problems"] == ["no poller is connected", "Redis takes no writes"]


def test_requests_that_wait_long_are_counted_and_told(
    gateway: RunningGateway, db: sa.Engine, poller: None, client: chunkmill.Client
) -> None:
    StandInWorker(db).report()
    for _ in range(2):
        with contextlib.suppress(chunkmill.WaitTimeout):
            client.embed(["a"], timeout=0.001)
    with db.begin() as conn:
        conn.execute(
            sa.text("""
                INSERT INTO embed_requests (space_id, kind, texts, created_at)
                SELECT id, 'query', '{a}', now() - interval '11 seconds' FROM spaces
            """)
        )
    status, said = without_key(gateway, "/health")
    assert (status, said["status"], said["queue"]) == (200, "degraded", 1)
    assert said["problems"] == ["requests wait long for a worker"]


def test_without_postgres_it_lives_and_says_what_is_away(settings: Settings) -> None:
    url = "postgresql://nobody@127.0.0.1:1/nothing?connect_timeout=1"
    with running_gateway(settings.model_copy(update={"database_url": url})) as gateway:
        assert without_key(gateway, "/live") == (200, {"status": "alive"})
        status, said = without_key(gateway, "/health")
        assert (status, said["status"], said["problems"]) == (503, "unhealthy", ["Postgres cannot be used"])
        status, said = without_key(gateway, "/ready")
        assert status == 503
        for answer in (gateway.http.post("/v1/embeddings", json={"input": "a"}), gateway.http.get("/v1/models")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
            assert "retry-after" in answer.headers


def test_a_gateway_that_leaves_is_not_ready_and_still_says_how_it_is(
    gateway: RunningGateway, db: sa.Engine, poller: None
) -> None:
    StandInWorker(db).report()
    gateway.gateway.is_leaving = True
    status, said = without_key(gateway, "/ready")
    assert (status, said["error"]["code"]) == (503, "draining")  # type: ignore[index]
    assert without_key(gateway, "/health")[0] == 200


def test_many_who_ask_at_once_are_told_by_one_look(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, db: sa.Engine
) -> None:
    monkeypatch.setattr(health, "KEEP_SECONDS", 3600.0)
    assert without_key(gateway, "/health")[0] == 503
    StandInWorker(db).report()
    assert without_key(gateway, "/health")[0] == 503
    monkeypatch.setattr(health, "KEEP_SECONDS", -1.0)
    until(lambda: without_key(gateway, "/health")[0] == 200)


def test_info_is_for_callers_and_has_what_both_kinds_of_client_read(gateway: RunningGateway) -> None:
    assert without_key(gateway, "/info")[0] == 401
    said = gateway.http.get("/info").json()
    assert {name: said[name] for name in ("model_name", "embedding_dimension", "max_seq_length", "batch_size")} == {
        "model_name": "all-MiniLM-L6-v2",
        "embedding_dimension": 384,
        "max_seq_length": 256,
        "batch_size": 256,
    }
    assert (said["model_id"], said["max_client_batch_size"], said["max_input_length"]) == (
        "all-MiniLM-L6-v2",
        2048,
        256,
    )
    assert (said["model_sha"], said["fingerprint"]) == (DEFAULT_SPEC.revision, DEFAULT_SPEC.fingerprint)
    assert said["version"] == importlib.metadata.version("chunkmill")
