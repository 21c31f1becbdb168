"""Vectors: search, embed, read, audit, index."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from chunkmill.client.base import ClientPart, store_errors
from chunkmill.domain.arguments import (
    as_flag,
    as_ids,
    as_items,
    as_number,
    as_queries,
    as_query_vector,
    as_score,
    as_seconds,
    as_text,
    require_name,
)
from chunkmill.domain.chunks import prepare_all
from chunkmill.domain.filters import parse as parse_filter
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.results import Audit, Hits, Index
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.errors import EngineError, InvalidInput, WaitTimeout
from chunkmill.ledger import embed_requests
from chunkmill.spaces import collections, registry
from chunkmill.store import audit as auditing
from chunkmill.store import indexing, read, segments
from chunkmill.store import search as searching

MAX_K = 1_000_000
"""The most hits of one search, which are all in memory."""
EMBED_STEP = 256
"""How many texts one embed request has. This bounds the size of its row, and how long a worker holds it."""


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

        Raises :class:`NotFound`, :class:`InvalidInput`, :class:`EngineError` if a worker cannot embed the query, and
        :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        require_name("collection", collection)
        where, exact, explain = parse_filter(metadata), as_flag("exact", exact), as_flag("explain", explain)
        k, timeout = as_number("k", k, least=1, most=MAX_K), as_seconds("timeout", timeout)
        least = as_score("min_score", min_score)
        if offset is not None:
            offset = as_number("offset", offset, least=0, most=MAX_K)
        if (query is None) == (like is None):
            raise InvalidInput("give either a query, or with like= the id of a chunk.")
        like = None if like is None else as_text("like", like)
        queries, is_single = ([], True) if query is None else as_queries(query)
        if len(queries) * k > MAX_K:
            raise InvalidInput(f"{len(queries):,} queries for {k:,} hits are too many at once; the most are {MAX_K:,}.")
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            space = registry.get(conn, row.space_id)
        given = self._ask_all(space, queries, "query", timeout) if isinstance(queries, list) else queries
        vectors = [as_query_vector(vector, space.spec.dimensions) for vector in given]
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
                k=k,
                where=where,
                exact=exact,
                offset=offset,
                without=like,
                explain=explain,
            )
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
        if not isinstance(kind, str) or kind not in ("document", "query"):
            raise InvalidInput("kind must be 'document' or 'query'.")
        timeout, texts = as_seconds("timeout", timeout), list(as_items("texts", texts))
        for _ in prepare_all(((f"texts[{i}]", text) for i, text in enumerate(texts))):
            pass
        space = self._space(model, OnLong.TRUNCATE, dimensions=dimensions, precision=precision)
        return self._ask_all(space, texts, kind, timeout)

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

    def collections(self) -> list[str]:
        """The names of all collections, in order."""
        with self._transaction() as conn:
            return [row.name for row in collections.all_collections(conn)]

    def index(self, collection: str) -> Index:
        """Build now what searches of the collection need, and return what there is then.

        The poller does the same by itself within some seconds; what it is building now is waited for. Writers and
        searches go on meanwhile. A graph takes about a minute for 100,000 chunks, and the memory of INDEX_MEMORY_MB in
        Postgres.
        """
        require_name("collection", collection)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            space = registry.get(conn, row.space_id)
            segments.require_kept(conn)
        with store_errors(self._db):
            while indexing.flush(self._db, space, row.id, wait=True):
                pass
            while indexing.merge(self._db, space, row.id, memory_mb=self._settings.index_memory_mb, wait=True):
                pass
            indexing.index_metadata(self._db)
        with self._transaction() as conn:
            return segments.describe(conn, row.id, space.id)

    def _ask_all(self, space: registry.Space, texts: Sequence[str], kind: str, timeout: float) -> NDArray[np.float32]:
        """``(n, d)`` float32 of the texts, ``EMBED_STEP`` of them in one request to a worker."""
        if not texts:
            return np.empty((0, space.spec.dimensions), dtype=np.float32)
        deadline = time.monotonic() + timeout
        parts = [
            self._ask(space, texts[i : i + EMBED_STEP], kind, deadline - time.monotonic())
            for i in range(0, len(texts), EMBED_STEP)
        ]
        return np.concatenate(parts)

    def _ask(self, space: registry.Space, texts: Sequence[str], kind: str, timeout: float) -> NDArray[np.float32]:
        with self._transaction() as conn:
            request = embed_requests.ask(conn, space_id=space.id, kind=kind, texts=texts)
        deadline = time.monotonic() + timeout
        pause = 0.002
        while True:
            with self._transaction() as conn:
                answer = embed_requests.take_answer(conn, request, dimensions=space.spec.dimensions)
                over = time.monotonic() >= deadline  # looked at once, so that who gives up also withdraws
                if answer is None and over:
                    embed_requests.withdraw(conn, request)
            if answer is not None:
                if answer.vectors is None:
                    raise EngineError(f"the worker could not embed: {answer.error}")
                return answer.vectors
            if over:
                queue = "openai" if space.spec.provider == OPENAI else "gpu"
                raise WaitTimeout(
                    f"no worker answered in time. Start one with: celery -A chunkmill_workers worker -Q {queue}"
                )
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)
