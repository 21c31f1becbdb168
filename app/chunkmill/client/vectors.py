"""Vectors: search, embed, read, audit, index."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from os import PathLike
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary

import psycopg
import sqlalchemy as sa

from chunkmill.client.asking.gathered import DistinctTexts
from chunkmill.client.asking.inquiry import Inquiry, SpaceGone
from chunkmill.client.asking.listener import listener_of
from chunkmill.client.asking.lookups import Lookups
from chunkmill.client.asking.sockets import sockets_of
from chunkmill.client.base import ClientPart, forget_space, known_spaces, store_errors
from chunkmill.client.counting import counting_of
from chunkmill.client.steps import Steps, WorkStep, run_steps
from chunkmill.domain.arguments import (
    as_fallback,
    as_flag,
    as_hybrid,
    as_ids,
    as_items,
    as_number,
    as_path,
    as_queries,
    as_query_vector,
    as_score,
    as_seconds,
    as_session,
    as_text,
    require_name,
)
from chunkmill.domain.chunks import prepare
from chunkmill.domain.embedded import EmbeddedTexts, joined
from chunkmill.domain.filters import Filter, named_filter
from chunkmill.domain.filters import parse as parse_filter
from chunkmill.domain.mixing import Hybrid
from chunkmill.domain.results import Audit, Hits, Index
from chunkmill.domain.retention import QueryCache
from chunkmill.domain.sessions import SearchId
from chunkmill.domain.spaces import OnLong, Precision, SpaceSpec
from chunkmill.errors import EngineError, InvalidInput, StoreUnavailable, WaitTimeout
from chunkmill.spaces import bridges, collections, registry, serving
from chunkmill.store import audit as auditing
from chunkmill.store import indexing, keywords, read, segments
from chunkmill.store import search as searching
from chunkmill.store.search import SpaceLeft
from chunkmill.system.numbers import NDArray, np
from chunkmill.telemetry import tracing

MAX_K = 1_000_000
"""The most hits of one search, which are all in memory."""
MOST_MOVES = 3
"""How often one search begins again because the collection has left the space that was chosen."""
MOST_PATIENCE_S = 30.0
"""How many seconds a search that may go to another space waits at most for a worker of its own space."""
UNSERVED_SECONDS = 10.0
"""After no worker has answered for their space, for how many seconds searches that may go to another space go there at
once."""
MOST_REGISTERED = 3
"""How often one call registers its space again because somebody drops it."""


_UNSERVED: WeakKeyDictionary[sa.Engine, dict[int, float]] = WeakKeyDictionary()
"""``space id →`` the time of ``time.monotonic()`` until which searches that may go to another space do not ask in this
one."""


@dataclass(frozen=True, slots=True)
class _Search:
    """The arguments of a search, checked."""

    collection: str
    queries: list[str] | NDArray[np.float64]
    k: int
    where: Filter
    exact: bool
    timeout: float
    like: str | None
    least: float | None
    offset: int | None
    explain: bool
    how: bool | Hybrid | None
    session: str | None
    space: str | None
    may_fall_back: bool
    bridge: str | None
    tell: Callable[[EmbeddedTexts], object] | None

    @property
    def texts(self) -> list[str]:
        """The queries that a worker embeds."""
        return self.queries if isinstance(self.queries, list) else []

    @property
    def vectors(self) -> Sequence[NDArray[np.float64]]:
        """The queries that the caller has embedded."""
        return [] if isinstance(self.queries, list) else list(self.queries)

    def require_one_space(self) -> None:
        """Raise :class:`InvalidInput` if two arguments choose the space."""
        if self.session is not None and self.space is not None:
            raise InvalidInput("session chooses the space by itself: give either session or space.")
        if self.session is not None and not isinstance(self.queries, list):
            raise InvalidInput(
                "session chooses a space, and a query vector belongs to one already. Pass the text of the query, or "
                "name the space of the vector with space=."
            )
        if self.bridge is None:
            return
        if self.session is not None or self.space is not None or self.may_fall_back:
            raise InvalidInput(
                "a bridge leads into the active space of a collection: give no session, space or on_unserved with it."
            )
        if self.like is not None:
            raise InvalidInput("bridge is for queries; with like= there is none. Leave out one of the two.")

    def choose(self, served: serving.ServedCollection) -> registry.Space:
        if self.space is not None:
            return served.named(self.space)
        return served.active if self.session is None else served.of_session(self.session)

    def mix(
        self, conn: sa.Connection, served: serving.ServedCollection, space: registry.Space
    ) -> tuple[keywords.KeywordIndex, Hybrid] | None:
        """How keywords are mixed in, which is chosen for each space."""
        is_text = self.like is None and isinstance(self.queries, list)
        row = served.collection_in(space)
        mix = keywords.choose_mix(conn, row, self.how, is_text=is_text, k=self.k, offset=self.offset)
        if mix is not None:
            _require_few(len(self.queries), keywords.depth(self.k, self.offset))
        return mix


class Vectors(ClientPart):
    """The part of the client that is about collections and their vectors."""

    @overload
    def search(
        self,
        query: str | np.ndarray[tuple[int], np.dtype[np.float32]] | None = None,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Hits: ...

    @overload
    def search(
        self,
        query: list[str] | tuple[str, ...] | np.ndarray[tuple[int, int], np.dtype[np.float32]],
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Hits]: ...

    def search(
        self,
        query: str | list[str] | tuple[str, ...] | NDArray[np.float32] | None = None,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Hits | list[Hits]:
        """The ``k`` chunks nearest to ``query`` by cosine, best first.

        ``query`` is a text, which a worker embeds with the space's query prompt, or a ``(d,)`` vector. A list of texts
        or an ``(n, d)`` array gives a list of hit lists, in the same order. Instead of a query, ``like`` names a chunk
        of the collection: the hits are those nearest to its stored vector, without the chunk itself.

        Only chunks whose metadata pass ``filter`` are returned (docs/search.md describes the language; ``metadata`` is
        an older name of this argument), and no hit has a score below ``min_score``. ``offset`` skips this many of the
        nearest. Pages fit together if all of them are asked for with an offset, the first one with 0, and nothing is
        written meanwhile. ``exact`` compares the query with every vector of the collection. With ``explain`` the
        ``explanation`` of a hit list says how it was found, which takes longer.

        With ``hybrid``, chunks with the words of the query come first too: a number from 0.0 to 1.0 is the weight of
        the cosine in the mix, ``"rrf"`` fuses the ranks, True takes the weight that :meth:`tune_search` found best or
        0.8, and False uses the cosine alone. By default the search does what :meth:`tune_search` chose, which is the
        cosine alone until it was called. Hybrid searches are for texts, return at most 1,000 hits, and need
        :meth:`keywords`. ``"…"`` around words asks for the phrase, and ``word*`` for all words that begin with
        ``word``.

        While a collection is moving to another space (:meth:`reembed`), it has several spaces. ``session`` names
        whoever asks, such as a user: the new space answers its share of the sessions, always the same ones, and their
        searches are counted (:meth:`search_counts`). Without a session the active space answers. ``space`` names
        another one: ``"active"``, ``"filling"``, ``"previous"``, a model or the beginning of a fingerprint. A vector
        belongs to a space, so it takes no ``session``. If no worker embeds the query in time, or none can, the search
        fails, because a search in another space has other hits. ``on_unserved="previous"`` then searches the space that
        the collection had before: half of ``timeout`` is for the first space and half for the previous one, and
        ``instead_of`` of the hits says that this happened.

        With ``bridge``, the name of a model for which :meth:`bridge` has learnt one, the query is embedded with that
        model and carried into the collection's space, which ``bridge`` of each hit says. Once the collection is in a
        space of that model, the same call searches it without a bridge.

        Raises :class:`NotFound`, :class:`InvalidInput`, :class:`EngineError` if a worker cannot embed the query, and
        :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        return run_steps(
            self._search_steps(
                query,
                collection=collection,
                k=k,
                filter=filter,
                exact=exact,
                timeout=timeout,
                like=like,
                min_score=min_score,
                offset=offset,
                explain=explain,
                hybrid=hybrid,
                session=session,
                space=space,
                on_unserved=on_unserved,
                bridge=bridge,
                metadata=metadata,
            )
        )

    def _search_steps(
        self,
        query: str | list[str] | tuple[str, ...] | NDArray[np.float32] | None = None,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        tell: Callable[[EmbeddedTexts], object] | None = None,
    ) -> Steps[Hits | list[Hits]]:
        """``tell`` is given the vectors of the queries, in each space in which they were embedded."""
        require_name("collection", collection)
        if offset is not None:
            offset = as_number("offset", offset, least=0, most=MAX_K)
        if (query is None) == (like is None):
            raise InvalidInput("give either a query, or with like= the id of a chunk.")
        queries, is_single = ([], True) if query is None else as_queries(query)
        asked = _Search(
            collection=collection,
            queries=queries,
            k=as_number("k", k, least=1, most=MAX_K),
            where=parse_filter(*named_filter(filter, metadata)),
            exact=as_flag("exact", exact),
            timeout=as_seconds("timeout", timeout),
            like=None if like is None else as_text("like", like),
            least=as_score("min_score", min_score),
            offset=offset,
            explain=as_flag("explain", explain),
            how=as_hybrid("hybrid", hybrid),
            session=as_session(session),
            space=None if space is None else as_text("space", space),
            may_fall_back=as_fallback(on_unserved),
            bridge=None if bridge is None else as_text("bridge", bridge),
            tell=tell,
        )
        asked.require_one_space()
        _require_few(len(queries), asked.k)
        begun, tries = time.monotonic(), 0
        while True:
            try:
                hit_lists = yield from self._answering(asked, begun)
            except SpaceLeft:
                tries += 1
                if tries > MOST_MOVES:
                    raise StoreUnavailable(
                        f"collection {collection!r} left its space while this search used it, {tries} times. The same "
                        "call may be made again."
                    ) from None
            else:
                return hit_lists[0] if is_single else hit_lists

    def _answering(self, asked: _Search, begun: float) -> Steps[list[Hits]]:
        """The hits of each query, all in one space. Raises :class:`SpaceLeft`."""
        hit_lists: list[Hits] = []
        with _space_left(), self._transaction() as conn:
            if not asked.texts:
                searching.see_one_moment(conn)
            served = serving.find(conn, asked.collection)
            chosen = asked.choose(served)
            crossing = None
            if asked.bridge is not None:
                crossing = bridges.find(conn, served.collection_in(chosen), asked.bridge)
            mix = asked.mix(conn, served, chosen)
            if not asked.texts:
                hit_lists = self._nearest(conn, served, chosen, asked, mix, asked.vectors, crossing)
        counts = counting_of(self._db) if asked.session is not None and served.others else None
        other = served.before(chosen) if asked.may_fall_back and asked.texts else None
        patience = asked.timeout if other is None else min(MOST_PATIENCE_S, asked.timeout / 2)
        vectors, instead_of = None, None
        if asked.texts and (other is None or not self._is_unserved(chosen)):
            try:
                query_space = chosen if crossing is None else crossing.query_space
                vectors = yield from self._query_vectors(query_space, asked, begun + patience)
            except (EngineError, WaitTimeout):
                if other is None:
                    if counts is not None:
                        counts.failed(self._db, served.id, chosen.id)
                    raise
                self._keep_unserved(chosen)
        if other is not None and vectors is None:
            if counts is not None:
                counts.failed(self._db, served.id, chosen.id)
            counts, instead_of, chosen = None, chosen.spec.fingerprint, other
            with self._transaction() as conn:
                mix = asked.mix(conn, served, chosen)
            vectors = yield from self._query_vectors(chosen, asked, begun + asked.timeout)
        if vectors is not None:
            with _space_left(), self._transaction() as conn:
                searching.see_one_moment(conn)
                hit_lists = self._nearest(conn, served, chosen, asked, mix, list(vectors), crossing)
        if counts is not None:
            counts.answered(self._db, served.id, chosen.id, time.monotonic() - begun)
        return [
            Hits(
                hits if asked.least is None else (hit for hit in hits if hit.score >= asked.least),
                hits.explanation,
                space=chosen.spec.fingerprint,
                search_id=str(SearchId.new(served.id, chosen.id)),
                instead_of=instead_of,
            )
            for hits in hit_lists
        ]

    def _query_vectors(self, space: registry.Space, asked: _Search, deadline: float) -> Steps[NDArray[Any]]:
        """The vectors of the queries, which are texts, in a space, ``(n, d)``."""

        def was_dropped() -> registry.Space:
            raise SpaceLeft

        left = max(0.0, deadline - time.monotonic())
        embedded = yield from self._asking_all(space, asked.texts, "query", left, register=was_dropped)
        if asked.tell is not None:
            asked.tell(replace(embedded, spec=space.spec))
        return embedded.vectors

    def _nearest(
        self,
        conn: sa.Connection,
        served: serving.ServedCollection,
        space: registry.Space,
        asked: _Search,
        mix: tuple[keywords.KeywordIndex, Hybrid] | None,
        queries: Sequence[NDArray[Any]],
        crossing: bridges.Crossing | None,
    ) -> list[Hits]:
        """The hits of each query, all at the one moment that the transaction sees. ``crossing`` is the bridge that
        carries the queries into the space. Raises :class:`SpaceLeft`.
        """
        asked_in = space if crossing is None else crossing.query_space
        vectors = [as_query_vector(vector, asked_in.spec.dimensions) for vector in queries]
        if crossing is not None and vectors:
            vectors = list(crossing.adapter.carry(np.stack(vectors)))
        if asked.like is not None:
            stored = searching.vector_of(conn, space, served.collection_in(space), asked.like)
            vectors = [as_query_vector(stored, space.spec.dimensions)]
        hit_lists = searching.search_all(
            conn,
            space,
            np.stack(vectors) if vectors else np.empty((0, space.spec.dimensions), np.float32),
            collection_id=served.id,
            k=asked.k if mix is None else keywords.depth(asked.k, asked.offset),
            where=asked.where,
            exact=asked.exact,
            offset=asked.offset if mix is None else None,
            without=asked.like,
            explain=asked.explain,
            is_served=serving.is_served(conn),
        )
        if mix is not None:
            hit_lists = [
                keywords.search_mixed(
                    conn, *mix, space, vector, text, hits, k=asked.k, offset=asked.offset, where=asked.where
                )
                for vector, text, hits in zip(vectors, asked.texts, hit_lists, strict=True)
            ]
        if crossing is not None:
            hit_lists = [
                Hits((replace(hit, bridge=crossing.name) for hit in hits), hits.explanation) for hits in hit_lists
            ]
        return hit_lists

    def _is_unserved(self, space: registry.Space) -> bool:
        return time.monotonic() < _UNSERVED.get(self._db, {}).get(space.id, 0.0)

    def _keep_unserved(self, space: registry.Space) -> None:
        """Note that the space is not served, so that searches ask in the other space at once for a while and do not
        wait for half of the time first.
        """
        if not self._is_unserved(space):
            _UNSERVED.setdefault(self._db, {})[space.id] = time.monotonic() + UNSERVED_SECONDS

    def embed(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> NDArray[np.float32]:
        """``(n, d)`` float32 vectors of ``texts`` in input order, which a worker makes now and nobody stores.

        ``dimensions`` and ``precision`` are those of :meth:`enqueue`. Raises :class:`InvalidChunk` if a text is not
        valid, :class:`EngineError` if a worker cannot embed it, and :class:`WaitTimeout`.
        """
        steps = self._embed_steps(
            texts, model=model, kind=kind, timeout=timeout, dimensions=dimensions, precision=precision
        )
        return run_steps(steps)

    def _embed_steps(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> Steps[NDArray[np.float32]]:
        embedded = yield from self._embed_texts_steps(
            texts, model=model, kind=kind, timeout=timeout, dimensions=dimensions, precision=precision
        )
        return embedded.vectors

    def embed_texts(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        caller: str = "",
        blank: bool = False,
    ) -> EmbeddedTexts:
        """Like :meth:`embed`, and says how many tokens each text had and whether it was cut.

        With ``blank`` a text may be empty or white space. Its vector is then that of the model's special tokens alone.
        Workers share their time between callers, such as the users of a server, if each has its own ``caller``.
        """
        return run_steps(
            self._embed_texts_steps(
                texts,
                model=model,
                kind=kind,
                timeout=timeout,
                dimensions=dimensions,
                precision=precision,
                caller=caller,
                blank=blank,
            )
        )

    def _embed_texts_steps(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        caller: str = "",
        blank: bool = False,
    ) -> Steps[EmbeddedTexts]:
        if not isinstance(kind, str) or kind not in ("document", "query"):
            raise InvalidInput("kind must be 'document' or 'query'.")
        timeout, texts = as_seconds("timeout", timeout), list(as_items("texts", texts))
        caller = "" if isinstance(caller, str) and not caller else as_text("caller", caller)
        blank = as_flag("blank", blank)
        for i, text in enumerate(texts):
            if not (blank and isinstance(text, str) and (not text or text.isspace())):
                prepare((f"texts[{i}]", text), i)
        if not texts:
            spec = self._spec(model, OnLong.TRUNCATE, dimensions=dimensions, precision=precision)
            return replace(joined([], spec.dimensions), spec=spec)

        def register() -> registry.Space:
            return self._space(model, OnLong.TRUNCATE, dimensions=dimensions, precision=precision)

        space = register()
        embedded = yield from self._asking_all(space, texts, kind, timeout, caller, register=register)
        return replace(embedded, spec=space.spec)

    def _embed_few_steps(
        self,
        texts: Sequence[str],
        spec: SpaceSpec,
        *,
        kind: Literal["document", "query"],
        timeout: float,
        caller: str,
        lookups: Lookups | None,
    ) -> Steps[EmbeddedTexts]:
        """``embed_texts`` with ``blank`` in the space of ``spec``. The steps block in :class:`WorkStep` alone."""
        for i, text in enumerate(texts):
            if text and not text.isspace():
                prepare((f"texts[{i}]", text), i)

        register = partial(self._registered, spec)
        if (space := known_spaces(self._db).get(spec)) is None:
            registering = WorkStep(register)
            yield registering
            space = registering.result
        embedded = yield from self._asking_all(space, texts, kind, timeout, caller, register=register, lookups=lookups)
        return replace(embedded, spec=space.spec)

    def query_cache(self) -> QueryCache:
        """What this client keeps of the vectors of its queries, and how often that helped.

        Searches and ``embed(kind="query")`` take the vector of a text that they have asked for in the last
        QUERY_CACHE_SECONDS from memory. Texts are not kept, only their hashes. QUERY_CACHE_MB bounds the memory.
        """
        return self._query_cache.statistics()

    def save_query_cache(self, path: str | PathLike[str]) -> int:
        """Write the vectors of queries into a file, for :meth:`load_query_cache` in another process. Returns how many.

        The file replaces an older one in one step. It holds vectors and hashes, and no text.
        """
        return self._query_cache.save(as_path("path", path))

    def load_query_cache(self, path: str | PathLike[str]) -> int:
        """Take the vectors of a file that :meth:`save_query_cache` wrote. Returns how many were taken.

        Those that are too old are left out, and and if there are more than fit, those used last are taken. Vectors of
        other spaces do no harm. Raises :class:`InvalidInput` if the file is damaged, is of another kind, or may be
        written by everybody; nothing is taken then. Whoever can write the file decides what searches find.
        """
        return self._query_cache.load(as_path("path", path))

    def clear_query_cache(self) -> None:
        """Forget the vectors of all queries."""
        self._query_cache.clear()

    def vectors(self, collection: str, ids: Iterable[str] | None = None) -> dict[str, NDArray[np.float32]]:
        """``chunk id → (d,) float32`` of ``ids``, or of the whole collection. Chunks without a vector are left out."""
        require_name("collection", collection)
        chosen = None if ids is None else as_ids("ids", ids)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            space = registry.get(conn, row.space_id)
            return read.read_vectors(conn, space, collection_id=row.id, chunk_ids=chosen)

    def audit(self, collection: str) -> Audit:
        """Anti-join a collection's chunks with its space's vectors. ``audit.complete`` is true if all have one."""
        require_name("collection", collection)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            return auditing.audit(conn, registry.get(conn, row.space_id), row)

    def index(self, collection: str, *, space: str | None = None) -> Index:
        """Build now what searches of the collection need, and return what there is then.

        ``space`` names another space of the collection than the active one, as in :meth:`search`.

        The poller does the same by itself within some seconds; if it is building something now, this waits for it.
        Writers and searches go on meanwhile. A graph takes about a minute for 100,000 chunks, and the memory of
        INDEX_MEMORY_MB in Postgres. If an earlier release built a graph of the whole space and this role owns it, it is
        dropped, because no search uses it and it makes every write slow. Raises :class:`NotFound`, and
        :class:`StoreUnavailable` if a transaction that writes lasts so long that the index cannot begin.
        """
        require_name("collection", collection)
        with self._transaction() as conn:
            served = serving.find(conn, collection)
            meant = served.active if space is None else served.named(as_text("space", space))
            segments.require_kept(conn)
        with store_errors(self._db):
            indexing.build_now(
                self._db,
                meant,
                served.id,
                memory_mb=self._settings.index_memory_mb,
                compact=self._settings.index_compact,
            )
            indexing.index_metadata(self._db)
            indexing.drop_shared_graphs(self._db, meant)
        with self._transaction() as conn:
            return segments.describe(conn, served.id, meant.id)

    def _asking_all(
        self,
        space: registry.Space,
        texts: Sequence[str],
        kind: str,
        timeout: float,
        caller: str = "",
        *,
        register: Callable[[], registry.Space] | None = None,
        is_cached: bool = True,
        lookups: Lookups | None = None,
    ) -> Steps[EmbeddedTexts]:
        """The vectors of the texts in a space: known ones from the cache and from the store, others from workers.

        ``register`` is called if the space was dropped meanwhile, and returns it anew. Without ``is_cached`` the cache
        of queries is neither asked nor filled.
        """
        deadline = time.monotonic() + timeout
        gathered = DistinctTexts(texts)
        fingerprint, dimensions = space.spec.fingerprint, space.spec.dimensions
        if is_cached:
            self._query_cache.read(fingerprint, kind, dimensions, gathered)
        missing = list(gathered.missing)
        for tries in count():
            if not gathered.missing:
                break
            mailbox = listener_of(self._db).mailbox(self._db)
            sockets = None if self._settings.worker_socket == "off" else sockets_of(self._db)
            inquiry = Inquiry(
                self._transaction,
                mailbox,
                space,
                gathered,
                kind,
                caller,
                deadline,
                sockets,
                lookups,
                tracing.traceparent(),
            )
            try:
                yield from inquiry.steps()
            except SpaceGone:
                forget_space(self._db, space)
                if register is None or tries == MOST_REGISTERED:
                    raise StoreUnavailable(
                        "the space was dropped while this call used it. The same call may be made again."
                    ) from None
                registering = WorkStep(register)
                yield registering
                space = registering.result
        if is_cached:
            self._query_cache.keep(fingerprint, kind, gathered.of(missing))
        return gathered.result(dimensions)


@contextmanager
def _space_left() -> Iterator[None]:
    """Raise :class:`SpaceLeft` if a table is not there: that of a space that was dropped a moment ago, or one that a
    downgrade of the schema has taken away."""
    try:
        yield
    except sa.exc.ProgrammingError as error:
        if isinstance(error.orig, psycopg.errors.UndefinedTable):
            raise SpaceLeft from error
        raise


def _require_few(n_queries: int, k: int) -> None:
    """Raise :class:`InvalidInput` if so many queries have more hits than are to be in memory."""
    if n_queries * k > MAX_K:
        raise InvalidInput(f"{n_queries:,} queries for {k:,} hits are too many at once; the most are {MAX_K:,}.")
