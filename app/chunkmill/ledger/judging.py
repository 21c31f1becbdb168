"""Measures what the gates of a re-embedding ask for, in the database of a collection that has both spaces.

It reads texts and vectors, which a role of pollers may not. A producer or a worker may, and so may a poller whose role
owns the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from chunkmill.db.connect import raw
from chunkmill.domain import gates as gating
from chunkmill.domain.comparing import JUDGED, Changes, Question, Side, as_json, changes, unit, with_stand_in
from chunkmill.domain.costs import machine_usd
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.gates import CollectionMeasurement, GateResult, Gates
from chunkmill.domain.golden import MAX_JUDGED
from chunkmill.domain.prices import MILLION
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import ChunkBatchState
from chunkmill.errors import EngineError, WaitTimeout
from chunkmill.ledger import embed_requests
from chunkmill.ledger.jobs import routing
from chunkmill.ledger.money import charges
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill.store import golden
from chunkmill.store import search as searching
from chunkmill.system.numbers import NDArray, np

CHECKED = 200
"""How many queries check the recall of the serving index."""
TIMED = 100
"""How many queries are embedded alone and timed with their search. Their p95 is then the mean of the slowest five."""
PART_TEXTS = 32
"""How many texts one embed request has, as those of a client."""
OPEN_PARTS = 8
"""How many requests are open at a time, half of what one client has."""
FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.002, 0.05
"""Seconds between two checks for answers: at first, and later."""
SAME_SCORE = 1e-6
"""Two hits whose scores differ by no more than this count as equally near. One text may have several chunks."""
CALLER = "judge"
"""Workers share their time between callers, so that a judgement takes no more than its part of it."""
Count = Callable[[SpaceSpec, Sequence[str], Callable[[], EmbeddedTexts]], EmbeddedTexts]
"""Returns what the function returns, which has these texts embedded in this space, and counts what that costs."""


def uncounted(spec: SpaceSpec, texts: Sequence[str], ask: Callable[[], EmbeddedTexts]) -> EmbeddedTexts:
    """Count nothing."""
    return ask()


class JudgingStopped(Exception):
    """The caller's time for the judgement is over, so it stopped."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was measured, what the gates say of it, and how the rankings differ (None if no query could be judged)."""

    measured: CollectionMeasurement
    results: tuple[GateResult, ...]
    changes: Changes | None
    titles: int = 0
    """How many of the judged queries are titles. Titles say what the texts contain, and not what people search for."""

    @property
    def passed(self) -> bool:
        return gating.all_passed(self.results)

    def report(self) -> dict[str, Any]:
        """It as JSON, for ``reembeddings.report``: gates, measures and the ids of the worst queries, and no text."""
        report: dict[str, Any] = as_json(
            {
                "passed": self.passed,
                "gates": [asdict(result) for result in self.results],
                "titles": self.titles,
                "changes": None if self.changes is None else asdict(self.changes),
                "p95": {"old": self.measured.old_p95, "new": self.measured.new_p95, "timed": self.measured.timed},
            }
        )
        return report


