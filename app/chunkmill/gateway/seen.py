"""What a caller may see. A collection that a key does not name answers as one that does not exist, and so do its jobs
and its dead chunks.

A key may name a collection by its own name or by an alias. Who is given an alias sees what it leads to now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from chunkmill.client.door import door
from chunkmill.domain.arguments import as_number, require_name
from chunkmill.domain.results import Job
from chunkmill.errors import NewerSpace, NotFound
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.gateway import Gateway
from chunkmill.spaces import collections, serving
from chunkmill.spaces.serving import ServedCollection

Result = TypeVar("Result")


async def read(gateway: Gateway, work: Callable[[sa.Connection], Result]) -> Result:
    """Run ``work`` in a transaction of its own, in a thread. Errors of Postgres become ours."""

    def in_thread() -> Result:
        with door(gateway.db), gateway.db.begin() as conn:
            return work(conn)

    return await run_in_threadpool(in_thread)


def seen_by(conn: sa.Connection, caller: Caller) -> dict[str, int] | None:
    """Name → id of the collections that the caller may see; None if these are all."""
    if caller.collections is None:
        return None
    return {row.name: row.id for row in collections.of_names(conn, sorted(caller.collections))}


@dataclass(frozen=True, slots=True)
class VisibleCollection:
    """A collection by its own name, the fingerprint of its space, and the name of its model."""

    id: int
    name: str
    space: str
    model: str
    served: ServedCollection | None = None
    """The spaces that answer its searches; None if only a newer release can read the active one."""

    def model_for(self, *, session: str | None, space: str | None) -> str:
        """The model that embeds the query of a search. Raises what the search raises for a space that is not there."""
        if self.served is None or (session is None and space is None):
            return self.model
        return (self.served.of_session(session or "") if space is None else self.served.named(space)).spec.model


async def collection(gateway: Gateway, caller: Caller, name: str) -> VisibleCollection:
    """The collection of this name or alias. Raises :class:`NotFound` if the caller may not see it."""
    require_name("collection", name)

    def work(conn: sa.Connection) -> VisibleCollection:
        try:
            served = serving.find(conn, name)
        except NewerSpace:
            return of_newer_space(conn)
        _require_seen(served.id, seen_by(conn, caller), name)
        spec = served.active.spec
        return VisibleCollection(served.id, served.name, spec.fingerprint, spec.model, served)

    def of_newer_space(conn: sa.Connection) -> VisibleCollection:
        row = collections.find(conn, name)
        _require_seen(row.id, seen_by(conn, caller), name)
        query = sa.text("SELECT fingerprint, spec ->> 'model' AS model FROM spaces WHERE id = :id")
        space = conn.execute(query, {"id": row.space_id}).one()
        return VisibleCollection(row.id, row.name, space.fingerprint, space.model)

    return await read(gateway, work)


async def collection_in_path(gateway: Gateway, request: Request, caller: Caller) -> VisibleCollection:
    """The collection whose name or alias stands in the path. Raises :class:`NotFound` as :func:`collection` does."""
    return await collection(gateway, caller, request.path_params["collection"])


def _require_seen(collection_id: int, seen: dict[str, int] | None, name: str) -> None:
    if seen is not None and collection_id not in seen.values():
        raise collections.not_found(name)


async def collection_to_fill(gateway: Gateway, caller: Caller, name: str) -> str:
    """The name to enqueue into, which may be that of a new collection if the caller's key names it."""
    require_name("collection", name)
    if caller.collections is None or name in caller.collections:
        return name
    return (await collection(gateway, caller, name)).name


async def job(gateway: Gateway, caller: Caller, given: str) -> Job:
    """The job with the number in a path. Raises :class:`NotFound` if the caller may not see its collection."""
    job_id = number_in_path(given, "job")
    seen = await gateway.client.job(job_id)
    if caller.collections is not None:
        names = await read(gateway, lambda conn: seen_by(conn, caller))
        if names is not None and seen.collection not in names:
            raise NotFound(f"there is no job {job_id}; `chunkmill jobs` lists the latest.")
    return seen


def number_in_path(given: str, what: str) -> int:
    if not given.isascii() or not given.isdigit() or len(given) > 18:
        raise Refusal(404, "not_found", f"there is no such {what}; the path has something else than a number.")
    return as_number(what, int(given))
