"""A collection goes to another space and back: what is promised in the moment of the flip."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import NoReturn

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Gates, InvalidInput, NotFound, Reembedding, ReembeddingState, UnknownRoute, WaitTimeout
from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.db.locks import DELETE_LOCK, holders, lock_shared
from chunkmill.domain.chunks import content_hash
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.reembedding import beside, cleaning, flipping, lives
from chunkmill.ledger.reembedding.flipping import Direction
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.integration.hands import Hands
from tests.support.waiting import running, until

CHUNKS = [(f"c{i}", f"text {i} of the collection") for i in range(6)]
OTHERS = [(f"c{i}", f"text {i} of the collection") for i in range(3)] + [("x", "a text of its own")]


@pytest.fixture
def model(settings: Settings) -> str:
    return settings.embedding_model


@pytest.fixture
def way(client: Client, hands: Hands, model: str) -> Iterator[Way]:
    """A collection that is to move to another space. A second one, with some of its texts, stays in the old space."""
    client.enqueue(CHUNKS, collection="docs")
    client.enqueue(OTHERS, collection="stays")
    hands.work()
    yield Way(client, hands, client.reembed("docs", to=model, on_long="split", gates=Gates()))


class Way:
    """A re-embedding whose steps the test takes itself."""

    def __init__(self, client: Client, hands: Hands, begun: Reembedding) -> None:
        self.client, self.hands, self.id = client, hands, begun.id
        self.begun = begun
        life = self.life()
        self.old, self.new = life.from_space_id, life.to_space_id

    def life(self) -> lives.Life:
        with self.hands.db.begin() as conn:
            return lives.get(conn, self.id)

    def go_on_to(self, *states: ReembeddingState) -> None:
        for state in states:
            with self.hands.db.begin() as conn:
                assert lives.advance(conn, lives.get(conn, self.id), state)

    def fill(self, space_id: int, texts: Iterable[str]) -> None:
        self.hands.write(space_id, list(texts))

    def until_ramping(self, *, but: Iterable[str] = ()) -> Way:
        """All is filled but some texts."""
        left_out = set(but)
        self.fill(self.new, [text for _, text in CHUNKS if text not in left_out])
        state = ReembeddingState
        self.go_on_to(state.FILLING, state.INDEXING, state.JUDGING, state.RAMPING)
        return self

    def active(self) -> int:
        ((space_id,),) = self.hands.rows("SELECT space_id FROM collections WHERE name = 'docs'")
        return int(space_id)

    def others(self) -> list[tuple[object, ...]]:
        return self.hands.rows(
            "SELECT o.space_id, o.role FROM collection_spaces o JOIN collections k ON k.id = o.collection_id "
            "WHERE k.name = 'docs' ORDER BY 1"
        )

    def searchable(self) -> set[str]:
        """The chunks that a search can return."""
        with self.hands.db.begin() as conn:
            table = registry.VectorTable(self.active()).table_name
            query = f"""
                SELECT c.chunk_id
                FROM chunks c
                JOIN collections k ON k.id = c.collection_id AND k.name = 'docs'
                JOIN {table} v USING (content_hash)
            """
            return set(conn.execute(sa.text(query)).scalars())


def test_a_flip_and_a_rollback_swap_the_spaces(way: Way, client: Client) -> None:
    way.until_ramping()
    flipped = client.flip("docs")
    assert (flipped.state, flipped.share, way.active()) == (ReembeddingState.FLIPPED, 100, way.new)
    assert way.others() == [(way.old, "previous")]
    assert flipped.dropped_at is not None
    assert client.audit("docs").space == way.begun.to_space
    assert client.audit("stays").space == way.begun.from_space
    back = client.rollback(way.id)
    assert (back.state, back.is_open, way.active()) == (ReembeddingState.ROLLED_BACK, False, way.old)
    assert way.others() == [(way.new, "previous")]
    again = client.reembed("docs", to=way.begun.to_model, on_long="split")
    assert again.id != way.id
    assert way.others() == [(way.new, "filling")]


def test_a_chunk_that_is_found_by_its_old_text_is_found_in_both_spaces_and_after_each_move(
    way: Way, client: Client, hands: Hands, db: sa.Engine, settings: Settings
) -> None:
    for collection in ("docs", "stays"):
        client.outdated(collection, serve=True)
    way.until_ramping()
    for collection in ("docs", "stays"):
        client.enqueue(
            [("c1", f"a new text of {collection}"), ("c2", f"another of {collection}")], collection=collection
        )

    def old(space: str | None = None) -> list[str]:
        Poller(db, client._broker, settings).round()  # which deletes nothing that is still read
        hits = client.search(np.ones(384, np.float32), collection="docs", space=space)
        assert {hit.chunk_id for hit in hits} == {chunk_id for chunk_id, _ in CHUNKS}
        return sorted(hit.chunk_id for hit in hits if hit.outdated)

    assert old() == old("filling") == ["c1", "c2"]
    way.fill(way.new, ["a new text of docs"])
    assert (old(), old("filling")) == (["c1", "c2"], ["c2"])
    client.flip("docs", timeout=0)
    assert (old(), old("previous")) == (["c2"], ["c1", "c2"])
    way.fill(way.old, ["a new text of docs"])
    client.rollback(way.id)
    assert old() == old("previous") == ["c2"]


def test_a_flip_is_refused_if_a_searchable_chunk_has_no_vector_in_the_new_space(way: Way, client: Client) -> None:
    lacking = CHUNKS[2][1]
    way.until_ramping(but=[lacking])
    before = way.searchable()
    with pytest.raises(WaitTimeout, match=r"1 chunks that can be searched have no vector .* 0 may be missing"):
        client.flip("docs", timeout=0)
    assert (way.active(), way.searchable()) == (way.old, before)
    assert way.life().state is ReembeddingState.RAMPING
    way.fill(way.new, [lacking])
    client.flip("docs", timeout=0)
    assert way.searchable() == before


def test_a_rollback_is_refused_if_a_searchable_chunk_has_no_vector_in_the_old_space(
    way: Way, client: Client, hands: Hands
) -> None:
    way.until_ramping()
    client.flip("docs")
    ((vector_lost,),) = hands.rows(
        f"DELETE FROM vectors_{way.old} WHERE content_hash = :hash RETURNING 1", hash=content_hash(CHUNKS[0][1])
    )
    assert vector_lost
    with pytest.raises(WaitTimeout, match="1 chunks that can be searched"):
        client.rollback("docs", timeout=0)
    assert way.active() == way.new
    assert client.rollback("docs", timeout=0, missing=1).state is ReembeddingState.ROLLED_BACK


def test_as_many_chunks_may_be_missing_as_the_gates_allow(way: Way, client: Client) -> None:
    way.until_ramping(but=[CHUNKS[0][1]])
    client.resume_reembedding("docs", gates=Gates(missing=1))
    assert client.flip("docs", timeout=0).state is ReembeddingState.FLIPPED


def test_what_can_be_searched_since_the_look_is_seen_in_the_moment_of_the_flip(
    way: Way, client: Client, hands: Hands
) -> None:
    """A chunk that had no vector at the look, and one that was not there, get theirs in the old space alone."""
    pending, late = "pending at the look", "written after the look"
    job = client.enqueue([("pending", pending)], collection="docs")
    way.until_ramping()
    going = Direction.of(way.life(), back=False)
    seen = flipping.look(hands.db, going)
    assert (seen.missing, set(seen.lacking)) == (0, {content_hash(pending)})
    client.enqueue([("late", late)], collection="docs")
    way.fill(way.old, [late])
    tried = flipping.try_to_flip(hands.db, going, seen, states=flipping.FLIP_FROM, missing=0)
    assert (tried.done, tried.missing, tried.hashes) == (False, 1, (content_hash(late),))
    way.fill(way.new, [late])
    way.fill(way.old, [pending])
    tried = flipping.try_to_flip(hands.db, going, seen, states=flipping.FLIP_FROM, missing=0)
    assert (tried.done, tried.hashes) == (False, (content_hash(pending),))
    way.fill(way.new, [pending])
    before = way.searchable()
    assert flipping.try_to_flip(hands.db, going, seen, states=flipping.FLIP_FROM, missing=0).done
    assert way.searchable() == before >= {"pending", "late"}
    assert job.collection == "docs"


def test_a_known_text_that_comes_since_the_look_is_seen_too(way: Way, client: Client, hands: Hands) -> None:
    """Another collection has its vector in the old space, so that it can be searched with its commit."""
    way.until_ramping()
    going = Direction.of(way.life(), back=False)
    seen = flipping.look(hands.db, going)
    client.enqueue([("known", "a text of its own")], collection="docs")
    assert "known" in way.searchable()
    tried = flipping.try_to_flip(hands.db, going, seen, states=flipping.FLIP_FROM, missing=0)
    assert (tried.done, tried.missing) == (False, 1)


def test_a_look_waits_for_the_windows_that_have_begun(
    way: Way, client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their ChunkBatches may have numbers before the mark, and nobody sees them before their commit."""
    way.until_ramping()
    looks = []
    monkeypatch.setattr(flipping, "holders", lambda *given: looks.append(given) or holders(*given))
    with hands.db.connect() as writer, writer.begin() as window:
        lock_shared(writer, DELETE_LOCK)
        client.enqueue([("other", "another window")], collection="stays")
        with running(lambda: flipping.look(hands.db, Direction.of(way.life(), back=False))) as (looking,):
            insert = """
                INSERT INTO chunks (collection_id, chunk_id, content_hash, metadata, job_id)
                SELECT id, 'slow', :hash, '{}', 1 FROM collections WHERE name = 'docs'
            """
            writer.execute(sa.text(insert), {"hash": content_hash("slow")})
            until(lambda: len(looks) > 2 or not looking.is_alive())
            window.commit()
    assert content_hash("slow") in looking.result().lacking


