"""Bridges: queries of a new model answered in the space that a collection has now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

import sqlalchemy as sa

from chunkmill.bridge import fitting, judging
from chunkmill.bridge.adapters import Adapter
from chunkmill.client.costing import PricedSpace, Spending, require_affordable, without_vector
from chunkmill.client.steps import run_steps
from chunkmill.client.vectors import Vectors
from chunkmill.domain.arguments import as_flag, as_function, as_number, as_seconds, as_text, as_usd, require_name
from chunkmill.domain.bridges import Bridge, BridgeQuote, BridgeTrial
from chunkmill.domain.costs import Spent, known_sum, sum_of
from chunkmill.domain.golden import GoldenQuery
from chunkmill.domain.printed import Rows
from chunkmill.domain.spaces import Precision, SpaceSpec
from chunkmill.errors import InvalidInput
from chunkmill.spaces import bridges, collections, registry
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space
from chunkmill.store import golden, keywords, pairs
from chunkmill.system.numbers import NDArray, np

MAX_SAMPLE = 50_000
"""The most texts of a sample, whose vectors are in memory."""
MAX_QUERIES = 5_000
"""The most queries that judge a bridge. Their bounds are then about ±0.005."""
CALLER = "bridge"
"""Workers share their time between callers, so that a bridge takes no more than its part of it."""
WINDOW = 256
"""How many texts are read and embedded at a time."""
TITLES_SHARE = 4
"""At most one text in this many is asked for by its title, and then not learnt from."""


@dataclass(frozen=True, slots=True)
class _GradedQuery:
    """A query and the grades of its answers, by content hash."""

    text: str
    grades: Mapping[bytes, float]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a bridge is to be learnt from and judged by."""

    collection: Collection
    old: Space
    new: PricedSpace
    own: PricedSpace | None
    """The space of the collection, if it is asked too."""
    asked: Sequence[_GradedQuery]
    queries_from: str
    names: Sequence[bytes]
    """The content hashes of the answers, and then those of the other texts of the sample."""
    answers: frozenset[bytes]

    @property
    def texts(self) -> list[str]:
        """Those of the queries."""
        return [one.text for one in self.asked]

    @property
    def priced(self) -> list[PricedSpace]:
        """The spaces that texts are embedded into."""
        return [self.new] if self.own is None else [self.new, self.own]


@dataclass(frozen=True, slots=True)
class _Sample:
    """The vectors of the texts of a plan."""

    corpus: judging.Corpus
    pairs: fitting.Pairs
    """Those of the corpus that answer no golden query."""
    embedded: int


