"""Vectors: search, embed, read, audit, index."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from os import PathLike
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from chunkmill.client.asking.gathered import Gathered
from chunkmill.client.asking.inquiry import Inquiry, SpaceGone
from chunkmill.client.asking.listener import listener_of
from chunkmill.client.asking.sockets import sockets_of
from chunkmill.client.base import ClientPart, forget_space, store_errors
from chunkmill.client.steps import Steps, run_steps
from chunkmill.domain.arguments import (
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
    as_text,
    require_name,
)
from chunkmill.domain.chunks import prepare
from chunkmill.domain.embedded import EmbeddedTexts, joined
from chunkmill.domain.filters import parse as parse_filter
from chunkmill.domain.results import Audit, Hits, Index
from chunkmill.domain.retention import QueryCache
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.errors import InvalidInput, StoreUnavailable
from chunkmill.spaces import collections, registry
from chunkmill.store import audit as auditing
from chunkmill.store import indexing, keywords, read, segments
from chunkmill.store import search as searching

MAX_K = 1_000_000
"""The most hits of one search, which are all in memory."""
MOST_REGISTERED = 3
"""How often one call registers its space again because somebody drops it."""


class Vectors(ClientPart):
    """The part of the client that is about collections and their vectors."""

    @overload
    def search(
        self,
        query: str | np.ndarray[tuple[int], np.dtype[np.float32]] | None = None,
        *,
        collection: str,
        k: int = 10,
        metadata: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
    ) -> Hits: ...

    @overload
    def search(
        self,
        query: list[str] | tuple[str, ...] | np.ndarray[tuple[int, int], np.dtype[np.float32]],
        *,
        collection: str,
        k: int = 10,
        metadata: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
    ) -> list[Hits]: ...

    def search(
        self,
        query: str | list[str] | tuple[str, ...] | NDArray[np.float32] | None = None,
        *,
        collection: str,
        k: int = 10,
        metadata: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
    ) -> Hits | list[Hits]:
        """The ``k`` chunks nearest to ``query`` by cosine, best first.

        ``query`` is a text, which a worker embeds with the space's query prompt, or a ``(d,)`` vector. A list of texts
        or an ``(n, d)`` array gives a list of hit lists, in the same order. Instead of a query, ``like`` names a chunk
        of the collection: the hits are those nearest to its stored vector, without the chunk itself.

        Only chunks that pass the filter ``metadata`` are returned (docs/search.md describes the language), and no hit
        has a score below ``min_score``. ``offset`` leaves out so many of the nearest. Pages fit together if all of them
        are asked for with an offset, the first one with 0, and nothing is written meanwhile. ``exact`` compares the
        query with every vector of the collection. With ``explain`` the ``explanation`` of a hit list says how it was
        found, which takes longer.

        With ``hybrid``, chunks with the words of the query come first too: a number from 0.0 to 1.0 is the weight of
        the cosine in the mix, ``"rrf"`` fuses the ranks, True takes the weight that :meth:`tune_search` found best or
        0.8, and False goes by the cosine alone. By default the search does what :meth:`tune_search` chose, which is the
        cosine alone until it was called. Hybrid searches are for texts, return at most 1,000 hits, and need
        :meth:`keywords`. ``"…"`` around words asks for the phrase, and ``word*`` for all that begins so.

        Raises :class:`NotFound`, :class:`InvalidInput`, :class:`EngineError` if a worker cannot embed the query, and
        :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        return run_steps(
            self._search_steps(
                query,
                collection=collection,
                k=k,
                metadata=metadata,
                exact=exact,
                timeout=timeout,
                like=like,
                min_score=min_score,
                offset=offset,
                explain=explain,
                hybrid=hybrid,
            )
        )

    def _search_steps(
        self,
        query: str | list[str] | tuple[str, ...] | NDArray[np.float32] | None = None,
        *,
        collection: str,
        k: int = 10,
        metadata: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
    ) -> Steps[Hits | list[Hits]]:
        require_name("collection", collection)
        how = as_hybrid("hybrid", hybrid)
        where, exact, explain = parse_filter(metadata), as_flag("exact", exact), as_flag("explain", explain)
        k, timeout = as_number("k", k, least=1, most=MAX_K), as_seconds("timeout", timeout)
        least = as_score("min_score", min_score)
        if offset is not None:
            offset = as_number("offset", offset, least=0, most=MAX_K)
        if (query is None) == (like is None):
            raise InvalidInput("give either a query, or with like= the id of a chunk.")
        like = None if like is None else as_text("like", like)
        asked, is_single = ([], True) if query is None else as_queries(query)
        _require_few(len(asked), k)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            space = registry.get(conn, row.space_id)
            is_text = like is None and isinstance(asked, list)
            mix = keywords.choose_mix(conn, row, how, is_text=is_text, k=k, offset=offset)
        if mix is not None:
            _require_few(len(asked), keywords.depth(k, offset))
        texts = asked if isinstance(asked, list) else []
        queries = (
            asked
            if not isinstance(asked, list)
            else (yield from self._asking_all(space, texts, "query", timeout)).vectors
        )
        vectors = [as_query_vector(vector, space.spec.dimensions) for vector in queries]
        with self._transaction() as conn:
            searching.see_one_moment(conn)
            if like is not None:
                stored = searching.vector_of(conn, space, row, like)
                vectors = [as_query_vector(stored, space.spec.dimensions)]
            hit_lists = searching.search_all(
                conn,
                space,
                np.stack(vectors) if vectors else np.empty((0, space.spec.dimensions), np.float32),
                collection_id=row.id,
                k=k if mix is None else keywords.depth(k, offset),
                where=where,
                exact=exact,
                offset=offset if mix is None else None,
                without=like,
                explain=explain,
            )
            if mix is not None:
                hit_lists = [
                    keywords.search_mixed(conn, *mix, space, vector, text, hits, k=k, offset=offset, where=where)
                    for vector, text, hits in zip(vectors, texts, hit_lists, strict=True)
                ]
        if least is not None:
            hit_lists = [Hits((hit for hit in hits if hit.score >= least), hits.explanation) for hits in hit_lists]
        return hit_lists[0] if is_single else hit_lists

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

        Those that are too old are left out, and of more than fit those used last are taken. Vectors of other spaces do
        no harm. Raises :class:`InvalidInput` if the file is damaged, is of another kind, or may be written by
        everybody; nothing is taken then. Whoever can write the file decides what searches find.
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

    def index(self, collection: str) -> Index:
        """Build now what searches of the collection need, and return what there is then.

        The poller does the same by itself within some seconds; what it is building now is waited for. Writers and
        searches go on meanwhile. A graph takes about a minute for 100,000 chunks, and the memory of INDEX_MEMORY_MB in
        Postgres. The graph of the whole space that an earlier release built is dropped, if this role owns it, because
        no search uses it and every write is slow with it. Raises :class:`NotFound`, and :class:`StoreUnavailable` if a
        transaction that writes lasts so long that the index cannot begin.
        """
        require_name("collection", collection)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            space = registry.get(conn, row.space_id)
            segments.require_kept(conn)
        with store_errors(self._db):
            indexing.build_now(
                self._db,
                space,
                row.id,
                memory_mb=self._settings.index_memory_mb,
                compact=self._settings.index_compact,
            )
            indexing.index_metadata(self._db)
            indexing.drop_shared_graphs(self._db, space)
        with self._transaction() as conn:
            return segments.describe(conn, row.id, space.id)

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
    ) -> Steps[EmbeddedTexts]:
        """The vectors of the texts in a space: known ones from the cache and from the store, others from workers.

        ``register`` is called if the space was dropped meanwhile, and returns it anew. Without ``is_cached`` the cache
        of queries is neither asked nor filled.
        """
        deadline = time.monotonic() + timeout
        gathered = Gathered(texts)
        fingerprint, dimensions = space.spec.fingerprint, space.spec.dimensions
        if is_cached:
            self._query_cache.read(fingerprint, kind, dimensions, gathered)
        missing = list(gathered.missing)
        for tries in count():
            if not gathered.missing:
                break
            mailbox = listener_of(self._db).mailbox(self._db)
            sockets = None if self._settings.worker_socket == "off" else sockets_of(self._db)
            inquiry = Inquiry(self._transaction, mailbox, space, gathered, kind, caller, deadline, sockets)
            try:
                yield from inquiry.steps()
            except SpaceGone:
                forget_space(self._db, space)
                if register is None or tries == MOST_REGISTERED:
                    raise StoreUnavailable(
                        "the space was dropped while this call used it. The same call may be made again."
                    ) from None
                space = register()
        if is_cached:
            self._query_cache.keep(fingerprint, kind, gathered.of(missing))
        return gathered.result(dimensions)


def _require_few(n_queries: int, k: int) -> None:
    """Raise :class:`InvalidInput` if so many queries have more hits than are to be in memory."""
    if n_queries * k > MAX_K:
        raise InvalidInput(f"{n_queries:,} queries for {k:,} hits are too many at once; the most are {MAX_K:,}.")
