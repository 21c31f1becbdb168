"""Runs steps in the caller's thread, and those that run side by side in a few threads."""

from __future__ import annotations

import contextlib
import contextvars
import os
import queue
import ssl
import threading
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

import httpx2

from chunkmill.errors import ClientClosed
from chunkmill.openai.bounded import Bounds, within, within_deadlines
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


class _Stopped(Exception):
    """Another of the steps that run side by side has failed."""


class ThreadRunner:
    """Safe to use from several threads. A process that is forked makes connections of its own."""

    def __init__(self, verify: ssl.SSLContext, *, trust_env: bool) -> None:
        self._verify = verify
        self._trust_env = trust_env
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._clients: dict[Server, httpx2.Client] = {}
        self._is_closed = False

    def run(self, steps: Steps[Result]) -> Result:
        """Run the steps to their end, and return the result."""
        return self._run(steps, threading.Event())

    def items(self, steps: Steps[None]) -> Generator[Any, None, None]:
        """Run the steps, and hand out what they give."""
        with contextlib.ExitStack() as streams:
            yield from _driven(steps, partial(self._do, streams=streams, stopping=threading.Event()))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def _run(self, steps: Steps[Result], stopping: threading.Event) -> Result:
        with contextlib.ExitStack() as streams:
            driven = _driven(steps, partial(self._do, streams=streams, stopping=stopping))
            while True:
                try:
                    next(driven)
                except StopIteration as end:
                    result: Result = end.value
                    return result

    def _do(self, step: Step, *, streams: contextlib.ExitStack, stopping: threading.Event) -> Any:
        if stopping.is_set():
            raise _Stopped
        match step:
            case SendStep(server, request):
                return self._send(server, request)
            case OpenStep(server, request):
                return self._open(server, request, streams)
            case ReadStep(opened, seconds):
                return _read(opened, seconds)
            case PauseStep(seconds):
                stopping.wait(seconds)
            case TellStep(function, argument):
                function(argument)
            case WorkStep(function):
                return function()
            case DrainStep(lines):
                try:
                    lines.drain()
                except SourceFailed as failed:
                    raise failed.error from None
            case ParallelStep(makers, at_once):
                return self._together(list(makers), at_once)
        return None

    def _together(self, makers: list[Callable[[], Steps[Any]]], at_once: int) -> list[Any]:
        stopping = threading.Event()
        if len(makers) == 1:
            return [self._run(makers[0](), stopping)]
        results: list[Any] = [None] * len(makers)
        waiting, taking = iter(enumerate(makers)), threading.Lock()
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def work_off() -> None:
            try:
                while not stopping.is_set():
                    with taking:
                        i, make = next(waiting, (0, None))
                    if make is None:
                        break
                    results[i] = self._run(make(), stopping)
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                ended.put(error)
            else:
                ended.put(None)

        # They are daemons: if the interpreter ends, it does not wait for the servers that they wait for.
        threads = [
            threading.Thread(
                target=contextvars.copy_context().run, args=(work_off,), name="chunkmill-remote", daemon=True
            )
            for _ in range(min(at_once, len(makers)))
        ]
        try:
            for thread in threads:
                thread.start()
            for _ in threads:
                if (error := ended.get()) is not None:
                    raise error
        finally:
            stopping.set()
        return results

    def _send(self, server: Server, request: Request) -> Answer:
        bounds = contextlib.nullcontext() if isinstance(request.body, Lines) else within(Bounds(request.seconds))
        try:
            with bounds:
                response = self._asked(server, request)
                try:
                    return _answer(response, request)
                finally:
                    self._end(response)
        except SourceFailed as failed:
            raise failed.error from None
        except http.TRANSPORT_ERRORS as error:
            self._require_open()
            raise http.unanswered(error) from None
        except RuntimeError:  # as httpx2 has it for a client that was closed a moment ago
            self._require_open()
            raise

    def _open(self, server: Server, request: Request, streams: contextlib.ExitStack) -> Answer | OpenAnswer:
        try:
            response = self._asked(server, request)
            if not 200 <= response.status_code < 300:
                try:
                    return _answer(response, request)
                finally:
                    self._end(response)
            streams.callback(self._end, response)
            http.most_bytes(response, request)
            return http.opened(response, response.iter_raw())
        except http.TRANSPORT_ERRORS as error:
            self._require_open()
            raise http.unanswered(error) from None
        except RuntimeError:  # as httpx2 has it for a client that was closed a moment ago
            self._require_open()
            raise

    def _asked(self, server: Server, request: Request) -> httpx2.Response:
        client = self._client(server)
        body = request.body.pieces() if isinstance(request.body, Lines) else request.body
        return client.send(client.build_request(**http.request_options(request), content=body), stream=True)

    def _end(self, response: httpx2.Response) -> None:
        response.close()
        if self._is_closed:
            # If the connection was still being made when its pool was closed, it belongs to no pool, and stays open.
            response.extensions["network_stream"].close()

    def _client(self, server: Server) -> httpx2.Client:
        with self._lock:
            self._after_a_fork()
            self._require_open()
            if server not in self._clients:
                client = httpx2.Client(**http.client_options(server, self._verify, trust_env=self._trust_env))
                within_deadlines(client)
                self._clients[server] = client
            return self._clients[server]

    def _after_a_fork(self) -> None:
        if self._pid != os.getpid():
            # The sockets are those of the other process, which goes on with them.
            self._pid, self._clients = os.getpid(), {}

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClientClosed("this RemoteClient was closed.")


def _driven(steps: Steps[Result], do: Callable[[Step], Any]) -> Generator[Any, None, Result]:
    """Yields what the steps give, and returns their result."""
    value: Any = None
    error: BaseException | None = None
    try:
        while True:
            try:
                step = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as end:
                result: Result = end.value
                return result
            value = error = None
            if isinstance(step, GiveStep):
                yield step.item
                continue
            try:
                value = do(step)
            except BaseException as raised:  # noqa: BLE001 - also Ctrl-C: it is raised again in there
                error = raised
    finally:
        steps.close()


def _answer(response: httpx2.Response, request: Request) -> Answer:
    gathered = http.BodyBuffer(response.status_code, most := http.most_bytes(response, request))
    if most:
        for piece in response.iter_raw(http.PIECE_BYTES):
            if not gathered.take(piece):
                break
    return Answer(response.status_code, http.names_of(response), gathered.body())


def _read(opened: OpenAnswer, seconds: float) -> bytes | None:
    _, pieces = opened.stream
    try:
        with within(Bounds(seconds)):
            piece: bytes | None = next(pieces, None)
            return piece
    except http.TRANSPORT_ERRORS as error:
        raise http.unanswered(error) from None
