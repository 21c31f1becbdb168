"""A worker answers below the span of whoever asked, through Postgres or its socket, and the traces do not mix."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import AsyncClient, Client
from chunkmill.client.asking.sockets import sockets_of
from chunkmill.domain import frames
from chunkmill.domain.frames import BadFrame, FrameKind
from chunkmill.domain.spaces import OnLong
from chunkmill.errors import EngineError, NotFound
from chunkmill.machine import this_boot
from chunkmill.monitor import worker_sockets
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import tracing
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.embedder import AwaitedRequest, RequestEmbedder
from chunkmill_workers.local.responder import EmbedResponder
from chunkmill_workers.local.sockets import WorkerSocketServer
from tests.conftest import client_for
from tests.integration.hands import Hands
from tests.integration.test_worker_sockets import connect
from tests.support.askers import answering
from tests.support.gateways import running_gateway, stand_in_worker
from tests.support.remotes import remote
from tests.support.waiting import PATIENCE, Call, until

pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")

from opentelemetry.sdk.trace import ReadableSpan

SECRET = "ZEBRAFISH"
LONG = 3 * PATIENCE

Spans = Callable[[], list[ReadableSpan]]


def traced(name: str, work: Callable[[], Any]) -> Any:
    with tracing.root(name):
        return work()


def value(hands: Hands, statement: str) -> Any:
    ((value,),) = hands.rows(statement)
    return value


def change(hands: Hands, statement: str) -> None:
    with hands.db.begin() as conn:
        conn.execute(sa.text(statement))


def named(spans: Spans, name: str) -> list[ReadableSpan]:
    return [span for span in spans() if span.name == name]


@pytest.fixture
def space(client: Client, context: WorkerContext) -> Space:
    """A space whose model is loaded."""
    made = client._space(None, OnLong.TRUNCATE)
    context.engine_for(made)
    return made


@pytest.fixture
def responder(context: WorkerContext, space: Space) -> Iterator[EmbedResponder]:
    """It embeds in the thread of the test, when the test says so."""
    made = EmbedResponder(context)
    yield made
    made.embedder.close()


@pytest.fixture
def listening(
    context: WorkerContext, responder: EmbedResponder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WorkerSocketServer]:
    """The worker's socket, which announces itself when a test says so."""
    monkeypatch.setattr(WorkerSocketServer, "_announce_often", lambda _: None)
    (tmp_path / "s").mkdir(mode=0o700)
    server = WorkerSocketServer(context, responder.embedder, f"unix:{tmp_path}/s")
    server.start()
    server.announce()
    yield server
    server.stop()


@pytest.mark.parametrize("way", ["rows", "socket"])
def test_each_caller_finds_its_own_request_in_its_trace_and_the_shared_pass_is_linked_to_both(
    way: str,
    client: Client,
    spans: Spans,
    responder: EmbedResponder,
    hands: Hands,
    request: pytest.FixtureRequest,
) -> None:
    if way == "socket":
        request.getfixturevalue("listening")
        connect(client, "test-worker")

    def ask(name: str, n: int) -> Call:
        texts = [f"{SECRET} {name} {i}" for i in range(n)]
        return Call(lambda: traced(name, lambda: client.embed(texts, kind="query", timeout=LONG)))

    calls = [ask("first", 1), ask("second", 2), Call(lambda: client.embed(["a text"], kind="query", timeout=LONG))]
    if way == "rows":
        until(lambda: value(hands, "SELECT count(*) FROM embed_requests") == 3)
        assert responder.answer_next()
    else:
        until(lambda: responder.embedder.n_open == 3)
        responder.embedder.settle()
        assert value(hands, "SELECT is_called FROM embed_requests_id_seq") is False
    assert [len(call.result()) for call in calls] == [1, 2, 1]

    callers = {span.context.span_id: span for span in spans() if span.name in ("first", "second")}
    answered = named(spans, "chunkmill.embed_request")
    below = {callers[span.parent.span_id].name: span for span in answered if span.parent}
    assert below.keys() == {"first", "second"}
    assert len(answered) == 2  # the third caller has no trace
    for span in below.values():
        assert span.parent is not None
        assert span.context.trace_id == callers[span.parent.span_id].context.trace_id
    assert {name: (span.attributes or {})["chunkmill.texts"] for name, span in below.items()} == {
        "first": 1, "second": 2
    }  # fmt: skip
    (together,) = named(spans, "embed")
    assert together.parent is None
    assert {link.context.span_id for link in together.links} == {span.context.span_id for span in answered}
    assert together.context.trace_id not in {span.context.trace_id for span in callers.values()}
    assert {name: value for name, value in (together.attributes or {}).items() if "tokens" not in name} == {
        "chunkmill.requests": 3, "chunkmill.contents": 4
    }  # fmt: skip
    assert SECRET not in "".join(span.to_json() for span in spans())


