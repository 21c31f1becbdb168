"""Takes the steps of re-embeddings, in two threads beside the poller's rounds: one steps, the other judges.

Each step is one short transaction that names its guard, so that this process may die between any two statements, and
the next poller goes on. Any number of pollers may do this: one of them works on a collection at a time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import sqlalchemy as sa

from chunkmill.db.connect import sqlstate
from chunkmill.db.locks import REEMBED_LOCK
from chunkmill.domain.reembedding import Coverage, Plan, ReembeddingState, ServedBy, step_of_ramp
from chunkmill.ledger import judging
from chunkmill.ledger.reembedding import cleaning, fill, flipping, gating, lives, serving
from chunkmill.ledger.reembedding.flipping import Direction
from chunkmill.ledger.reembedding.lives import Life
from chunkmill.poller.steps import Steps
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.registry import VectorTable
from chunkmill.store import indexing

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often a poller looks what the next step of each re-embedding is."""
FLIP_LOOK_SECONDS = 10.0
"""How often a poller looks at what a flip or a rollback would have to prove, or 20 times as long as the look took. The
person who rolls back then waits only for what was written since."""
FLIP_LOOK_PATIENCE_S = 5.0
"""How many seconds such a look waits for those who write now."""
COUNT_SECONDS = 15.0
"""How often the chunks of a collection are counted in its new space, or 20 times as long as the count took."""
JUDGE_SECONDS = 600.0
"""After how long gates that were not passed are checked again. Vectors and golden queries may have come meanwhile."""
LACKING_SECONDS = 15.0
"""The same if only chunks are missing, which somebody may have enqueued a moment ago."""
FAILED_SECONDS = 60.0
"""After how long it is tried again to check gates if something went wrong."""
NOT_ALLOWED = "42501"
"""The SQLSTATE of a role that may not do something."""

_S = ReembeddingState


