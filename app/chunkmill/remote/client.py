"""The clients over HTTP: the verbs, and who runs them."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from chunkmill.domain.arguments import as_seconds
from chunkmill.errors import InvalidSetting
from chunkmill.remote.address import read_address, read_hosts, read_key
from chunkmill.remote.bridges import Bridges
from chunkmill.remote.collections import Collections
from chunkmill.remote.embedding import Embedding
from chunkmill.remote.http import context_of
from chunkmill.remote.indexes import Indexes
from chunkmill.remote.jobs import Jobs
from chunkmill.remote.reembedding import Reembeddings
from chunkmill.remote.servers import Server
from chunkmill.remote.tasks import TaskRunner
from chunkmill.remote.threads import ThreadRunner
from chunkmill.remote.upkeep import Upkeep
from chunkmill.remote.verbs import (
    AsyncReembed,
    AsyncSearch,
    Reembed,
    Search,
    in_loop,
    in_thread,
    items_in_loop,
    items_in_thread,
)

Verify = bool | str | Path | ssl.SSLContext
Runner = TypeVar("Runner")


class Verbs(Embedding, Jobs, Collections, Indexes, Bridges, Upkeep, Reembeddings):
    """All verbs, as generators of steps."""


class _Remote(Generic[Runner]):
    """What both clients are made of. ``_runs_in`` makes what runs the steps of their verbs."""

    _runs_in: Callable[..., Runner]

    def __init__(
        self,
        base_url: str,
        key: str,
        *,
        fallback: str | None = None,
        fallback_key: str | None = None,
        timeout: float = 30.0,
        verify: Verify = True,
        http_hosts: Iterable[str] = (),
        trust_env: bool = False,
    ) -> None:
        hosts = read_hosts(http_hosts)
        server = Server(read_address("base_url", base_url, hosts), read_key("key", key))
        other = None
        if fallback is not None:
            other_key = server.key if fallback_key is None else read_key("fallback_key", fallback_key)
            other = Server(read_address("fallback", fallback, hosts), other_key)
            if other.address == server.address:
                raise InvalidSetting("fallback is the same address as base_url; name another server.")
        elif fallback_key is not None:
            raise InvalidSetting("fallback_key is given, and no fallback.")
        self._verbs = Verbs(server, other, as_seconds("timeout", timeout))
        is_needed = any(one is not None and one.address.is_https for one in (server, other))
        self._runner = self._runs_in(context_of(verify, is_needed=is_needed), trust_env=trust_env)

    def __repr__(self) -> str:
        """One line with the address, without the key."""
        return f"{type(self).__name__}({self._verbs._server.name!r})"


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    url, key = environment.get("CHUNKMILL_URL", ""), environment.get("CHUNKMILL_API_KEY", "")
    hosts = read_hosts(environment.get("CHUNKMILL_HTTP_HOSTS", ""))
    if not url:
        raise InvalidSetting("CHUNKMILL_URL is not set: it is the address of a gateway, such as https://embed.example.")
    read_address("CHUNKMILL_URL", url, hosts)  # so that the error names the variable
    return {"base_url": url, "key": read_key("CHUNKMILL_API_KEY", key).reveal(), "http_hosts": hosts}


class RemoteClient(_Remote[ThreadRunner]):
    """A :class:`Client` that speaks to a gateway over HTTP, and needs neither Postgres nor Redis.

    ``base_url`` is the gateway's address, and ``key`` one of its API keys. Results and errors are those of
    :class:`Client`. What may be repeated is repeated after 429, 502, 503, 504 and broken connections, with the pauses
    that the gateway asks for, until the ``timeout`` of the call; calls without one have that of the client, in seconds.

    The vectors of a client are of one space for each model and size: if the gateway answers with another, it raises
    :class:`SpaceMismatch`. ``fallback`` is the address of a second gateway, which makes vectors while the first cannot
    be reached or is overloaded. Its key is ``fallback_key``, or else the same. It is used only for a space of which the
    first has made vectors before, and if its fingerprint is the same and its vectors of a few texts agree.

    http is taken on loopback only, and for the hosts in ``http_hosts``. ``verify`` is the path of a private CA's
    certificates, or an ``ssl.SSLContext``. Redirects are not followed. ``trust_env=True`` takes the proxies of
    the environment for https. All threads may use a client at once.
    """

    _runs_in = ThreadRunner

    @classmethod
    def from_env(cls) -> RemoteClient:
        """A client for ``CHUNKMILL_URL`` and ``CHUNKMILL_API_KEY``. ``CHUNKMILL_HTTP_HOSTS`` names the hosts that may
        have http, with commas. Raises :class:`InvalidSetting`."""
        return cls(**_from_environment(os.environ))

    embed = in_thread(Verbs.embed)
    embed_texts = in_thread(Verbs.embed_texts)

    search: Search = cast(Any, in_thread(Verbs.search))
    enqueue = in_thread(Verbs.enqueue)
    estimate = in_thread(Verbs.estimate)
    job = in_thread(Verbs.job)
    jobs = in_thread(Verbs.jobs)
    wait = in_thread(Verbs.wait)
    cancel = in_thread(Verbs.cancel)
    retry = in_thread(Verbs.retry)
    dead = in_thread(Verbs.dead)
    collections = in_thread(Verbs.collections)
    audit = in_thread(Verbs.audit)
    feedback = in_thread(Verbs.feedback)
    count = in_thread(Verbs.count)
    delete = in_thread(Verbs.delete)
    get = in_thread(Verbs.get)
    vectors = in_thread(Verbs.vectors)
    index = in_thread(Verbs.index)
    keywords = in_thread(Verbs.keywords)
    drop_keywords = in_thread(Verbs.drop_keywords)
    search_counts = in_thread(Verbs.search_counts)
    outdated = in_thread(Verbs.outdated)
    tune_search = in_thread(Verbs.tune_search)
    compare = in_thread(Verbs.compare)
    quote_comparison = in_thread(Verbs.quote_comparison)
    bridge = in_thread(Verbs.bridge)
    quote_bridge = in_thread(Verbs.quote_bridge)
    bridges = in_thread(Verbs.bridges)
    drop_bridge = in_thread(Verbs.drop_bridge)
    explain = in_thread(Verbs.explain)
    attempts = in_thread(Verbs.attempts)
    update_metadata = in_thread(Verbs.update_metadata)
    drop_collection = in_thread(Verbs.drop_collection)
    rename_collection = in_thread(Verbs.rename_collection)
    set_alias = in_thread(Verbs.set_alias)
    remove_alias = in_thread(Verbs.remove_alias)
    dead_codes = in_thread(Verbs.dead_codes)
    dead_chunk = in_thread(Verbs.dead_chunk)
    dead_chunks = in_thread(Verbs.dead_chunks)
    retry_dead = in_thread(Verbs.retry_dead)
    drop_dead = in_thread(Verbs.drop_dead)
    lanes = in_thread(Verbs.lanes)
    resume_lane = in_thread(Verbs.resume_lane)
    usage = in_thread(Verbs.usage)
    reembed: Reembed = cast(Any, in_thread(Verbs.reembed))
    reembedding = in_thread(Verbs.reembedding)
    reembeddings = in_thread(Verbs.reembeddings)
    flip = in_thread(Verbs.flip)
    rollback = in_thread(Verbs.rollback)
    judge_reembedding = in_thread(Verbs.judge_reembedding)
    pause_reembedding = in_thread(Verbs.pause_reembedding)
    resume_reembedding = in_thread(Verbs.resume_reembedding)
    cancel_reembedding = in_thread(Verbs.cancel_reembedding)
    finish_reembedding = in_thread(Verbs.finish_reembedding)
    chunks = items_in_thread(Verbs.chunks)
    iter_vectors = items_in_thread(Verbs.iter_vectors)

    def close(self) -> None:
        """Close the connections. Calls that are under way in other threads raise :class:`ClientClosed`."""
        self._runner.close()

    def __enter__(self) -> RemoteClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncRemoteClient(_Remote[TaskRunner]):
    """A :class:`RemoteClient` for asyncio: its methods are coroutines with the same arguments, and ``chunks`` and
    ``iter_vectors`` are asynchronous generators.

    ``enqueue`` also takes an asynchronous iterable, and reads a synchronous one in a thread. ``on_progress`` may be a
    coroutine function. A call whose task is cancelled ends at once, and the gateway withdraws what it asked of a
    worker. It may be used in several event loops, each of which has connections of its own.
    """

    _runs_in = TaskRunner

    @classmethod
    def from_env(cls) -> AsyncRemoteClient:
        """As :meth:`RemoteClient.from_env`. It waits for nothing, so it is not a coroutine."""
        return cls(**_from_environment(os.environ))

    embed = in_loop(Verbs.embed)
    embed_texts = in_loop(Verbs.embed_texts)
    search: AsyncSearch = cast(Any, in_loop(Verbs.search))
    enqueue = in_loop(Verbs.enqueue)
    estimate = in_loop(Verbs.estimate)
    job = in_loop(Verbs.job)
    jobs = in_loop(Verbs.jobs)
    wait = in_loop(Verbs.wait)
    cancel = in_loop(Verbs.cancel)
    retry = in_loop(Verbs.retry)
    dead = in_loop(Verbs.dead)
    collections = in_loop(Verbs.collections)
    audit = in_loop(Verbs.audit)
    feedback = in_loop(Verbs.feedback)
    count = in_loop(Verbs.count)
    delete = in_loop(Verbs.delete)
    get = in_loop(Verbs.get)
    vectors = in_loop(Verbs.vectors)
    index = in_loop(Verbs.index)
    keywords = in_loop(Verbs.keywords)
    drop_keywords = in_loop(Verbs.drop_keywords)
    search_counts = in_loop(Verbs.search_counts)
    outdated = in_loop(Verbs.outdated)
    tune_search = in_loop(Verbs.tune_search)
    compare = in_loop(Verbs.compare)
    quote_comparison = in_loop(Verbs.quote_comparison)
    bridge = in_loop(Verbs.bridge)
    quote_bridge = in_loop(Verbs.quote_bridge)
    bridges = in_loop(Verbs.bridges)
    drop_bridge = in_loop(Verbs.drop_bridge)
    explain = in_loop(Verbs.explain)
    attempts = in_loop(Verbs.attempts)
    update_metadata = in_loop(Verbs.update_metadata)
    drop_collection = in_loop(Verbs.drop_collection)
    rename_collection = in_loop(Verbs.rename_collection)
    set_alias = in_loop(Verbs.set_alias)
    remove_alias = in_loop(Verbs.remove_alias)
    dead_codes = in_loop(Verbs.dead_codes)
    dead_chunk = in_loop(Verbs.dead_chunk)
    dead_chunks = in_loop(Verbs.dead_chunks)
    retry_dead = in_loop(Verbs.retry_dead)
    drop_dead = in_loop(Verbs.drop_dead)
    lanes = in_loop(Verbs.lanes)
    resume_lane = in_loop(Verbs.resume_lane)
    usage = in_loop(Verbs.usage)
    reembed: AsyncReembed = cast(Any, in_loop(Verbs.reembed))
    reembedding = in_loop(Verbs.reembedding)
    reembeddings = in_loop(Verbs.reembeddings)
    flip = in_loop(Verbs.flip)
    rollback = in_loop(Verbs.rollback)
    judge_reembedding = in_loop(Verbs.judge_reembedding)
    pause_reembedding = in_loop(Verbs.pause_reembedding)
    resume_reembedding = in_loop(Verbs.resume_reembedding)
    cancel_reembedding = in_loop(Verbs.cancel_reembedding)
    finish_reembedding = in_loop(Verbs.finish_reembedding)
    chunks = items_in_loop(Verbs.chunks)
    iter_vectors = items_in_loop(Verbs.iter_vectors)

    async def close(self) -> None:
        """Close the connections of this event loop. Later calls raise :class:`ClientClosed`."""
        await self._runner.close()

    async def __aenter__(self) -> AsyncRemoteClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
