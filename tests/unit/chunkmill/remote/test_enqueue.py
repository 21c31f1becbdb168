"""Chunks on their way to a gateway: every one of them arrives once, in constant memory, whatever breaks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from chunkmill import Chunk, GatewayUnavailable, InvalidChunk, InvalidInput, InvalidSetting, Job
from chunkmill.remote import lines
from chunkmill.remote.lines import Lines, SourceFailed
from tests.support.remotes import HANGS_UP, Asked, Said, refusal, remote, scripted

JOB = {
    "id": 7,
    "state": "running",
    "collection": "docs",
    "space": "f" * 64,
    "model": "m",
    "route": "local",
    "priority": "normal",
    "idempotency_key": "k",
    "chunks": 3,
    "contents": 3,
    "cached": 0,
    "embedded": 0,
    "remaining": 3,
    "dead": 1,
    "truncated": 0,
    "tokens": 0,
    "engine_seconds": 0,
    "created_at": "2026-01-31T12:00:00Z",
    "finished_at": None,
    "error": None,
    "dead_chunks": [{"chunk_id": "c", "code": "too_long", "reason": "it is too long"}],
    "new": 3,
    "progress": 0.5,
    "a field of a later release": [1],
}
WELL = Said(body=json.dumps(JOB).encode())
CHUNKS = [Chunk(f"c{i}", f"text {i} " + "ü" * 500, {"n": i}) for i in range(1_000)]


def sent(asked: Asked) -> list[dict[str, Any]]:
    return [json.loads(line) for line in asked.body.splitlines()]


def expected(chunks: list[Chunk]) -> list[dict[str, Any]]:
    return [{"id": chunk.id, "text": chunk.text, "metadata": dict(chunk.metadata)} for chunk in chunks]


def once(chunks: list[Chunk]) -> Iterator[Chunk]:
    yield from chunks


async def asynchronously(chunks: list[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


SOURCES = [(kind, source) for kind in ("sync", "async") for source in (list, tuple, once)] + [("async", asynchronously)]


def test_an_enqueue_sends_every_chunk_and_argument_and_returns_the_job(kind: str) -> None:
    with scripted(lambda _: WELL) as server, remote(kind, server.url) as client:
        job = client.enqueue(
            CHUNKS,
            collection="a/b c",
            model="m",
            route="openai",
            priority="high",
            idempotency_key="mine",
            on_long="reject",
            on_invalid="skip",
            dimensions=256,
            precision="int8",
            deadline=timedelta(hours=3),
            replace={"source": "wiki"},
            allow_empty=True,
            max_refused=0.25,
        )
    (asked,) = server.asked
    query = {name: values[0] for name, values in parse_qs(urlsplit(asked.path).query).items()}
    left = datetime.fromisoformat(query.pop("deadline")) - datetime.now(UTC)
    assert timedelta(hours=2) < left <= timedelta(hours=3)
    assert query == {
        "collection": "a/b c",
        "model": "m",
        "route": "openai",
        "priority": "high",
        "on_long": "reject",
        "on_invalid": "skip",
        "dimensions": "256",
        "precision": "int8",
        "replace": '{"source": "wiki"}',
        "allow_empty": "true",
        "max_refused": "0.25",
    }
    assert asked.headers["idempotency-key"] == "mine"
    assert asked.headers["content-type"] == "application/x-ndjson"
    assert sent(asked) == expected(CHUNKS)
    assert isinstance(job, Job) and (job.id, job.dead_chunks[0].code, job.new) == (7, "too_long", 3)
    assert job.created_at == datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(("kind", "source"), SOURCES)
@pytest.mark.parametrize("failure", [HANGS_UP, refusal(503, "draining", after_ms=1)])
def test_after_a_lost_answer_all_is_sent_again_under_the_same_key(kind: str, source: Any, failure: Said) -> None:
    answers = iter([failure, failure, WELL])
    with scripted(lambda _: next(answers)) as server, remote(kind, server.url) as client:
        assert client.enqueue(source(CHUNKS), collection="docs").id == 7
    assert [sent(asked) for asked in server.asked] == [expected(CHUNKS)] * 3
    keys = {asked.headers["idempotency-key"] for asked in server.asked}
    assert len(keys) == 1 and len(keys.pop()) == 32


@pytest.mark.parametrize(("kind", "source"), SOURCES)
def test_a_source_that_is_too_slow_for_the_gateway_is_read_to_its_end_before_it_is_sent_again(
    kind: str, source: Any
) -> None:
    cuts = iter([refusal(408, "body_too_slow", retry=False), refusal(503, "draining", after_ms=1)])
    read: list[str] = []

    def noted(chunks: list[Chunk]) -> Any:
        if source is asynchronously:
            return noted_asynchronously(chunks)
        return (read.append(chunk.id) or chunk for chunk in chunks) if source is once else source(chunks)

    async def noted_asynchronously(chunks: list[Chunk]) -> AsyncIterator[Chunk]:
        for chunk in chunks:
            read.append(chunk.id)
            yield chunk

    def answer(asked: Asked) -> Said:
        said = next(cuts, WELL)
        if said is WELL and source in (once, asynchronously):
            assert len(read) == len(CHUNKS)
        return said

    with scripted(answer) as server, remote(kind, server.url) as client:
        assert client.enqueue(noted(CHUNKS), collection="docs").id == 7
    assert sent(server.asked[-1]) == expected(CHUNKS) and len(server.asked) == 3


def test_a_body_that_is_too_slow_although_nobody_is_waited_for_is_not_sent_for_ever(kind: str) -> None:
    with scripted(lambda _: refusal(408, "body_too_slow", retry=False)) as server, remote(kind, server.url) as client:
        with pytest.raises(GatewayUnavailable, match="body_too_slow"):
            client.enqueue(once(CHUNKS), collection="docs")
        assert len(server.asked) == 2


def test_a_slow_source_survives_a_gateway_that_hangs_up_in_the_middle(kind: str) -> None:
    """The gateway hangs up after the first piece, and the rest comes only after that."""
    hung_up = threading.Event()

    def chunks() -> Iterator[Chunk]:
        yield from CHUNKS[:500]
        assert hung_up.wait(60)
        yield from CHUNKS[500:]

    with socket.create_server(("127.0.0.1", 0)) as listening, scripted(lambda _: WELL) as well:
        to = ("127.0.0.1", int(well.url.rpartition(":")[2]))

        def serve() -> None:
            first, _ = listening.accept()
            first.recv(1000)
            first.close()
            hung_up.set()
            second, _ = listening.accept()
            with second, socket.create_connection(to) as behind:
                second.settimeout(60)
                back = threading.Thread(target=copy, args=(behind, second), daemon=True)
                back.start()
                copy(second, behind)
                back.join(60)

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        with remote(kind, f"http://127.0.0.1:{listening.getsockname()[1]}") as client:
            assert client.enqueue(chunks(), collection="docs").id == 7
        serving.join(60)
    assert sent(well.asked[-1]) == expected(CHUNKS)


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_two_enqueues_have_two_keys(kind: str) -> None:
    with scripted(lambda _: WELL) as server, remote(kind, server.url) as client:
        client.enqueue(CHUNKS, collection="docs")
        client.enqueue(CHUNKS, collection="docs")
    assert len({asked.headers["idempotency-key"] for asked in server.asked}) == 2


def test_an_enqueue_that_gives_up_says_under_which_key_it_can_be_completed(kind: str) -> None:
    with scripted(lambda _: HANGS_UP) as server, remote(kind, server.url) as client:
        client.client._verbs._clock = itertools.count(0, 5).__next__
        with pytest.raises(GatewayUnavailable, match="idempotency_key='mine'"):
            client.enqueue(CHUNKS[:3], collection="docs", idempotency_key="mine")
        assert len(server.asked) > 1


@pytest.mark.parametrize(("kind", "source"), SOURCES)
def test_a_bad_chunk_breaks_the_request_off_and_is_named(kind: str, source: Any) -> None:
    chunks = [*CHUNKS, Chunk("bad", " "), *CHUNKS]
    with scripted(lambda _: WELL) as server, remote(kind, server.url) as client:
        with pytest.raises(InvalidChunk) as raised:
            client.enqueue(source(chunks), collection="docs")
        assert (raised.value.chunk_id, raised.value.position) == ("bad", 1_000)
        assert not any(asked.body.endswith(b"}\n") and len(sent(asked)) == 2_001 for asked in server.asked)


def test_an_error_of_the_callers_iterable_is_the_callers(kind: str) -> None:
    class OfTheCaller(OSError):
        pass

    def chunks() -> Iterator[Chunk]:
        yield from CHUNKS
        raise OfTheCaller

    async def asynchronous_chunks() -> AsyncIterator[Chunk]:
        for chunk in CHUNKS:
            yield chunk
        raise OfTheCaller

    with scripted(lambda _: WELL) as server, remote(kind, server.url) as client:
        with pytest.raises(OfTheCaller):
            client.enqueue(chunks(), collection="docs")
        if kind == "async":
            with pytest.raises(OfTheCaller):
                client.enqueue(asynchronous_chunks(), collection="docs")
        else:
            with pytest.raises(InvalidInput, match="AsyncRemoteClient"):
                client.enqueue(asynchronous_chunks(), collection="docs")


def test_skipped_chunks_travel_to_the_dead_list_whatever_they_hold(kind: str) -> None:
    bad = [
        Chunk("blank", " "),
        ("surrogate", "\ud800"),
        ("object", "text", {"n": object()}),
        ("bytes", b"text"),
        {"id": "dict", "text": ""},
        7,
        Chunk("good", "text"),
    ]
    with scripted(lambda _: WELL) as server, remote(kind, server.url) as client:
        client.enqueue(bad, collection="docs", on_invalid="skip")
    assert sent(server.asked[0]) == [
        {"id": "blank", "text": " ", "metadata": {}},
        {"id": "surrogate", "text": "\ud800", "metadata": {}},
        {"id": "object", "text": "text", "metadata": "not a JSON object"},
        {"id": "bytes", "text": None, "metadata": {}},
        {"id": "dict", "text": "", "metadata": {}},
        {"id": None, "text": None, "metadata": {}},
        {"id": "good", "text": "text", "metadata": {}},
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"collection": ""},
        {"collection": "docs", "on_invalid": "maybe"},
        {"collection": "docs", "route": "post"},
        {"collection": "docs", "idempotency_key": "schlüssel"},
        {"collection": "docs", "idempotency_key": "a\nb"},
        {"collection": "docs", "deadline": -1},
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_sent(kind: str, arguments: dict[str, Any]) -> None:
    with scripted(lambda _: WELL) as server, remote(kind, server.url) as client:
        with pytest.raises(InvalidInput):
            client.enqueue(CHUNKS, **arguments)
        with pytest.raises(InvalidInput):
            client.enqueue("text", collection="docs")
        assert server.asked == []


def test_a_long_stream_that_is_sent_twice_stays_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MEMORY_BYTES", 100_000)
    source = Lines(Chunk(f"{i}", f"{i} " + "x" * 10_000) for i in range(2_000))
    tracemalloc.start()
    try:
        first = sum(map(len, source.pieces()))
        assert first > 20_000_000
        assert sum(map(len, source.pieces())) == first
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
        source.close()


def test_a_disk_that_is_full_is_said_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Lines(iter(CHUNKS))

    class Full:
        def seek(self, *_: int) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    pieces = source.pieces()
    next(pieces)
    source.close()
    monkeypatch.setattr(source, "_kept", Full())
    with pytest.raises(SourceFailed) as raised:
        next(pieces)
    assert isinstance(raised.value.error, InvalidSetting) and "No space left" in str(raised.value.error)


def test_a_stream_that_was_cut_in_the_middle_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "PIECE_BYTES", 3_000)
    source = Lines(iter(CHUNKS))
    whole = [{"id": chunk.id, "text": chunk.text, "metadata": dict(chunk.metadata)} for chunk in CHUNKS]
    for taken in (1, 5, 2, 40):
        pieces = source.pieces()
        for _ in range(taken):
            next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert [json.loads(line) for line in b"".join(source.pieces()).splitlines()] == whole
    source.close()
