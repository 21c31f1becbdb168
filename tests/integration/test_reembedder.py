"""What a poller does for re-embeddings: each goes from state to state by itself, whoever dies on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NoReturn

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill import Gates, Reembedding, ReembeddingState
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.latencies import bucket_of
from chunkmill.ledger.reembedding import fill, flipping, lives
from chunkmill.poller.reembedding import Reembedder
from chunkmill.settings import Settings
from chunkmill.store import searches
from tests.integration.hands import Hands
from tests.support.waiting import together, until

CHUNKS = [(f"c{i}", f"text {i} of the collection") for i in range(7)]
ONLY_COVERAGE = Gates(canary=False, recall=None, ndcg_loss=None, p95_ratio=None)
S = ReembeddingState


@pytest.fixture
def small(settings: Settings) -> Settings:
    return settings.model_copy(update={"chunk_batch_size": 2, "index_seconds": 0.0})


class Scene:
    """Two collections in one space: "docs" is to move to another one, and "stays" is not."""

    def __init__(self, client: Client, hands: Hands, settings: Settings) -> None:
        self.client, self.hands, self.settings = client, hands, settings
        for collection in ("docs", "stays"):
            client.enqueue(CHUNKS, collection=collection)
        hands.work()
        self.poller = Reembedder(hands.db, settings)

    def begin(self, **asked: object) -> Reembedding:
        given = {"gates": ONLY_COVERAGE, "ramp": (), **asked}
        return self.client.reembed("docs", to=self.settings.embedding_model, on_long="split", **given)  # type: ignore[call-overload,no-any-return]

    def goes_to(self, state: ReembeddingState) -> Reembedding:
        """Let the poller and the workers work until it is in a state."""
        for _ in range(20):
            shown = self.client.reembedding("docs")
            if shown.state is state:
                return shown
            self.round()
        raise AssertionError(f"it never came to {state}: {self.client.reembedding('docs')!r}")

    def round(self) -> None:
        self.hands.rows("UPDATE reembedding_fills SET passed_at = passed_at - interval '1 h' RETURNING 1")
        self.poller.round()
        self.hands.work()

    def later(self, *, days: float = 0.0, hours: float = 0.0) -> None:
        """Let time pass for the spaces beside the active one."""
        self.hands.rows(
            "UPDATE collection_spaces SET since = since - make_interval(secs => :s) RETURNING 1",
            s=days * 86_400 + hours * 3600,
        )

    def share(self) -> int:
        return self.client.reembedding("docs").share


def lives_of(hands: Hands) -> lives.Life:
    ((number,),) = hands.rows("SELECT id FROM reembeddings")
    with hands.db.begin() as conn:
        return lives.get(conn, number)


@pytest.fixture
def scene(client: Client, hands: Hands, small: Settings) -> Iterator[Scene]:
    yield Scene(client, hands, small)


def test_a_poller_looks_once_a_minute_whether_a_filling_is_passed_over(
    scene: Scene, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look may read all attempts of a thousand jobs, and a poller takes a step every second."""
    looks: list[int] = []
    look = fill._is_passed_over

    def noted(conn: sa.Connection, job_id: int) -> bool:
        looks.append(job_id)
        return look(conn, job_id)

    monkeypatch.setattr(fill, "_is_passed_over", noted)
    client.enqueue([("a", "text of another collection")], collection="other")
    scene.hands.work()
    for collection in ("docs", "other"):
        client.reembed(collection, to=scene.settings.embedding_model, on_long="split")
    poller = Reembedder(db, scene.settings)
    for _ in range(4):
        poller.step_all()
    assert len(looks) == len(set(looks)) == 2
    monkeypatch.setattr(fill, "LOOK_AGAIN_SECONDS", 0.0)
    another = Reembedder(db, scene.settings)
    for _ in range(2):
        another.step_all()
    assert len(looks) == 6


