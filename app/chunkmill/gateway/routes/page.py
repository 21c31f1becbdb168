"""The page: jobs, collections, lanes, money and workers at a glance, and a search box. It works without JavaScript."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.domain.collections import CollectionInfo
from chunkmill.domain.reembedding import Reembedding
from chunkmill.domain.results import Explanation, Hits, Job
from chunkmill.errors import ChunkmillError
from chunkmill.gateway import seen
from chunkmill.gateway.caller import NOBODY, Caller, Scope
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.errors import Refusal, refusal_of
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.page import session
from chunkmill.gateway.page.rendering import HEADERS, STATIC, html, share_of, static
from chunkmill.gateway.routes import collections, jobs, reembeddings
from chunkmill.ledger import overview
from chunkmill.ledger.jobs import jobs as ledger
from chunkmill.monitor import snapshot
from chunkmill.monitor.snapshot import Snapshot
from chunkmill.spaces.collections import all_collections

SHOWN_JOBS = 12
SHOWN_COLLECTIONS = 50
SHOWN_DEAD = 20
SHOWN_MOVES = 6
"""How many moves to another model the overview shows."""
HITS = 10
FLIP_SECONDS = 20.0
"""How many seconds a browser waits for a flip, which then says what is missing."""

Page = Callable[[Gateway, Request, Caller], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Glance:
    """What the overview shows. A part that the caller's scopes do not allow is None."""

    jobs: list[Job] | None
    collections: list[CollectionInfo] | None
    others: int
    """How many collections are not shown."""
    moves: list[Reembedding]
    """Collections that move to another model, or did so lately."""
    snapshot: Snapshot | None


def _paged(scope: Scope | None = None) -> Callable[[Page], Page]:
    """Show the page to the owner of the cookie's key, if the key has the scope, and errors as pages."""

    def decorate(page: Page) -> Page:
        @functools.wraps(page)
        async def shown(gateway: Gateway, request: Request, _: Caller) -> Response:
            try:
                caller = await session.caller_of(gateway, request)
                if caller is None:
                    return html("login.html", status=401, problem=None, is_known=False)
                if scope is not None and not caller.may(scope):
                    return _problem(Refusal(403, "scope", f"this API key does not allow {scope!s} requests."))
                return await page(gateway, request, caller)
            except Refusal as refusal:
                return _problem(refusal)
            except ChunkmillError as error:
                return _problem(refusal_of(error))

        return shown

    return decorate


def _problem(refusal: Refusal) -> Response:
    return html("problem.html", status=refusal.status, message=refusal.message, is_known=True)


async def home(gateway: Gateway, request: Request, _: Caller) -> Response:
    """The overview, or the form for a key. The address that a start prints may hold the key: it goes into the cookie,
    and out of the address bar."""
    key = request.query_params.get("key")
    if key is not None and not session.is_followed_from_elsewhere(request):
        return await _log_in(gateway, request, key)
    return await _home(gateway, request, NOBODY)


