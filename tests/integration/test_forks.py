"""A client that was made before a fork, as under `gunicorn --preload`: no process reads what another one asked for."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import numpy as np
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.broker import Doorbell
from chunkmill.db.connect import raw
from tests.integration.conftest import Runner

CHILDREN, CALLS = 4, 40


def child(work: Callable[[], None]) -> int:
    """Fork, and run ``work`` in the child, which exits with 0 if it raised nothing; returns the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - a child that went on would run the tests of its parent
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def backends(client: Client) -> set[int]:
    """The sessions of the client's pool."""
    several = [client._db.connect() for _ in range(2)]
    pids = {raw(conn).info.backend_pid for conn in several}
    for conn in several:
        conn.close()
    return pids


def test_processes_that_share_a_client_get_their_own_answers(client: Client, runner: Runner) -> None:
    names = [f"collection-{number}" for number in range(CHILDREN + 1)]
    for name in names:
        client.enqueue([(f"{name}/{i}", f"text {i} of {name}") for i in range(3)], collection=name)
    runner.run_due()
    dimensions = next(iter(client.vectors(names[0]).values())).shape[0]
    query = np.ones(dimensions, dtype=np.float32)

    def calls(name: str) -> None:
        for number in range(CALLS):
            assert {hit.chunk_id.partition("/")[0] for hit in client.search(query, collection=name, k=3)} == {name}
            assert len(client.vectors(name)) == 3
            if number % 10 == 0:  # Redis too, whose connections were used before the fork
                client._broker.queued_doorbells()
                client._broker.ring([Doorbell(number, priority=9)])
                client.enqueue([(f"{name}/new", f"new text {number} of {name}")], collection=f"{name}-new")

    before = backends(client)
    children = [child(lambda name=name: calls(name)) for name in names[1:]]  # type: ignore[misc]
    calls(names[0])
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * CHILDREN
    # The children have closed nothing of their parent's.
    assert backends(client) == before
    with client._db.begin() as conn:
        new = conn.execute(sa.text("SELECT count(*) FROM jobs WHERE n_chunks = 1")).scalar_one()
    assert new == (CHILDREN + 1) * CALLS // 10
    assert client._broker.queued_doorbells()[9] == (CHILDREN + 1) * CALLS // 10


def test_a_client_that_is_closed_in_a_child_goes_on_in_its_parent(client: Client) -> None:
    client.enqueue([("a", "one")], collection="docs")
    client.enqueue([("b", "two")], collection="other")
    before = backends(client)
    pid = child(client.close)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert backends(client) == before
    assert [info.name for info in client.collections()] == ["docs", "other"]
    assert client.enqueue([("c", "three")], collection="docs").chunks == 1