def test_writers_of_vectors_and_chunks_wait_for_a_flip_and_it_for_them(
    way: Way, settings: Settings, hands: Hands
) -> None:
    """Whoever holds the shared lock of windows and vectors is waited for; nobody gets it between proof and swap."""
    way.until_ramping()
    going = Direction.of(way.life(), back=False)
    seen = flipping.look(hands.db, going)
    flipping_db = create_db(settings.require_database_url(), role="test")
    has_ended = threading.Event()
    with hands.db.connect() as writer, writer.begin() as window:
        lock_shared(writer, DELETE_LOCK)

        def flip() -> flipping.FlipAttempt:
            done = flipping.try_to_flip(flipping_db, going, seen, states=flipping.FLIP_FROM, missing=0)
            has_ended.set()
            return done

        with running(flip) as (trying,):
            until(lambda: hands.waiting() == 1)
            assert not has_ended.is_set()
            insert = """
                INSERT INTO chunks (collection_id, chunk_id, content_hash, metadata, job_id)
                SELECT k.id, 'quick', c.content_hash, '{}', 1
                FROM collections k
                JOIN chunks c ON c.chunk_id = 'x'
                WHERE k.name = 'docs'
            """
            writer.execute(sa.text(insert))
            copy = """
                INSERT INTO chunk_batches (
                    job_id, space_id, route, priority, max_attempts, state, content_hashes, n_contents)
                SELECT b.job_id, b.space_id, 'local', 6, 3, 'completed', ARRAY[CAST(:hash AS bytea)], 1
                FROM chunk_batches b JOIN jobs j ON j.id = b.job_id JOIN collections k ON k.id = j.collection_id
                WHERE k.name = 'docs' LIMIT 1
            """
            writer.execute(sa.text(copy), {"hash": content_hash("a text of its own")})
            window.commit()
    tried = trying.result()
    flipping_db.dispose()
    assert (tried.done, tried.missing) == (False, 1)
    assert way.active() == way.old


