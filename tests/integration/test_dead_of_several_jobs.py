"""Dead chunks of jobs that share texts, chunk ids and spaces: what is done for one job leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.client import Client as ClientClass
from chunkmill.domain.results import Job, Standing
from chunkmill.domain.states import JobState
from chunkmill.ledger.jobs import jobs
from chunkmill.settings import Settings
from tests.integration.hands import Hands

DEAD = "a dead text"


@pytest.fixture
def client(settings: Settings, db: sa.Engine) -> Iterator[Client]:
    """Makes ChunkBatches of one content. Jobs, ChunkBatches and dead chunks have numbers of their own."""
    with db.begin() as conn:
        for first, table in enumerate(("jobs", "chunk_batches", "dead_chunks"), start=1):
            conn.execute(sa.text(f"ALTER TABLE {table} ALTER COLUMN id RESTART WITH {100 * first}"))
    small = settings.model_copy(update={"chunk_batch_size": 1})
    with ClientClass(db, Broker.connect(small), small) as made:
        yield made


@pytest.fixture
def both(client: Client, hands: Hands) -> tuple[Job, Job]:
    """Two jobs that failed for the same text under the same chunk id, each in a collection of its own."""
    enqueued = [
        client.enqueue([("id-0", DEAD, {"of": name}), ("well", "a harmless text")], collection=name)
        for name in ("first", "second")
    ]
    hands.work(dead={DEAD: "not_finite"})
    first, second = (client.job(job.id) for job in enqueued)
    assert (first.state, second.state) == (JobState.FAILED, JobState.FAILED)
    return first, second


def ledger_of(hands: Hands, job: Job) -> list[list[tuple[Any, ...]]]:
    tables = {"jobs": "id", "chunk_batches": "job_id", "dead_chunks": "job_id", "chunks": "job_id"}
    return [
        hands.rows(f"SELECT * FROM {table} WHERE {column} = :job ORDER BY 1, 2", job=job.id)
        for table, column in tables.items()
    ]


def test_a_jobs_dead_list_names_chunks_of_its_own_collection(client: Client, hands: Hands) -> None:
    enqueued = [client.enqueue([(f"of-{name}", DEAD)], collection=name) for name in ("first", "second")]
    hands.work(dead={DEAD: "not_finite"})
    listed = [[(entry.collection, entry.chunk_id) for entry in client.dead(job.id)] for job in enqueued]
    assert listed == [[("first", "of-first")], [("second", "of-second")]]


def test_the_details_of_a_dead_chunk_are_its_own(client: Client, both: tuple[Job, Job]) -> None:
    shown = [client.dead_chunk(entry.id) for job in both for entry in client.dead(job.id)]
    assert [details.metadata for details in shown] == [{"of": "first"}, {"of": "second"}]


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_retry_of_a_dead_chunk_leaves_the_other_job_as_it_is(
    client: Client, hands: Hands, both: tuple[Job, Job], chosen: int
) -> None:
    job, other = both[chosen], both[1 - chosen]
    before = ledger_of(hands, other)
    assert client.retry_dead(job_id=job.id).jobs == (job.id,)
    assert ledger_of(hands, other) == before
    assert [hands.of_job(job.id)[-1]] == hands.due()
    hands.work()
    assert client.job(job.id).state is JobState.COMPLETED
    assert ledger_of(hands, other) == before
    (entry,) = client.dead()
    assert (entry.job_id, entry.standing) == (other.id, Standing.EMBEDDED)  # they share the vector


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_drop_leaves_the_same_chunk_of_another_collection(
    client: Client, hands: Hands, both: tuple[Job, Job], chosen: int
) -> None:
    job, other = both[chosen], both[1 - chosen]
    before = ledger_of(hands, other)
    (entry,) = client.dead(job.id)
    dropped = client.drop_dead([entry.id])
    assert (dropped.jobs, dropped.entries, dropped.chunks) == ((job.id,), 1, 1)
    assert client.job(job.id).state is JobState.COMPLETED
    assert ledger_of(hands, other) == before


def test_a_text_that_has_a_vector_in_another_space_is_still_missing(
    client: Client, hands: Hands, both: tuple[Job, Job]
) -> None:
    """It died in three jobs, one of them in a space of its own, where it has a vector since."""
    whole = client.enqueue([("id-0", DEAD)], collection="whole", on_long="split")
    hands.work(dead={DEAD: "not_finite"})
    with hands.db.begin() as conn:
        space_id = jobs.space_id(conn, whole.id)
    hands.write(space_id, [DEAD])
    standings = {entry.job_id: entry.standing for entry in client.dead()}
    first, second = both
    assert standings == {whole.id: Standing.EMBEDDED, first.id: Standing.MISSING, second.id: Standing.MISSING}
    assert client.retry_dead(job_id=first.id).contents == 1


def test_a_retry_of_a_job_tries_again_what_its_own_dead_list_names(
    client: Client, hands: Hands, both: tuple[Job, Job]
) -> None:
    """Another job has the text on its list that this one has embedded by now."""
    first, second = both
    client.retry_dead(job_id=first.id)
    hands.work()
    third = client.enqueue([("id-0", DEAD), ("id-1", "another dead text")], collection="first")
    hands.work(dead={"another dead text": "not_finite"})
    (entry,) = client.dead(third.id)
    assert entry.chunk_id == "id-1"
    assert client.retry(third.id).remaining == 1
    assert len(hands.due()) == 1
    assert [entry.job_id for entry in client.dead()] == [second.id]


def test_a_retry_of_a_job_keeps_on_the_list_what_it_does_not_try_again(client: Client, hands: Hands) -> None:
    job = client.enqueue(
        [("empty", ""), ("long", "a long text"), ("id-0", DEAD)], collection="docs", on_long="reject", on_invalid="skip"
    )
    hands.work(dead={"a long text": "too_long", DEAD: "not_finite"})
    assert client.job(job.id).dead == 3
    client.retry(job.id)
    assert client.dead_codes(job.id) == {"empty_text": 1, "too_long": 1}
    assert len(hands.due()) == 1
    hands.work()
    again = client.job(job.id)
    assert (again.state, again.dead) == (JobState.COMPLETED, 2)


@pytest.mark.parametrize(("priority", "rank"), [("high", 3), ("low", 9)])
def test_a_text_that_is_tried_again_has_the_priority_of_its_job(
    client: Client, hands: Hands, priority: str, rank: int
) -> None:
    job = client.enqueue([("id-0", DEAD), ("id-1", "a deadly text")], collection="docs", priority=priority)
    hands.work(dead={DEAD: "not_finite", "a deadly text": "kills_workers"})
    client.retry_dead(job_id=job.id)
    again = hands.rows("SELECT route, priority FROM chunk_batches WHERE state = 'available'")
    assert again == [("local", rank)] * 2


def test_ids_that_nobody_knows_do_not_end_a_deletion(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkmill.client.chunks.DELETE_STEP", 2)
    for name in ("docs", "other"):
        client.enqueue([(str(i), f"text {i}") for i in range(6)], collection=name)
    assert client.delete("docs", ["0", "unknown", "not there", "nor there", "1", "2", "3"]) == 4
    assert [client.audit(name).chunks for name in ("docs", "other")] == [2, 6]


def test_a_drop_in_steps_may_name_the_entries_of_two_jobs_about_one_chunk(
    client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes the other job's entry with it, so that a later step does not find it any more."""
    monkeypatch.setattr("chunkmill.client.dead.DROP_STEP", 1)
    chunks = [("a", DEAD), ("b", "another dead text")]
    jobs_of_docs = [client.enqueue([*chunks, ("well", "text")], collection="docs") for _ in range(2)]
    other = client.enqueue(chunks, collection="other")
    hands.work(dead=dict.fromkeys((DEAD, "another dead text"), "not_finite"))

    named = [entry.id for job in jobs_of_docs for entry in client.dead(job.id)]
    dropped = client.drop_dead(named)

    assert (len(named), dropped.entries, dropped.chunks) == (4, 4, 2)
    assert [client.job(job.id).state for job in jobs_of_docs] == [JobState.COMPLETED] * 2
    assert (client.job(other.id).state, len(client.dead())) == (JobState.FAILED, 2)


