"""Collections: list, search, audit, and their chunks and vectors. Names stand in the path, escaped."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

import numpy as np
import orjson
import sqlalchemy as sa
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.domain.arguments import as_session, as_text
from chunkmill.domain.collections import CollectionInfo, DroppedCollection
from chunkmill.domain.results import Audit, Hits, SearchHit, SearchPlan
from chunkmill.domain.sessions import SearchId
from chunkmill.domain.stored import StoredChunk
from chunkmill.errors import NotFound
from chunkmill.gateway import seen
from chunkmill.gateway.asked import Query, read_exact, require_known, wrong
from chunkmill.gateway.bodies import read_body
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.ndjson import json_lines
from chunkmill.gateway.shapes import answer, large_answer, list_of, object_of, schema_of
from chunkmill.gateway.streams import StreamedResponse
from chunkmill.ledger import overview
from chunkmill.spaces import collections

MOST_HITS = 1_000
MOST_QUERIES = 100
MOST_OFFSET = 100_000
LONGEST_MS = 120_000
BODY_BYTES = 8 << 20
MOST_CHUNKS = 1_000
MOST_IDS = 10_000
IDS_STEP = 20
"""How many chunks are read by their ids at a time. Each may have 16 MiB of text."""
PAGE_BYTES = 16 << 20
"""A page of chunks ends once its texts, metadata and vectors have about so many characters."""
NUMBER_CHARACTERS = 12
"""About how many characters a number of a vector has in JSON."""
VECTORS_STEP = 200
"""How many vectors are written at a time: of 384 numbers, that is 2 ms."""

_FILTER: Schema = {"type": "object", "description": "A filter of metadata: docs/search.md describes the language."}
SEARCH: Schema = {
    "type": "object",
    "properties": {
        "query": {
            "description": "A text or a vector; a list of texts or of vectors asks several queries.",
            "oneOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "maxItems": MOST_QUERIES},
                {"type": "array", "items": {"type": "number"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "number"}}, "maxItems": MOST_QUERIES},
            ],
        },
        "like": {"type": "string", "description": "The id of a chunk, instead of a query."},
        "k": {"type": "integer", "minimum": 1, "maximum": MOST_HITS, "default": 10},
        "filter": _FILTER,
        "offset": {"type": "integer", "minimum": 0, "maximum": MOST_OFFSET},
        "min_score": {"type": "number", "minimum": -1, "maximum": 1},
        "hybrid": {"description": 'true, false, "rrf", or the weight of the cosine from 0 to 1.'},
        "exact": {"type": "boolean", "default": False},
        "explain": {"type": "boolean", "default": False},
        "timeout_ms": {"type": "integer", "minimum": 1, "maximum": LONGEST_MS, "default": 30_000},
        "session": {
            "type": "string",
            "description": "Names whoever asks. While the collection moves to another space, the same one answers it.",
        },
        "space": {
            "type": "string",
            "description": "`active`, `filling`, `previous`, a model, or the beginning of a fingerprint.",
        },
        "bridge": {
            "type": "string",
            "description": "A model for which the collection has a bridge: the query is embedded with it.",
        },
        "on_unserved": {
            "enum": ["previous"],
            "description": "Allows the space that the collection had before, if no worker embeds the query.",
        },
    },
    "additionalProperties": False,
}
FEEDBACK_BYTES = 64 << 10
FEEDBACK: Schema = {
    "type": "object",
    "properties": {
        "search_id": {"type": "string", "description": "That of the answer of a search."},
        "chunk_id": {"type": "string", "description": "The hit that was what somebody wanted."},
    },
    "required": ["search_id", "chunk_id"],
    "additionalProperties": False,
}
LISTED: dict[str, Schema] = {"exact": {"type": "boolean", "default": False, "description": "Count large ones too."}}
CHUNKS: dict[str, Schema] = {
    "id": {"type": "array", "items": {"type": "string"}, "description": "Ids of chunks; may be repeated."},
    "filter": {"type": "string", "description": "A filter as JSON."},
    "after": {"type": "string", "description": "Begin behind this id: the `next` of the page before."},
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST_CHUNKS, "default": 100},
    "with_text": {"type": "boolean", "default": True},
    "with_vector": {"type": "boolean", "default": False},
}
GET: Schema = {
    "type": "object",
    "description": "The same with ids in the body, for more of them than an address holds.",
    "properties": {
        "ids": {"type": "array", "items": {"type": "string"}, "maxItems": MOST_CHUNKS},
        "with_text": CHUNKS["with_text"],
        "with_vector": CHUNKS["with_vector"],
    },
    "required": ["ids"],
    "additionalProperties": False,
}
COUNT: dict[str, Schema] = {"filter": CHUNKS["filter"]}
VECTORS: dict[str, Schema] = {
    "filter": CHUNKS["filter"],
    "format": {
        "enum": ["ndjson", "binary"],
        "default": "ndjson",
        "description": "`binary` is a row of blocks, each with the length of its header (uint32, little-endian), the "
        'header {"ids": […], "dimensions": d} and the vectors (float32, little-endian). A length of 0 is the end.',
    },
}
CHOSEN: dict[str, Schema] = {
    "ids": {"type": "array", "items": {"type": "string"}, "maxItems": MOST_IDS},
    "filter": _FILTER,
    "all": {"const": True, "description": "All chunks of the collection."},
}
DELETE: Schema = {
    "type": "object",
    "description": "Either ids, or filter, or all.",
    "properties": CHOSEN,
    "additionalProperties": False,
}
DELETE_QUERY: dict[str, Schema] = {"id": CHUNKS["id"], "filter": CHUNKS["filter"]}
UPDATE: Schema = {
    "type": "object",
    "description": "Either ids, or filter, or all, and what to change.",
    "properties": {
        **CHOSEN,
        "metadata": {"type": "object", "description": "The keys to set; others stay."},
        "remove": {"type": "array", "items": {"type": "string"}, "description": "The keys to remove."},
        "replace": {"type": "boolean", "description": "`metadata` takes the place of all that a chunk had."},
    },
    "additionalProperties": False,
}
DROP: dict[str, Schema] = {
    "wait": {"type": "boolean", "default": False, "description": "Answer when no chunk is left."}
}


async def list_collections(gateway: Gateway, request: Request, caller: Caller) -> Response:
    exact = Query(request, LISTED).flag("exact")

    def work(conn: sa.Connection) -> list[CollectionInfo]:
        mine = seen.seen_by(conn, caller)
        return overview.all_collections(conn, exact=exact, ids=None if mine is None else list(mine.values()))

    listed = await seen.read(gateway, work)
    return await large_answer({"collections": listed}, len(listed))


async def one_collection(gateway: Gateway, request: Request, caller: Caller) -> Response:
    exact = Query(request, LISTED).flag("exact")
    named = await seen.collection_in_path(gateway, request, caller)
    listed = await seen.read(gateway, lambda conn: overview.all_collections(conn, exact=exact, ids=[named.id]))
    if not listed:
        raise collections.not_found(named.name)
    return answer(listed[0])


async def search(gateway: Gateway, request: Request, caller: Caller) -> Response:
    named = await seen.collection_in_path(gateway, request, caller)
    body = await read_exact(request, BODY_BYTES)
    require_known(body, SEARCH["properties"])
    begun = time.monotonic()
    result = await searched(gateway, caller, named, body)
    taken: dict[str, Any] = {"took_ms": round(1000 * (time.monotonic() - begun), 3)}
    if isinstance(result, Hits):
        return await large_answer(_hits(result) | taken, len(result))
    taken["space"] = result[0].space if result else named.space
    return await large_answer({"results": [_hits(hits) for hits in result], **taken}, sum(map(len, result)))


async def searched(
    gateway: Gateway, caller: Caller, named: seen.VisibleCollection, body: dict[str, Any]
) -> Hits | list[Hits]:
    """What a search with the fields of ``SEARCH`` finds in the collection. Its texts count for the caller's limits."""
    query: Any = body.get("query")
    k, offset = body.get("k", 10), body.get("offset")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MOST_HITS:
        raise wrong("k", f"it must be a whole number from 1 to {MOST_HITS:,}")
    if offset is not None and (
        not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset <= MOST_OFFSET
    ):
        raise wrong("offset", f"it must be a whole number from 0 to {MOST_OFFSET:,}")
    several = len(query) if isinstance(query, list) and query and isinstance(query[0], str | list) else 1
    if query is not None and not isinstance(query, str | list):
        raise wrong("query", "it must be a text, a vector, a list of texts or a list of vectors")
    if several > MOST_QUERIES:
        raise wrong("query", f"there may be {MOST_QUERIES} queries in a request")
    milliseconds = body.get("timeout_ms", 30_000)
    if not isinstance(milliseconds, int) or isinstance(milliseconds, bool) or not 1 <= milliseconds <= LONGEST_MS:
        raise wrong("timeout_ms", f"it must be a whole number from 1 to {LONGEST_MS:,}")
    for flag in ("exact", "explain"):
        if not isinstance(body.get(flag, False), bool):
            raise wrong(flag, "it must be true or false")
    session, space = as_session(body.get("session")), body.get("space")
    if space is not None and not isinstance(space, str):
        raise wrong("space", "it must be a text")
    bridge = body.get("bridge")
    if bridge is not None and not isinstance(bridge, str):
        raise wrong("bridge", "it must be a text")
    await gateway.models.require_usable(bridge, caller)
    # A bridge that has ended has the name of the model in whose space the collection is.
    model = named.model_for(session=session, space=space) if bridge is None else bridge
    return await gateway.search(
        query,
        model=model,
        caller=caller,
        collection=named.name,
        k=k,
        filter=body.get("filter"),
        exact=body.get("exact", False),
        timeout=milliseconds / 1000,
        like=body.get("like"),
        min_score=body.get("min_score"),
        offset=offset,
        explain=body.get("explain", False),
        hybrid=body.get("hybrid"),
        session=session,
        space=space,
        on_unserved=body.get("on_unserved"),
        bridge=bridge,
    )