def test_two_who_flip_at_once_flip_once(way: Way, client: Client, hands: Hands) -> None:
    way.until_ramping()
    going = Direction.of(way.life(), back=False)
    seen = flipping.look(hands.db, going)
    assert flipping.try_to_flip(hands.db, going, seen, states=flipping.FLIP_FROM, missing=0).done
    with pytest.raises(InvalidInput, match="has changed meanwhile"):
        flipping.try_to_flip(hands.db, going, seen, states=flipping.FLIP_FROM, missing=0)
    assert way.others() == [(way.old, "previous")]
    with pytest.raises(InvalidInput, match="cannot flip, because it is flipped"):
        client.flip("docs")


def test_a_collection_into_which_somebody_enqueues_all_the_time_flips(way: Way, client: Client, hands: Hands) -> None:
    """Work in the old space waits for a moment, and the new space gets what it lacks first."""
    way.until_ramping()
    client.enqueue([("new", "a new text")], collection="docs", priority="low")
    way.fill(way.old, ["a new text"])
    client.enqueue([("newer", "a newer text")], collection="docs")
    going = Direction.of(way.life(), back=False)
    tried = flipping.flip_once(hands.db, going, states=flipping.FLIP_FROM, missing=0)
    assert (tried.done, tried.missing) == (False, 1)
    with hands.db.begin() as conn:
        flipping.let_catch_up(conn, going, tried)
    held = hands.rows(
        "SELECT space_id, priority, not_before > now() FROM chunk_batches WHERE state = 'available' ORDER BY 1"
    )
    assert sorted(held) == [(way.old, 6, True), (way.old, 9, True), *[(way.new, 3, False)] * 2]
    with hands.db.begin() as conn:
        flipping.let_go_on(conn, going)
    assert hands.rows("SELECT 1 FROM chunk_batches WHERE state = 'available' AND not_before > now()") == []


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Direction]:
    """Each time that a whole collection is looked at."""
    looks, look = [], flipping.look

    def counted(db: sa.Engine, going: Direction, **patience: float) -> flipping.Look:
        looks.append(going)
        return look(db, going, **patience)

    monkeypatch.setattr(flipping, "look", counted)
    return looks