def test_a_drop_of_many_chunks_lets_others_in_between(
    client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven in one job, in steps of three. The other job lists the same chunks; a third one is left alone."""
    monkeypatch.setattr("chunkmill.client.dead.DROP_STEP", 3)
    texts = [f"dead text {i}" for i in range(7)]
    chunks = [(str(i), text) for i, text in enumerate(texts)]
    job, twin = (client.enqueue([*chunks, ("well", "text")], collection="docs") for _ in range(2))
    other = client.enqueue(chunks, collection="other")
    hands.work(dead=dict.fromkeys(texts, "not_finite"))
    steps: list[int | str] = []

    @sa.event.listens_for(client._db, "commit")
    def committed(_conn: object) -> None:
        steps.append("commit")

    @sa.event.listens_for(client._db, "after_cursor_execute")
    def deleted(_conn: object, cursor: Any, statement: str, *_: object) -> None:
        if statement.split()[:3] == ["DELETE", "FROM", "chunks"]:
            steps.append(cursor.rowcount)

    dropped = client.drop_dead(job_id=job.id)
    assert steps[:7] == ["commit", 3, "commit", 3, "commit", 1, "commit"]
    assert (dropped.jobs, dropped.entries, dropped.chunks) == ((job.id, twin.id), 14, 7)
    assert [client.job(one.id).state for one in (job, twin)] == [JobState.COMPLETED] * 2
    assert (client.job(other.id).state, client.audit("other").chunks) == (JobState.FAILED, 7)