async def feedback(gateway: Gateway, request: Request, caller: Caller) -> Response:
    Query(request, ())
    body = await read_exact(request, FEEDBACK_BYTES)
    require_known(body, FEEDBACK["properties"])
    search_id, chunk_id = as_text("search_id", body.get("search_id")), as_text("chunk_id", body.get("chunk_id"))
    search_of = SearchId.read(search_id)
    mine = await seen.read(gateway, lambda conn: seen.seen_by(conn, caller))
    if mine is not None and search_of.collection_id not in mine.values():
        raise NotFound("there is no collection of this search.")
    return answer({"is_new": await gateway.client.feedback(search_id, chunk_id)})


def _hits(hits: Hits) -> dict[str, Any]:
    return {
        "hits": hits,
        "explanation": hits.explanation,
        "space": hits.space,
        "search_id": hits.search_id,
        "instead_of": hits.instead_of,
    }


async def audit(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer(await gateway.client.audit((await seen.collection_in_path(gateway, request, caller)).name))


async def chunks(gateway: Gateway, request: Request, caller: Caller) -> Response:
    query = Query(request, CHUNKS)
    named = await seen.collection_in_path(gateway, request, caller)
    ids, chosen = query.texts("id"), query.object("filter")
    limit = query.number("limit", 100, least=1, most=MOST_CHUNKS) or 100
    with_text, with_vector = query.flag("with_text", default=True), query.flag("with_vector")
    if ids is not None:
        if chosen is not None or query.text("after") is not None:
            raise wrong("id", "give either ids, or a filter and after")
        if len(ids) > MOST_CHUNKS:
            raise wrong("id", f"there may be {MOST_CHUNKS:,} ids in a request")
        return await _by_ids(gateway, named, ids, with_text=with_text, with_vector=with_vector)
    page: list[StoredChunk] = []
    size, more = 0, None
    reading = gateway.client.chunks(
        named.name,
        filter=chosen,
        after=query.text("after") or "",
        limit=limit,
        with_text=with_text,
        with_vector=with_vector,
    )
    async with aclosing(reading):
        async for chunk in reading:
            page.append(chunk)
            size += _size(chunk)
            if len(page) == limit or size >= PAGE_BYTES:
                more = chunk.id
                break
    return await large_answer({"chunks": page, "next": more}, len(page))


async def get(gateway: Gateway, request: Request, caller: Caller) -> Response:
    Query(request, ())
    named = await seen.collection_in_path(gateway, request, caller)
    body = await read_exact(request, BODY_BYTES)
    require_known(body, GET["properties"])
    ids, with_text, with_vector = body.get("ids"), body.get("with_text", True), body.get("with_vector", False)
    if not isinstance(ids, list) or len(ids) > MOST_CHUNKS:
        raise wrong("ids", f"it must be a list of at most {MOST_CHUNKS:,} ids")
    if not isinstance(with_text, bool) or not isinstance(with_vector, bool):
        raise wrong("with_vector" if isinstance(with_text, bool) else "with_text", "it must be true or false")
    return await _by_ids(gateway, named, ids, with_text=with_text, with_vector=with_vector)


async def _by_ids(
    gateway: Gateway, named: seen.VisibleCollection, ids: list[str], *, with_text: bool, with_vector: bool
) -> Response:
    stored: list[StoredChunk] = []
    size = 0
    for first in range(0, len(ids), IDS_STEP):
        some = ids[first : first + IDS_STEP]
        got = await gateway.client.get(named.name, some, with_text=with_text, with_vector=with_vector)
        stored += got.values()
        size += sum(map(_size, got.values()))
        if size > PAGE_BYTES and first + IDS_STEP < len(ids):
            raise Refusal(
                413,
                "answer_too_large",
                "these chunks have too much text, metadata or vectors; ask for fewer, or with_text=false.",
                param="id",
            )
    return await large_answer({"chunks": stored, "next": None}, len(stored))


def _size(chunk: StoredChunk) -> int:
    """About how many characters a chunk has in an answer."""
    numbers = 0 if chunk.vector is None else len(chunk.vector)
    return len(chunk.text or "") + len(json.dumps(chunk.metadata)) + NUMBER_CHARACTERS * numbers


async def count(gateway: Gateway, request: Request, caller: Caller) -> Response:
    chosen = Query(request, COUNT).object("filter")
    named = await seen.collection_in_path(gateway, request, caller)
    return answer({"count": await gateway.client.count(named.name, filter=chosen)})


async def delete(gateway: Gateway, request: Request, caller: Caller) -> Response:
    query = Query(request, DELETE_QUERY)
    named = await seen.collection_in_path(gateway, request, caller)
    ids, chosen = query.texts("id"), query.object("filter")
    if ids is not None or chosen is not None:
        if await read_body(request, BODY_BYTES):
            raise wrong("id", "say in the query which chunks are meant, or in the body, and not in both")
        return answer({"deleted": await gateway.client.delete(named.name, ids, filter=chosen)})
    body = await read_exact(request, BODY_BYTES)
    require_known(body, DELETE["properties"])
    meant = _meant(body)
    return answer({"deleted": await gateway.client.delete(named.name, meant.pop("ids"), **meant)})


async def update(gateway: Gateway, request: Request, caller: Caller) -> Response:
    Query(request, ())
    named = await seen.collection_in_path(gateway, request, caller)
    body = await read_exact(request, BODY_BYTES)
    require_known(body, UPDATE["properties"])
    if not isinstance(body.get("replace", False), bool):
        raise wrong("replace", "it must be true or false")
    changed = await gateway.client.update_metadata(
        named.name,
        body.get("metadata"),
        remove=body.get("remove") or (),
        replace=body.get("replace", False),
        **_meant(body),
    )
    return answer({"changed": changed})


def _meant(body: dict[str, Any]) -> dict[str, Any]:
    """Which chunks a body means. The client refuses none and several."""
    ids, everything = body.get("ids"), body.get("all", False)
    if ids is not None and (not isinstance(ids, list) or len(ids) > MOST_IDS):
        raise wrong("ids", f"it must be a list of at most {MOST_IDS:,} ids")
    if everything not in (True, False, None):
        raise wrong("all", "it must be true")
    return {"ids": ids, "filter": body.get("filter"), "all_chunks": everything is True}


async def vectors(gateway: Gateway, request: Request, caller: Caller) -> Response:
    query = Query(request, VECTORS)
    named = await seen.collection_in_path(gateway, request, caller)
    how, chosen = query.text("format") or "ndjson", query.object("filter")
    if how not in ("ndjson", "binary"):
        raise wrong("format", "it must be ndjson or binary")
    write = _block if how == "binary" else _lines
    with ExitStack() as stack:
        stack.enter_context(gateway.streams.one_more())
        reading = gateway.client.iter_vectors(named.name, batch_size=VECTORS_STEP, filter=chosen)

        async def parts() -> AsyncGenerator[bytes, None]:
            async with aclosing(reading):
                async for ids, rows in reading:
                    yield await run_in_threadpool(write, ids, rows)
            if how == "binary":
                yield bytes(4)

        media_type = "application/octet-stream" if how == "binary" else "application/x-ndjson"
        return await StreamedResponse.of(parts(), media_type=media_type, ends=stack.pop_all().close)


def _lines(ids: list[str], rows: NDArray[np.float32]) -> bytes:
    return json_lines([{"id": chunk_id, "vector": row} for chunk_id, row in zip(ids, rows, strict=True)])


def _block(ids: list[str], rows: NDArray[np.float32]) -> bytes:
    header = orjson.dumps({"ids": ids, "dimensions": rows.shape[1]})
    return struct.pack("<I", len(header)) + header + rows.astype("<f4").tobytes()


async def drop(gateway: Gateway, request: Request, caller: Caller) -> Response:
    wait = Query(request, DROP).flag("wait")
    await seen.collection_in_path(gateway, request, caller)
    # The client refuses an alias, so the name goes on as it came.
    return answer(await gateway.client.drop_collection(request.path_params["collection"], wait=wait))


async def rename(gateway: Gateway, request: Request, caller: Caller) -> Response:
    await seen.collection_in_path(gateway, request, caller)
    to = await _name_in_body(request, "name")
    _require_named(caller, to)
    await gateway.client.rename_collection(request.path_params["collection"], to)
    return answer({"name": to})


async def set_alias(gateway: Gateway, request: Request, caller: Caller) -> Response:
    alias = request.path_params["alias"]
    named = await seen.collection(gateway, caller, await _name_in_body(request, "collection"))
    _require_named(caller, alias)
    await gateway.client.set_alias(alias, named.name)
    return answer({"alias": alias, "collection": named.name})


async def remove_alias(gateway: Gateway, request: Request, caller: Caller) -> Response:
    alias = request.path_params["alias"]
    await seen.collection(gateway, caller, alias)
    await gateway.client.remove_alias(alias)
    return answer({"alias": alias, "collection": None})


def _require_named(caller: Caller, name: str) -> None:
    """Raise :class:`Refusal` if the caller's key does not name it. Whether it exists is not looked at."""
    if not caller.may_see(name):
        raise Refusal(403, "name_not_allowed", "this API key may give a collection only a name that it may see.")


async def _name_in_body(request: Request, field: str) -> str:
    body = await read_exact(request, 1 << 16)
    require_known(body, (field,))
    name = body.get(field)
    if not isinstance(name, str):
        raise wrong(field, "it must be a text")
    return name


_PATH = "/v1/collections/{collection}"
_SEARCHED = {
    "hits": list_of(SearchHit),
    "explanation": schema_of(SearchPlan | None),
    "space": {"type": "string", "description": "The fingerprint of the space that answered."},
    "search_id": {"type": "string"},
    "instead_of": {
        "anyOf": [{"type": "string"}, {"type": "null"}],
        "description": "The fingerprint of the space that was to answer, if no worker served it.",
    },
}
_TOOK: dict[str, Schema] = {"took_ms": {"type": "number"}}
ENDPOINTS = [
    Endpoint(
        "GET",
        "/v1/collections",
        list_collections,
        Scope.SEARCH,
        "All collections that the key may see.",
        answer=object_of(collections=list_of(CollectionInfo)),
        parameters=LISTED,
    ),
    Endpoint(
        "GET",
        _PATH,
        one_collection,
        Scope.SEARCH,
        "One collection: what is in it and how it is served.",
        answer=schema_of(CollectionInfo),
        parameters=LISTED,
    ),
    Endpoint(
        "POST",
        _PATH + "/search",
        search,
        Scope.SEARCH,
        "The chunks nearest to a query. Several queries are answered with `results`, one for each.",
        body=SEARCH,
        answer={
            "oneOf": [
                dict(object_of(**_SEARCHED, **_TOOK)),
                dict(
                    object_of(
                        results={"type": "array", "items": dict(object_of(**_SEARCHED))},
                        space=_SEARCHED["space"],
                        **_TOOK,
                    )
                ),
            ]
        },
    ),
    Endpoint(
        "POST",
        "/v1/feedback",
        feedback,
        Scope.SEARCH,
        "Says that a hit was what somebody wanted. `is_new` is false if it was said before.",
        body=FEEDBACK,
        answer=object_of(is_new={"type": "boolean"}),
    ),
    Endpoint(
        "GET",
        _PATH + "/audit",
        audit,
        Scope.SEARCH,
        "Which chunks have no vector, by an anti-join.",
        answer=schema_of(Audit),
    ),
    Endpoint(
        "GET",
        _PATH + "/chunks",
        chunks,
        Scope.SEARCH,
        "Chunks by their ids, or page by page those that pass a filter.",
        answer=object_of(chunks=list_of(StoredChunk), next=schema_of(str | None)),
        parameters=CHUNKS,
    ),
    Endpoint(
        "GET",
        _PATH + "/count",
        count,
        Scope.SEARCH,
        "How many chunks pass a filter.",
        answer=object_of(count={"type": "integer"}),
        parameters=COUNT,
    ),
    Endpoint(
        "GET",
        _PATH + "/vectors",
        vectors,
        Scope.SEARCH,
        "All vectors of a collection as a stream.",
        answer=object_of(id={"type": "string"}, vector={"type": "array", "items": {"type": "number"}}),
        media_type="application/x-ndjson",
        parameters=VECTORS,
    ),
    Endpoint(
        "POST",
        _PATH + "/chunks/get",
        get,
        Scope.SEARCH,
        "Chunks by their ids. An id that is not in the collection is left out.",
        body=GET,
        answer=object_of(chunks=list_of(StoredChunk), next={"type": "null"}),
    ),
    Endpoint(
        "DELETE",
        _PATH + "/chunks",
        delete,
        Scope.JOBS,
        "Delete chunks by their ids or by a filter. The query or the body says which.",
        body=DELETE,
        answer=object_of(deleted={"type": "integer"}),
        parameters=DELETE_QUERY,
    ),
    Endpoint(
        "PATCH",
        _PATH + "/chunks",
        update,
        Scope.JOBS,
        "Change the metadata of chunks. Nothing is embedded again.",
        body=UPDATE,
        answer=object_of(changed={"type": "integer"}),
    ),
    Endpoint(
        "DELETE",
        _PATH,
        drop,
        Scope.ADMIN,
        "Drop a collection with all of its chunks.",
        answer=schema_of(DroppedCollection),
        parameters=DROP,
    ),
    Endpoint(
        "PATCH",
        _PATH,
        rename,
        Scope.ADMIN,
        "Give a collection another name.",
        body=object_of(name={"type": "string"}),
        answer=object_of(name={"type": "string"}),
    ),
    Endpoint(
        "PUT",
        "/v1/aliases/{alias}",
        set_alias,
        Scope.ADMIN,
        "Let an alias lead to a collection. It moves at one moment.",
        body=object_of(collection={"type": "string"}),
        answer=object_of(alias={"type": "string"}, collection={"type": "string"}),
    ),
    Endpoint(
        "DELETE",
        "/v1/aliases/{alias}",
        remove_alias,
        Scope.ADMIN,
        "Take an alias away. Its collection stays.",
        answer=object_of(alias={"type": "string"}, collection={"type": "null"}),
    ),
]
