"""Bridges: queries of a new model answered in the space that a collection has now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.bridge import fitting, judging
from chunkmill.bridge.adapters import Adapter
from chunkmill.client.steps import run_steps
from chunkmill.client.vectors import Vectors
from chunkmill.domain.arguments import as_flag, as_number, as_seconds, as_text, require_name
from chunkmill.domain.bridges import Bridge, BridgeTrial
from chunkmill.domain.golden import GoldenQuery
from chunkmill.domain.printed import Rows
from chunkmill.domain.spaces import Precision
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
class _Sample:
    """What a bridge is learnt from and judged by."""

    asked: Sequence[_GradedQuery]
    queries_from: str
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
        timeout: float = 3_600.0,
    ) -> Bridge:
        """Learn to answer queries of ``model`` in the space that the collection has now, and store what was learnt.

        ``search(bridge=model)`` uses it from then on, and nothing else does. It is for a time in which the collection's
        own model cannot be asked, or in which a migration to ``model`` is under way. It ends by itself when the
        collection leaves its space, and ``search(bridge=model)`` then searches the new one.

        It is learnt from up to ``sample`` stored texts, chosen at random. Those without a vector of ``model`` are
        embedded now, which costs money if it is a paid model; these vectors are not stored. Up to ``queries`` golden
        queries, or else titles of chunks, choose among three kinds of adapter and measure what is lost against a full
        re-embedding; their answers are not learnt from. With ``compare_old`` they are also asked with the collection's
        own model, which a worker must then serve. A bridge of the same model is replaced.

        If the collection is on its way into a space of this model, the bridge is from that space. Otherwise
        ``dimensions`` and ``precision`` are those of :meth:`enqueue`, and long texts are treated as in the space that
        the collection has. The sample takes about ``20 * sample * (d + e)`` bytes of memory for ``d`` and ``e``
        dimensions.

        Raises :class:`NotFound`, :class:`InvalidInput` if the collection is in that space already, or has too few texts
        or no queries, :class:`EngineError`, and :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        require_name("collection", collection)
        model = as_text("model", model)
        most = as_number("sample", sample, least=fitting.MIN_PAIRS, most=MAX_SAMPLE)
        most_queries = as_number("queries", queries, least=2, most=MAX_QUERIES)
        compare_old = as_flag("compare_old", compare_old)
        deadline = time.monotonic() + as_seconds("timeout", timeout)
        with self._transaction() as conn:
            bridges.require_kept(conn)
            row = collections.find(conn, collection)
            old = registry.get(conn, row.space_id)
            is_any = dimensions is None and precision is None
            on_its_way = bridges.other_space(conn, row, model) if is_any else None
        new = on_its_way or self._space(model, old.spec.long_text.policy, dimensions=dimensions, precision=precision)
        if new.spec.fingerprint == old.spec.fingerprint:
            raise InvalidInput(f"collection {collection!r} is in the space of {model!r} already, and needs no bridge.")
        drawn = self._draw(row, old, new, most, most_queries, deadline)
        texts = [one.text for one in drawn.asked]
        vectors = self._asked_now(new, texts, deadline)
        learnt = list(fitting.fit_all(drawn.pairs))
        grades = [{name.hex(): grade for name, grade in one.grades.items()} for one in drawn.asked]
        questions = [judging.Question(vector, of) for vector, of in zip(vectors, grades, strict=True)]
        verdict = judging.judge(drawn.corpus, questions, learnt)
        own = None
        if compare_old:
            own = judging.judge_own(drawn.corpus, self._asked_now(old, texts, deadline), verdict, grades)
        adapter = learnt[verdict.chosen]
        bridge = _report(row, new, old, drawn, learnt, verdict, own)
        with self._transaction() as conn:
            held = registry.register_and_hold(conn, new.spec, storage=self._settings.vector_storage)
            if not bridges.keep(conn, bridge, adapter, row, held):
                raise InvalidInput(
                    f"collection {collection!r} left its space, or was dropped, while the bridge was learnt. Nothing "
                    "was stored."
                )
            (stored,) = [one for one in bridges.of_collection(conn, row) if one.name == bridge.name]
        return stored

    def bridges(self, collection: str | None = None) -> list[Bridge]:
        """The bridges of a collection, or of all, by collection and name. Raises :class:`NotFound`."""
        if collection is not None:
            require_name("collection", collection)
        with self._transaction() as conn:
            row = None if collection is None else collections.find(conn, collection)
            return Rows(bridges.of_collection(conn, row) if bridges.are_kept(conn) else [], Bridge)

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

    def _draw(
        self, collection: Collection, old: Space, new: Space, most: int, most_queries: int, deadline: float
    ) -> _Sample:
        """Choose queries and texts, and have those of the texts embedded that have no vector in the new space."""
        with self._transaction() as conn:
            # The space may have been dropped since this process registered it. It is held here, so that it is not
            # dropped while its vectors are read.
            new = registry.register_and_hold(conn, new.spec, storage=self._settings.vector_storage)
            sampled = pairs.sample(conn, old, collection.id, most)
            asked, queries_from = _questions(conn, collection, old, most_queries, n_texts=len(sampled))
            answers = dict.fromkeys(name for one in asked for name in one.grades)
            names = [*answers, *(name for name in sampled if name not in answers)]
            of_old, of_new = pairs.vectors(conn, old, names), pairs.vectors(conn, new, names)
        _require_pairs(collection, len(names) - len(answers))
        n_stored = len(of_new)
        for made in self._made(new, [name for name in names if name not in of_new], deadline):
            of_new.update(made)
        # A text that is deleted meanwhile is left out.
        names = [name for name in names if name in of_old and name in of_new]
        _require_pairs(collection, sum(name not in answers for name in names))
        corpus = judging.Corpus([name.hex() for name in names], _rows(of_new, names), _rows(of_old, names))
        is_learnt = np.array([name not in answers for name in names])
        learnt_from = fitting.Pairs.of(new=corpus.new[is_learnt], old=corpus.old[is_learnt])
        return _Sample(asked, queries_from, corpus, learnt_from, len(of_new) - n_stored)

    def _made(
        self, space: Space, hashes: Sequence[bytes], deadline: float
    ) -> Iterable[dict[bytes, NDArray[np.float32]]]:
        """Content hash → vector of stored texts, which workers make now, window by window."""
        for start in range(0, len(hashes), WINDOW):
            with self._transaction() as conn:
                texts = golden.texts_of(conn, hashes[start : start + WINDOW])
            made = self._asked_now(space, list(texts.values()), deadline, "document")
            yield dict(zip(texts, made, strict=True))

    def _asked_now(
        self, space: Space, texts: Sequence[str], deadline: float, kind: str = "query"
    ) -> NDArray[np.float32]:
        """``(n, d)`` float32."""
        left = max(0.0, deadline - time.monotonic())
        return run_steps(self._asking_all(space, texts, kind, left)).vectors


def _require_pairs(collection: Collection, n: int) -> None:
    if n < fitting.MIN_PAIRS:
        raise InvalidInput(
            f"collection {collection.name!r} has {n} texts with a vector that do not answer a query, and a bridge is "
            f"learnt from at least {fitting.MIN_PAIRS}. Enqueue more, or pass fewer queries."
        )


def _report(
    collection: Collection,
    new: Space,
    old: Space,
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
        collection=collection.name,
        name=new.spec.model,
        query_space=new.spec.fingerprint,
        space=old.spec.fingerprint,
        kind=learnt[verdict.chosen].kind,
        pairs=len(drawn.pairs),
        embedded=drawn.embedded,
        ranked=len(drawn.corpus.ids),
        queries=len(drawn.asked),
        queries_from=drawn.queries_from,
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
