"""Collections through a gateway: search, read, count, delete."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from chunkmill.domain.arguments import (
    as_fallback,
    as_flag,
    as_hybrid,
    as_ids,
    as_number,
    as_queries,
    as_score,
    as_seconds,
    as_session,
    as_text,
    require_name,
)
from chunkmill.domain.collections import CollectionInfo
from chunkmill.domain.filters import named_filter
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import Audit, DeadEntry, Hits, SearchHit, SearchPlan
from chunkmill.domain.stored import StoredChunk
from chunkmill.errors import InvalidInput
from chunkmill.remote.asking import RemoteCalls, as_json, told_timeout_ms, unreadable
from chunkmill.remote.http import IN_FLIGHT
from chunkmill.remote.reading import UnreadableAnswer, parse, parse_object, read, read_list
from chunkmill.remote.refusals import Failure, failure_of_silence
from chunkmill.remote.steps import (
    Answer,
    GiveStep,
    Items,
    ParallelStep,
    ReadStep,
    Request,
    Steps,
    Unanswered,
    given_by,
)

MAX_K = 1_000
MAX_OFFSET = 100_000
MOST_QUERIES = 100
"""How many queries, ids and so on the gateway takes in one request. More are sent in several."""
MOST_IDS = 10_000
MOST_DEAD = 1_000
LONGEST_SEARCH_MS = 120_000
LONGEST_PAGE = 256 * 1024 * 1024
"""Bytes of a page of chunks or hits. The texts of a gateway's page have 32 Mi characters at most."""
PAGE_WITH_TEXT = 100
PAGE_WITHOUT = 1_000
WHOLE_BATCH = 10_000
"""How many vectors of a whole collection are put together at a time."""
LONGEST_HEADER = 4 * 1024 * 1024
LONGEST_BLOCK = 64 * 1024 * 1024
"""Bytes of the header of a block of vectors, and of its vectors."""
STALL_SECONDS = 60.0


