"""Keyword search beside vectors: keywords, golden queries, and whether the mix is better."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path

import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client.base import ClientPart, store_errors
from chunkmill.client.costing import counting
from chunkmill.client.steps import run_steps
from chunkmill.client.vectors import Vectors
from chunkmill.domain import mixing
from chunkmill.domain.arguments import as_function, as_number, as_seconds, as_text, require_name
from chunkmill.domain.comparing import Question, unit
from chunkmill.domain.costs import Spent
from chunkmill.domain.golden import MAX_JUDGED, GoldenQuery, read_judgements, read_queries
from chunkmill.domain.results import GoldenLoaded, Keywords, SearchTuning
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.ledger.judging import Count
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry, serving
from chunkmill.store import golden, keywords
from chunkmill.store import search as searching
from chunkmill.store.keywords import KeywordIndex
from chunkmill.system.numbers import NDArray, np

MAX_GOLDEN = 100_000
"""The most golden queries of a collection."""
LOOK_S = 0.2
"""How many seconds pass between two checks whether another process has filled in the keywords."""


class HybridSearch(Vectors):
    """The part of the client that is about searches by vectors and keywords together."""

    def keywords(self, collection: str, *, language: str | None = None) -> Keywords | None:
        """The keywords of a collection; None if it has none. With ``language`` it gets some.

        ``language`` is a text search configuration of Postgres, such as ``english`` or ``simple``. The call returns
        when all chunks have their keywords, which takes about a minute for 100,000 of them; writers and searches go on,
        and if it is interrupted, the poller goes on with it. From then on each chunk gets its keywords in the commit
        that writes it. Keywords stay in Postgres and are deleted with the text.

        Raises :class:`NotFound`, and :class:`InvalidInput` if Postgres does not know the language, or if the collection
        has keywords in another one: call :meth:`drop_keywords` first.
        """
        require_name("collection", collection)
        if language is not None:
            require_name("language", language)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            keywords.require_kept(conn)
            if language is not None:
                made = keywords.create(conn, row.id, language)
                if made != keywords.qualified(language):
                    raise InvalidInput(
                        f"collection {collection!r} has keywords in {made} already. Call drop_keywords({collection!r}) "
                        f"first, or run: chunkmill keywords {shlex.quote(collection)} --drop"
                    )
        if language is not None:
            with store_errors(self._db):
                while not keywords.fill(self._db, row.id):
                    with self._db.begin() as conn:
                        if keywords.find(conn, row.id) is None:
                            raise NotFound(f"the keywords of collection {collection!r} were dropped meanwhile.")
                    time.sleep(LOOK_S)
        with self._transaction() as conn:
            index = keywords.find(conn, row.id)
            if index is None:
                return None
            texts, size = keywords.measure(conn, index)
            return Keywords(collection, index.language, index.state is mixing.KeywordState.READY, texts, size)

    def drop_keywords(self, collection: str) -> bool:
        """Delete the keywords of a collection, and what its golden queries chose. Returns whether there were any.

        Its searches then use vectors alone. Raises :class:`NotFound`.
        """
        require_name("collection", collection)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            keywords.require_kept(conn)
            return keywords.drop(conn, row.id)

    def golden(self, collection: str) -> GoldenQueries:
        """The golden queries of a collection: queries whose answers are known."""
        require_name("collection", collection)
        made = GoldenQueries(self._db, self._broker, self._settings, collection)
        made._closing = self._closing
        return made

    def tune_search(
        self,
        collection: str,
        *,
        timeout: float = 600.0,
        space: str | None = None,
        on_spent: Callable[[Spent], object] | None = None,
    ) -> SearchTuning:
        """Judge searches by vectors, by keywords and by both with the collection's golden queries, and choose.

        If mixing is better even at the lower bound of its confidence interval, searches are mixed from then on;
        otherwise they use vectors alone. The report says why. Call it again when the collection, its space or its
        golden queries have changed. At most 2,000 queries are judged, chosen at random, and a worker embeds them. The
        choice holds for one space: ``space`` names another one of the collection than the active one, as in
        :meth:`search`, for example before the collection moves to it. ``on_spent`` is called with what is spent, before
        and after each request to workers.

        Raises :class:`NotFound`, :class:`InvalidInput` if the collection has no keywords or no golden queries, and
        :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        require_name("collection", collection)
        as_function("on_spent", on_spent)
        deadline = time.monotonic() + as_seconds("timeout", timeout)
        with self._transaction() as conn:
            served = serving.find(conn, collection)
            meant = served.active if space is None else served.named(as_text("space", space))
            row = served.collection_in(meant)
            index = keywords.require_ready(conn, row)
            queries = golden.read(conn, row.id, most=MAX_JUDGED)
            if not queries:
                raise InvalidInput(
                    f"collection {collection!r} has no golden queries. To load some: `chunkmill golden load "
                    "COLLECTION QUERIES QRELS`. If chunks have titles, they can be the queries: `chunkmill golden "
                    "titles COLLECTION`."
                )
            judged = golden.judgeable(conn, row.id, queries)
        if len(judged) < 2:
            raise InvalidInput(
                f"{len(judged)} of the {len(queries):,} golden queries of collection {collection!r} can be judged, and "
                "it takes two at least. The others have no relevant chunk in the collection, or its title has changed."
            )
        count = counting(self._transaction, self._settings, on_spent)
        asked = self._embedded(meant, [question.text for question in judged], "query", deadline, count)
        rests = [question.rest for question in judged if question.rest is not None]
        rest_vectors = iter(self._embedded(meant, rests, "document", deadline, count))
        ndcg, rrf = np.empty((len(judged), len(mixing.ALPHAS))), np.empty(len(judged))
        for i, question in enumerate(judged):
            stands_in = None if question.rest is None else (question.rest, next(rest_vectors))
            ndcg[i], rrf[i] = self._judge(meant, index, asked[i], question, stands_in)
        tuning = _report(collection, meant.spec.fingerprint, mixing.choose(ndcg, rrf), len(queries) - len(judged))
        with self._transaction() as conn:
            golden.keep_tuning(conn, row.id, meant.id, tuning)
        return tuning

    def _judge(
        self,
        space: registry.Space,
        index: KeywordIndex,
        vector: NDArray[np.float32],
        question: Question,
        stands_in: tuple[str, NDArray[np.float32]] | None,
    ) -> tuple[mixing.Scores, float]:
        """nDCG@10 of one query for each alpha, and that of reciprocal rank fusion.

        For a title, ``stands_in`` replaces the relevant chunks: it has the text that follows the title, and its vector.
        """
        grades = question.grades
        with self._transaction() as conn:
            nearest = searching.search(conn, space, vector, collection_id=index.collection_id, k=mixing.DEPTH)
            candidates = keywords.candidates(conn, index, space, vector, question.text, nearest)
            if stands_in is not None:
                rest, rest_vector = stands_in
                terms = keywords.read_terms(conn, index, question.text)
                cosine = float(vector @ rest_vector)
                keyword = keywords.score_text(conn, index, terms, rest)
                candidates = [
                    *(one for one in candidates if one.chunk_id not in grades),
                    *(keywords.Candidate(chunk_id, cosine, keyword) for chunk_id in grades),
                ]
        cosines, scores = keywords.scores_of(candidates)
        return mixing.judge(cosines, scores, [one.chunk_id for one in candidates], grades)

    def _embedded(
        self, space: registry.Space, texts: Sequence[str], kind: str, deadline: float, count: Count
    ) -> NDArray[np.float32]:
        """``(n, d)`` float32, each of length 1."""
        steps = self._asking_all(space, texts, kind, max(0.0, deadline - time.monotonic()))
        return unit(count(space.spec, texts, lambda: run_steps(steps)).vectors)


