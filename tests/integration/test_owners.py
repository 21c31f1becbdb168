"""Chunks that several jobs name: none of these jobs deletes what another one has accepted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.client import Client as ClientClass
from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState
from chunkmill.errors import SpaceMismatch
from chunkmill.settings import Settings
from tests.integration.hands import Hands

LONG, SHORT = "a long text", "a short text"
POLICIES = ("reject", "truncate")
"""Those whose vectors share a space, so that a collection can have chunks of both."""


@pytest.fixture
def client(settings: Settings, db: sa.Engine) -> Iterator[Client]:
    small = settings.model_copy(update={"chunk_batch_size": 1})
    with ClientClass(db, Broker.connect(small), small) as made:
        yield made


def enqueue(client: Client, on_long: str, *, metadata: str = "m", collection: str = "docs") -> Job:
    chunks = [("long", LONG, {"of": metadata}), ("short", SHORT, {"of": metadata})]
    return client.enqueue(chunks, collection=collection, on_long=on_long)


def work(hands: Hands, jobs: Sequence[Job]) -> None:
    """Do the work of each job, in their order. A job that rejects long texts refuses ``LONG``, another one cuts it."""
    for job in jobs:
        ((rejects,),) = hands.rows("SELECT on_long = 'reject' FROM jobs WHERE id = :id", id=job.id)
        for number in set(hands.of_job(job.id)).intersection(hands.due()):
            lease = hands.claim(number)
            ((holds_long,),) = hands.rows(
                "SELECT sha256(:text) = ANY(content_hashes) FROM chunk_batches WHERE id = :id",
                text=LONG.encode(), id=number,
            )  # fmt: skip
            if rejects and holds_long:
                hands.complete(lease, dead={LONG: "too_long"})
                hands.finish(job.id)
            else:
                hands.embed(lease, {})


@pytest.mark.parametrize("metadata", ["m", "other"], ids=["unchanged", "with other metadata"])
@pytest.mark.parametrize("worked_on", [(0, 1), (1, 0)])
@pytest.mark.parametrize("policies", list(product(POLICIES, POLICIES)))
def test_every_accepted_chunk_stays_and_every_refused_one_is_named(
    client: Client, hands: Hands, policies: tuple[str, str], worked_on: tuple[int, int], metadata: str
) -> None:
    elsewhere = enqueue(client, "reject", collection="elsewhere")
    jobs = [enqueue(client, policies[0]), enqueue(client, policies[1], metadata=metadata)]
    work(hands, [jobs[number] for number in worked_on])
    after = [client.job(job.id) for job in jobs]
    assert [job.state for job in after] == [JobState.COMPLETED] * 2
    assert [job.dead for job in after] == [int(policy == "reject") for policy in policies]
    audit = client.audit("docs")
    assert (audit.complete, audit.chunks) == (True, 2 if "truncate" in policies else 1)
    assert client.job(elsewhere.id).dead == 0
    assert client.audit("elsewhere").chunks == 2


@pytest.mark.parametrize("first", POLICIES)
def test_split_never_meets_another_policy_in_a_collection(client: Client, hands: Hands, first: str) -> None:
    """Its vectors are of another space, so there is no chunk that both have accepted."""
    for policies in ((first, "split"), ("split", first)):
        collection = "-".join(policies)
        accepted = enqueue(client, policies[0], collection=collection)
        with pytest.raises(SpaceMismatch):
            enqueue(client, policies[1], collection=collection)
        work(hands, [accepted])
        assert client.job(accepted.id).state is JobState.COMPLETED
        assert client.audit(collection).complete


def test_two_jobs_that_split_share_their_chunks(client: Client, hands: Hands) -> None:
    jobs = [enqueue(client, "split"), enqueue(client, "split")]
    work(hands, jobs[::-1])
    assert [client.job(job.id).state for job in jobs] == [JobState.COMPLETED] * 2
    assert (client.audit("docs").complete, client.audit("docs").chunks) == (True, 2)


def test_a_chunk_that_only_an_ended_job_and_this_one_rejected_leaves_the_collection(
    client: Client, hands: Hands
) -> None:
    """The first was cancelled before it could refuse the chunk, which is in its name still."""
    first, second = enqueue(client, "reject"), enqueue(client, "reject")
    client.cancel(first.id)
    work(hands, [second])
    assert (client.job(second.id).state, client.job(second.id).dead) == (JobState.COMPLETED, 1)
    assert client.audit("docs").complete
    client.retry(first.id)
    work(hands, [first])
    assert (client.job(first.id).state, client.job(first.id).dead) == (JobState.COMPLETED, 1)


def test_a_job_is_not_told_of_a_chunk_that_was_refused_before_it_began(client: Client, hands: Hands) -> None:
    work(hands, [enqueue(client, "reject")])
    later = client.enqueue([("another", LONG)], collection="docs", on_long="reject")
    work(hands, [later])
    assert [chunk.chunk_id for chunk in client.dead_chunks(later.id)] == ["another"]


def test_what_a_permissive_job_has_taken_over_is_written_once(client: Client, hands: Hands) -> None:
    enqueue(client, "reject"), enqueue(client, "truncate")
    before = hands.rows("SELECT chunk_id, xmin::text FROM chunks ORDER BY 1")
    for policy in POLICIES:
        enqueue(client, policy)
    assert hands.rows("SELECT chunk_id, xmin::text FROM chunks ORDER BY 1") == before