def test_it_goes_from_the_plan_to_its_end_by_itself(scene: Scene, client: Client, hands: Hands) -> None:
    begun = scene.begin(keep_days=2)
    assert (begun.state, begun.coverage) == (S.PLANNED, None)
    flipped = scene.goes_to(S.FLIPPED)
    assert flipped.coverage is not None
    assert (flipped.coverage.missing, flipped.progress) == (0, 1.0)
    assert [(gate.name, gate.passed) for gate in flipped.gates] == [("coverage", True)]
    assert client.audit("docs").space == begun.to_space
    # What comes now reaches both, so that there is a way back.
    client.enqueue([("late", "a late text")], collection="docs", model=begun.to_model, on_long="split")
    client.enqueue([("later", "a later text")], collection="docs", model=begun.from_model)
    scene.round()
    scene.later(days=1)
    scene.round()
    assert client.reembedding("docs").state is S.FLIPPED
    scene.later(days=1)
    finished = scene.goes_to(S.FINISHED)
    assert (finished.share, finished.dropped_at) == (100, None)
    scene.round()
    with hands.db.begin() as conn:
        assert lives.to_care_for(conn) == []
    assert client.audit("docs").complete
    assert client.audit("stays").complete
    assert len(hands.rows("SELECT 1 FROM jobs WHERE idempotency_key LIKE 'reembed:%'")) == 1