class GoldenQueries(ClientPart):
    """The golden queries of one collection. ``client.golden("docs")`` makes it."""

    def __init__(self, db: sa.Engine, broker: Broker, settings: Settings, collection: str) -> None:
        super().__init__(db, broker, settings)
        self._collection = collection

    def __repr__(self) -> str:
        return f"GoldenQueries({self._collection!r})"

    def load(self, queries: str | PathLike[str], qrels: str | PathLike[str]) -> GoldenLoaded:
        """Store the queries of two files of a BEIR data set. One that has the id of an earlier one replaces it.

        ``queries`` has a line of JSON for each query, such as ``{"_id": "q1", "text": "…"}``. ``qrels`` has three
        columns with tabs between them: query id, chunk id and grade, from 0 for a wrong answer. Nothing is stored if a
        line is wrong. Raises :class:`NotFound`, and :class:`InvalidInput`, which names the file and the line.
        """
        with self._transaction() as conn:
            row = collections.find(conn, self._collection)
            keywords.require_kept(conn)
        asked = read_queries(_lines("queries", queries), str(queries))
        judged = read_judgements(_lines("qrels", qrels), str(qrels), asked)
        made = [GoldenQuery(query_id, asked[query_id], grades) for query_id, grades in judged.items()]
        self._require_room(len(made))
        ids = [chunk_id for query in made for chunk_id in query.relevant]
        with self._transaction() as conn:
            unknown = golden.unknown_chunks(conn, row.id, list(dict.fromkeys(ids)))
            golden.add(conn, row.id, made)
        return GoldenLoaded(
            queries=len(made),
            judgements=len(ids),
            without_judgement=len(asked) - len(made),
            unknown_chunks=sum(chunk_id in unknown for chunk_id in ids),
        )

    def from_titles(self, n: int = 500) -> int:
        """Make up to ``n`` golden queries of titles, in place of those made before. Returns how many there are.

        The query is the first line or sentence of a chunk, and the chunk is its answer. When it is judged, the title is
        removed from the chunk, and only the rest of the chunk is searched. The chunks are chosen at random. Raises
        :class:`NotFound`, and :class:`InvalidInput` if no chunk has a title with enough text below.
        """
        most = as_number("n", n, least=1, most=MAX_GOLDEN)
        with self._transaction() as conn:
            row = collections.find(conn, self._collection)
            keywords.require_kept(conn)
            made = golden.titles(conn, row.id, most)
            if not made:
                raise InvalidInput(
                    f"no chunk of collection {self._collection!r} has a title: a first line or sentence of some words, "
                    "with at least 40 characters below. Load golden queries from files instead."
                )
            golden.clear(conn, row.id, only_titles=True)
            golden.add(conn, row.id, made)
        return len(made)

    def list(self) -> Sequence[GoldenQuery]:
        """All golden queries of the collection, by id. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            row = collections.find(conn, self._collection)
            keywords.require_kept(conn)
            return golden.read(conn, row.id)

    def count(self) -> int:
        """How many golden queries the collection has. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            row = collections.find(conn, self._collection)
            keywords.require_kept(conn)
            return golden.count(conn, row.id)

    def clear(self) -> int:
        """Delete all golden queries of the collection. Returns how many there were. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            row = collections.find(conn, self._collection)
            keywords.require_kept(conn)
            return golden.clear(conn, row.id)

    def _require_room(self, n: int) -> None:
        if n > MAX_GOLDEN:
            raise InvalidInput(f"there are {n:,} golden queries in the files; a collection takes {MAX_GOLDEN:,}.")


def _report(collection: str, space: str, choice: mixing.Choice, left_out: int) -> SearchTuning:
    return SearchTuning(
        collection=collection,
        space=space,
        n=choice.n,
        left_out=left_out,
        dense=choice.dense,
        keyword=choice.keyword,
        rrf=choice.rrf,
        mix=choice.mix,
        gain=choice.gain.mean,
        low=choice.gain.low,
        high=choice.gain.high,
        alpha=choice.alpha,
        best_alpha=choice.best_alpha,
        needed=choice.needed,
        curve=dict(zip(mixing.ALPHAS, choice.curve, strict=True)),
        because=choice.because,
    )


def _lines(argument: str, path: str | PathLike[str]) -> Iterator[str]:
    """The lines of a file of UTF-8, one at a time."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except UnicodeDecodeError:
        raise InvalidInput(f"{argument} is {str(path)!r}, which is not a file of UTF-8.") from None
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidInput(f"{argument} is {str(path)[:200]!r}, which cannot be read: {reason}.") from None
