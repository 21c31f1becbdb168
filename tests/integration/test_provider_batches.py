"""ProviderBatches in the ledger, two of them at least: who takes which step, and what belongs to which."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.states import Route
from chunkmill.errors import LeaseLost
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes, provider_room
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.support.paid_ledger import LARGE, SMALL, add_inputs, add_provider_batch, register

HERE, THERE = "https://here.example/v1", "https://there.example/v1"


@pytest.fixture
def small(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings)


@pytest.fixture
def large(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings, LARGE)


def claim(
    conn: sa.Connection, batch: int, *, owner: str = "w1", server: str = HERE, seconds: float = 60
) -> Step | None:
    return provider_batches.claim_if_due(conn, batch, owner=owner, lease_seconds=seconds, server=server)


def claimed(conn: sa.Connection, batch: int, **more: Any) -> Step:
    step = claim(conn, batch, **more)
    assert step is not None
    return step


def rung(conn: sa.Connection) -> set[int]:
    """For which steps a poller rings now; not again for a minute."""
    return {bell.provider_batch_id for bell in provider_batches.take_due(conn, repair_seconds=60, limit=10)}


def rows_of(conn: sa.Connection, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in conn.execute(sa.text(query), parameters)]


# Who takes a step


def test_a_worker_of_another_server_leaves_a_batch_alone(db: sa.Engine, small: registry.Space) -> None:
    """It would ask its own server, which knows nothing of the batch, and declare it lost: it would be paid again."""
    with db.begin() as conn:
        here = add_provider_batch(conn, small, server=HERE, batch_id="batch_1")
        there = add_provider_batch(conn, small, server=THERE, batch_id="batch_2")
        not_uploaded = add_provider_batch(conn, small, "gathered")

        assert claim(conn, here, server=THERE) is None
        assert claim(conn, there, server=HERE) is None
        assert rows_of(conn, "SELECT attempt, lease_owner FROM provider_batches") == [(0, None)] * 3
        assert claimed(conn, here, server=HERE).batch_id == "batch_1"
        assert claimed(conn, there, server=THERE).batch_id == "batch_2"
        assert claimed(conn, not_uploaded, server=THERE).id == not_uploaded


@pytest.mark.parametrize("state", ["gathered", "submitted"])
def test_a_paused_or_stopped_lane_of_plain_requests_holds_no_batch_up(
    db: sa.Engine, small: registry.Space, state: str
) -> None:
    with db.begin() as conn:
        batch = add_provider_batch(conn, small, state)
        provider_lanes.pause(conn, Route.OPENAI_SYNC, seconds=60, reason="a limit")
        provider_lanes.stop(conn, Route.OPENAI_SYNC, code="insufficient_quota", reason="no credit is left")

        assert rung(conn) == {batch}
        assert claimed(conn, batch).id == batch


def test_a_stopped_lane_spends_nothing_and_collects_what_is_paid(db: sa.Engine, small: registry.Space) -> None:
    states = ("gathering", "gathered", "uploaded", "creating", "submitted", "collecting", "cleaning")
    with db.begin() as conn:
        batches = {add_provider_batch(conn, small, state): state for state in states}
        provider_lanes.stop(conn, Route.OPENAI, code="insufficient_quota", reason="no credit is left")

        assert {batches[batch] for batch in rung(conn)} == {"submitted", "collecting", "cleaning"}
        taken = {batches[batch] for batch in batches if claim(conn, batch) is not None}
        assert taken == {"submitted", "collecting", "cleaning"}


def test_a_paused_lane_asks_for_nothing_until_the_pause_is_over(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        batch = add_provider_batch(conn, small)
        provider_lanes.pause(conn, Route.OPENAI, seconds=60, reason="a limit")
        assert (rung(conn), claim(conn, batch)) == (set(), None)
        conn.execute(sa.text("UPDATE provider_lanes SET paused_until = now()"))
        assert rung(conn) == {batch}
        assert claimed(conn, batch).id == batch


def test_a_step_that_is_not_due_is_neither_rung_for_nor_taken(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        later = add_provider_batch(conn, small, not_before=sa.text("now() + interval '1 second'"))
        now = add_provider_batch(conn, small)
        assert rung(conn) == {now}
        assert claim(conn, later) is None
        assert rung(conn) == set()  # its bell is on its way


def test_a_step_is_rung_for_again_if_nobody_came_or_its_worker_died(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        unheard, held, dead = (add_provider_batch(conn, small) for _ in range(3))
        claimed(conn, held)
        claimed(conn, dead)
        seconds_ago = "UPDATE provider_batches SET {} = now() - interval '{} s' WHERE id = :id"
        conn.execute(sa.text(seconds_ago.format("lease_until", 1)), {"id": dead})
        conn.execute(sa.text(seconds_ago.format("rung_at", 60)), {"id": unheard})
        assert rung(conn) == {dead}
        conn.execute(sa.text(seconds_ago.format("rung_at", 61)), {"id": unheard})
        assert rung(conn) == {unheard}


def test_the_steps_that_are_due_for_the_longest_are_rung_for_first(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        batches = {
            add_provider_batch(conn, small, not_before=sa.text(f"now() - interval '{n} minutes'")): n for n in (1, 3, 2)
        }
        bells = provider_batches.take_due(conn, repair_seconds=60, limit=2)
        assert {batches[bell.provider_batch_id] for bell in bells} == {3, 2}


# Leases


def test_a_worker_renews_the_leases_that_it_still_has_and_no_others(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        lost, kept, given_back = (claimed(conn, add_provider_batch(conn, small)) for _ in range(3))
        conn.execute(
            sa.text("UPDATE provider_batches SET lease_until = now() - interval '1 s' WHERE id = :id"), {"id": lost.id}
        )
        claimed(conn, lost.id, owner="w2", seconds=100)
        provider_batches.release(conn, given_back, delay_s=0)

        assert provider_batches.renew_if_held(conn, [lost, kept, given_back], lease_seconds=500) == {kept.id}

        left = "SELECT id, lease_owner, extract(epoch FROM lease_until - now())::int FROM provider_batches ORDER BY id"
        assert rows_of(conn, left) == [(lost.id, "w2", 100), (kept.id, "w1", 500), (given_back.id, None, None)]


def test_a_worker_that_leaves_gives_back_its_own_steps_and_cannot_change_them(
    db: sa.Engine, small: registry.Space
) -> None:
    with db.begin() as conn:
        own, others = (claimed(conn, add_provider_batch(conn, small), owner=owner) for owner in ("w1", "w2"))
        conn.execute(sa.text("UPDATE provider_batches SET rung_at = now()"))

        provider_batches.release_all(conn, "w1")

        assert rung(conn) == {own.id}
        provider_batches.note(conn, others, n_done=1)
        with pytest.raises(LeaseLost):
            provider_batches.note(conn, own, n_done=1)
        assert claimed(conn, own.id, owner="w3").attempt > own.attempt


# What belongs to which


def join(conn: sa.Connection, batch: int, *chunk_batches: int) -> None:
    for chunk_batch in chunk_batches:
        conn.execute(
            sa.text("INSERT INTO provider_batch_members VALUES (:batch, :id)"), {"batch": batch, "id": chunk_batch}
        )


def enqueue(client: Client, n: int, prefix: str, **more: Any) -> int:
    """The id of a new job's one ChunkBatch, which is with a provider."""
    texts = [(f"{prefix}-{i}", f"{prefix} {i}") for i in range(n)]
    job = client.enqueue(texts, **{"collection": prefix, "model": SMALL, "route": "openai", **more})
    with client._db.begin() as conn:
        query = "UPDATE chunk_batches SET state = 'running', attempt = 1 WHERE job_id = :id RETURNING id"
        return int(conn.execute(sa.text(query), {"id": job.id}).scalar_one())