def test_a_pass_for_one_caller_is_part_of_its_trace(client: Client, spans: Spans, responder: EmbedResponder) -> None:
    call = Call(lambda: traced("caller", lambda: client.embed(["a text"], kind="query", timeout=LONG)))
    until(responder.answer_next)
    call.result()
    by_id = {span.context.span_id: span for span in spans()}
    (embedded,) = named(spans, "embed")
    above = []
    while embedded.parent is not None:
        embedded = by_id[embedded.parent.span_id]
        above.append(embedded.name)
    assert above == ["chunkmill.embed_request", "caller"]


def test_a_text_that_fails_marks_the_span_of_its_request_alone(
    client: Client, spans: Spans, responder: EmbedResponder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RequestEmbedder, "_stream", lambda *_: (_ for _ in ()).throw(ValueError(SECRET)))
    call = Call(lambda: traced("caller", lambda: client.embed(["a text"], kind="query", timeout=LONG)))
    until(responder.answer_next)
    with pytest.raises(EngineError, match="could not embed"):
        call.result()
    (failed,) = named(spans, "chunkmill.embed_request")
    assert (failed.status.is_ok, failed.status.description) == (False, "ValueError")
    assert SECRET not in "".join(span.to_json() for span in spans())


def test_the_tasks_of_an_event_loop_ask_with_their_own_spans(
    settings: Settings, spans: Spans, db: sa.Engine, space: Space
) -> None:
    async def one(aio: AsyncClient, name: str) -> str:
        with tracing.root(name):
            await aio.embed([f"text {len(name)}"], timeout=LONG)
            return str(tracing.traceparent())

    async def scene() -> list[str]:
        async with AsyncClient(client_for(settings)) as aio:
            return await asyncio.gather(one(aio, "first"), one(aio, "seconds"))

    with answering(db) as answerer:
        first, second = asyncio.run(scene())
    asked = {request.texts[0]: request.traceparent for request in answerer.answered}
    assert asked == {"text 5": first, "text 7": second}


