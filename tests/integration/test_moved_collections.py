"""A collection that was emptied and filled again in another space: what its old jobs say about it holds no longer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.client import Client as ClientClass
from chunkmill.domain.results import Job, Standing
from chunkmill.domain.states import JobState
from chunkmill.errors import InvalidInput
from chunkmill.settings import Settings
from tests.integration.hands import Hands

DEAD, WELL = "a dead text", "a harmless text"
CHUNKS = [("dead", DEAD), ("well", WELL)]


@pytest.fixture
def client(settings: Settings, db: sa.Engine) -> Iterator[Client]:
    small = settings.model_copy(update={"chunk_batch_size": 1})
    with ClientClass(db, Broker.connect(small), small) as made:
        yield made


@pytest.fixture
def old(client: Client, hands: Hands) -> Job:
    """A job that failed for one of its texts. Its collection has the same chunks since, in another space, embedded.

    Another collection, in the old space, has such a job too, and has stayed where it is.
    """
    enqueued = client.enqueue(CHUNKS, collection="docs", idempotency_key="k")
    client.enqueue(CHUNKS, collection="stays")
    hands.work(dead={DEAD: "not_finite"})
    empty(client, "docs")
    client.enqueue(CHUNKS, collection="docs", on_long="split")
    hands.work()
    assert client.audit("docs").complete
    return client.job(enqueued.id)


def empty(client: Client, collection: str) -> None:
    client.delete(collection, ["dead", "well"])


def test_a_drop_deletes_nothing_of_the_collection_of_now(client: Client, old: Job) -> None:
    (entry,) = client.dead(old.id)
    assert entry.standing is Standing.DELETED
    dropped = client.drop_dead(job_id=old.id)
    assert (dropped.entries, dropped.chunks) == (1, 0)
    assert client.job(old.id).state is JobState.COMPLETED
    assert (client.audit("docs").chunks, client.audit("docs").complete) == (2, True)
    assert [entry.collection for entry in client.dead()] == ["stays"]
    assert client.drop_dead(job_id=client.dead()[0].job_id).chunks == 1


def test_a_drop_for_an_old_job_drops_nothing_of_a_new_one(client: Client, hands: Hands, old: Job) -> None:
    """The same chunk with the same text has died in the new space as well."""
    empty(client, "docs")
    client.evict(max_bytes=0)
    new = client.enqueue(CHUNKS, collection="docs", on_long="split")
    hands.work(dead={DEAD: "not_finite"})
    assert client.drop_dead(job_id=old.id).chunks == 0
    (entry,) = client.dead(new.id)
    assert entry.standing is Standing.MISSING
    assert client.audit("docs").chunks == 2


def test_a_retry_of_an_old_job_is_refused(client: Client, hands: Hands, old: Job) -> None:
    before = hands.ledger()
    with pytest.raises(InvalidInput, match=f"job {old.id} cannot be retried: collection 'docs' .* another space"):
        client.retry(old.id)
    with pytest.raises(InvalidInput, match="the chunk was deleted"):
        client.retry_dead(job_id=old.id)
    assert hands.ledger() == before
    assert client.retry_dead(code="not_finite").contents == 1  # that of the collection that has stayed
    assert len(hands.due()) == 1


def test_an_old_job_that_is_ended_again_asks_for_nothing_in_its_old_space(client: Client, hands: Hands) -> None:
    """It had promised a vector that does not exist. Its dead chunk goes, and with it the reason to keep it failed."""
    old = client.enqueue(CHUNKS, collection="docs")
    hands.work(dead={DEAD: "not_finite"})
    hands.rows(f"DELETE FROM {hands.vectors_of(old.id)} RETURNING 1")
    empty(client, "docs")
    client.enqueue(CHUNKS, collection="docs", on_long="split")
    hands.work()
    client.drop_dead(job_id=old.id)
    assert (client.job(old.id).state, hands.due()) == (JobState.COMPLETED, [])


def test_a_prune_does_not_keep_an_old_job_for_chunks_of_another_space(client: Client, hands: Hands, old: Job) -> None:
    hands.rows("UPDATE jobs SET finished_at = now() - interval '90 days' RETURNING 1")
    pruned = client.prune(30)
    assert pruned.kept_jobs == 1  # the one whose collection has stayed
    assert old.id not in {job.id for job in client.jobs()}


def test_an_audit_explains_missing_chunks_by_jobs_of_its_own_space(client: Client, hands: Hands, old: Job) -> None:
    empty(client, "docs")
    client.evict(max_bytes=0)
    client.enqueue(CHUNKS, collection="docs", on_long="split")
    audit = client.audit("docs")
    assert (audit.missing, audit.pending, audit.dead) == (2, 2, 0)
    assert client.audit("stays").dead == 1


def test_the_same_key_is_the_same_job_after_its_collection_has_moved(client: Client, old: Job) -> None:
    again = client.enqueue(CHUNKS, collection="docs", idempotency_key="k")
    assert (again.id, again.state) == (old.id, JobState.FAILED)
    empty(client, "docs")
    assert client.enqueue(CHUNKS, collection="docs", idempotency_key="k").id == old.id
    assert client.audit("docs").space != old.space  # the empty collection was not moved back