class Bridges(Vectors):
    """The part of the client that is about bridges."""

    def bridge(
        self,
        collection: str,
        model: str,
        *,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        sample: int = 5_000,
        queries: int = 500,
        compare_old: bool = False,
        max_usd: Decimal | int | str | None = None,
        timeout: float = 3_600.0,
        on_progress: Callable[[Spent], object] | None = None,
    ) -> Bridge:
        """Learn to answer queries of ``model`` in the space that the collection has now, and store what was learnt.

        ``search(bridge=model)`` uses it from then on, and nothing else does. It is for a time in which the collection's
        own model cannot be asked, or in which a migration to ``model`` is under way. It ends by itself when the
        collection leaves its space, and ``search(bridge=model)`` then searches the new one.

        It is learnt from up to ``sample`` stored texts, chosen at random. Those without a vector of ``model`` are
        embedded now, as workers answer any other request, and these vectors are not stored. Up to ``queries`` golden
        queries, or else titles of chunks, choose among three kinds of adapter and measure what is lost against a full
        re-embedding; their answers are not learnt from. With ``compare_old`` they are also asked with the collection's
        own model, which a worker must then serve. A bridge of the same model is replaced.

        If the collection is on its way into a space of this model, the bridge is from that space. Otherwise
        ``dimensions`` and ``precision`` are those of :meth:`enqueue`, and long texts are treated as in the space that
        the collection has. The sample takes about ``20 * sample * (d + e)`` bytes of memory for ``d`` and ``e``
        dimensions.

        A provider's model is quoted first (:meth:`quote_bridge`). Raises :class:`BudgetExceeded` before anything is
        sent if the quote is above ``max_usd`` or above what the month's budget has left. ``on_progress`` is called with
        what is spent, before and after each request to workers.

        Raises :class:`NotFound`, :class:`InvalidInput` if the collection is in that space already, or has too few texts
        or no queries, :class:`EngineError`, and :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        deadline = time.monotonic() + as_seconds("timeout", timeout)
        limit = None if max_usd is None else as_usd("max_usd", max_usd)
        as_function("on_progress", on_progress)
        plan = self._plan_bridge(collection, model, dimensions, precision, sample, queries, compare_old)
        self._require_affordable_bridge(plan, limit)
        spending = Spending(on_progress)
        drawn = self._draw(plan, spending, deadline)
        vectors = self._asked_now(spending, plan.new, plan.texts, deadline)
        learnt = list(fitting.fit_all(drawn.pairs))
        grades = [{name.hex(): grade for name, grade in one.grades.items()} for one in plan.asked]
        questions = [judging.Question(vector, of) for vector, of in zip(vectors, grades, strict=True)]
        verdict = judging.judge(drawn.corpus, questions, learnt)
        own = None
        if plan.own is not None:
            asked = self._asked_now(spending, plan.own, plan.texts, deadline)
            own = judging.judge_own(drawn.corpus, asked, verdict, grades)
        adapter = learnt[verdict.chosen]
        bridge = _report(plan, drawn, learnt, verdict, own)
        with self._transaction() as conn:
            held = self._held(conn, plan.new.spec)
            if not bridges.keep(conn, bridge, adapter, plan.collection, held):
                raise InvalidInput(
                    f"collection {collection!r} left its space, or was dropped, while the bridge was learnt. Nothing "
                    "was stored."
                )
            (stored,) = [one for one in bridges.of_collections(conn, [plan.collection.id]) if one.name == bridge.name]
        return stored

    def quote_bridge(
        self,
        collection: str,
        model: str,
        *,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        sample: int = 5_000,
        queries: int = 500,
        compare_old: bool = False,
    ) -> BridgeQuote:
        """What :meth:`bridge` with these arguments would have embedded, and what that would cost. Nothing is sent.

        The tokens of a provider's model are counted as those of an enqueue are. Raises what :meth:`bridge` raises
        before it sends anything.
        """
        return self._quote_bridge(
            self._plan_bridge(collection, model, dimensions, precision, sample, queries, compare_old)
        )

    def bridges(self, collection: str | None = None) -> list[Bridge]:
        """The bridges of a collection, or of all, by collection and name. Raises :class:`NotFound`."""
        if collection is not None:
            require_name("collection", collection)
        with self._transaction() as conn:
            row = None if collection is None else collections.find(conn, collection)
            ids = None if row is None else [row.id]
            return Rows(bridges.of_collections(conn, ids) if bridges.are_kept(conn) else [], Bridge)

    def drop_bridge(self, collection: str, name: str) -> bool:
        """Delete the bridge of a collection for the model ``name``. Returns whether there was one.

        Searches through it raise :class:`NotFound` from then on. Raises :class:`NotFound`.
        """
        require_name("collection", collection)
        name = as_text("name", name)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            bridges.require_kept(conn)
            return bridges.drop(conn, row, name)

    def _plan_bridge(
        self,
        collection: str,
        model: str,
        dimensions: int | None,
        precision: Precision | str | None,
        sample: int,
        queries: int,
        compare_old: bool,
    ) -> _Plan:
        """Choose queries and texts."""
        require_name("collection", collection)
        model = as_text("model", model)
        most = as_number("sample", sample, least=fitting.MIN_PAIRS, most=MAX_SAMPLE)
        most_queries = as_number("queries", queries, least=2, most=MAX_QUERIES)
        compare_old = as_flag("compare_old", compare_old)
        with self._transaction() as conn:
            bridges.require_kept(conn)
            row = collections.find(conn, collection)
            old = registry.get(conn, row.space_id)
            is_any = dimensions is None and precision is None
            on_its_way = bridges.other_space(conn, row, model) if is_any else None
        spec = (
            self._spec(model, old.spec.long_text.policy, dimensions=dimensions, precision=precision)
            if on_its_way is None
            else on_its_way.spec
        )
        if spec.fingerprint == old.spec.fingerprint:
            raise InvalidInput(f"collection {collection!r} is in the space of {model!r} already, and needs no bridge.")
        priced = PricedSpace(self._transaction, self._settings, spec)
        own = PricedSpace(self._transaction, self._settings, old.spec) if compare_old else None
        with self._transaction() as conn:
            sampled = pairs.sample(conn, old, row.id, most)
            asked, queries_from = _questions(conn, row, old, most_queries, n_texts=len(sampled))
        answers = dict.fromkeys(name for one in asked for name in one.grades)
        names = [*answers, *(name for name in sampled if name not in answers)]
        _require_pairs(row, len(names) - len(answers))
        return _Plan(row, old, priced, own, asked, queries_from, names, frozenset(answers))

    def _quote_bridge(self, plan: _Plan) -> BridgeQuote:
        queries = list(dict.fromkeys(plan.texts))
        tokens = {one: one.tokens_of(queries) for one in plan.priced}
        to_embed = 0
        for start in range(0, len(plan.names), WINDOW):
            with self._transaction() as conn:
                missing = without_vector(conn, plan.new.spec, plan.names[start : start + WINDOW])
                texts = golden.texts_of(conn, missing) if missing else {}
            to_embed += len(texts)
            tokens[plan.new] += plan.new.tokens_of(texts.values())
        usd = [one.usd_of(tokens[one]) for one in plan.priced]
        return BridgeQuote(
            collection=plan.collection.name,
            name=plan.new.spec.model,
            query_space=plan.new.spec.fingerprint,
            space=plan.old.spec.fingerprint,
            queries=len(plan.asked),
            texts=len(plan.names),
            to_embed=to_embed,
            tokens=sum(tokens.values()),
            usd=sum_of(usd),
            known_usd=known_sum(usd),
        )

    def _require_affordable_bridge(self, plan: _Plan, limit: Decimal | None) -> None:
        if not any(one.is_paid for one in plan.priced):
            return
        quote = self._quote_bridge(plan)
        with self._transaction() as conn:
            require_affordable(
                conn,
                self._settings,
                [one.spec for one in plan.priced],
                quote.usd,
                limit=limit,
                what="the bridge",
                advice=f"Learn it from a smaller sample than {quote.texts:,} texts, or raise the limit.",
            )

    def _draw(self, plan: _Plan, spending: Spending, deadline: float) -> _Sample:
        """Have those of the texts embedded that have no vector in the new space."""
        names = plan.names
        with self._transaction() as conn:
            new = self._held(conn, plan.new.spec)
            of_old, of_new = pairs.vectors(conn, plan.old, names), pairs.vectors(conn, new, names)
        n_stored = len(of_new)
        for made in self._made(spending, plan.new, [name for name in names if name not in of_new], deadline):
            of_new.update(made)
        # A text that is deleted meanwhile is left out.
        names = [name for name in names if name in of_old and name in of_new]
        _require_pairs(plan.collection, sum(name not in plan.answers for name in names))
        corpus = judging.Corpus([name.hex() for name in names], _rows(of_new, names), _rows(of_old, names))
        is_learnt = np.array([name not in plan.answers for name in names])
        learnt_from = fitting.Pairs.of(new=corpus.new[is_learnt], old=corpus.old[is_learnt])
        return _Sample(corpus, learnt_from, len(of_new) - n_stored)

    def _held(self, conn: sa.Connection, spec: SpaceSpec) -> Space:
        """The space, which is registered if it is new or was dropped. It is held, so that it is not dropped while its
        vectors are read, or while a bridge is stored."""
        return registry.register_and_hold(conn, spec, storage=self._settings.vector_storage)

    def _made(
        self, spending: Spending, priced: PricedSpace, hashes: Sequence[bytes], deadline: float
    ) -> Iterable[dict[bytes, NDArray[np.float32]]]:
        """Content hash → vector of stored texts, which workers make now, window by window."""
        for start in range(0, len(hashes), WINDOW):
            with self._transaction() as conn:
                texts = golden.texts_of(conn, hashes[start : start + WINDOW])
            made = self._asked_now(spending, priced, list(texts.values()), deadline, "document")
            yield dict(zip(texts, made, strict=True))

    def _asked_now(
        self, spending: Spending, priced: PricedSpace, texts: Sequence[str], deadline: float, kind: str = "query"
    ) -> NDArray[np.float32]:
        """``(n, d)`` float32."""
        left = max(0.0, deadline - time.monotonic())
        distinct = list(dict.fromkeys(texts))
        # Without the cache of queries, what is asked for is what was quoted.
        register = partial(self._registered, priced.spec)
        steps = self._asking_all(register(), distinct, kind, left, CALLER, register=register, is_cached=False)
        vectors = spending.embed(priced, distinct, lambda: run_steps(steps)).vectors
        rows = {text: row for row, text in enumerate(distinct)}
        return vectors[[rows[text] for text in texts]]


def _require_pairs(collection: Collection, n: int) -> None:
    if n < fitting.MIN_PAIRS:
        raise InvalidInput(
            f"collection {collection.name!r} has {n} texts with a vector that do not answer a query, and a bridge is "
            f"learnt from at least {fitting.MIN_PAIRS}. Enqueue more, or pass fewer queries."
        )


def _report(
    plan: _Plan,
    drawn: _Sample,
    learnt: Sequence[Adapter],
    verdict: judging.Verdict,
    own: judging.RankingQuality | None,
) -> Bridge:
    full, held_out, loss = verdict.full, verdict.held_out, verdict.loss
    trials = tuple(
        BridgeTrial(one.kind, _mean(how.ndcg), _mean(how.recall), _mean(how.same_hits), one.nbytes)
        for one, how in zip(learnt, verdict.tried, strict=True)
    )
    return Bridge(
        collection=plan.collection.name,
        name=plan.new.spec.model,
        query_space=plan.new.spec.fingerprint,
        space=plan.old.spec.fingerprint,
        kind=learnt[verdict.chosen].kind,
        pairs=len(drawn.pairs),
        embedded=drawn.embedded,
        ranked=len(drawn.corpus.ids),
        queries=len(plan.asked),
        queries_from=plan.queries_from,
        full_ndcg=_mean(full.ndcg),
        ndcg=_mean(held_out.ndcg),
        loss=loss.mean,
        low=loss.low,
        high=loss.high,
        full_recall=_mean(full.recall),
        recall=_mean(held_out.recall),
        same_hits=_mean(held_out.same_hits),
        old_ndcg=None if own is None else _mean(own.ndcg),
        trials=trials,
        because=judging.sentence(verdict),
    )


def _mean(scores: NDArray[np.float64]) -> float:
    return float(scores.mean())


def _rows(known: Mapping[bytes, NDArray[np.float32]], names: Sequence[bytes]) -> NDArray[np.float32]:
    return np.stack([known[name] for name in names])


def _questions(
    conn: sa.Connection, collection: Collection, space: Space, most: int, *, n_texts: int
) -> tuple[list[_GradedQuery], str]:
    """The queries that judge, and what they are: golden queries that are not titles, or titles if there are too few.

    Their answers have a vector in the space. Only as many are taken that at least half of the texts are no answers.
    """
    given = golden.read(conn, collection.id, most=most) if keywords.are_kept(conn) else []
    queries: Sequence[GoldenQuery] = [query for query in given if not query.is_title]
    queries_from = "golden"
    asked = _with_hashes(conn, collection, space, queries)
    if len(asked) < 2:
        made = golden.titles(conn, collection.id, min(most, n_texts // TITLES_SHARE)) if n_texts >= TITLES_SHARE else []
        asked, queries_from = _with_hashes(conn, collection, space, made), "titles"
    taken: list[_GradedQuery] = []
    answers: set[bytes] = set()
    for one in asked:
        if len(answers | one.grades.keys()) * 2 <= n_texts:
            taken.append(one)
            answers |= one.grades.keys()
    if len(taken) < 2:
        raise InvalidInput(
            f"collection {collection.name!r} has {len(taken)} queries to judge a bridge by, and it takes two at least. "
            f"Load golden queries with client.golden({collection.name!r}).load(…). Their answers must have vectors, "
            "and half of the texts must be no answers, because these are learnt from."
        )
    return taken, queries_from


def _with_hashes(
    conn: sa.Connection, collection: Collection, space: Space, queries: Sequence[GoldenQuery]
) -> list[_GradedQuery]:
    """The queries that have a right answer with a vector. Chunks with the same text are one answer."""
    chunk_ids = list(dict.fromkeys(chunk_id for query in queries for chunk_id in query.relevant))
    known = pairs.hashes(conn, space, collection.id, chunk_ids)
    asked = []
    for query in queries:
        grades: dict[bytes, float] = {}
        for chunk_id, grade in query.relevant.items():
            if (name := known.get(chunk_id)) is not None:
                grades[name] = max(grade, grades.get(name, 0.0))
        if any(grade > 0 for grade in grades.values()):
            asked.append(_GradedQuery(query.text, grades))
    return asked
