"""Two models judged on a collection's own texts and queries, before a collection moves to one of them."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial

from chunkmill.client.costing import PricedSpace, Spending, require_affordable, without_vector
from chunkmill.client.hybrid import HybridSearch
from chunkmill.client.steps import run_steps
from chunkmill.domain.arguments import as_function, as_number, as_seconds, as_text, as_usd, require_name
from chunkmill.domain.comparing import (
    DEEP,
    Comparison,
    ComparisonQuote,
    Contender,
    Nearest,
    Question,
    Side,
    changes,
    unit,
    with_stand_in,
)
from chunkmill.domain.costs import Spent
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.gates import loss_for
from chunkmill.domain.golden import MAX_JUDGED
from chunkmill.domain.prices import MILLION
from chunkmill.domain.spaces import LongText, OnLong, Precision, SpaceSpec
from chunkmill.errors import EngineError, InvalidInput
from chunkmill.ledger import judging
from chunkmill.spaces import collections, registry
from chunkmill.spaces.registry import Space
from chunkmill.store import golden, read
from chunkmill.system.numbers import NDArray, np

MAX_SAMPLE = 1_000_000
"""The most texts of a sample."""
WINDOW = 512
"""How many texts are in memory at a time. One call has as many open at workers."""
TIMED = 50
"""How many queries are embedded alone in both models, one after the other."""
CALLER = "compare"
"""Workers share their time between callers, so that a comparison takes no more than its part of it."""
MADE_QUERIES = 500
"""How many titles serve as queries if the collection has no golden queries."""


@dataclass(slots=True)
class _Model:
    """One of the two while it is measured."""

    priced: PricedSpace
    register: Callable[[], Space]
    """The space, which is registered if it is new or was dropped."""
    queries: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    rests: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    query_seconds: list[float] = field(default_factory=list)
    from_store: int = 0
    embedded: int = 0
    spending: Spending = field(default_factory=lambda: Spending(None))
    asked_seconds: float = 0.0
    """How many seconds this call has waited for workers of the model."""
    document_tokens: int = 0
    other_tokens: int = 0
    seconds: float = 0.0

    @property
    def space(self) -> Space:
        return self.register()

    @property
    def spec(self) -> SpaceSpec:
        return self.priced.spec


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be compared."""

    collection: collections.Collection
    old: _Model
    new: _Model
    questions: list[Question]
    """Their grades are keyed by the number of a content in the sample, written as a text."""
    relevant: list[bytes]
    """The content hashes with the first numbers of the sample."""
    sample: int
    contents: int
    made_of_titles: bool
    left_out: int

    @property
    def models(self) -> tuple[_Model, _Model]:
        return self.old, self.new


