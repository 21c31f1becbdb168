"""One client, many threads: each gets its own answers, and nothing is lost, rung twice or kept."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import sqlalchemy as sa
from kombu import pools

from chunkmill import Client, Job, NotFound
from chunkmill.broker import Doorbell
from chunkmill.settings import Settings
from tests.conftest import client_for
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, Call, together, until

THREADS = 16
ROUNDS = 3


@pytest.fixture
def clients(settings: Settings) -> Iterator[tuple[Client, Client]]:
    """Two clients that nobody has used yet. On a slow machine a bell that one of them has just rung could seem lost to
    the other after a second, and a bell that is rung again is one too many."""
    settings = settings.model_copy(update={"doorbell_repair_seconds": 3_600})
    made = tuple(client_for(settings) for _ in range(2))
    yield made  # type: ignore[misc]
    for client in made:
        client.close()


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns a thousand times as often, so that what is not safe shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def test_sixteen_threads_use_two_clients_that_nobody_has_used_before(
    clients: tuple[Client, Client], hands: Hands, hasty: None
) -> None:
    barrier = threading.Barrier(THREADS)

    def work(number: int) -> list[Job]:
        client, name = clients[number % 2], f"docs-{number}"
        barrier.wait()
        jobs = []
        for turn in range(ROUNDS):
            chunks = ((f"{number}/{turn}/{n}", f"text {turn} {n} of {number}") for n in range(40))
            job = client.enqueue(chunks, collection=name, idempotency_key=f"{number} {turn}")
            jobs.append(job)
            assert (job.collection, job.chunks, job.new) == (name, 40, 40)
            assert client.job(job.id).collection == name
            assert (
                client.enqueue(
                    ((f"{number}/{turn}/{n}", f"text {turn} {n} of {number}") for n in range(40)),
                    collection=name,
                    idempotency_key=f"{number} {turn}",
                ).id
                == job.id
            )
            assert client.audit(name).chunks == 40 * (turn + 1)
            assert client.search(np.ones(384, np.float32), collection=name) == []
            with pytest.raises(NotFound, match=f"nowhere-{number}"):
                client.audit(f"nowhere-{number}")
        return jobs

    made = [job for jobs in together(*(lambda n=n: work(n) for n in range(THREADS))) for job in jobs]  # type: ignore[misc]
    assert len({job.id for job in made}) == THREADS * ROUNDS
    assert hands.rows("SELECT count(*), sum(n_chunks) FROM jobs") == [(THREADS * ROUNDS, THREADS * ROUNDS * 40)]
    # Each bell is there once, whichever thread of which client rang.
    rung = hands.rows("SELECT count(*) FROM chunk_batches WHERE rung_at IS NOT NULL")[0][0]
    assert sum(clients[0]._broker.queued_doorbells().values()) == rung > 0
    for client in clients:
        assert client._db.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_threads_that_wait_and_search_do_not_keep_the_others_out(
    clients: tuple[Client, Client], hands: Hands, hasty: None
) -> None:
    """A thread that waits has no connection, so more may wait than a client has connections."""
    client, other = clients
    jobs = [client.enqueue([(f"c{n}", f"text {n}")], collection=f"docs-{n}") for n in range(THREADS)]
    waiting: set[int] = set()
    everybody_waits = threading.Event()

    def note(job: Job) -> None:
        waiting.add(job.id)
        if len(waiting) == THREADS:
            everybody_waits.set()

    def wait(job: Job) -> Job:
        return client.wait(job.id, on_progress=note)

    def finish() -> None:
        everybody_waits.wait()
        assert len(client.jobs()) == len(other.jobs()) == THREADS
        hands.work()

    *ended, _ = together(*(lambda job=job: wait(job) for job in jobs), finish)  # type: ignore[misc]
    assert [(job.id, job.state) for job in ended] == [(job.id, "completed") for job in jobs]
    answers = together(
        *(lambda n=n: client.search(np.ones(384, np.float32), collection=f"docs-{n}") for n in range(THREADS))
    )  # type: ignore[misc]
    assert [[hit.chunk_id for hit in hits] for hits in answers] == [[f"c{n}"] for n in range(THREADS)]


def test_a_client_that_is_closed_leaves_the_other_one_its_connections(
    clients: tuple[Client, Client], db: sa.Engine
) -> None:
    stays, goes = clients
    for client in clients:
        client.enqueue([("a", "text 1")], collection="docs")
    goes.close()
    assert stays.enqueue([("b", "text 2")], collection="docs").chunks == 1
    assert sum(stays._broker.queued_doorbells().values()) == 3


def test_threads_that_ring_first_at_once_share_one_pool_of_connections_to_redis(
    clients: tuple[Client, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    create = pools.producers.create

    def slowly(*arguments: object) -> object:
        made.append(threading.current_thread().name)
        # Every other thread is in here too, or waits until this one is done.
        until(lambda: len(made) > 1 or all_but_one_wait(threads))
        return create(*arguments)

    fresh = type(pools.producers)(limit=pools.use_global_limit)
    monkeypatch.setattr(fresh, "create", slowly)
    monkeypatch.setattr(pools, "producers", fresh)
    threads = [
        threading.Thread(target=lambda n=n: clients[n % 2]._broker.ring([Doorbell(n, priority=6)]), daemon=True)  # type: ignore[misc]
        for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(made) == 1
    assert clients[0]._broker.queued_doorbells()[6] == THREADS


def all_but_one_wait(threads: list[threading.Thread]) -> bool:
    """Whether they all are in the function that gives out the pool, most of them at its lock."""
    frames = sys._current_frames()
    inside = 0
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        inside += frame is not None and frame.f_code.co_name == "_producers"
    return inside == len(threads) - 1


def test_more_calls_than_connections_wait_for_one(clients: tuple[Client, Client], db: sa.Engine, hands: Hands) -> None:
    client, _ = clients
    with db.connect() as conn, conn.begin():
        conn.execute(sa.text("LOCK TABLE jobs"))
        calls = [Call(client.jobs) for _ in range(THREADS)]
        until(lambda: hands.waiting() == 10)
    assert [call.result() for call in calls] == [[]] * THREADS
