"""Which lane a job gets, when it changes, and what is said of it, on real Postgres."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from chunkmill import Client
from chunkmill.cli.__main__ import cli
from chunkmill.db.connect import create_db
from chunkmill.domain.providers import read_models
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput, NotFound, UnknownRoute
from chunkmill.ledger.jobs import routing
from chunkmill.ledger.provider import provider_lanes
from chunkmill.settings import Settings
from tests.conftest import client_for
from tests.support.waiting import together

SMALL = "text-embedding-3-small"
TWIN = {
    "remote": {"dimensions": 384, "max_tokens": 256, "usd": 0.02, "same_as": "all-MiniLM-L6-v2", "tokenizer": "cl100k"}
}
LONG = timedelta(hours=36)
Make = Callable[..., Client]


@pytest.fixture
def make(settings: Settings) -> Iterator[Make]:
    made: list[Client] = []

    def build(**changes: Any) -> Client:
        own = settings.model_copy(update=changes)
        made.append(client_for(own))
        return made[-1]

    yield build
    for server in made:
        server.close()


@pytest.fixture
def twins(settings: Settings) -> Settings:
    """A provider serves the bundled model too."""
    return settings.model_copy(update={"openai_models": read_models(TWIN)})


def texts(n: int, prefix: str = "text") -> list[tuple[str, str]]:
    return [(f"{prefix}-{i}", f"{prefix} {i}") for i in range(n)]


def routes(db: sa.Engine, job_id: int) -> dict[tuple[str, str], int]:
    """``(route, state) → ChunkBatches``."""
    with db.begin() as conn:
        rows = conn.execute(
            sa.text("SELECT route, state, count(*) FROM chunk_batches WHERE job_id = :id GROUP BY 1, 2"), {"id": job_id}
        )
        return {(route, state): n for route, state, n in rows}


def stop(db: sa.Engine, route: Route) -> None:
    with db.begin() as conn:
        assert provider_lanes.stop(conn, route, code="insufficient_quota", reason="the account has no credit left")


def reroute(db: sa.Engine, settings: Settings) -> int:
    with db.begin() as conn:
        return routing.reroute(conn, settings)


def set_deadline(db: sa.Engine, job_id: int, hours: float) -> None:
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE jobs SET deadline = now() + make_interval(hours => :h) WHERE id = :id"),
            {"h": hours, "id": job_id},
        )


# The first choice


@pytest.mark.parametrize(
    ("changes", "asked", "lane", "because"),
    [
        ({}, {}, "local", "the only route that serves the space"),
        ({}, {"route": "local"}, "local", "asked for by name"),
        ({}, {"model": SMALL}, "openai", "the cheapest"),
        ({}, {"model": SMALL, "deadline": timedelta(hours=5)}, "openai-sync", "openai is out: it takes up to 24 h"),
        ({}, {"model": SMALL, "route": "openai", "deadline": timedelta(hours=5)}, "openai", "asked for by name"),
        ({"openai_batches": False}, {"model": SMALL}, "openai-sync", "the only route"),
        ({"openai_models": read_models(TWIN)}, {}, "local", "local without a known price"),
        ({"openai_models": read_models(TWIN)}, {"deadline": LONG}, "openai", "local is out: none of its workers is"),
        ({"openai_models": read_models(TWIN), "embedding_provider": "local"}, {"deadline": LONG}, "local", "the only"),
    ],
)
def test_the_choice_is_made_once_and_kept(
    make: Make, db: sa.Engine, changes: dict[str, Any], asked: dict[str, Any], lane: str, because: str
) -> None:
    client = make(**changes)
    job = client.enqueue(texts(3), collection="docs", **asked)
    assert routes(db, job.id) == {(lane, "available"): 1}
    told = client.explain(job.id)
    assert [(step.route.value, because in step.because) for step in told.routing] == [(lane, True)]
    assert told.routing[0].at == job.created_at
    assert (told.deadline is not None) == ("deadline" in asked)


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ({"route": "openai"}, UnknownRoute, "only local workers serve this space"),
        ({"route": "local", "model": SMALL}, UnknownRoute, "only the provider serves model"),
        ({"deadline": datetime(2999, 1, 1)}, InvalidInput, "without a time zone"),
        ({"deadline": datetime(2020, 1, 1, tzinfo=UTC)}, InvalidInput, "is in the past"),
        ({"precision": "int8", "model": SMALL}, InvalidInput, "Pass precision='float'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    make: Make, rows: Callable[[str], int], asked: dict[str, Any], kind: type[Exception], said: str
) -> None:
    read: list[object] = []
    with pytest.raises(kind, match=said):
        make().enqueue((read.append(c) or c for c in texts(3)), collection="docs", **asked)  # type: ignore[func-returns-value]
    assert read == []
    assert rows("jobs") == rows("collections") == 0


def test_a_second_enqueue_under_a_key_goes_on_in_the_first_ones_lane(make: Make, db: sa.Engine) -> None:
    client = make()

    def broken() -> Iterator[object]:
        yield from texts(2)
        raise RuntimeError("the producer died")

    # skip commits window by window, so the job is there when its producer dies
    with pytest.raises(RuntimeError):
        client.enqueue(broken(), collection="docs", model=SMALL, idempotency_key="k", on_invalid="skip")
    stop(db, Route.OPENAI)
    job = client.enqueue(texts(2), collection="docs", model=SMALL, idempotency_key="k", on_invalid="skip")
    assert set(routes(db, job.id)) == {("openai", "available")}
    assert len(client.explain(job.id).routing) == 1
    assert set(routes(db, client.enqueue(texts(2), collection="docs", model=SMALL).id)) == {
        ("openai-sync", "available")
    }


def test_dead_chunks_are_retried_in_the_jobs_lane(make: Make, db: sa.Engine) -> None:
    client = make()
    job = client.enqueue(texts(2), collection="docs", model=SMALL)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'completed'"))
        conn.execute(
            sa.text(
                "INSERT INTO dead_chunks (job_id, chunk_id, content_hash, code, reason) "
                "SELECT job_id, chunk_id, content_hash, 'refused', 'why' FROM chunks"
            )
        )
    assert client.retry_dead(job_id=job.id).contents == 2
    assert routes(db, job.id) == {("openai", "completed"): 1, ("openai", "available"): 1}


def test_a_local_worker_of_another_database_serves_no_job_of_this_one(
    make: Make, db: sa.Engine, twins: Settings
) -> None:
    client = make(openai_models=twins.openai_models)
    elsewhere = sa.make_url(twins.require_database_url()).set(database="postgres")
    others = create_db(elsewhere.render_as_string(hide_password=False), role="worker")
    own = create_db(twins.require_database_url(), role="worker")
    try:
        with others.connect():
            assert routes(db, client.enqueue(texts(1), collection="docs", deadline=LONG).id) == {
                ("openai", "available"): 1
            }
            with own.connect():
                assert routes(db, client.enqueue(texts(1, "more"), collection="docs", deadline=LONG).id) == {
                    ("local", "available"): 1
                }
    finally:
        others.dispose()
        own.dispose()


# Moving


def test_what_waits_leaves_a_lane_that_stopped_and_what_has_begun_stays(
    make: Make, db: sa.Engine, settings: Settings
) -> None:
    client = make(chunk_batch_size=10)
    job = client.enqueue(texts(50), collection="docs", model=SMALL)
    named = client.enqueue(texts(20, "named"), collection="docs", model=SMALL, route="openai")
    local = client.enqueue(texts(5), collection="local")
    with db.begin() as conn:
        first, second = list(conn.execute(sa.text("SELECT id FROM chunk_batches ORDER BY id LIMIT 2")).scalars())
        conn.execute(
            sa.text("UPDATE chunk_batches SET state = 'running', attempt = 1, lease_until = NULL WHERE id = :id"),
            {"id": first},
        )
        # What is at the provider is paid for there, whatever became of the attempt that sent it.
        conn.execute(
            sa.text(
                "INSERT INTO provider_inputs (space_id, content_hash, chunk_batch_id, attempt, job_id, n_tokens, "
                "sent_tokens, truncated) SELECT space_id, content_hashes[1], id, 1, job_id, 2, 2, false "
                "FROM chunk_batches WHERE id = :id"
            ),
            {"id": second},
        )
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = now()"))
    assert reroute(db, settings) == 0
    stop(db, Route.OPENAI)
    assert (reroute(db, settings), reroute(db, settings)) == (3, 0)
    assert routes(db, job.id) == {
        ("openai", "running"): 1, ("openai", "available"): 1, ("openai-sync", "available"): 3,
    }  # fmt: skip
    with db.begin() as conn:  # to be rung for anew, on the other queue
        unrung = conn.execute(sa.text("SELECT DISTINCT route FROM chunk_batches WHERE rung_at IS NULL")).scalars()
        assert list(unrung) == ["openai-sync"]
    assert routes(db, named.id) == {("openai", "available"): 2}
    assert routes(db, local.id) == {("local", "available"): 1}
    steps = client.explain(job.id).routing
    assert [step.route.value for step in steps] == ["openai", "openai-sync"]
    assert "moved from openai because it stopped" in steps[1].because


def test_what_waits_leaves_the_batch_api_when_the_deadline_comes_near(
    make: Make, db: sa.Engine, settings: Settings
) -> None:
    client = make()
    job = client.enqueue(texts(3), collection="docs", model=SMALL, deadline=LONG)
    assert reroute(db, settings) == 0
    set_deadline(db, job.id, 23)
    assert reroute(db, settings) == 1
    assert routes(db, job.id) == {("openai-sync", "available"): 1}
    assert "the deadline" in client.explain(job.id).routing[-1].because


def test_with_no_better_lane_left_nothing_moves(make: Make, db: sa.Engine, settings: Settings) -> None:
    client = make()
    job = client.enqueue(texts(3), collection="docs", model=SMALL)
    stop(db, Route.OPENAI)
    stop(db, Route.OPENAI_SYNC)
    assert reroute(db, settings) == 0
    assert routes(db, job.id) == {("openai", "available"): 1}
    assert len(client.explain(job.id).routing) == 1


def test_it_falls_back_to_local_workers_only_inside_the_space(make: Make, db: sa.Engine, twins: Settings) -> None:
    client = make(openai_models=twins.openai_models)
    shared = client.enqueue(texts(3), collection="docs", deadline=LONG)  # no local worker is connected
    own = client.enqueue(texts(3), collection="own", model=SMALL)
    assert {*routes(db, shared.id), *routes(db, own.id)} == {("openai", "available")}
    stop(db, Route.OPENAI)
    stop(db, Route.OPENAI_SYNC)
    assert reroute(db, twins) == 1
    assert routes(db, shared.id) == {("local", "available"): 1}
    assert routes(db, own.id) == {("openai", "available"): 1}
    with db.begin() as conn:
        mixed = sa.text(
            "SELECT count(*) FROM chunk_batches b JOIN jobs j ON j.id = b.job_id WHERE b.space_id <> j.space_id"
        )
        assert conn.execute(mixed).scalar_one() == 0


def test_pollers_that_move_at_once_move_each_once_and_say_it_once(
    make: Make, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "SLICE", 3)
    client = make(chunk_batch_size=2)
    job = client.enqueue(texts(40), collection="docs", model=SMALL)
    stop(db, Route.OPENAI)

    def poll() -> int:
        moved = 0
        while ("openai", "available") in routes(db, job.id):
            moved += reroute(db, settings)
        return moved

    assert sum(together(poll, poll, poll)) == 20
    assert routes(db, job.id) == {("openai-sync", "available"): 20}
    assert len(client.explain(job.id).routing) == 2


def test_what_a_producer_adds_after_the_move_follows(make: Make, db: sa.Engine, settings: Settings) -> None:
    client = make(enqueue_window=2, chunk_batch_size=1)

    def stream() -> Iterator[object]:
        yield from texts(2)
        stop(db, Route.OPENAI)
        assert reroute(db, settings) == 2
        yield from texts(2, "later")

    job = client.enqueue(stream(), collection="docs", model=SMALL, on_invalid="skip")
    assert routes(db, job.id) == {("openai-sync", "available"): 2, ("openai", "available"): 2}
    assert reroute(db, settings) == 2
    assert routes(db, job.id) == {("openai-sync", "available"): 4}
    assert len(client.explain(job.id).routing) == 2


def resume(db: sa.Engine, route: Route) -> None:
    with db.begin() as conn:
        assert provider_lanes.resume(conn, route)


def test_auto_returns_to_the_cheaper_lane_when_it_takes_work_again(
    make: Make, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job is moved away and one is enqueued meanwhile. Both return, slice by slice; what has begun stays."""
    monkeypatch.setattr(routing, "SLICE", 3)
    client = make(chunk_batch_size=2)
    job = client.enqueue(texts(20), collection="docs", model=SMALL)
    stop(db, Route.OPENAI)
    while reroute(db, settings):
        pass
    late = client.enqueue(texts(8, "late"), collection="docs", model=SMALL)
    named = client.enqueue(texts(2, "named"), collection="docs", model=SMALL, route="openai-sync")
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "UPDATE chunk_batches SET state = 'running', attempt = 1 WHERE id = "
                "(SELECT min(id) FROM chunk_batches WHERE job_id = :id)"
            ),
            {"id": job.id},
        )
    assert reroute(db, settings) == 0
    resume(db, Route.OPENAI)

    assert reroute(db, settings) == 3 + 3
    while reroute(db, settings):
        pass

    assert routes(db, job.id) == {("openai-sync", "running"): 1, ("openai", "available"): 9}
    assert routes(db, late.id) == {("openai", "available"): 4}
    assert routes(db, named.id) == {("openai-sync", "available"): 1}
    assert [step.route.value for step in client.explain(job.id).routing] == ["openai", "openai-sync", "openai"]
    told = client.explain(late.id).routing
    assert [step.route.value for step in told] == ["openai-sync", "openai"]
    assert told[1].because.startswith("moved from openai-sync because openai takes work again; the cheapest (openai at")
    with db.begin() as conn:  # so that no later round looks at them
        kept = conn.execute(sa.text("SELECT routing -> -1 FROM jobs WHERE route = 'auto'")).scalars()
        assert all(entry.keys() == {"at", "route", "because"} for entry in kept)