class Comparisons(HybridSearch):
    """The part of the client that judges models."""

    def compare(
        self,
        collection: str,
        model: str,
        *,
        against: str | None = None,
        sample: int = 20_000,
        queries: int = MAX_JUDGED,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        max_usd: Decimal | int | str | None = None,
        timeout: float = 3600.0,
        on_progress: Callable[[int], object] | None = None,
        on_spent: Callable[[Spent], object] | None = None,
    ) -> Comparison:
        """Judge ``model`` against the model of a collection, or against ``against``, on a sample of the collection.

        The golden queries of the collection are asked in both models, at most ``queries`` of them. If there are none,
        first lines and sentences of chunks serve as queries, each of which asks for the rest of its chunk. The sample
        has the relevant texts and others chosen at random, ``sample`` in all. Workers embed what has no vector yet, as
        they answer any other request, and nothing is stored. A worker must serve each model. For each text of the
        sample, memory grows by only about 100 bytes. ``on_progress`` is called with the number of texts that were
        compared so far, first with 0 before anything is embedded, and ``on_spent`` with what is spent, before and after
        each request to workers.

        A provider's model is quoted first (:meth:`quote_comparison`). Raises :class:`BudgetExceeded` before anything is
        sent if the quote is above ``max_usd`` or above what the month's budget has left. Too few queries to tell is no
        error: ``changes.needed`` says how many it would take. Raises :class:`NotFound`, :class:`UnknownModel`,
        :class:`InvalidInput` if there is nothing to judge by, and :class:`WaitTimeout` when workers have not done it
        within ``timeout`` seconds.
        """
        deadline = time.monotonic() + as_seconds("timeout", timeout)
        limit = None if max_usd is None else as_usd("max_usd", max_usd)
        as_function("on_progress", on_progress)
        as_function("on_spent", on_spent)
        plan = self._plan(collection, model, against, sample, queries, dimensions, precision)
        quote = self._quote(plan)
        with self._transaction() as conn:
            require_affordable(
                conn,
                self._settings,
                [one.spec for one in plan.models],
                quote.usd,
                limit=limit,
                what="the comparison",
                advice=f"Compare a smaller sample than {quote.contents:,} texts, or raise the limit.",
            )
        spending = Spending(on_spent)
        if on_progress is not None:
            on_progress(0)
        for one in plan.models:
            one.spending = spending
            self._ask_questions(one, plan, deadline)
        nearest, compared, refused = self._compare_sample(plan, deadline, on_progress)
        sides = (Side(), Side())
        judged: list[str] = []
        of_rest = 0
        for i, question in enumerate(plan.questions):
            grades = {number: grade for number, grade in question.grades.items() if int(number) not in refused}
            if any(grade > 0 for grade in grades.values()):
                for side, one, near in zip(sides, plan.models, nearest, strict=True):
                    hits = [(str(number), score) for number, score in near.of(i)]
                    ranked = [number for number, _ in hits]
                    if question.rest is not None:
                        ranked = with_stand_in(hits, grades, float(one.queries[i] @ one.rests[of_rest]))
                    side.add(ranked[:DEEP], grades)
                judged.append(question.id)
            of_rest += question.rest is not None
        if not judged:
            raise InvalidInput("no text that answers a golden query could be embedded by both models.")
        told = changes(judged, *sides)
        return Comparison(
            collection=plan.collection.name,
            sample=compared,
            contents=plan.contents,
            made_of_titles=plan.made_of_titles,
            left_out=plan.left_out + len(plan.questions) - len(judged) + len(refused),
            old=self._contender(plan.old, plan),
            new=self._contender(plan.new, plan),
            changes=told,
            loss_seen=loss_for(told.queries, told.spread) if told.queries > 1 else math.inf,
            quote=quote,
        )

    def quote_comparison(
        self,
        collection: str,
        model: str,
        *,
        against: str | None = None,
        sample: int = 20_000,
        queries: int = MAX_JUDGED,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> ComparisonQuote:
        """What :meth:`compare` with these arguments would have embedded, and what that would cost. Nothing is sent.

        The tokens of a provider's model are counted as those of an enqueue are. Raises what :meth:`compare` raises
        before it sends anything.
        """
        return self._quote(self._plan(collection, model, against, sample, queries, dimensions, precision))

    def _plan(
        self,
        collection: str,
        model: str,
        against: str | None,
        sample: int,
        queries: int,
        dimensions: int | None,
        precision: Precision | str | None,
    ) -> _Plan:
        require_name("collection", collection)
        model = as_text("model", model)
        against = None if against is None else as_text("against", against)
        sample = as_number("sample", sample, least=1, most=MAX_SAMPLE)
        most = as_number("queries", queries, least=2, most=MAX_JUDGED)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            own = registry.get(conn, row.space_id)
        on_long = OnLong.SPLIT if own.spec.long_text is LongText.SPLIT else OnLong.TRUNCATE

        def contender(spec: SpaceSpec, register: Callable[[], Space] | None = None) -> _Model:
            return _Model(
                PricedSpace(self._transaction, self._settings, spec), register or partial(self._registered, spec)
            )

        def own_space() -> Space:
            return own

        old = (
            contender(own.spec, own_space)
            if against is None
            else contender(self._spec(against, on_long, dimensions=None, precision=None))
        )
        new = contender(self._spec(model, on_long, dimensions=dimensions, precision=precision))
        if old.spec.fingerprint == new.spec.fingerprint:
            raise InvalidInput(
                f"{model!r} would be compared with itself: both are space {new.spec.fingerprint[:12]}. Name "
                "another model, or other dimensions or another precision."
            )
        with self._transaction() as conn:
            asked = golden.read(conn, row.id, most=most)
            made_of_titles = not asked
            if made_of_titles:
                asked = golden.titles(conn, row.id, min(most, MADE_QUERIES))
            judgeable = golden.judgeable(conn, row.id, asked)
            known = golden.hashes_of(conn, row.id, list({name for one in judgeable for name in one.grades}))
            contents = golden.count_contents(conn, row.id)
        if not judgeable:
            raise InvalidInput(
                f"collection {collection!r} has nothing to judge a model by: no golden query whose chunks are there, "
                f"and no chunk with a title. Load some with client.golden({collection!r}).load(…), or: "
                f"chunkmill golden load {shlex.quote(collection)} QUERIES QRELS"
            )
        numbers = {content_hash: i for i, content_hash in enumerate(sorted(set(known.values())))}
        questions = [_by_number(question, known, numbers) for question in judgeable]
        return _Plan(
            row, old, new, questions, list(numbers), sample, contents, made_of_titles, len(asked) - len(judgeable)
        )

    def _sample(self, plan: _Plan) -> Iterator[list[bytes]]:
        """The content hashes of the sample in windows, the relevant ones first."""
        for first in range(0, len(plan.relevant), WINDOW):
            yield plan.relevant[first : first + WINDOW]
        relevant, left, after = set(plan.relevant), plan.sample - len(plan.relevant), b""
        while left > 0:
            with self._transaction() as conn:
                window = golden.contents_after(conn, plan.collection.id, after, WINDOW)
            if not window:
                return
            after = window[-1]
            window = [content_hash for content_hash in window if content_hash not in relevant][:left]
            left -= len(window)
            if window:
                yield window

    def _quote(self, plan: _Plan) -> ComparisonQuote:
        to_embed, tokens, contents = [0, 0], [0, 0], 0
        priced = [one.priced for one in plan.models]
        for i, one in enumerate(priced):
            # Queries that are timed are embedded alone, and are still sent only once.
            tokens[i] += one.tokens_of(question.text for question in plan.questions)
            tokens[i] += one.tokens_of(question.rest for question in plan.questions if question.rest is not None)
        for window in self._sample(plan):
            contents += len(window)
            with self._transaction() as conn:
                for i, one in enumerate(priced):
                    missing = without_vector(conn, one.spec, window)
                    to_embed[i] += len(missing)
                    if missing:
                        tokens[i] += one.tokens_of(golden.texts_of(conn, missing).values())
        usd = [one.usd_of(n) for one, n in zip(priced, tokens, strict=True)]
        return ComparisonQuote(
            plan.collection.name, len(plan.questions), contents, to_embed[0], to_embed[1], usd[0], usd[1], sum(tokens)
        )

    def _ask_questions(self, one: _Model, plan: _Plan, deadline: float) -> None:
        """Embed the queries and what follows titles. The first queries are embedded alone, and timed."""
        texts = [question.text for question in plan.questions]
        made = []
        for text in texts[:TIMED]:
            before = one.asked_seconds
            made.append(self._embed_now(one, [text], "query", deadline))
            one.query_seconds.append(one.asked_seconds - before)
        made.append(self._embed_now(one, texts[TIMED:], "query", deadline))
        one.queries = np.concatenate(made)
        rests = [question.rest for question in plan.questions if question.rest is not None]
        one.rests = self._embed_now(one, rests, "document", deadline)

    def _compare_sample(
        self, plan: _Plan, deadline: float, on_progress: Callable[[int], object] | None
    ) -> tuple[tuple[Nearest, Nearest], int, set[int]]:
        """The texts of the sample that are nearest to the queries in both models, how many texts were compared, and the
        numbers of those that one of the models could not embed."""
        most_graded = max(len(question.grades) for question in plan.questions)
        old, new = (Nearest(one.queries, DEEP + most_graded) for one in plan.models)
        first, refused = 0, set[int]()
        for window in self._sample(plan):
            by_old, by_new = (self._vectors_of(one, window, deadline) for one in plan.models)
            both = [i for i, content_hash in enumerate(window) if content_hash in by_old and content_hash in by_new]
            refused.update(set(range(first, first + len(window))).difference(first + i for i in both))
            for nearest, by_hash in ((old, by_old), (new, by_new)):
                if both:
                    block = unit(np.stack([by_hash[window[i]] for i in both]))
                    nearest.add(block, np.array(both, np.int64) + first)
            first += len(window)
            if on_progress is not None:
                on_progress(first)
        return (old, new), first - len(refused), refused

    def _vectors_of(self, one: _Model, window: Sequence[bytes], deadline: float) -> dict[bytes, NDArray[np.float32]]:
        """Content hash → vector, of the texts of a window that are there and can be embedded."""
        with self._transaction() as conn:
            vectors = read.read_rounded(conn, one.space, window)
            missing = [content_hash for content_hash in window if content_hash not in vectors]
            texts = golden.texts_of(conn, missing) if missing else {}
        one.from_store += len(vectors)
        wanted = [content_hash for content_hash in missing if content_hash in texts]
        began, before = one.asked_seconds, one.other_tokens
        made = self._embed_or_leave(one, wanted, texts, deadline)
        one.seconds += one.asked_seconds - began
        one.embedded += len(made)
        one.document_tokens += one.other_tokens - before
        one.other_tokens = before
        return vectors | made

    def _embed_or_leave(
        self, one: _Model, hashes: Sequence[bytes], texts: dict[bytes, str], deadline: float
    ) -> dict[bytes, NDArray[np.float32]]:
        """Embed texts, without those that cannot be embedded: one such text fails its whole request."""
        if not hashes:
            return {}
        try:
            made = self._embed_now(one, [texts[content_hash] for content_hash in hashes], "document", deadline)
        except EngineError:
            if len(hashes) == 1:
                return {}
            middle = len(hashes) // 2
            return self._embed_or_leave(one, hashes[:middle], texts, deadline) | self._embed_or_leave(
                one, hashes[middle:], texts, deadline
            )
        return dict(zip(hashes, made, strict=True))

    def _embed_now(self, one: _Model, texts: Sequence[str], kind: str, deadline: float) -> NDArray[np.float32]:
        """``(n, d)`` float32, each of length 1, which workers make, or which are stored."""
        left = max(0.0, deadline - time.monotonic())
        steps = self._asking_all(one.space, texts, kind, left, CALLER, register=one.register, is_cached=False)

        def ask() -> EmbeddedTexts:
            began = time.perf_counter()
            try:
                return run_steps(steps)
            finally:
                one.asked_seconds += time.perf_counter() - began

        embedded = one.spending.embed(one.priced, texts, ask)
        one.other_tokens += int(embedded.tokens.sum())
        return unit(embedded.vectors)

    def _contender(self, one: _Model, plan: _Plan) -> Contender:
        spec = one.spec
        with self._transaction() as conn:
            price = judging.price_of(conn, self._settings, one.space)
        seconds = np.array(one.query_seconds) * 1e3
        per_text = one.document_tokens / one.embedded if one.embedded else None
        vector_bytes = spec.dimensions * (2 if one.space.is_half else 4)
        return Contender(
            model=spec.model,
            space=spec.fingerprint,
            dimensions=spec.dimensions,
            from_store=one.from_store,
            embedded=one.embedded,
            tokens=one.document_tokens + one.other_tokens,
            tokens_per_second=one.document_tokens / one.seconds if one.document_tokens else None,
            query_p50_ms=float(np.quantile(seconds, 0.5)) if len(seconds) else None,
            query_p95_ms=float(np.quantile(seconds, 0.95)) if len(seconds) else None,
            usd_per_million=price,
            collection_usd=None
            if price is None or per_text is None
            else price * Decimal(round(per_text * plan.contents)) / MILLION,
            vector_bytes=vector_bytes,
            collection_bytes=vector_bytes * plan.contents,
        )


def _by_number(question: Question, known: dict[str, bytes], numbers: dict[bytes, int]) -> Question:
    """The question with the grades of contents: of two chunks with the same text, the better grade counts."""
    grades: dict[str, float] = {}
    for chunk_id, grade in question.grades.items():
        if chunk_id in known:
            number = str(numbers[known[chunk_id]])
            grades[number] = max(grade, grades.get(number, grade))
    return Question(question.id, question.text, grades, question.rest)