def test_a_request_to_the_gateway_continues_the_trace_of_its_caller_down_to_the_worker(
    settings: Settings, spans: Spans, hands: Hands
) -> None:
    callers = {name: f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01" for name in ("one", "two")}
    with running_gateway(settings) as gateway, stand_in_worker(hands.db) as worker:
        worker.may.clear()
        calls = [
            Call(
                lambda name=name, parent=parent: gateway.http.post(
                    "/v1/embeddings", json={"input": name}, headers={"traceparent": parent}
                )
            )
            for name, parent in callers.items()
        ]
        until(lambda: value(hands, "SELECT count(*) FROM embed_requests") == 2)
        asked = dict(hands.rows("SELECT texts[1], traceparent FROM embed_requests"))
        worker.may.set()
        assert [call.result().status_code for call in calls] == [200, 200]
        until(lambda: len(named(spans, "gateway request")) == 2)
    own = {span.context.span_id: span for span in named(spans, "gateway request")}
    for name, parent in callers.items():
        _, trace_id, span_id, _ = asked[name].split("-")
        above = own[int(span_id, 16)].parent
        assert above is not None
        assert (f"{above.trace_id:032x}", f"{above.span_id:016x}") == (trace_id, parent.split("-")[2])
        assert trace_id == parent.split("-")[1]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_remote_client_takes_the_trace_of_its_caller_along(
    kind: str, settings: Settings, spans: Spans, hands: Hands
) -> None:
    """With every request of a call: the many pieces of an embed, and those that are read piece by piece."""
    calls: dict[str, Callable[[Any], Any]] = {
        "first": lambda c: c.embed([f"{SECRET} {i}" for i in range(600)], kind="query", timeout=LONG),
        "second": lambda c: c.reembeddings(),
        "third": lambda c: c.chunks("absent"),
    }

    def askers() -> list[str | None]:
        """In whose span each request to the gateway was asked."""
        callers = {span.context.span_id: span.name for span in spans() if span.name in calls}
        return [span.parent and callers[span.parent.span_id] for span in named(spans, "gateway request")]

    with (
        running_gateway(settings) as gateway,
        stand_in_worker(hands.db),
        remote(kind, gateway.url, gateway.key, timeout=LONG) as client,
    ):
        for name, call in calls.items():
            with contextlib.suppress(NotFound), tracing.root(name):
                call(client)
        client.reembeddings()
        until(lambda: set(askers()) == {*calls, None})
    assert askers().count("first") >= 3
    assert SECRET not in "".join(span.to_json() for span in spans())


def test_a_caller_whose_trace_is_not_kept_gets_no_spans_of_the_worker(
    space: Space, responder: EmbedResponder, spans: Spans
) -> None:
    answers: list[object] = []
    for flags in ("00", "01"):
        parent = f"00-{'a' * 32}-{'b' * 16}-{flags}"
        on_error = answers.append
        asked = AwaitedRequest(space, "query", ["a text"], answers.append, on_error, traceparent=parent)
        responder.embedder.submit(asked)
        responder.embedder.settle()
    assert len(answers) == 2
    assert len(spans()) == 2


# --- releases and schemas that know no traces ------------------------------------------------------------------------


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kinds of the frames that are sent to workers with requests."""
    seen: list[int] = []
    take = WorkerSocketServer._take

    def noted(server: WorkerSocketServer, connection: Any, one: frames.Frame) -> None:
        if one.kind in (FrameKind.ASK, FrameKind.ASK_TRACED):
            seen.append(one.kind)
        take(server, connection, one)

    monkeypatch.setattr(WorkerSocketServer, "_take", noted)
    return seen


def embed_through(client: Client, responder: EmbedResponder, text: str = "a text") -> None:
    call = Call(lambda: traced("caller", lambda: client.embed([text], kind="query", timeout=LONG)))
    until(lambda: responder.embedder.n_open == 1)
    responder.embedder.settle()
    assert call.result().shape == (1, 384)


def test_a_worker_of_the_last_release_is_asked_as_that_release_asks_also_if_it_took_the_name_of_a_newer_one(
    client: Client,
    spans: Spans,
    responder: EmbedResponder,
    listening: WorkerSocketServer,
    hands: Hands,
    kinds: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: bytes) -> None:
        raise BadFrame("a frame that callers do not send")

    monkeypatch.setattr(frames, "read_traced_question", refuse)
    listening._token = bytes(32)
    with hands.db.begin() as conn:
        row = {"name": "test-worker", "machine": this_boot(), "address": listening.address, "token": bytes(32)}
        conn.execute(worker_sockets._WRITE_OLD, row | {"spaces": list(listening._spaces)})
    assert value(hands, "SELECT traces_for IS NOT NULL FROM worker_sockets")  # that release does not know the column
    connect(client, "test-worker")
    embed_through(client, responder)
    assert kinds == [FrameKind.ASK]


def test_a_worker_that_sends_no_traces_is_asked_without(
    client: Client,
    responder: EmbedResponder,
    listening: WorkerSocketServer,
    kinds: list[int],
    spans: Spans,
    hands: Hands,
) -> None:
    connect(client, "test-worker")
    embed_through(client, responder)
    change(hands, "UPDATE worker_sockets SET traces_for = NULL")
    connect(client, "test-worker")
    embed_through(client, responder, "another text")
    assert kinds == [FrameKind.ASK_TRACED, FrameKind.ASK]


def test_without_traces_no_statement_and_no_frame_is_another_than_before(
    client: Client, responder: EmbedResponder, listening: WorkerSocketServer, kinds: list[int], hands: Hands
) -> None:
    statements: list[str] = []
    for db in (client._db, responder._context.db):
        sa.event.listen(db, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement))
    connect(client, "test-worker")
    call = Call(lambda: client.embed(["a text"], kind="query", timeout=LONG))
    until(lambda: responder.embedder.n_open == 1)
    responder.embedder.settle()
    call.result()
    listening.stop()
    until(lambda: not sockets_of(client._db).ready)
    call = Call(lambda: client.embed(["another text"], kind="query", timeout=LONG))
    until(responder.answer_next)
    call.result()
    assert kinds == [FrameKind.ASK]
    assert any("INSERT INTO embed_requests" in statement for statement in statements)
    assert not [statement for statement in statements if "embed_requests" in statement and ", traceparent" in statement]


def test_on_the_schema_of_the_last_release_traced_calls_are_answered_as_before(
    client: Client, spans: Spans, responder: EmbedResponder, hands: Hands, tmp_path: Path
) -> None:
    change(hands, "ALTER TABLE embed_requests DROP COLUMN traceparent")
    change(hands, "ALTER TABLE worker_sockets DROP COLUMN traces_for")
    (tmp_path / "s").mkdir(mode=0o700)
    call = Call(lambda: traced("caller", lambda: client.embed(["a text"], kind="query", timeout=LONG)))
    until(responder.answer_next)
    call.result()
    server = WorkerSocketServer(responder._context, responder.embedder, f"unix:{tmp_path}/s")
    server.start()
    try:
        server.announce()
        connect(client, "test-worker")
        embed_through(client, responder, "another text")
    finally:
        server.stop()
    assert not named(spans, "chunkmill.embed_request")


def test_a_request_that_has_no_room_for_its_trace_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    question = frames.Question(1, "0" * 64, "query", 0, 9.0, "", ["a text"], parent)
    body = frames.pack_question(question)
    assert body is not None
    assert frames.read_traced_question(frames.trace_of(question, body) + body) == question
    assert frames.read_question(body).traceparent is None
    monkeypatch.setattr(frames, "MOST_ASKED_BYTES", len(body) + frames.TRACE_BYTES - 1)
    assert frames.trace_of(question, body) == b""
