"""The end of a job: what it asks of its own chunks, and of nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.client import Client as ClientClass
from chunkmill.domain.states import JobState
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, until

SAME = "the same text"


@pytest.fixture
def client(settings: Settings, db: sa.Engine) -> Iterator[Client]:
    """A client whose job 1, of three ChunkBatches, is cancelled: what follows has a number of its own for each kind."""
    small = settings.model_copy(update={"chunk_batch_size": 1})
    with ClientClass(db, Broker.connect(small), small) as made:
        made.cancel(made.enqueue([(str(i), f"text {i} of another job") for i in range(3)], collection="before").id)
        yield made


def test_another_jobs_dead_chunk_explains_nothing(client: Client, hands: Hands) -> None:
    """Two jobs share a text. In one it is dead; the other promises a vector that does not exist, and must not end."""
    first = client.enqueue([("a", SAME)], collection="first")
    second = client.enqueue([("b", SAME)], collection="second")
    (of_first,), (of_second,) = hands.of_job(first.id), hands.of_job(second.id)
    hands.complete(hands.claim(of_first), dead={SAME: "not_finite"})
    hands.complete(hands.claim(of_second), n_embedded=1)
    assert hands.finish(first.id) is JobState.FAILED
    assert hands.finish(second.id) is None
    assert client.job(second.id).state is JobState.RUNNING
    assert hands.due() == [of_second]


def test_a_chunk_deleted_from_the_collection_is_not_asked_for_again(client: Client, hands: Hands) -> None:
    """Another collection still has its text, so that the text itself stays."""
    first = client.enqueue([("a", SAME)], collection="first")
    second = client.enqueue([("b", SAME)], collection="second")
    hands.complete(hands.claim(*hands.of_job(first.id)), n_embedded=1)
    client.delete("first", ["a"])
    assert hands.finish(first.id) is JobState.COMPLETED
    assert hands.due() == hands.of_job(second.id)


def test_a_dead_chunk_that_has_its_vector_by_now_fails_no_job(client: Client, hands: Hands) -> None:
    job = client.enqueue([("a", SAME)], collection="docs")
    lease = hands.claim(*hands.of_job(job.id))
    hands.complete(lease, dead={SAME: "out_of_memory"})
    hands.write(lease.space_id, [SAME])
    assert hands.finish(job.id) is JobState.COMPLETED


@pytest.mark.parametrize("since", ["replaced", "deleted"])
def test_a_dead_chunk_that_is_gone_fails_no_job(client: Client, hands: Hands, since: str) -> None:
    """Another collection has a chunk of the same id and text still."""
    job = client.enqueue([("a", SAME)], collection="docs")
    other = client.enqueue([("a", SAME)], collection="other")
    hands.complete(hands.claim(*hands.of_job(job.id)), dead={SAME: "not_finite"})
    if since == "replaced":
        client.enqueue([("a", "another text")], collection="docs")
    else:
        client.delete("docs", ["a"])
    assert hands.finish(job.id) is JobState.COMPLETED
    assert client.job(other.id).state is JobState.RUNNING


def test_a_job_fails_for_its_own_dead_chunks_and_discarded_chunk_batches_alone(client: Client, hands: Hands) -> None:
    dead = client.enqueue([("a", "a dead text")], collection="docs")
    discarded = client.enqueue([("b", "text b")], collection="docs")
    too = client.enqueue([("c", "text c")], collection="docs")
    well = client.enqueue([("d", "text d")], collection="docs")
    hands.complete(hands.claim(*hands.of_job(dead.id)), dead={"a dead text": "not_finite"})
    hands.fail(hands.claim(*hands.of_job(discarded.id)), error="the first reason", retryable=False)
    hands.fail(hands.claim(*hands.of_job(too.id)), error="the second reason", retryable=False)
    hands.embed(hands.claim(*hands.of_job(well.id)), {})
    assert client.job(well.id).state is JobState.COMPLETED
    for job in (dead, discarded, too):
        assert hands.finish(job.id) is JobState.FAILED
    errors = [client.job(job.id).error or "" for job in (dead, discarded, too)]
    assert ["1 chunk cannot be embedded" in error for error in errors] == [True, False, False]
    assert ["the first reason" in error for error in errors] == [False, True, False]
    assert ["the second reason" in error for error in errors] == [False, False, True]


def test_a_false_promise_of_another_job_does_not_keep_this_one_open(client: Client, hands: Hands) -> None:
    false = client.enqueue([("a", SAME)], collection="docs")
    job = client.enqueue([("b", "text b")], collection="docs")
    hands.complete(hands.claim(*hands.of_job(false.id)), n_embedded=1)
    hands.embed(hands.claim(*hands.of_job(job.id)), {})
    assert client.job(job.id).state is JobState.COMPLETED
    assert hands.due() == []  # the other job's is opened again when that job comes to its end
    assert hands.finish(false.id) is None
    assert hands.due() == hands.of_job(false.id)


def test_a_poller_ends_a_job_beside_one_that_goes_on(
    client: Client, hands: Hands, db: sa.Engine, broker: Broker, settings: Settings
) -> None:
    """The worker that completed the first job's last ChunkBatch died before it could end the job."""
    job = client.enqueue([("a", SAME)], collection="docs")
    other = client.enqueue([("b", "text b")], collection="docs")
    lease = hands.claim(*hands.of_job(job.id))
    hands.write(lease.space_id, [SAME])
    hands.complete(lease, n_embedded=1)
    assert Poller(db, broker, settings).round().finished == 1
    assert [client.job(one_job.id).state for one_job in (job, other)] == [JobState.COMPLETED, JobState.RUNNING]


def test_the_counts_of_a_chunk_batch_that_is_opened_again_begin_anew(
    client: Client, hands: Hands, db: sa.Engine
) -> None:
    """Vectors vanish behind a cache hit and behind a content that was embedded: both are still to be embedded."""
    client.enqueue([("a", "known 1"), ("b", "known 2")], collection="docs")
    hands.work()
    job = client.enqueue([("a", "known 1"), ("b", "known 2"), ("c", "new")], collection="again")
    (lease,) = [hands.claim(due) for due in hands.due()]
    hands.complete(lease, n_embedded=1)
    counted = client.job(job.id)
    assert (counted.contents, counted.cached, counted.embedded, counted.remaining) == (3, 2, 1, 0)
    with db.begin() as conn:
        space = registry.get(conn, lease.space_id)
        conn.execute(sa.text(f"DELETE FROM {space.table_name}"))
    assert hands.finish(job.id) is None
    counted = client.job(job.id)
    assert (counted.contents, counted.cached, counted.embedded, counted.remaining) == (3, 0, 0, 3)
    hands.work()
    counted = client.job(job.id)
    assert (counted.state, counted.cached, counted.embedded, counted.remaining) == (JobState.COMPLETED, 0, 3, 0)


def test_a_job_is_ended_by_one_closer(client: Client, hands: Hands, db: sa.Engine) -> None:
    """The second one waits for the first, and finds the job ended."""
    job = client.enqueue([("a", SAME)], collection="docs")
    lease = hands.claim(*hands.of_job(job.id))
    hands.write(lease.space_id, [SAME])
    hands.complete(lease, n_embedded=1)
    with ThreadPoolExecutor(1) as threads:
        with db.begin() as closing:
            assert finish_if_done(closing, job.id, registry.get(closing, lease.space_id)) is JobState.COMPLETED
            second = threads.submit(hands.finish, job.id)
            until(lambda: second.done() or hands.waiting())
        assert second.result(PATIENCE) is None
    assert client.job(job.id).state is JobState.COMPLETED
