"""Producers, deleters, workers, the filling and changes of the active space, all beside each other: at the end both
spaces have a vector of each chunk, and of nothing else.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.spaces import LongText
from chunkmill.errors import SpaceMismatch
from chunkmill.ledger.jobs import recover
from chunkmill.ledger.reembedding import fill
from chunkmill.ledger.work import chunk_batches
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from tests.integration.hands import Hands
from tests.support import reembeddings
from tests.support.waiting import PATIENCE, running, until

PRODUCERS, DELETERS, WORKERS = 3, 2, 2
TEXTS = [f"text {n}" for n in range(60)]
IDS = [f"{n}" for n in range(40)]


class Died(Exception):
    """The producer's iterable ends with it, as if the process had been killed there."""


class World:
    """A collection with two spaces, in which everybody does what a seed says."""

    def __init__(self, db: sa.Engine, settings: Settings, seed: int, rounds: int) -> None:
        self.db, self.rounds, self.seed = db, rounds, seed
        self.settings = settings.model_copy(update={"chunk_batch_size": 3, "enqueue_window": 4})
        self.client = Client(db, Broker.connect(self.settings), self.settings)
        self.hands = Hands(db)
        self.client.enqueue([(i, f"first {i}") for i in IDS], collection="docs")
        self.client.enqueue([(i, TEXTS[int(i)]) for i in IDS[:10]], collection="others")
        self.hands.work()
        self.new = reembeddings.second_space(db, "docs")
        with db.begin() as conn:
            docs = collections.find(conn, "docs")
            self.id, self.old = docs.id, registry.get(conn, docs.space_id)
        self.reembedding = reembeddings.begin(db, "docs", self.new)
        self.is_over = threading.Event()

    def produce(self, number: int) -> None:
        chance = random.Random(f"{self.seed} producer {number}")
        on_long = "truncate"
        for _ in range(self.rounds):
            n, dies = chance.randrange(1, 12), chance.random() < 0.15
            chunks = [(chance.choice(IDS), chance.choice(TEXTS)) for _ in range(n)]

            def stream(chunks: list[tuple[str, str]] = chunks, dies: bool = dies) -> Iterator[tuple[str, str]]:
                yield from chunks
                if dies:
                    raise Died

            for _ in range(20):
                try:
                    self.client.enqueue(stream(), collection="docs", on_long=on_long, on_invalid="skip")
                    break
                except Died:
                    break
                except SpaceMismatch:
                    on_long = "split" if on_long == "truncate" else "truncate"

    def delete(self, number: int) -> None:
        chance = random.Random(f"{self.seed} deleter {number}")
        for _ in range(self.rounds):
            self.client.delete("docs", chance.sample(IDS, 3))

    def flip(self) -> None:
        for _ in range(self.rounds):
            reembeddings.swap(self.db, "docs")

    def fill(self) -> None:
        while not self.is_over.is_set():
            self.fill_now()

    def fill_now(self) -> bool:
        self.hands.rows("UPDATE reembedding_fills SET passed_at = passed_at - interval '1 h' RETURNING 1")
        return fill.fill_some(self.db, self.settings, self.reembedding)

    def work(self, number: int) -> None:
        chance = random.Random(f"{self.seed} worker {number}")
        while not self.is_over.is_set():
            due = self.hands.due()
            chance.shuffle(due)
            for chunk_batch in due[:5]:
                self.embed(chunk_batch, number)

    def embed(self, chunk_batch: int, number: int) -> None:
        with self.db.begin() as conn:
            lease = chunk_batches.claim_if_due(conn, chunk_batch, owner=f"host:{number}", lease_seconds=600)
        if lease is not None:
            self.hands.embed(lease, {})

    def settle(self) -> None:
        """Let the poller and the workers go on until nothing is left to do."""
        self.hands.rows("UPDATE reembedding_fills SET is_there = false, began_at = NULL RETURNING 1")
        for _ in range(50):
            with self.db.begin() as conn:
                recover.fail_abandoned(conn)
            is_there = self.fill_now()
            due = self.hands.due()
            for chunk_batch in due:
                self.embed(chunk_batch, 0)
            if is_there and not due:
                return
        stands = self.hands.rows("SELECT * FROM reembedding_fills")
        left = self.hands.rows("SELECT * FROM chunk_batches WHERE state NOT IN ('completed', 'cancelled')")
        raise AssertionError(f"the collection is filled for ever\n{stands}\n{left}")

    def require_whole(self) -> None:
        with self.db.begin() as conn:
            for space in (self.old, self.new):
                covered = fill.coverage(conn, self.id, space)
                assert (covered.missing, covered.pending, covered.dead) == (0, 0, 0), (space.spec.long_text, covered)
                left_over = f"""
                    SELECT count(*)
                    FROM {space.table_name} v
                    WHERE NOT EXISTS (SELECT FROM contents t WHERE t.content_hash = v.content_hash)
                """
                assert conn.execute(sa.text(left_over)).scalar_one() == 0
            open_jobs = "SELECT count(*) FROM jobs WHERE state IN ('enqueueing', 'running')"
            assert conn.execute(sa.text(open_jobs)).scalar_one() == 0
            without_text = """
                SELECT count(*)
                FROM chunks c
                WHERE NOT EXISTS (SELECT FROM contents t WHERE t.content_hash = c.content_hash)
            """
            assert conn.execute(sa.text(without_text)).scalar_one() == 0
            untouched = fill.coverage(conn, collections.find(conn, "others").id, self.old)
            assert (untouched.chunks, untouched.missing) == (10, 0)


@pytest.mark.parametrize(
    ("seed", "rounds"), [(1, 6), *(pytest.param(seed, 40, marks=pytest.mark.slow) for seed in range(2, 22))]
)
def test_at_the_end_both_spaces_have_all_chunks(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, seed: int, rounds: int
) -> None:
    monkeypatch.setattr(fill, "PAGE", 7)
    monkeypatch.setattr(fill, "SECONDS", PATIENCE)
    db = create_db(settings.require_database_url(), role="test", pool_size=20)
    world = World(db, settings, seed, rounds)
    assert world.old.spec.long_text is LongText.TRUNCATE
    ending: list[Callable[[], None]] = [
        *(lambda n=n: world.produce(n) for n in range(PRODUCERS)),  # type: ignore[misc]
        *(lambda n=n: world.delete(n) for n in range(DELETERS)),  # type: ignore[misc]
        world.flip,
    ]
    going = [world.fill, *(lambda n=n: world.work(n) for n in range(1, WORKERS + 1))]  # type: ignore[misc]
    with running(*going, release=world.is_over.set) as beside, running(*ending) as calls:
        until(lambda: not any(call.is_alive() for call in calls) or not all(call.is_alive() for call in beside))
    world.settle()
    world.require_whole()
    with suppress(Exception):
        world.client.close()
    db.dispose()