def test_what_a_producer_adds_after_the_return_follows(make: Make, db: sa.Engine, settings: Settings) -> None:
    client = make(enqueue_window=2, chunk_batch_size=1)
    stop(db, Route.OPENAI)

    def stream() -> Iterator[object]:
        yield from texts(2)
        resume(db, Route.OPENAI)
        assert (reroute(db, settings), reroute(db, settings)) == (2, 0)
        yield from texts(2, "later")

    job = client.enqueue(stream(), collection="docs", model=SMALL, on_invalid="skip")
    assert routes(db, job.id) == {("openai", "available"): 2, ("openai-sync", "available"): 2}
    assert (reroute(db, settings), reroute(db, settings)) == (2, 0)
    assert routes(db, job.id) == {("openai", "available"): 4}
    assert len(client.explain(job.id).routing) == 2


def test_nothing_returns_to_a_lane_that_would_be_too_late_or_is_stopped_again(
    make: Make, db: sa.Engine, settings: Settings
) -> None:
    client = make()
    stop(db, Route.OPENAI)
    jobs = [client.enqueue(texts(3, name), collection="docs", model=SMALL, deadline=LONG) for name in ("a", "b")]
    set_deadline(db, jobs[0].id, 23)
    resume(db, Route.OPENAI)
    assert reroute(db, settings) == 1
    stop(db, Route.OPENAI)
    stop(db, Route.OPENAI_SYNC)
    assert reroute(db, settings) == 0
    assert routes(db, jobs[0].id) == {("openai-sync", "available"): 1}
    assert routes(db, jobs[1].id) == {("openai", "available"): 1}