def judge(
    db: sa.Engine,
    settings: Settings,
    collection_id: int,
    old: Space,
    new: Space,
    gates: Gates,
    *,
    timeout: float = 600.0,
    is_stopping: Callable[[], bool] = lambda: False,
    count: Count = uncounted,
) -> Judgement:
    """Measure a collection in both spaces, and check the gates.

    It takes as long as workers need for the golden queries in both spaces, and 200 exact searches; it holds no
    connection while it waits for workers, and no transaction lasts longer than one search. A gate whose measure could
    not be taken, for example because no worker answered within ``timeout`` seconds, is not passed and says why. Raises
    :class:`JudgingStopped` soon after ``is_stopping`` says so.
    """
    deadline = time.monotonic() + timeout
    measuring = _Measuring(db, settings, collection_id, (old, new), deadline, is_stopping, count)
    with db.begin() as conn:
        chunks, missing, dead = coverage(conn, collection_id, old, new)
        canary = None if new.spec.provider == OPENAI else _has_canary(conn, new)
        price = price_of(conn, settings, new)
        asked = golden.read(conn, collection_id, most=MAX_JUDGED)
        questions = golden.judgeable(conn, collection_id, asked)
    unmeasured: dict[str, str] = {}
    if price is None:
        unmeasured["price"] = _why_no_price(new)
    told: Changes | None = None
    sides = (Side(), Side())
    times: tuple[list[float], list[float]] = ([], [])
    recalls: list[float] = []
    if gates.recall is not None or gates.ndcg_loss is not None or gates.p95_ratio is not None:
        try:
            measuring.run(questions, sides, times, recalls)
            if questions:
                told = changes([question.id for question in questions], *sides)
        except (EngineError, WaitTimeout) as error:
            sides, times = (Side(), Side()), ([], [])
            unmeasured |= dict.fromkeys(("ndcg", "p95"), str(error))
            if not recalls:
                unmeasured["recall"] = str(error)
        if not times[1]:
            unmeasured.setdefault(
                "p95",
                "No search could be timed, because the collection has no golden queries. Make some with "
                "`chunkmill golden titles COLLECTION`, or go without this gate: `--p95-ratio off`.",
            )
        if not recalls:
            unmeasured.setdefault("recall", "The new space has no vector that could be searched for.")
    result = CollectionMeasurement(
        chunks=chunks,
        missing=missing,
        dead=dead,
        canary=canary,
        recall=float(np.mean(recalls)) if recalls else None,
        recall_queries=len(recalls),
        old_ndcg=sides[0].ndcg,
        new_ndcg=sides[1].ndcg,
        old_p95=gating.p95(times[0]),
        new_p95=gating.p95(times[1]),
        timed=len(times[1]),
        price=price,
        unmeasured=unmeasured,
    )
    titles = 0 if told is None else sum(question.rest is not None for question in questions)
    return Judgement(result, tuple(gating.check(gates, result)), told, titles)


def coverage(conn: sa.Connection, collection_id: int, old: Space, new: Space) -> tuple[int, int, int]:
    """Chunks of the collection, those that only the old space has a vector of, and those of them that are dead.

    What waits in an open ChunkBatch of the new space does not count as missing.
    """
    # If producers enqueue all the time, some chunks always wait for their vector. The flip itself makes sure that none
    # of them is missing.
    query = f"""
        WITH pending AS (
            SELECT DISTINCT h.content_hash
            FROM jobs j
            JOIN chunk_batches b ON b.job_id = j.id AND b.state IN (:available, :running)
            CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
            WHERE j.collection_id = :collection AND j.space_id = :new
        ),
        missing AS (
            SELECT c.chunk_id, c.content_hash
            FROM chunks c
            JOIN {old.table_name} o ON o.content_hash = c.content_hash
            LEFT JOIN {new.table_name} n ON n.content_hash = c.content_hash
            WHERE c.collection_id = :collection AND n.content_hash IS NULL
              AND c.content_hash NOT IN (SELECT content_hash FROM pending)
        )
        SELECT (SELECT count(*) FROM chunks WHERE collection_id = :collection) AS chunks,
               (SELECT count(*) FROM missing) AS missing,
               (
                   SELECT count(*)
                   FROM missing m
                   WHERE EXISTS (
                       SELECT
                       FROM dead_chunks d
                       JOIN jobs j ON j.id = d.job_id
                       WHERE j.space_id = :new AND d.content_hash = m.content_hash
                         AND j.collection_id = :collection
                   )
               ) AS dead
    """
    parameters = {
        "collection": collection_id,
        "new": new.id,
        "available": ChunkBatchState.AVAILABLE,
        "running": ChunkBatchState.RUNNING,
    }
    conn.execute(sa.text("SET LOCAL statement_timeout = 0"))  # it reads the whole collection
    row = conn.execute(sa.text(query), parameters).one()
    return row.chunks, row.missing, row.dead


