"""Runs steps in an event loop, and those that run side by side in a few tasks."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import ssl
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from chunkmill.errors import ClientClosed
from chunkmill.openai.bounded import wrap_backends
from chunkmill.remote import http
from chunkmill.remote.lines import Lines, SourceFailed
from chunkmill.remote.servers import Server
from chunkmill.remote.steps import (
    Answer,
    DrainStep,
    GiveStep,
    OpenAnswer,
    OpenStep,
    ParallelStep,
    PauseStep,
    ReadStep,
    Request,
    SendStep,
    Step,
    Steps,
    TellStep,
    WorkStep,
)

Result = TypeVar("Result")


class TaskRunner:
    """Each event loop has connections of its own. They are closed by :meth:`close` in that loop, or when it ends."""

    def __init__(self, verify: ssl.SSLContext, *, trust_env: bool) -> None:
        self._verify = verify
        self._trust_env = trust_env
        self._clients: dict[tuple[Server, asyncio.AbstractEventLoop], _Client] = {}
        self._is_closed = False

    async def run(self, steps: Steps[Result]) -> Result:
        """Run the steps to their end, and return the result."""
        value: Any = None
        error: BaseException | None = None
        async with contextlib.AsyncExitStack() as streams:
            try:
                while True:
                    step = steps.send(value) if error is None else steps.throw(error)
                    value = error = None
                    try:
                        value = await self._do(step, streams)
                    except BaseException as raised:  # noqa: BLE001 - also a cancellation: it is raised again in there
                        error = raised
            except StopIteration as end:
                result: Result = end.value
                return result
            finally:
                steps.close()

    async def items(self, steps: Steps[None]) -> AsyncGenerator[Any, None]:
        """Run the steps, and hand out what they give."""
        value: Any = None
        error: BaseException | None = None
        async with contextlib.AsyncExitStack() as streams:
            try:
                while True:
                    try:
                        step = steps.send(value) if error is None else steps.throw(error)
                    except StopIteration:
                        return
                    value = error = None
                    if isinstance(step, GiveStep):
                        yield step.item
                        continue
                    try:
                        value = await self._do(step, streams)
                    except BaseException as raised:  # noqa: BLE001 - also a cancellation: it is raised again in there
                        error = raised
            finally:
                steps.close()

    async def close(self) -> None:
        self._is_closed = True
        here = asyncio.get_running_loop()
        clients, self._clients = self._clients, {}
        for (_, loop), client in clients.items():
            if loop is here:
                await client.ends.aclose()

    async def _do(self, step: Step, streams: contextlib.AsyncExitStack) -> Any:
        match step:
            case SendStep(server, request):
                return await self._send(server, request)
            case OpenStep(server, request):
                return await self._open(server, request, streams)
            case ReadStep(opened, seconds):
                return await _read(opened, seconds)
            case PauseStep(seconds):
                await asyncio.sleep(seconds)
            case TellStep(function, argument):
                told = function(argument)
                if inspect.isawaitable(told):
                    await told
            case WorkStep(function, is_long):
                return await asyncio.to_thread(function) if is_long else function()
            case DrainStep(lines):
                try:
                    await lines.drain_in_a_loop()
                except SourceFailed as failed:
                    raise failed.error from None
            case ParallelStep(makers, at_once):
                return await self._together(list(makers), at_once)
        return None

    async def _together(self, makers: list[Callable[[], Steps[Any]]], at_once: int) -> list[Any]:
        results: list[Any] = [None] * len(makers)
        waiting = iter(enumerate(makers))

        async def work_off(waiting: Iterator[tuple[int, Callable[[], Steps[Any]]]]) -> None:
            for i, make in waiting:
                results[i] = await self.run(make())

        tasks = [asyncio.ensure_future(work_off(waiting)) for _ in range(min(at_once, len(makers)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return results

    async def _send(self, server: Server, request: Request) -> Answer:
        seconds = None if isinstance(request.body, Lines) else request.seconds
        try:
            async with asyncio.timeout(seconds):
                response = await self._asked(server, request)
                try:
                    return await _answer(response, request)
                finally:
                    await self._end(response)
        except SourceFailed as failed:
            raise failed.error from None
        except http.TRANSPORT_ERRORS as error:
            self._require_open()
            raise http.unanswered(error) from None
        except RuntimeError:  # as httpx2 has it for a client that was closed a moment ago
            self._require_open()
            raise

    async def _open(self, server: Server, request: Request, streams: contextlib.AsyncExitStack) -> Answer | OpenAnswer:
        try:
            async with asyncio.timeout(request.seconds):
                response = await self._asked(server, request)
                if not 200 <= response.status_code < 300:
                    try:
                        return await _answer(response, request)
                    finally:
                        await self._end(response)
            streams.push_async_callback(self._end, response)
            http.most_bytes(response, request)
            return http.opened(response, response.aiter_raw())
        except http.TRANSPORT_ERRORS as error:
            self._require_open()
            raise http.unanswered(error) from None
        except RuntimeError:  # as httpx2 has it for a client that was closed a moment ago
            self._require_open()
            raise

    async def _asked(self, server: Server, request: Request) -> httpx2.Response:
        client = await self._client(server)
        body = request.body.pieces_in_a_loop() if isinstance(request.body, Lines) else request.body
        return await client.send(client.build_request(**http.request_options(request), content=body), stream=True)

    async def _end(self, response: httpx2.Response) -> None:
        await response.aclose()
        if self._is_closed:
            # If the connection was still being made when its pool was closed, it belongs to no pool, and stays open.
            await response.extensions["network_stream"].aclose()

    async def _client(self, server: Server) -> httpx2.AsyncClient:
        self._require_open()
        loop = asyncio.get_running_loop()
        for key in [key for key in self._clients if key[1].is_closed()]:
            del self._clients[key]
        if (server, loop) not in self._clients:
            client = httpx2.AsyncClient(**http.client_options(server, self._verify, trust_env=self._trust_env))
            wrap_backends(client, _Backend)
            self._clients[server, loop] = made = _Client(client, _closing(client))
            await anext(made.ends)
        return self._clients[server, loop].http

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClientClosed("this AsyncRemoteClient was closed.")


class _Backend:
    """A network backend of httpcore. If a task is cancelled while it shakes hands, its connection is closed; httpcore
    does that for errors alone. Calls whose time is over are cancelled too."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def connect_tcp(self, *args: Any, **more: Any) -> _Stream:
        return _Stream(await self._inner.connect_tcp(*args, **more))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Stream:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def start_tls(self, *args: Any, **more: Any) -> _Stream:
        try:
            return _Stream(await self._inner.start_tls(*args, **more))
        except BaseException:
            await self._inner.aclose()
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True, slots=True)
class _Client:
    http: httpx2.AsyncClient
    ends: AsyncGenerator[None, None]


async def _closing(client: httpx2.AsyncClient) -> AsyncGenerator[None, None]:
    """Closes the client when it is closed itself, which ``asyncio.run`` also does at the end of its loop."""
    try:
        yield
    finally:
        await client.aclose()


async def _answer(response: httpx2.Response, request: Request) -> Answer:
    gathered = http.BodyBuffer(response.status_code, most := http.most_bytes(response, request))
    if most:
        async for piece in response.aiter_raw(http.PIECE_BYTES):
            if not gathered.take(piece):
                break
    return Answer(response.status_code, http.names_of(response), gathered.body())


async def _read(opened: OpenAnswer, seconds: float) -> bytes | None:
    _, pieces = opened.stream
    try:
        async with asyncio.timeout(seconds):
            piece: bytes | None = await anext(pieces, None)
            return piece
    except http.TRANSPORT_ERRORS as error:
        raise http.unanswered(error) from None