class Reembedder:
    """Looks every second which re-embeddings can go on, and takes the next step of each."""

    def __init__(self, db: sa.Engine, settings: Settings) -> None:
        self._db = db
        self._settings = settings
        self._steps = Steps()
        self._judge_steps = Steps()
        self._count_at: dict[int, float] = {}
        """Re-embedding → when its coverage is counted again, by the clock of this process."""
        self._judge_at: dict[tuple[int, Plan], float] = {}
        """Re-embedding and plan → before when its gates are not checked again."""
        self._flip_look_at: dict[tuple[int, ReembeddingState], float] = {}
        """Re-embedding and state → when to look again at what its next flip or rollback has to prove."""
        self._passed_over = fill.PassedOverJobs()
        self._stop = threading.Event()

    def start(self, stop: threading.Event) -> list[threading.Thread]:
        """Start both threads, which end soon after ``stop``."""
        self._stop = stop
        threads = [
            threading.Thread(target=steps.repeat, args=(what, work, stop, LOOK_SECONDS), name=name, daemon=True)
            for name, what, steps, work in (
                ("reembed", "the look at re-embeddings", self._steps, self.step_all),
                ("judge", "the look at gates", self._judge_steps, self.judge_all),
            )
        ]
        for thread in threads:
            thread.start()
        return threads

    def round(self) -> None:
        """Take one step of each re-embedding, and check the gates of those that wait for it."""
        self.step_all()
        self.judge_all()

    def step_all(self) -> None:
        """Take the next step of each re-embedding."""
        for reembedding_id, collection_id in self._to_care_for(self._steps):
            what = f"the re-embedding {reembedding_id}"
            with self._alone(collection_id) as is_alone:
                if is_alone:
                    self._steps.run(what, lambda number=reembedding_id: self._step(number))  # type: ignore[misc]
            if self._stop.is_set():
                return

    def judge_all(self) -> None:
        """Check the gates of each re-embedding that waits for it, which may take minutes."""
        for reembedding_id, collection_id in self._to_care_for(self._judge_steps):
            what = f"the gates of re-embedding {reembedding_id}"
            # A number of its own, so that the steps of the collection go on.
            with self._alone(-collection_id) as is_alone:
                if is_alone:
                    self._judge_steps.run(what, lambda number=reembedding_id: self._judge(number))  # type: ignore[misc]
            if self._stop.is_set():
                return

    def _to_care_for(self, steps: Steps) -> list[tuple[int, int]]:
        def read() -> list[tuple[int, int]]:
            with self._db.begin() as conn:
                return lives.to_care_for(conn) if lives.are_kept(conn) else []

        return steps.run("the search for re-embeddings", read) or []

    @contextlib.contextmanager
    def _alone(self, number: int) -> Iterator[bool]:
        """Whether no other poller works on it until the end of the block. The lock ends with its connection."""
        keys = {"key": REEMBED_LOCK, "number": number}
        with self._db.connect() as conn:
            with conn.begin():
                is_alone = conn.execute(sa.text("SELECT pg_try_advisory_lock(:key, :number)"), keys).scalar_one()
            try:
                yield bool(is_alone)
            finally:
                if is_alone:
                    try:
                        with conn.begin():
                            conn.execute(sa.text("SELECT pg_advisory_unlock(:key, :number)"), keys)
                    except sa.exc.SQLAlchemyError:
                        conn.invalidate()

    def _step(self, reembedding_id: int) -> None:
        """Take the next step, and those after it for which nothing is to be awaited."""
        state = None
        for _ in ReembeddingState:
            with self._db.begin() as conn:
                life = lives.get(conn, reembedding_id)
            if life.state is state:
                return
            state = life.state
            if life.is_dropped:
                self._let_go_of_dropped(life)
            elif life.finished_at is not None:
                self._after_the_end(life)
            elif life.paused_at is None:
                self._go_on(life)

    def _go_on(self, life: Life) -> None:
        if life.state is _S.PLANNED:
            self._advance(life, _S.FILLING)
            return
        is_there = fill.fill_some(self._db, self._settings, life.id)
        if life.state is _S.FILLING:
            self._fill(life, is_there=is_there)
        elif life.state is _S.INDEXING:
            self._index(life)
        elif life.state is _S.JUDGING:
            if life.report.judgement.get("passed"):
                self._advance(life, _S.RAMPING)
        elif life.state is _S.RAMPING:
            self._look(life)
            self._ramp(life)
        elif life.state is _S.FLIPPED:
            if life.kept_until is not None and life.kept_until <= life.now:
                self._let_go(life)
            else:
                self._look(life)

    def _advance(self, life: Life, to: ReembeddingState) -> None:
        with self._db.begin() as conn:
            if lives.advance(conn, life, to):
                logger.info("collection %r: re-embedding %s is %s", life.collection, life.id, to.value)

    def _fill(self, life: Life, *, is_there: bool) -> None:
        with self._db.begin() as conn:
            problem = fill.why_waiting(conn, self._settings, life.id, self._passed_over)
        if not is_there and time.monotonic() < self._count_at.get(life.id, 0.0):
            with self._db.begin() as conn:
                lives.note_problem(conn, life, problem)
            return
        coverage = self._count(life)
        with self._db.begin() as conn:
            lives.note(conn, life, replace(life.report, coverage=coverage), problem)
        if is_there:
            self._advance(life, _S.INDEXING)

    def _count(self, life: Life) -> Coverage:
        began = time.monotonic()
        with self._db.begin() as conn:
            conn.execute(sa.text("SET LOCAL statement_timeout = 0"))
            counted = fill.coverage(conn, life.collection_id, VectorTable(life.to_space_id))
        took = time.monotonic() - began
        self._count_at[life.id] = time.monotonic() + max(COUNT_SECONDS, 20 * took)
        return Coverage(counted.chunks, counted.contents, counted.missing, counted.pending, counted.dead, at=life.now)

    def _index(self, life: Life) -> None:
        if self._settings.index_seconds:  # 0 turns serving indexes off
            with self._db.begin() as conn:
                space = registry.get(conn, life.to_space_id)
                if not indexing.is_ready(conn, life.collection_id, space):
                    return
        self._advance(life, _S.JUDGING)

    def _ramp(self, life: Life) -> None:
        old, new = self._served(life)
        since = life.share_since or life.now
        # The first step does not wait, unless the ramp has stepped back to none.
        lasted = timedelta.max if life.share == 0 else life.now - since
        step = step_of_ramp(life.plan, life.share, lasted=lasted, old=old, new=new, is_held=life.problem is not None)
        if step.flips:
            self._flip(life)
        elif step.share != life.share or step.problem is not None:
            with self._db.begin() as conn:
                if not lives.set_share(conn, life, step.share, problem=step.problem):
                    return
            if step.problem is None:
                logger.info("collection %r: the new space answers %s %%", life.collection, step.share)
            else:
                logger.warning("collection %r steps back: %s", life.collection, step.problem)

    def _served(self, life: Life) -> tuple[ServedBy | None, ServedBy | None]:
        """What the searches of the old and the new space were like in this step of the ramp."""
        with self._db.begin() as conn:
            served = serving.served(conn, life)
        by_space = {one.space: one for one in served}
        return by_space.get(life.names["from_space"]), by_space.get(life.names["to_space"])

    def _look(self, life: Life) -> None:
        """Look at what the next flip or rollback has to prove, so that it does not depend on the collection's size."""
        began = time.monotonic()
        if began < self._flip_look_at.get((life.id, life.state), 0.0):
            return
        way = Direction.of(life, back=life.state is _S.FLIPPED)
        # A step of its own, because without it everything goes on, and a flip only takes longer.
        self._steps.run(
            f"the look at what a flip of re-embedding {life.id} has to prove",
            lambda: flipping.look_and_keep(self._db, way, patience=FLIP_LOOK_PATIENCE_S),
        )
        ended = time.monotonic()
        self._flip_look_at[life.id, life.state] = ended + max(FLIP_LOOK_SECONDS, 20 * (ended - began))

    def _flip(self, life: Life) -> None:
        way = Direction.of(life, back=False)
        tried = flipping.flip_once(self._db, way, states=[_S.RAMPING], missing=life.plan.gates.missing)
        with self._db.begin() as conn:
            if tried.done:
                flipping.let_go_on(conn, way)
            elif tried.missing:
                flipping.let_catch_up(conn, way, tried)
        if tried.done:
            logger.info(
                "collection %r: re-embedding %s is flipped; writers waited for %.0f ms",
                life.collection, life.id, tried.seconds * 1e3,
            )  # fmt: skip

    def _let_go(self, life: Life) -> None:
        with self._db.begin() as conn:
            if lives.let_go(conn, life):
                logger.info("collection %r: its previous space is no longer kept", life.collection)

    def _after_the_end(self, life: Life) -> None:
        if life.kept_until is None:
            cleaning.clean_up(self._db, life.id, is_stopping=self._stop.is_set)
        elif life.kept_until <= life.now:
            self._let_go(life)

    def _let_go_of_dropped(self, life: Life) -> None:
        """End what a drop of the collection has left. What is in its spaces goes with its chunks."""
        with self._db.begin() as conn:
            if not lives.cancel(conn, life):
                lives.let_go(conn, life)
        cleaning.clean_up(self._db, life.id, is_stopping=self._stop.is_set)

    def _judge(self, reembedding_id: int) -> None:
        with self._db.begin() as conn:
            life = lives.get(conn, reembedding_id)
        asked = life.id, life.plan
        if not _is_to_judge(life) or time.monotonic() < self._judge_at.get(asked, 0.0):
            return
        # Whatever goes wrong is not tried again at once.
        self._judge_at[asked] = time.monotonic() + FAILED_SECONDS
        try:
            gating.judge(self._db, self._settings, life, is_stopping=self._stop.is_set)
        except judging.JudgingStopped:
            return
        except sa.exc.ProgrammingError as error:
            if sqlstate(error) != NOT_ALLOWED:
                raise
            problem = (
                "The role of the pollers may not read texts and vectors, so that it cannot check the gates. Check them "
                f"with `chunkmill reembed judge {life.id}`, in a role of producers."
            )
            with self._db.begin() as conn:
                lives.note_problem(conn, life, problem)
        else:
            del self._judge_at[asked]


def _is_to_judge(life: Life) -> bool:
    """Whether the gates are to be checked: for the first time, or again after a while if they were not passed."""
    if life.state is not _S.JUDGING or life.paused_at is not None or life.is_dropped:
        return False
    judged_at = life.report.judged_at
    if judged_at is None:
        return True
    if life.report.judgement.get("passed"):
        return False
    is_lacking = [gate.name for gate in life.report.gates if not gate.passed] == ["coverage"]
    return life.now - judged_at >= timedelta(seconds=LACKING_SECONDS if is_lacking else JUDGE_SECONDS)