def test_a_poller_looks_at_what_a_rollback_has_to_prove(
    scene: Scene, client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a person flips, and a look at the way there was made a moment ago."""
    scene.begin(ramp=(50,), step_hours=0)
    scene.goes_to(S.RAMPING)
    scene.round()
    kept = "SELECT space_id FROM reembedding_looks"
    life = lives_of(hands)
    assert hands.rows(kept) == [(life.from_space_id,)]
    client.flip("docs")
    scene.round()
    assert hands.rows(kept) == [(life.to_space_id,)]

    def refused(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the whole collection was read")

    monkeypatch.setattr(flipping, "look", refused)
    client.enqueue([("late", "a late text")], collection="docs", model=life.names["to_model"], on_long="split")
    hands.work()
    assert client.rollback("docs").state is S.ROLLED_BACK
    assert client.audit("docs").complete


def test_a_look_that_fails_holds_no_step_up(
    scene: Scene, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A flip then reads the whole collection itself."""

    def fails(*_: object, **__: object) -> NoReturn:
        raise ValueError("it cannot be kept")

    monkeypatch.setattr(flipping, "_keep", fails)
    begun = scene.begin(ramp=(50,), step_hours=0)
    scene.goes_to(S.RAMPING)
    scene.round()
    assert scene.share() == 50
    said = [record.getMessage() for record in caplog.records if "has to prove" in record.getMessage()]
    assert len(said) == 1
    assert f"re-embedding {begun.id}" in said[0]


def test_it_stays_where_a_gate_is_not_passed_until_somebody_changes_it(
    scene: Scene, client: Client, hands: Hands
) -> None:
    dead = CHUNKS[3][1]
    scene.begin()
    scene.poller.round()
    scene.poller.round()
    hands.work(dead={dead: "not_finite"})
    for _ in range(4):
        scene.round()
    shown = client.reembedding("docs")
    assert (shown.state, [gate.passed for gate in shown.gates]) == (S.JUDGING, [False])
    assert shown.problem is not None
    assert "1 of 7 chunks can be searched now and have no vector in the new space" in shown.problem
    assert f"chunkmill reembed resume {shown.id}" in shown.problem
    client.resume_reembedding("docs", gates=Gates(missing=1, canary=False, recall=None, ndcg_loss=None, p95_ratio=None))
    assert client.reembedding("docs").problem is None
    scene.goes_to(S.FLIPPED)


def test_the_share_grows_step_by_step(scene: Scene) -> None:
    scene.begin(ramp=(10, 50, 100), step_hours=3)
    scene.goes_to(S.RAMPING)
    scene.round()
    assert scene.share() == 10
    scene.later(hours=2.9)
    scene.round()
    assert scene.share() == 10
    for share in (50, 100):
        scene.later(hours=3)
        scene.round()
        assert scene.share() == share
    scene.later(hours=3)
    scene.goes_to(S.FLIPPED)


def test_a_ramp_that_does_not_end_at_100_stays(scene: Scene, client: Client) -> None:
    scene.begin(ramp=(50,), step_hours=0)
    scene.goes_to(S.RAMPING)
    for _ in range(3):
        scene.round()
        scene.later(days=20)
    assert (client.reembedding("docs").state, scene.share()) == (S.RAMPING, 50)
    assert client.flip("docs").state is S.FLIPPED


def test_one_that_is_paused_stays_in_its_state_and_share(scene: Scene, client: Client) -> None:
    scene.begin(ramp=(10, 100), step_hours=1)
    scene.goes_to(S.RAMPING)
    client.pause_reembedding("docs")
    scene.later(hours=1)
    scene.round()
    assert scene.share() == 10
    gates = client.reembedding("docs").gates
    assert [gate.name for gate in gates if gate.passed] == [gate.name for gate in gates] != []
    assert client.resume_reembedding("docs").gates == gates  # nothing checks them again
    scene.round()
    assert scene.share() == 10  # the step lasts its whole time again
    scene.later(hours=1)
    scene.round()
    assert scene.share() == 100
    scene.later(hours=1)
    scene.goes_to(S.FLIPPED)
    client.pause_reembedding("docs")
    assert client.resume_reembedding("docs").gates == gates


def test_the_ramp_steps_back_when_searches_fail_in_the_new_space(scene: Scene, client: Client, hands: Hands) -> None:
    begun = scene.begin(ramp=(10, 50, 100), step_hours=3)
    scene.goes_to(S.RAMPING)
    scene.later(hours=3)
    scene.round()
    assert scene.share() == 50
    scene.later(hours=0.5)
    with hands.db.begin() as conn:
        life = lives.get(conn, begun.id)
        minute = int(life.now.timestamp()) // 60 * 60 - 60
        answered, failed = bucket_of(0.01), searches.FAILED
        counts = {
            searches.Key(life.collection_id, life.from_space_id, minute, answered): 400,
            searches.Key(life.collection_id, life.to_space_id, minute, answered): 195,
            searches.Key(life.collection_id, life.to_space_id, minute, failed): 5,
        }
        searches.add(conn, counts)
    shown = client.reembedding("docs")
    assert [(one.space, one.searches, one.errors) for one in shown.served] == [
        (begun.from_space, 400, 0), (begun.to_space, 200, 5)
    ]  # fmt: skip
    scene.round()
    shown = client.reembedding("docs")
    assert (shown.share, shown.state) == (10, S.RAMPING)
    assert shown.problem is not None
    assert "5 of 200 searches failed in the new space (2.5%; in the old one 0.0%). The share is 10 % again" in (
        shown.problem
    )
    hands.rows("DELETE FROM search_counts RETURNING 1")
    scene.later(hours=3)
    scene.round()
    assert scene.share() == 10  # it waits for somebody
    client.resume_reembedding("docs")
    scene.later(hours=3)
    scene.round()
    assert scene.share() == 50


def test_a_space_that_was_rolled_back_from_is_dropped_after_its_days(
    scene: Scene, client: Client, hands: Hands
) -> None:
    scene.begin(keep_days=2)
    scene.goes_to(S.FLIPPED)
    back = client.rollback("docs")
    scene.round()
    assert len(hands.rows("SELECT 1 FROM collection_spaces")) == 1
    scene.later(days=2)
    scene.round()
    scene.round()
    assert hands.rows("SELECT 1 FROM collection_spaces") == []
    with hands.db.begin() as conn:
        assert lives.to_care_for(conn) == []
        new = lives.get(conn, back.id).to_space_id
    assert hands.rows(f"SELECT 1 FROM vectors_{new}") == []
    assert client.audit("docs").complete


def test_a_dropped_collection_ends_its_re_embedding(scene: Scene, client: Client, hands: Hands) -> None:
    begun = scene.begin()
    scene.goes_to(S.FILLING)
    client.drop_collection("docs", wait=False)
    scene.round()
    scene.round()
    with hands.db.begin() as conn:
        assert begun.id not in {number for number, _ in lives.to_care_for(conn)}
    assert client.audit("stays").complete


def test_several_pollers_take_each_step_once(scene: Scene, client: Client, hands: Hands) -> None:
    scene.begin(ramp=(10, 100), step_hours=0)
    pollers = [Reembedder(hands.db, scene.settings) for _ in range(3)]
    seen = [client.reembedding("docs").state]
    for _ in range(20):
        together(*[poller.round for poller in pollers])
        hands.work()
        seen.append(client.reembedding("docs").state)
        hands.rows("UPDATE reembedding_fills SET passed_at = passed_at - interval '1 h' RETURNING 1")
    assert list(dict.fromkeys(seen))[-1] is S.FLIPPED
    assert len(hands.rows("SELECT 1 FROM jobs WHERE idempotency_key LIKE 'reembed:%'")) == 1
    ((written,),) = hands.rows("SELECT sum(n_embedded) FROM chunk_batches WHERE space_id <> 1")
    assert written == len(CHUNKS)


class Died(BaseException):
    """The end of a process."""


def test_a_poller_may_die_between_any_two_statements(
    scene: Scene, client: Client, hands: Hands, small: Settings
) -> None:
    """Each poller lives for a few statements more than the last one. The way goes on, and nothing is done twice."""
    begun = scene.begin(ramp=(50, 100), step_hours=0, keep_days=0)
    lived, alive = 0, 0
    for lived in range(1, 400):
        dying = create_db(small.require_database_url(), role="test")
        left = [lived]

        @sa.event.listens_for(dying, "before_cursor_execute")
        def count(*_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Died

        try:
            Reembedder(dying, small).round()
            alive += 1
        except Died:
            pass
        finally:
            dying.dispose()
        hands.work()
        hands.rows("UPDATE reembedding_fills SET passed_at = passed_at - interval '1 h' RETURNING 1")
        with hands.db.begin() as conn:
            if not lives.to_care_for(conn):
                break
    shown = client.reembedding(begun.id)
    assert (shown.state, alive > 0, lived < 399) == (S.FINISHED, True, True)
    assert client.audit("docs").complete
    assert client.audit("stays").complete
    assert hands.rows("SELECT 1 FROM collection_spaces") == []
    assert len(hands.rows("SELECT 1 FROM jobs WHERE idempotency_key LIKE 'reembed:%'")) == 1
    ((written,),) = hands.rows("SELECT sum(n_embedded) FROM chunk_batches WHERE space_id <> 1")
    assert written == len(CHUNKS)


def test_no_statement_that_postgres_ends_ends_the_thread(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that ended would leave every re-embedding as it is, and the poller would go on as if nothing were."""
    for collection in ("docs", "stays"):
        scene.client.reembed(
            collection, to=scene.settings.embedding_model, on_long="split", gates=ONLY_COVERAGE, ramp=()
        )
    monkeypatch.setattr("chunkmill.poller.reembedding.LOOK_SECONDS", 0.02)
    behind = create_db(scene.settings.require_database_url(), role="poller")
    ended: list[str] = []

    @sa.event.listens_for(behind, "before_cursor_execute", retval=True)
    def end_the_first(
        conn: object, cursor: psycopg.Cursor, statement: str, parameters: object, context: object, many: object
    ) -> tuple[str, object]:
        if "pg_try_advisory_lock" not in statement or len(ended) == 2:
            return statement, parameters
        ended.append(statement)
        cursor.execute("SET LOCAL statement_timeout = '20ms'")
        return "SELECT pg_sleep(600)", ()

    stop = threading.Event()
    threads = Reembedder(behind, scene.settings).start(stop)

    def have_gone_on() -> bool:
        states = [scene.client.reembedding(collection).state for collection in ("docs", "stays")]
        return S.PLANNED not in states

    until(lambda: have_gone_on() or not any(thread.is_alive() for thread in threads))
    assert len(ended) == 2
    assert have_gone_on()
    assert all(thread.is_alive() for thread in threads)
    stop.set()
    for thread in threads:
        thread.join()
    behind.dispose()