class Collections(RemoteCalls):
    """The verbs that are about collections."""

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
    ) -> Steps[Hits | list[Hits]]:
        """The ``k`` chunks nearest to ``query`` by cosine, best first, as :meth:`Client.search` finds them, which
        describes the arguments.

        ``k`` is at most 1,000, and ``offset`` at most 100,000. Raises what that raises, :class:`AccessDenied` and
        :class:`GatewayUnavailable`.
        """
        require_name("collection", collection)
        if (query is None) == (like is None):
            raise InvalidInput("give either a query, or with like= the id of a chunk.")
        timeout = as_seconds("timeout", timeout)
        body: dict[str, Any] = {
            "k": as_number("k", k, least=1, most=MAX_K),
            "exact": as_flag("exact", exact),
            "explain": as_flag("explain", explain),
        }
        chosen, argument = named_filter(filter, metadata)
        if chosen is not None:
            body["filter"] = as_filter(argument, chosen)
        if (least := as_score("min_score", min_score)) is not None:
            body["min_score"] = least
        if offset is not None:
            body["offset"] = as_number("offset", offset, least=0, most=MAX_OFFSET)
        if (how := as_hybrid("hybrid", hybrid)) is not None:
            body["hybrid"] = how
        if (who := as_session(session)) is not None:
            body["session"] = who
        if space is not None:
            body["space"] = as_text("space", space)
        if as_fallback(on_unserved):
            body["on_unserved"] = "previous"
        if bridge is not None:
            body["bridge"] = as_text("bridge", bridge)
        deadline = self._deadline(timeout)
        if query is None:
            return (yield from self._search(collection, {**body, "like": as_text("like", like)}, 1, deadline))[0]
        asked, is_single = as_queries(query)
        if not isinstance(asked, list) and not np.isfinite(asked).all():
            raise InvalidInput("the query vector has a number that is not finite.")
        queries: list[Any] = asked if isinstance(asked, list) else asked.tolist()
        if is_single:
            return (yield from self._search(collection, {**body, "query": queries[0]}, 1, deadline))[0]
        if not queries:
            yield from self._get(path_of(collection), parse, timeout=timeout)  # which raises NotFound
            return []
        parts: list[list[Hits]] = yield ParallelStep(
            [
                partial(self._search, collection, {**body, "query": part}, len(part), deadline)
                for part in slices(queries, MOST_QUERIES)
            ],
            IN_FLIGHT,
        )
        return [hits for part in parts for hits in part]

    def _search(self, collection: str, body: Mapping[str, Any], n: int, deadline: float) -> Steps[list[Hits]]:
        """The hits of each of ``n`` queries."""
        is_single = not isinstance(body.get("query"), list) or not isinstance(body["query"][0], str | list)

        def make(seconds: float) -> Request:
            told = {**body, "timeout_ms": min(LONGEST_SEARCH_MS, told_timeout_ms(seconds))}
            content = as_json(told)
            headers = {"content-type": "application/json"}
            return Request("POST", path_of(collection, "search"), seconds, {}, headers, content, longest=LONGEST_PAGE)

        def reader() -> list[Hits]:
            answered = parse_object(answer.body)
            results = [answered] if is_single else answered.get("results")
            if not isinstance(results, list) or len(results) != n:
                raise UnreadableAnswer(f"results does not have those of {n} queries")
            return [_hits(result) for result in results]

        answer = yield from self._ask(make, deadline=deadline)
        return (yield from self._read(self._server, answer.body, reader))

    def feedback(self, search_id: str, chunk_id: str) -> Steps[bool]:
        """Say that a hit was what somebody wanted, as :meth:`Client.feedback` does, which says what it raises."""
        said = {"search_id": as_text("search_id", search_id), "chunk_id": as_text("chunk_id", chunk_id)}
        return self._get(
            "/v1/feedback",
            lambda answer: read(bool, parse_object(answer).get("is_new"), "is_new"),
            method="POST",
            body=as_json(said),
        )

    def collections(self, *, exact: bool = False) -> Steps[list[CollectionInfo]]:
        """All collections that the key may see, by name, with what is in them and how they are served.

        Large ones are estimated, which ``CollectionInfo.counted`` says. ``exact`` counts them.
        """

        def reader(body: bytes) -> list[CollectionInfo]:
            listed = read_list(CollectionInfo, parse_object(body).get("collections"), "collections")
            return Rows(listed, CollectionInfo)

        return self._get("/v1/collections", reader, query={"exact": flag(as_flag("exact", exact))})

    def audit(self, collection: str) -> Steps[Audit]:
        """Anti-join a collection's chunks with its space's vectors. ``audit.complete`` is true if all have one."""
        require_name("collection", collection)
        return self._get(path_of(collection, "audit"), lambda body: read(Audit, parse(body)))

    def count(self, collection: str, *, filter: Mapping[str, Any] | None = None) -> Steps[int]:  # noqa: A002
        """How many chunks of a collection pass ``filter``; without one, how many there are. Raises :class:`NotFound`
        and :class:`InvalidInput`.
        """
        require_name("collection", collection)
        return self._get(
            path_of(collection, "count"),
            lambda body: read(int, parse_object(body).get("count"), "count"),
            query=_filter_query(filter),
        )

    def delete(
        self,
        collection: str,
        ids: Iterable[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        all_chunks: bool = False,
    ) -> Steps[int]:
        """Delete chunks by id, by ``filter``, or with ``all_chunks`` all of the collection. Returns how many.

        If the call fails, what it has deleted stays deleted, and the same call deletes the rest. A request whose answer
        was lost is not repeated, because its number would be lost with it. Raises :class:`InvalidInput` unless exactly
        one of ``ids``, ``filter`` and ``all_chunks`` is given, and for a filter that is empty; and :class:`NotFound`.
        """
        require_name("collection", collection)
        all_chunks = as_flag("all_chunks", all_chunks)
        if (ids is not None) + (filter is not None) + all_chunks != 1:
            raise InvalidInput("give exactly one of ids, filter and all_chunks, to say which chunks are meant.")
        bodies: list[dict[str, Any]]
        if ids is not None:
            bodies = [{"ids": some} for some in slices(as_ids("ids", ids), MOST_IDS)] or [{"ids": []}]
        else:
            bodies = [{"all": True} if all_chunks else {"filter": as_filter("filter", filter)}]
        deleted = 0
        for body in bodies:
            deleted += yield from self._get(
                path_of(collection, "chunks"),
                lambda answer: read(int, parse_object(answer).get("deleted"), "deleted"),
                method="DELETE",
                body=as_json(body),
                is_repeatable=False,
            )
        return deleted

    def dead(
        self,
        job_id: int | None = None,
        collection: str | None = None,
        code: str | None = None,
        limit: int = 1000,
    ) -> Steps[list[DeadEntry]]:
        """The newest ``limit`` entries of the dead list, of which there are 1,000 at most.

        ``job_id``, ``collection`` and ``code`` keep only the entries of a job, of a collection, or with a code. Raises
        :class:`NotFound` for a job or a collection that does not exist.
        """
        query = {"limit": str(max(1, limit := as_number("limit", limit, least=0, most=MOST_DEAD)))}
        if job_id is not None:
            query["job_id"] = str(as_number("job_id", job_id))
        if collection is not None:
            require_name("collection", collection)
            query["collection"] = collection
        if code is not None:
            query["code"] = as_text("code", code)

        def reader(body: bytes) -> list[DeadEntry]:
            return Rows(read_list(DeadEntry, parse_object(body).get("dead"), "dead")[:limit], DeadEntry)

        return self._get("/v1/dead", reader, query=query)

    def chunks(
        self,
        collection: str,
        *,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        after: str = "",
        limit: int | None = None,
        with_text: bool = True,
        with_vector: bool = False,
    ) -> Items[StoredChunk]:
        """The chunks of a collection that pass ``filter``, or all, in the order in which Postgres sorts their ids.

        ``after`` begins behind an id, and ``limit`` ends after so many chunks. They are read page by page, in constant
        memory, and a page whose answer is lost is read again. A chunk that is in the collection all the time comes
        exactly once. Raises :class:`NotFound`, also if the collection is dropped meanwhile, and :class:`InvalidInput`.
        """
        require_name("collection", collection)
        after, left = as_text("after", after), None if limit is None else as_number("limit", limit, least=0)
        with_text, with_vector = as_flag("with_text", with_text), as_flag("with_vector", with_vector)
        query = {
            **_filter_query(filter),
            "with_text": flag(with_text),
            "with_vector": flag(with_vector),
        }
        return Items(self._chunk_pages(collection, query, after, left, PAGE_WITH_TEXT if with_text else PAGE_WITHOUT))

    def get(
        self, collection: str, ids: Iterable[str], *, with_text: bool = True, with_vector: bool = False
    ) -> Steps[dict[str, StoredChunk]]:
        """``chunk id → StoredChunk`` of ``ids``, in their order. An id that is not in the collection is left out.

        Many ids are asked for in several requests, and so at several moments. Raises :class:`NotFound` if there is no
        such collection.
        """
        require_name("collection", collection)
        wanted = list(dict.fromkeys(as_ids("ids", ids)))
        flags = {"with_text": as_flag("with_text", with_text), "with_vector": as_flag("with_vector", with_vector)}
        size = PAGE_WITH_TEXT if flags["with_text"] else PAGE_WITHOUT
        parts: list[list[StoredChunk]] = yield ParallelStep(
            [partial(self._by_ids, collection, part, flags) for part in slices(wanted, size) or [[]]],
            IN_FLIGHT,
        )
        return {chunk.id: chunk for part in parts for chunk in part}

    def _by_ids(self, collection: str, ids: list[str], flags: Mapping[str, bool]) -> Steps[list[StoredChunk]]:
        """The chunks of some ids. If their texts are more than an answer may have, of one half after the other."""
        deadline = self._deadline()
        content = as_json({"ids": ids, **flags})

        def attempt() -> Steps[Answer | Failure | None]:
            headers = {"content-type": "application/json"}
            path = path_of(collection, "chunks/get")
            request = Request("POST", path, self._left(deadline), {}, headers, content, longest=LONGEST_PAGE)
            made = yield from self._attempt(self._server, request)
            return None if isinstance(made, Failure) and made.is_too_large and len(ids) > 1 else made

        answer = yield from self._repeated(attempt, deadline)
        if answer is None:
            half = len(ids) // 2
            first = yield from self._by_ids(collection, ids[:half], flags)
            return first + (yield from self._by_ids(collection, ids[half:], flags))

        def reader() -> list[StoredChunk]:
            return read_list(StoredChunk, parse_object(answer.body).get("chunks"), "chunks")

        return (yield from self._read(self._server, answer.body, reader))

    def vectors(self, collection: str, ids: Iterable[str] | None = None) -> Steps[dict[str, NDArray[np.float32]]]:
        """``chunk id → (d,) float32`` of ``ids``, or of the whole collection. Chunks without a vector are left out.

        Raises :class:`NotFound`. A collection that does not fit in memory is read with :meth:`iter_vectors`.
        """
        if ids is not None:
            stored = yield from self.get(collection, ids, with_text=False, with_vector=True)
            return {chunk_id: chunk.vector for chunk_id, chunk in stored.items() if chunk.vector is not None}
        require_name("collection", collection)
        batches = yield from given_by(self._vector_batches(collection, {}, _Batches(WHOLE_BATCH)))
        return {chunk_id: row for some, rows in batches for chunk_id, row in zip(some, rows, strict=True)}

    def _chunk_pages(
        self, collection: str, query: Mapping[str, str], after: str, left: int | None, most: int
    ) -> Steps[None]:
        while left is None or left > 0:
            page, following = yield from self._chunk_page(
                collection, {**query, "limit": str(most if left is None else min(most, left))}, after
            )
            for chunk in page:
                yield GiveStep(chunk)
            if following is None:
                return
            after = following
            left = None if left is None else left - len(page)

    def _chunk_page(
        self, collection: str, query: Mapping[str, str], after: str
    ) -> Steps[tuple[list[StoredChunk], str | None]]:
        def make(seconds: float) -> Request:
            whole = {**query, "after": after} if after else query
            return Request("GET", path_of(collection, "chunks"), seconds, whole, longest=LONGEST_PAGE)

        def reader() -> tuple[list[StoredChunk], str | None]:
            page = parse_object(answer.body)
            following = page.get("next")
            return read_list(StoredChunk, page.get("chunks"), "chunks"), following and read(str, following, "next")

        answer = yield from self._ask(make, deadline=self._deadline())
        return (yield from self._read(self._server, answer.body, reader))

    def iter_vectors(
        self,
        collection: str,
        *,
        batch_size: int = 1000,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> Items[tuple[list[str], NDArray[np.float32]]]:
        """Batches of ``(ids, vectors)``: the ids of up to ``batch_size`` chunks and their ``(n, d)`` float32 vectors.

        Every batch but the last is full. The chunks are those that pass ``filter`` and have a vector, in the order of
        their ids, and are read as they come, in constant memory. If the connection breaks, reading goes on behind the
        last id that came. A chunk that stays comes exactly once. Raises what :meth:`chunks` raises.
        """
        require_name("collection", collection)
        batch_size = as_number("batch_size", batch_size, least=1)
        return Items(self._vector_batches(collection, _filter_query(filter), _Batches(batch_size)))

    def _vector_batches(self, collection: str, query: Mapping[str, str], batches: _Batches) -> Steps[None]:
        try:
            try:
                yield from self._vectors_of_stream(collection, query, batches)
            except Unanswered as silence:
                failure = failure_of_silence(silence, self._server.name)
                if not failure.may_repeat:
                    raise failure.error from None
                yield from self._vectors_of_pages(collection, query, batches)
        except UnreadableAnswer as error:
            raise unreadable(self._server, error) from None
        for batch in batches.take(is_last=True):
            yield GiveStep(batch)

    def _vectors_of_stream(self, collection: str, query: Mapping[str, str], batches: _Batches) -> Steps[None]:
        def make(seconds: float) -> Request:
            return Request("GET", path_of(collection, "vectors"), seconds, {**query, "format": "binary"})

        opened = yield from self._open(make, deadline=self._deadline())
        blocks = _Blocks()
        while not blocks.is_complete:
            piece: bytes | None = yield ReadStep(opened, STALL_SECONDS)
            if piece is None:
                raise Unanswered("hung up before its answer was complete.")
            for ids, rows in blocks.add(piece):
                batches.add(ids, rows)
            for batch in batches.take():
                yield GiveStep(batch)

    def _vectors_of_pages(self, collection: str, query: Mapping[str, str], batches: _Batches) -> Steps[None]:
        whole = {**query, "with_text": "false", "with_vector": "true", "limit": str(PAGE_WITHOUT)}
        following: str | None = batches.last_id
        while following is not None:
            page, following = yield from self._chunk_page(collection, whole, following)
            for chunk in page:
                if chunk.vector is not None:
                    batches.add([chunk.id], chunk.vector[None, :])
            for batch in batches.take():
                yield GiveStep(batch)


class _Batches:
    """Puts vectors together that came in blocks of other sizes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ids: list[str] = []
        self._rows: list[NDArray[np.float32]] = []
        self.last_id = ""

    def add(self, ids: Sequence[str], rows: NDArray[np.float32]) -> None:
        if self._rows and self._rows[0].shape[1] != rows.shape[1]:
            raise UnreadableAnswer("vectors of one collection have several sizes")
        self._ids += ids
        self._rows.append(rows)
        self.last_id = ids[-1]

    def take(self, *, is_last: bool = False) -> Iterable[tuple[list[str], NDArray[np.float32]]]:
        """The full batches, and with ``is_last`` the rest."""
        if len(self._ids) < self._size and not (is_last and self._ids):
            return
        ids, rows = self._ids, np.concatenate(self._rows)
        whole = len(ids) if is_last else len(ids) - len(ids) % self._size
        self._ids, self._rows = ids[whole:], [rows[whole:]] if whole < len(ids) else []
        for begin in range(0, whole, self._size):
            end = min(begin + self._size, whole)
            yield ids[begin:end], rows[begin:end].copy()


class _Blocks:
    """Reads the binary form of vectors: the length of a header, the header as JSON, and the vectors in float32.

    A length of 0 is the end, so that a stream that was cut is told from one that is complete.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.is_complete = False

    def add(self, piece: bytes) -> list[tuple[list[str], NDArray[np.float32]]]:
        """The blocks that are complete with this piece. Raises :class:`UnreadableAnswer`."""
        self._buffer += piece
        blocks = []
        while not self.is_complete and (block := self._next()) is not None:
            blocks.append(block)
        return blocks

    def _next(self) -> tuple[list[str], NDArray[np.float32]] | None:
        buffer = self._buffer
        if len(buffer) < 4:
            return None
        (length,) = struct.unpack_from("<I", buffer)
        if length == 0:
            self.is_complete = True
            return None
        if length > LONGEST_HEADER:
            raise UnreadableAnswer("a block is longer than any may be")
        if len(buffer) < 4 + length:
            return None
        header = parse_object(bytes(buffer[4 : 4 + length]))
        ids, dimensions = read_list(str, header.get("ids"), "ids"), read(int, header.get("dimensions"), "dimensions")
        size = 4 * len(ids) * dimensions
        if not ids or dimensions < 1 or size > LONGEST_BLOCK:
            raise UnreadableAnswer("a block has no vectors, or more than any may have")
        if len(buffer) < 4 + length + size:
            return None
        flat = np.frombuffer(bytes(buffer[4 + length : 4 + length + size]), "<f4").astype(np.float32, copy=False)
        if not np.isfinite(flat).all():
            raise UnreadableAnswer("a vector has a number that is not finite")
        del buffer[: 4 + length + size]
        return ids, flat.reshape(len(ids), dimensions)


def path_of(collection: str, what: str = "") -> str:
    return f"/v1/collections/{quote(collection, safe='')}{'/' if what else ''}{what}"


def as_filter(argument: str, given: object) -> dict[str, Any]:
    """A filter that JSON can hold. The gateway checks its words. Raises :class:`InvalidInput`."""
    if not isinstance(given, Mapping):
        raise InvalidInput(f"{argument} is of type {type(given).__name__}; it must be a filter, which is a dict.")
    try:
        json.dumps(dict(given), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise InvalidInput(f"{argument} has a value that JSON cannot hold; docs/search.md has the language.") from None
    return dict(given)


def _filter_query(given: object) -> dict[str, str]:
    return {} if given is None else {"filter": json.dumps(as_filter("filter", given), ensure_ascii=False)}


def _hits(result: Any) -> Hits:
    if not isinstance(result, dict):
        raise UnreadableAnswer("a result is not an object")
    plan = result.get("explanation")
    instead_of = result.get("instead_of")
    # A gateway of an earlier release knows one space alone, and no ids of searches.
    return Hits(
        read_list(SearchHit, result.get("hits"), "hits"),
        None if plan is None else read(SearchPlan, plan),
        space=read(str, result.get("space", ""), "space"),
        search_id=read(str, result.get("search_id", ""), "search_id"),
        instead_of=None if instead_of is None else read(str, instead_of, "instead_of"),
    )


def flag(value: bool) -> str:
    return "true" if value else "false"


def slices(items: Sequence[Any], size: int) -> list[Any]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]