def test_the_reason_of_a_move_names_every_route_that_serves_the_space(
    make: Make, db: sa.Engine, settings: Settings
) -> None:
    client = make()
    job = client.enqueue(texts(3), collection="docs", model=SMALL)
    stop(db, Route.OPENAI)
    assert reroute(db, settings) == 1
    because = client.explain(job.id).routing[-1].because
    assert "the only route that serves the space" not in because
    assert "the only one left (openai-sync at 0.020" in because
    assert "openai is out: stopped (insufficient_quota) until `chunkmill lanes resume openai`" in because


# What is said


@pytest.fixture
def call(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    return lambda *arguments: CliRunner().invoke(cli, list(arguments))


def test_an_explanation_says_what_waits_for_what(make: Make, db: sa.Engine) -> None:
    client = make(chunk_batch_size=2)
    job = client.enqueue(texts(8), collection="docs", model=SMALL)
    assert client.explain(job.id).waits == ("4 ChunkBatches (8 contents) wait to be gathered into a ProviderBatch",)
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "WITH sent AS (UPDATE chunk_batches SET state = 'running', attempt = 1 WHERE id IN "
                "  (SELECT id FROM chunk_batches ORDER BY id LIMIT 1) RETURNING id, space_id), "
                "batch AS (INSERT INTO provider_batches (space_id, state, token, n_requests, n_done, n_contents, "
                "  provider_status, batch_id) SELECT space_id, 'submitted', 't', 4, 1, 2, 'in_progress', 'b' FROM sent "
                "  RETURNING id) INSERT INTO provider_batch_members SELECT batch.id, sent.id FROM sent, batch"
            )
        )
        provider_lanes.pause(conn, Route.OPENAI, seconds=600, reason="the provider asked for it")
    told = client.explain(job.id)
    assert told.waits[0].startswith("3 ChunkBatches (6 contents) wait because openai pauses until ")
    assert told.waits[1] == f"1 ChunkBatch (2 contents) waits for ProviderBatch {told.provider_batches[0].id}"
    batch = told.provider_batches[0]
    assert (batch.provider_status, batch.done, batch.requests, batch.next_look is None) == ("in_progress", 1, 4, False)
    stop(db, Route.OPENAI)
    assert "openai is stopped" in client.explain(job.id).waits[0]
    assert "chunkmill lanes resume openai" in client.explain(job.id).waits[0]
    with pytest.raises(NotFound):
        client.explain(job.id + 1)