@_paged()
async def _home(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return html("overview.html", **await _glance(gateway, caller), is_known=True)


@_paged()
async def live(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """The part of the overview that changes."""
    return html("live.html", **await _glance(gateway, caller))


async def _glance(gateway: Gateway, caller: Caller) -> dict[str, Any]:
    def work(conn: sa.Connection) -> Glance:
        mine = seen.seen_by(conn, caller)
        ids = None if mine is None else list(mine.values())
        may_search = caller.may(Scope.SEARCH)
        listed = overview.all_collections(conn, exact=False, ids=ids) if may_search else []
        listed.sort(key=lambda info: info.last_enqueue_at or info.created_at, reverse=True)
        return Glance(
            ledger.page(conn, limit=SHOWN_JOBS, collections=ids) if caller.may(Scope.JOBS) else None,
            listed[:SHOWN_COLLECTIONS] if may_search else None,
            max(0, len(listed) - SHOWN_COLLECTIONS),
            reembeddings.latest(conn, ids, SHOWN_MOVES) if may_search else [],
            snapshot.take(conn, gateway.settings) if caller.may(Scope.ADMIN) else None,
        )

    glance = await seen.read(gateway, work)
    states = snapshot.lane_states(glance.snapshot) if glance.snapshot else {}
    money = glance.snapshot.money if glance.snapshot else None
    return {
        "glance": glance,
        "lane_states": states,
        "spent_share": share_of(money.month + money.committed, money.limit) if money else None,
        "can_search": caller.may(Scope.SEARCH),
        "chosen": "",
        "query": "",
        "names": [info.name for info in glance.collections or ()],
    }


@_paged(Scope.JOBS)
async def one_job(gateway: Gateway, request: Request, caller: Caller) -> Response:
    job = await seen.job(gateway, caller, request.path_params["id"])
    explanation: Explanation = await gateway.client.explain(job.id)
    dead = await gateway.client.dead(job.id, limit=SHOWN_DEAD) if job.dead else []
    return html("job.html", job=job, explanation=explanation, dead=dead, is_known=True)


@_paged(Scope.JOBS)
async def cancel(gateway: Gateway, request: Request, caller: Caller) -> Response:
    await session.form(request)
    job = await seen.job(gateway, caller, request.path_params["id"])
    await gateway.client.cancel(job.id)
    return session.to(f"/page/jobs/{job.id}")


@_paged(Scope.JOBS)
async def retry(gateway: Gateway, request: Request, caller: Caller) -> Response:
    await session.form(request)
    job = await seen.job(gateway, caller, request.path_params["id"])
    await gateway.client.retry(job.id)
    return session.to(f"/page/jobs/{job.id}")


@_paged(Scope.SEARCH)
async def one_move(gateway: Gateway, request: Request, caller: Caller) -> Response:
    move = await reembeddings.seen_reembedding(gateway, caller, request.path_params["id"])
    return html("reembedding.html", move=move, may_act=caller.may(Scope.ADMIN), is_known=True)


@_paged(Scope.ADMIN)
async def act_on_move(gateway: Gateway, request: Request, caller: Caller) -> Response:
    await session.form(request)
    move = await reembeddings.seen_reembedding(gateway, caller, request.path_params["id"])
    client = gateway.client
    actions: dict[str, Callable[[int], Awaitable[Reembedding]]] = {
        "flip": functools.partial(client.flip, timeout=FLIP_SECONDS),
        "rollback": functools.partial(client.rollback, timeout=FLIP_SECONDS),
        "pause": client.pause_reembedding,
        "resume": client.resume_reembedding,
        "cancel": client.cancel_reembedding,
    }
    act = actions.get(request.path_params["action"])
    if act is None:
        raise Refusal(404, "not_found", "there is no such action.")
    await act(move.id)
    return session.to(f"/page/reembeddings/{move.id}")


async def events(gateway: Gateway, request: Request, _: Caller) -> Response:
    """The events of ``GET /v1/jobs/{id}/events``, for a browser, which sends the cookie."""
    caller = await session.caller_of(gateway, request)
    if caller is None or not caller.may(Scope.JOBS):
        raise Refusal(401, "invalid_api_key", "log in on the page first.")
    return await jobs.events(gateway, request, caller)


@_paged(Scope.SEARCH)
async def search_form(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return html("search.html", **await _search_page(gateway, caller))


@_paged(Scope.SEARCH)
async def search(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """A search. It is posted, so that the text stands in no address, in no history and in no proxy's log."""
    given = await session.form(request)
    name, query = given.get("collection", ""), given.get("query", "")
    page = await _search_page(gateway, caller)
    page |= {"chosen": name, "query": query}
    if not query.strip():
        return html("search.html", **page)
    try:
        named = await seen.collection(gateway, caller, name)
        hits = await collections.searched(gateway, caller, named, {"query": query, "k": HITS, "explain": True})
    except Refusal as refusal:
        return html("search.html", **(page | {"problem": refusal.message}), status=refusal.status)
    except ChunkmillError as error:
        told = refusal_of(error)
        return html("search.html", **(page | {"problem": told.message}), status=told.status)
    assert isinstance(hits, Hits)  # noqa: S101 - one query has one list
    return html("search.html", **(page | {"hits": hits, "explanation": hits.explanation}))


async def _search_page(gateway: Gateway, caller: Caller) -> dict[str, Any]:
    def work(conn: sa.Connection) -> list[str]:
        mine = seen.seen_by(conn, caller)
        return sorted(mine) if mine is not None else [info.name for info in all_collections(conn)]

    names = await seen.read(gateway, work)
    return {
        "names": names,
        "chosen": "",
        "query": "",
        "hits": None,
        "explanation": None,
        "problem": None,
        "is_known": True,
    }


async def log_in(gateway: Gateway, request: Request, _: Caller) -> Response:
    try:
        given = await session.form(request)
    except Refusal as refusal:
        return html("login.html", status=refusal.status, problem=refusal.message, is_known=False)
    return await _log_in(gateway, request, given.get("key", "").strip())


async def _log_in(gateway: Gateway, request: Request, key: str) -> Response:
    if not key or await gateway.keys.caller(key) is None:
        problem = "The key is wrong, was revoked, or has expired."
        return html("login.html", status=401, problem=problem, is_known=False)
    return session.log_in(request, key)


async def log_out(gateway: Gateway, request: Request, _: Caller) -> Response:
    try:
        await session.form(request)
    except Refusal as refusal:
        return _problem(refusal)
    return session.log_out(request)


async def file(gateway: Gateway, request: Request, _: Caller) -> Response:
    name = request.url.path.rpartition("/")[2]
    headers = HEADERS | {"cache-control": "public, max-age=300"}
    return Response(static(name), 200, headers, STATIC[name])


def _of_browsers(method: str, path: str, handler: Page, summary: str) -> Endpoint:
    return Endpoint(method, path, handler, None, summary, media_type="text/html", is_listed=False)


ENDPOINTS = [
    _of_browsers("GET", "/", home, "The overview."),
    _of_browsers("GET", "/page/live", live, "What changes in the overview."),
    _of_browsers("POST", "/page/login", log_in, "Keep the key in a cookie."),
    _of_browsers("POST", "/page/logout", log_out, "Forget the key."),
    _of_browsers("GET", "/page/search", search_form, "The form of a search."),
    _of_browsers("POST", "/page/search", search, "A search."),
    _of_browsers("GET", "/page/jobs/{id}", one_job, "One job."),
    _of_browsers("GET", "/page/jobs/{id}/events", events, "The progress of a job."),
    _of_browsers("POST", "/page/jobs/{id}/cancel", cancel, "Cancel a job."),
    _of_browsers("POST", "/page/jobs/{id}/retry", retry, "Retry a job."),
    _of_browsers("GET", "/page/reembeddings/{id}", one_move, "One move to another model."),
    _of_browsers("POST", "/page/reembeddings/{id}/{action}", act_on_move, "Flip, roll back, pause, resume or cancel."),
    *(_of_browsers("GET", f"/{name}", file, "A file of the page.") for name in STATIC),
]