def test_a_second_try_looks_only_at_what_was_written_since_the_first(
    way: Way, client: Client, hands: Hands, looks: list[Direction], monkeypatch: pytest.MonkeyPatch
) -> None:
    way.until_ramping()
    going = Direction.of(way.life(), back=False)

    def again() -> flipping.FlipAttempt:
        return flipping.flip_once(hands.db, going, states=flipping.FLIP_FROM, missing=0)

    for number, text in enumerate(("a first text", "a second text"), 1):
        client.enqueue([(text, text)], collection="docs")
        way.fill(way.old, [text])
        tried = again()
        # What is known to be missing is said without the lock that writers would wait for.
        assert (tried.done, tried.missing, tried.seconds, len(looks)) == (False, number, 0.0, 1)
    way.fill(way.new, ["a first text"])
    assert again().missing == 1
    before = way.searchable()
    with monkeypatch.context() as patch:
        patch.setattr(flipping, "REUSE_SECONDS", 0.0)
        assert (again().missing, len(looks)) == (1, 2)
    way.fill(way.new, ["a second text"])
    assert again().done
    assert (way.searchable(), way.active(), len(looks)) == (before, way.new, 2)


def test_who_rolls_back_looks_only_at_what_was_written_since_a_poller_looked(
    way: Way, client: Client, hands: Hands, looks: list[Direction], model: str
) -> None:
    """A look of another direction or of another collection is of no use."""
    way.until_ramping()
    other = Way(client, hands, client.reembed("stays", to=model, on_long="split", gates=Gates()))
    other.fill(other.new, [text for _, text in OTHERS])
    other.go_on_to(*list(ReembeddingState)[1:5])
    client.flip("docs")
    client.flip("stays")
    assert [(going.life.id, going.back) for going in looks] == [(way.id, False), (other.id, False)]
    late = ["one that is searched", "one that is not"]
    looks.clear()
    for one in (way, other):
        flipping.look_and_keep(hands.db, Direction.of(one.life(), back=True))
    assert [(going.life.id, going.back) for going in looks] == [(way.id, True), (other.id, True)]
    client.enqueue([(text, text) for text in late], collection="docs")
    way.fill(way.new, late[:1])
    before = way.searchable()
    with pytest.raises(WaitTimeout, match="1 chunks that can be searched"):
        client.rollback("docs", timeout=0)
    way.fill(way.old, late)
    client.rollback("docs", timeout=0)
    client.rollback("stays", timeout=0)
    assert (way.active(), len(looks)) == (way.old, 2)
    assert way.searchable() >= before >= {late[0], *(chunk for chunk, _ in CHUNKS)}