def test_the_explain_option(call: Callable[..., Result], make: Make, db: sa.Engine) -> None:
    job = make().enqueue(texts(3), collection="docs", model=SMALL, deadline=timedelta(hours=2))
    stop(db, Route.OPENAI_SYNC)
    shown = call("job", str(job.id), "--explain").stdout
    assert "openai is out: it takes up to 24 h, and the deadline is in 2 h" in shown
    assert "waits because openai-sync is stopped" in shown
    told = json.loads(call("job", str(job.id), "--explain", "--json").stdout)["explanation"]
    assert told["routing"][0]["route"] == "openai-sync"
    assert [lane["state"] for lane in told["lanes"]] == ["idle", "stopped"]


def test_lanes_are_shown_and_resumed(call: Callable[..., Result], db: sa.Engine, settings: Settings) -> None:
    assert [lane["state"] for lane in json.loads(call("lanes", "--json").stdout)] == ["idle", "idle"]
    assert "no worker serves it" in call("lanes").stdout
    assert [lane["state"] for lane in json.loads(call("status", "--json").stdout)["database"]["lanes"]] == ["idle"] * 2
    worker = create_db(settings.require_database_url(), role="worker-openai")
    with worker.connect():
        assert [lane["state"] for lane in json.loads(call("lanes", "--json").stdout)] == ["running", "running"]
    worker.dispose()
    assert "insufficient_quota" not in call("status").stdout
    stop(db, Route.OPENAI)
    with db.begin() as conn:
        provider_lanes.pause(conn, Route.OPENAI_SYNC, seconds=600, reason="429")
        provider_lanes.hold(conn, Route.OPENAI_SYNC, "the budget")
    shown = call("lanes").stdout
    assert "insufficient_quota: the account has no credit left" in shown
    for command in ("lanes", "status"):
        shown = call(command).stdout
        assert "stopped" in shown
        assert "chunkmill lanes resume openai" in shown
        assert "paused" in shown
    database = json.loads(call("status", "--json").stdout)["database"]
    assert [lane["state"] for lane in database["lanes"]] == ["stopped", "paused"]
    assert json.loads(call("lanes", "resume", "openai", "--json").stdout) == {"lane": "openai", "resumed": True}
    assert "openai-sync takes work again." in call("lanes", "resume", "openai-sync").stdout
    assert "neither stopped nor paused" in call("lanes", "resume", "openai").stdout
    assert [lane["state"] for lane in json.loads(call("lanes", "--json").stdout)] == ["idle", "held"]
    assert call("lanes", "resume", "local").exit_code == 2