def price_of(conn: sa.Connection, settings: Settings, space: Space) -> Decimal | None:
    """US dollars for a million tokens that somebody waits for in a space; None if that is not known."""
    if space.spec.provider == OPENAI:
        price = charges.price_today(conn, model_for(settings, space.spec))
        return None if price is None else price.plain
    seconds = routing.seconds_per_token(conn, space.spec)
    return None if seconds is None else machine_usd(seconds * int(MILLION), settings.gpu_hour_usd)


def _why_no_price(space: Space) -> str:
    if space.spec.provider == OPENAI:
        return "The model of the new space has no price: give it one in OPENAI_MODELS."
    return "The price of local work is known once GPU_HOUR_USD is set and workers have embedded in the new space."


def _has_canary(conn: sa.Connection, space: Space) -> bool:
    query = "SELECT EXISTS (SELECT FROM space_canaries WHERE space_id = :space)"
    return bool(conn.execute(sa.text(query), {"space": space.id}).scalar_one())


@dataclass(slots=True)
class _Measuring:
    """One judgement that is under way. ``spaces`` are the old one and the new one."""

    db: sa.Engine
    settings: Settings
    collection_id: int
    spaces: tuple[Space, Space]
    deadline: float
    is_stopping: Callable[[], bool]
    count: Count = uncounted
    asked_seconds: float = 0.0
    """How long texts have been with workers so far, without what it takes to count them."""

    def run(
        self,
        questions: Sequence[Question],
        sides: tuple[Side, Side],
        times: tuple[list[float], list[float]],
        recalls: list[float],
    ) -> None:
        """Judge all queries in both spaces, time the first ones, and check the recall of the new serving index."""
        # The queries that are stored vectors come first, because they need no worker.
        stored = self._stored_vectors(max(0, CHECKED - len(questions)))
        self._check_recall(stored, recalls)
        seconds: tuple[list[float], list[float]] = ([], [])
        asked: list[NDArray[np.float32]] = []
        rests: list[NDArray[np.float32]] = []
        alone: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
        # Each query is timed in one space and then in the other, so that other work on the machine slows both.
        for question in questions[:TIMED]:
            for which, space in enumerate(self.spaces):
                before = self.asked_seconds
                alone[which].append(self._embed(space, [question.text], "query"))
                seconds[which].append(self.asked_seconds - before)
        for which, space in enumerate(self.spaces):
            others = self._embed(space, [question.text for question in questions[TIMED:]], "query")
            asked.append(np.concatenate([*alone[which], others]))
            texts = [question.rest for question in questions if question.rest is not None]
            rests.append(self._embed(space, texts, "document"))
        self._check_recall(asked[1][: CHECKED - len(stored)], recalls)
        of_rest = 0
        for i, question in enumerate(questions):
            for which, space in enumerate(self.spaces):
                began = time.perf_counter()
                hits = self._search(space, asked[which][i], JUDGED + len(question.grades))
                if i < TIMED:
                    times[which].append(seconds[which][i] + time.perf_counter() - began)
                ranked = [chunk_id for chunk_id, _ in hits]
                if question.rest is not None:
                    ranked = with_stand_in(hits, question.grades, float(asked[which][i] @ rests[which][of_rest]))
                sides[which].add(ranked, question.grades)
            of_rest += question.rest is not None

    def _check_recall(self, queries: Iterable[NDArray[np.float32]], recalls: list[float]) -> None:
        for query in queries:
            nearest = self._search(self.spaces[1], query, JUDGED, exact=True)
            if nearest:
                least = nearest[-1][1] - SAME_SCORE
                ranked = self._search(self.spaces[1], query, JUDGED)
                recalls.append(sum(score >= least for _, score in ranked) / len(nearest))

    def _search(
        self, space: Space, query: NDArray[np.float32], k: int, *, exact: bool = False
    ) -> list[tuple[str, float]]:
        self._require_going_on()
        with self.db.begin() as conn:
            hits = searching.search(conn, space, query, collection_id=self.collection_id, k=k, exact=exact)
            return [(hit.chunk_id, hit.score) for hit in hits]

    def _stored_vectors(self, n: int) -> NDArray[np.float32]:
        """``(m, d)`` float32, each of length 1, of at most ``n`` texts of the collection, chosen at random."""
        new = self.spaces[1]
        query = f"""
            SELECT n.embedding::real[] AS embedding
            FROM (
                SELECT DISTINCT content_hash
                FROM chunks
                WHERE collection_id = :collection
                ORDER BY content_hash
                LIMIT :n
            ) c
            JOIN {new.table_name} n USING (content_hash)
            ORDER BY content_hash
        """
        if not n:
            return np.empty((0, new.spec.dimensions), np.float32)
        with self.db.begin() as conn:
            rows = conn.execute(sa.text(query), {"collection": self.collection_id, "n": n}).scalars().all()
        return unit(np.array(rows, np.float32).reshape(-1, new.spec.dimensions))

    def _embed(self, space: Space, texts: Sequence[str], kind: str) -> NDArray[np.float32]:
        """``(n, d)`` float32, each of length 1, which workers make of the texts."""
        return unit(self.count(space.spec, texts, lambda: self._answered(space, texts, kind)).vectors)

    def _answered(self, space: Space, texts: Sequence[str], kind: str) -> EmbeddedTexts:
        made = EmbeddedTexts(
            np.empty((len(texts), space.spec.dimensions), np.float32),
            np.zeros(len(texts), np.int32),
            np.zeros(len(texts), np.bool_),
        )
        waiting: dict[int, range] = {}
        remaining = [range(i, min(i + PART_TEXTS, len(texts))) for i in range(0, len(texts), PART_TEXTS)][::-1]
        pause, began = FIRST_LOOK_SECONDS, time.perf_counter()
        try:
            while self._ask(space, texts, kind, remaining, waiting):
                self._require_going_on()
                with self.db.begin() as conn:
                    has_counts = embed_requests.has_columns(conn, "tokens")
                    answers = embed_requests.take_answers(raw(conn), list(waiting), with_counts=has_counts)
                for row in answers:
                    places = waiting.pop(row.id)
                    answer = row.answer(space.spec.dimensions)
                    if answer.vectors is None:
                        raise EngineError(f"A worker could not embed a golden query: {answer.error}")
                    here = slice(places.start, places.stop)
                    made.vectors[here] = answer.vectors
                    if answer.tokens is not None and answer.truncated is not None:
                        made.tokens[here], made.truncated[here] = answer.tokens, answer.truncated
                pause = FIRST_LOOK_SECONDS if answers else min(LAST_LOOK_SECONDS, 1.5 * pause)
                if not answers:
                    time.sleep(pause)
        finally:
            self.asked_seconds += time.perf_counter() - began
            if waiting:
                with self.db.begin() as conn:
                    embed_requests.withdraw_all(conn, list(waiting))
        return made

    def _ask(
        self,
        space: Space,
        texts: Sequence[str],
        kind: str,
        remaining: list[range],
        waiting: dict[int, range],
    ) -> bool:
        """Send as many parts as may be open. Returns whether any answer is awaited."""
        if len(waiting) > OPEN_PARTS // 2:
            return True
        parts = [remaining.pop() for _ in range(min(len(remaining), OPEN_PARTS - len(waiting)))]
        if parts:
            with self.db.begin() as conn:
                ids = embed_requests.ask_all(
                    conn,
                    space_id=space.id,
                    fingerprint=space.spec.fingerprint,
                    kind=kind,
                    parts=[[texts[i] for i in part] for part in parts],
                    urgency=1 if len(texts) > 1 else 0,
                    caller=CALLER,
                    timeout_s=max(0.0, self.deadline - time.monotonic()),
                )
            if not ids:
                raise EngineError("The space was dropped.")
            waiting |= zip(ids, parts, strict=True)
        return bool(waiting)

    def _require_going_on(self) -> None:
        if self.is_stopping():
            raise JudgingStopped
        if time.monotonic() >= self.deadline:
            raise WaitTimeout(
                "The golden queries were not embedded and judged in time. Check with `chunkmill status` that workers "
                "serve both models."
            )