def test_a_look_is_written_again_only_if_something_was_written_or_it_grows_old(
    way: Way, client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    way.until_ramping()
    going = Direction.of(way.life(), back=False)

    def written() -> tuple[object, ...]:
        flipping.look_and_keep(hands.db, going)
        ((version, mark, age),) = hands.rows(
            "SELECT xmin::text, mark, now() - looked_at < interval '10 minutes' FROM reembedding_looks"
        )
        assert age
        return version, mark

    first = written()
    assert written() == first
    client.enqueue([("late", "a late text")], collection="docs")
    second = written()
    assert second[0] != first[0]
    assert second[1] != first[1]
    hands.rows("SELECT nextval('reopenings')")
    assert (third := written())[0] != second[0], "a look from before an enqueue began anew is of no use"
    assert written() == third
    hands.rows("UPDATE reembedding_looks SET looked_at = now() - interval '20 minutes' RETURNING 1")
    assert written()[1] == second[1]


def test_what_was_pending_when_a_poller_looked_is_looked_at_by_who_rolls_back(
    way: Way, client: Client, hands: Hands, looks: list[Direction]
) -> None:
    way.until_ramping()
    client.flip("docs")
    client.enqueue([("pending", "it had no vector when a poller looked")], collection="docs")
    for _ in range(2):
        flipping.look_and_keep(hands.db, Direction.of(way.life(), back=True))
    way.fill(way.new, ["it had no vector when a poller looked"])
    with pytest.raises(WaitTimeout, match="1 chunks that can be searched"):
        client.rollback("docs", timeout=0)
    assert len(looks) == 2


@pytest.mark.parametrize("when", ["before the flip", "between its look and its moment"])
def test_a_look_is_of_no_use_once_an_enqueue_began_anew(
    way: Way,
    settings: Settings,
    hands: Hands,
    looks: list[Direction],
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That deletes ChunkBatches. The text may have got its vector by another collection's enqueue meanwhile.

    The producer has no lane into the new space, so that it leaves no ChunkBatch there either.
    """
    text = "a text whose producer died"

    class Killed(BaseException):
        pass

    def dies() -> Iterator[tuple[str, str]]:
        yield "lost", text
        raise Killed

    way.until_ramping()
    going = Direction.of(way.life(), back=False)
    seen = flipping.look_and_keep(hands.db, going)

    def has_no_lane(*_: object) -> NoReturn:
        raise UnknownRoute("this process has no lane into the space")

    monkeypatch.setattr(beside, "choose", has_no_lane)
    small = settings.model_copy(update={"enqueue_window": 1})
    with contextlib.closing(Client(hands.db, Broker.connect(small), small)) as producer, pytest.raises(Killed):
        producer.enqueue(dies(), collection="docs", idempotency_key="key", on_invalid="skip")
    with hands.db.begin() as conn:
        ((job_id,),) = conn.execute(sa.text("SELECT id FROM jobs WHERE idempotency_key = 'key'")).all()
        assert jobs.reopen_for_enqueue_if_unsealed(conn, job_id)
    way.fill(way.old, [text])
    assert "lost" in way.searchable()
    if when == "before the flip":
        tried = flipping.flip_once(hands.db, going, states=flipping.FLIP_FROM, missing=0)
        assert (tried.done, tried.missing, len(looks)) == (False, 1, 2)
    else:
        assert not flipping.try_to_flip(hands.db, going, seen, states=flipping.FLIP_FROM, missing=0).done
    assert way.active() == way.old


def test_a_flip_does_not_wait_for_somebody_who_reads_the_view(way: Way, client: Client, hands: Hands) -> None:
    way.until_ramping()
    with hands.db.begin() as conn:
        schema = conn.execute(sa.text("SELECT view_schema()")).scalar_one()
        conn.execute(sa.text(f'SELECT count(*) FROM "{schema}".docs'))
        client.flip("docs")
        assert hands.waiting() == 0
    assert way.active() == way.new


def test_a_second_call_returns_the_one_under_way_and_another_plan_is_refused(way: Way, client: Client) -> None:
    model = way.begun.to_model
    assert client.reembed("docs", to=model, on_long="split", gates=Gates()).id == way.id
    with pytest.raises(InvalidInput, match=f"on its way .* re-embedding {way.id} .* with other arguments"):
        client.reembed("docs", to=model, on_long="split", keep_days=3)
    with pytest.raises(InvalidInput, match=r"in space .* already"):
        client.reembed("stays", to=model)
    with pytest.raises(NotFound, match="there is no collection 'none'"):
        client.reembed("none", to=model, on_long="split")
    with pytest.raises(NotFound, match="was never moved"):
        client.reembedding("stays")
    assert [one.id for one in client.reembeddings()] == [way.id]
    assert client.reembeddings("stays") == []


def test_a_cancelled_one_leaves_the_collection_as_it_was(way: Way, client: Client, hands: Hands) -> None:
    way.until_ramping()
    before = way.searchable()
    cancelled = client.cancel_reembedding("docs")
    assert (cancelled.state, cancelled.is_open) == (ReembeddingState.CANCELLED, False)
    assert (way.active(), way.others(), way.searchable()) == (way.old, [], before)
    with pytest.raises(InvalidInput, match="is cancelled, so there is nothing to cancel"):
        client.cancel_reembedding(way.id)
    # What was embedded, and paid, is found again.
    ((kept,),) = hands.rows(f"SELECT count(*) FROM vectors_{way.new}")
    assert kept == len(CHUNKS)
    assert client.reembed("docs", to=way.begun.to_model, on_long="split", dry_run=True).to_embed == 0


def test_the_left_space_is_emptied_but_for_what_other_collections_need(way: Way, client: Client, hands: Hands) -> None:
    way.until_ramping()
    client.flip("docs")
    assert not cleaning.clean_up(hands.db, way.id)
    finished = client.finish_reembedding("docs")
    assert (finished.state, finished.dropped_at, way.others()) == (ReembeddingState.FINISHED, None, [])
    with pytest.raises(InvalidInput, match="it is finished"):
        client.rollback("docs")
    for _ in range(2):
        assert cleaning.clean_up(hands.db, way.id)
    left = {row[0] for row in hands.rows(f"SELECT content_hash FROM vectors_{way.old}")}
    assert left == {content_hash(text) for _, text in OTHERS}
    assert client.audit("stays").complete
    assert client.audit("docs").complete
    ((cleaned,),) = hands.rows("SELECT cleaned_at IS NOT NULL FROM reembeddings WHERE id = :id", id=way.id)
    assert cleaned


def test_a_space_that_nobody_is_in_any_more_is_dropped_with_its_table(way: Way, client: Client, hands: Hands) -> None:
    way.until_ramping()
    client.flip("docs")
    client.drop_collection("stays")
    hands.rows("UPDATE jobs SET finished_at = now() - interval '1 day' RETURNING 1")
    client.prune(0.5)
    client.finish_reembedding("docs")
    assert cleaning.clean_up(hands.db, way.id)
    ((table,),) = hands.rows(f"SELECT to_regclass('vectors_{way.old}')")
    assert table is None
    shown = client.reembedding(way.id)
    assert (shown.from_space, shown.from_model) == (way.begun.from_space, way.begun.from_model)


def test_a_quote_counts_what_is_there_and_writes_nothing(way: Way, client: Client, hands: Hands) -> None:
    before = hands.ledger()
    quote = client.reembed("docs", to=way.begun.to_model, on_long="split", dry_run=True)
    assert (quote.chunks, quote.contents, quote.cached, quote.to_embed, quote.sampled) == (6, 6, 0, 6, 6)
    assert quote.tokens is not None
    assert quote.tokens > 6 * 4
    assert quote.vector_bytes > 6 * 4 * quote.dimensions
    way.fill(way.new, [CHUNKS[0][1]])
    again = client.reembed("docs", to=way.begun.to_model, on_long="split", dry_run=True)
    assert (again.cached, again.to_embed) == (1, 5)
    assert hands.ledger() == before
    with pytest.raises(InvalidInput, match="already"):
        client.reembed("docs", to=way.begun.to_model, dry_run=True)


def test_one_that_is_paused_does_not_go_on(way: Way, client: Client, hands: Hands) -> None:
    paused = client.pause_reembedding("docs")
    assert paused.paused_at is not None
    with hands.db.begin() as conn:
        assert not lives.advance(conn, way.life(), ReembeddingState.FILLING)
    assert client.resume_reembedding("docs", ramp=(50,)).ramp == (50,)
    way.go_on_to(ReembeddingState.FILLING)