def test_a_batch_whose_own_chunk_batches_have_ended_is_cancelled(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    """Somebody who waits for another ProviderBatch keeps it no more than a ChunkBatch that is over."""
    waiting, over = (enqueue(client, 2, name) for name in ("waiting", "over"))
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'cancelled' WHERE id = :id"), {"id": over})
        wanted, shared, unwanted = (add_provider_batch(conn, small) for _ in range(3))
        join(conn, wanted, waiting)
        join(conn, shared, waiting, over)
        join(conn, unwanted, over)

        assert provider_batches.abandon_unwanted(conn) == [unwanted]
        assert provider_batches.abandon_unwanted(conn) == []
        assert [claimed(conn, batch).cancel_requested for batch in (wanted, shared, unwanted)] == [False, False, True]


@pytest.mark.parametrize("state", ["gathered", "uploaded", "creating", "submitted"])
def test_a_batch_that_nobody_wants_is_cancelled_at_once_whatever_it_waits_for(
    db: sa.Engine, small: registry.Space, state: str
) -> None:
    with db.begin() as conn:
        batch = add_provider_batch(
            conn, small, state, not_before=sa.text("now() + interval '1 hour'"), rung_at=sa.text("now()")
        )
        collecting = add_provider_batch(conn, small, "collecting")
        assert provider_batches.abandon_unwanted(conn) == [batch]
        assert rung(conn) == {batch, collecting}


def test_a_half_is_waited_for_by_the_same_chunk_batches(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        whole, other = (add_provider_batch(conn, small) for _ in range(2))
        join(conn, whole, 11, 12)
        join(conn, other, 12, 13)
        add_inputs(conn, small, whole, [bytes([n]) * 32 for n in range(5)], sent_tokens=100)
        add_inputs(conn, small, other, [bytes([n]) * 32 for n in range(10, 13)], sent_tokens=7)
        half = provider_batches.open_half(conn, claimed(conn, whole))

        provider_inputs.move_half(conn, whole, half.id)
        for batch in (whole, half.id):
            provider_batches.count_inputs(conn, batch)

        members = "SELECT * FROM provider_batch_members ORDER BY 1, 2"
        assert rows_of(conn, members) == [
            (whole, 11), (whole, 12), (other, 12), (other, 13), (half.id, 11), (half.id, 12),
        ]  # fmt: skip
        counts = "SELECT id, n_requests, n_inputs, n_contents, n_tokens FROM provider_batches ORDER BY id"
        assert rows_of(conn, counts) == [(whole, 3, 3, 3, 300), (other, 0, 0, 0, 0), (half.id, 2, 2, 2, 200)]
        places = "SELECT request_no FROM provider_inputs WHERE provider_batch_id = :id ORDER BY content_hash"
        assert rows_of(conn, places, id=half.id) == [(0,), (1,)]
        assert rows_of(conn, places, id=other) == [(0,), (1,), (2,)]


def test_oddities_are_counted_for_their_own_batch_and_attempt(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        step, other = (claimed(conn, add_provider_batch(conn, small)) for _ in range(2))
        for kinds in ({"duplicate": 2}, {"duplicate": 3, "not_json": 1}):
            provider_batches.count_oddities(conn, step, kinds)
        provider_batches.release_all(conn, "w1")
        provider_batches.count_oddities(conn, step, {"duplicate": 100})  # its lease is lost

        counted = rows_of(conn, "SELECT id, oddities FROM provider_batches ORDER BY id")
        assert counted == [(step.id, {"duplicate": 5, "not_json": 1}), (other.id, {})]


# What is to be gathered


def to_gather(conn: sa.Connection, **more: Any) -> list[int]:
    return provider_batches.spaces_to_gather(conn, **{"wait_seconds": 0.0, "full": 50_000, **more})


def test_each_space_is_gathered_on_its_own(
    client: Client, db: sa.Engine, small: registry.Space, large: registry.Space
) -> None:
    for name, model in (("one", SMALL), ("two", LARGE)):
        client.enqueue([(name, name)], collection=name, model=model, route="openai")
    with db.begin() as conn:
        assert to_gather(conn) == [small.id, large.id]
        provider_batches.open_gathering(conn, small.id)
        provider_batches.open_gathering(conn, small.id)
        assert to_gather(conn) == [large.id]
        assert rows_of(conn, "SELECT space_id FROM provider_batches") == [(small.id,)]
        provider_lanes.stop(conn, Route.OPENAI_SYNC, code="insufficient_quota", reason="no credit is left")
        assert to_gather(conn) == [large.id]
        provider_lanes.stop(conn, Route.OPENAI, code="insufficient_quota", reason="no credit is left")
        assert to_gather(conn) == []


def test_a_space_is_gathered_once_its_work_is_enough_or_has_waited_long_enough(
    client: Client, db: sa.Engine, small: registry.Space, large: registry.Space
) -> None:
    for name, model, n in (("one", SMALL, 3), ("two", SMALL, 3), ("three", LARGE, 5)):
        texts = [(f"{name}-{i}", f"{name} {i}") for i in range(n)]
        client.enqueue(texts, collection=name, model=model, route="openai")
    with db.begin() as conn:
        assert to_gather(conn, wait_seconds=3600, full=7) == []
        assert to_gather(conn, wait_seconds=3600, full=6) == [small.id]  # of both jobs
        assert to_gather(conn, wait_seconds=3600, full=5) == [small.id, large.id]
        conn.execute(
            sa.text("UPDATE chunk_batches SET created_at = now() - interval '1 hour' WHERE space_id = :id"),
            {"id": large.id},
        )
        assert to_gather(conn, wait_seconds=3600) == [large.id]
        assert to_gather(conn, wait_seconds=3600.1) == []


# The account's limits


@pytest.mark.parametrize(
    ("state", "enqueued", "in_the_hour"),
    [
        ("gathering", False, False),
        ("gathered", True, True),
        ("uploaded", True, True),
        ("creating", True, False),  # counted by when it was made
        ("submitted", True, False),
        ("collecting", False, False),
        ("closed", False, False),
    ],
)
def test_what_is_at_the_provider_or_about_to_be_counts_for_the_accounts_limits(
    db: sa.Engine, small: registry.Space, large: registry.Space, state: str, enqueued: bool, in_the_hour: bool
) -> None:
    with db.begin() as conn:
        add_provider_batch(conn, small, state, n_tokens=500, n_requests=7)
        add_provider_batch(conn, large, n_tokens=30, n_requests=2, creating_since=sa.text("now()"))
        used = provider_room.enqueued(conn)

    assert (used.tokens, used.requests, used.provider_batches) == ((530, 9, 2) if enqueued else (30, 2, 1))
    assert used.made_in_an_hour == 1 + in_the_hour


@pytest.mark.parametrize(
    ("status", "is_queued"),
    [
        (None, True),
        ("validating", True),
        ("in_progress", True),
        ("finalizing", True),
        ("cancelling", True),
        ("vanished", True),  # another key may see it
        ("completed", False),
        ("failed", False),
        ("expired", False),
        ("cancelled", False),
    ],
)
def test_a_batch_that_has_ended_is_not_in_the_providers_queue(
    db: sa.Engine, small: registry.Space, large: registry.Space, status: str | None, is_queued: bool
) -> None:
    """Its result files may take hours to come. Neither the account's limits nor a refused batch wait for them."""
    with db.begin() as conn:
        step = claimed(conn, add_provider_batch(conn, large, "uploaded", n_tokens=30, n_requests=2))
        add_provider_batch(conn, small, "submitted", n_tokens=500, n_requests=7, provider_status=status)
        used = provider_room.enqueued(conn)
        others = provider_batches.any_other_at_provider(conn, step)
        # The status of an earlier create says nothing of what is about to be created.
        for state in ("gathered", "uploaded", "creating"):
            conn.execute(
                sa.text("UPDATE provider_batches SET state = :state WHERE id <> :id"), {"state": state, "id": step.id}
            )
            assert provider_room.enqueued(conn).tokens == 530

        assert provider_batches.any_other_at_provider(conn, step)
    assert (used.tokens, used.requests, used.provider_batches) == ((530, 9, 2) if is_queued else (30, 2, 1))
    assert others is is_queued


def test_an_hour_of_batches_is_an_hour(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        for age in ("59 minutes 59 seconds", "60 minutes"):
            add_provider_batch(conn, small, "closed", creating_since=sa.text(f"now() - interval '{age}'"))
        assert provider_room.enqueued(conn).made_in_an_hour == 1
