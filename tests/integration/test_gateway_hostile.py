"""Hostile callers: each gets a clear 4xx in the form of OpenAI's, over real sockets, and takes no memory."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from chunkmill.db.connect import create_db
from chunkmill.embedded import StackStatus
from chunkmill.gateway import protocol
from chunkmill.gateway.addresses import LOOPBACK_NAMES
from chunkmill.gateway.exchange import Exchange
from chunkmill.settings import Settings
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from tests.conftest import fresh_settings
from tests.support.gateway_endpoints import ENDPOINTS, MOST_BYTES
from tests.support.gateways import KEY, RunningGateway, StandInWorker, running_gateway, stand_in_worker
from tests.support.raw_http import RawAnswer, connect, head, is_closed, post, read_answer
from tests.support.waiting import until

EMBED = "/test/embed"
GOOD = json.dumps({"texts": ["a b"]}).encode()
SECRET = "the words of a text that must be in no error"


@dataclass(frozen=True, slots=True)
class Two:
    settings: Settings
    db: sa.Engine
    worker: StandInWorker
    gateways: tuple[RunningGateway, RunningGateway]


@pytest.fixture(scope="module")
def two(stack: StackStatus) -> Iterator[Two]:
    with fresh_settings(stack) as settings, contextlib.ExitStack() as open_ones:
        settings = settings.model_copy(update={"gateway_waiting_tokens": 4000, "gateway_waiting_texts": 200})
        db = create_db(settings.require_database_url(), role="test")
        open_ones.callback(db.dispose)
        worker = open_ones.enter_context(stand_in_worker(db))
        gateways = [open_ones.enter_context(running_gateway(settings, endpoints=ENDPOINTS)) for _ in range(2)]
        for gateway in gateways:
            gateway.gateway.hosts = LOOPBACK_NAMES
        yield Two(settings, db, worker, (gateways[0], gateways[1]))


def text(words: str) -> bytes:
    return json.dumps({"texts": [words]}).encode()


Case = tuple[str, bytes, int, str]
CASES: list[Case] = [
    # Bodies that are no JSON, or no object.
    ("nothing at all", post(EMBED, KEY, b""), 400, "invalid_json"),
    ("half a JSON", post(EMBED, KEY, GOOD[:-2]), 400, "invalid_json"),
    ("a list", post(EMBED, KEY, b"[1]"), 400, "invalid_json"),
    ("bytes that are no UTF-8", post(EMBED, KEY, b'{"texts": ["\xff\xfe"]}'), 400, "invalid_json"),
    ("overlong UTF-8", post(EMBED, KEY, b'{"texts": ["\xc0\xaf"]}'), 400, "invalid_json"),
    ("UTF-16", post(EMBED, KEY, json.dumps({"texts": ["a"]}).encode("utf-16")), 400, "invalid_json"),
    ("a lone surrogate", post(EMBED, KEY, rb'{"texts": ["\ud800"]}'), 400, "invalid_json"),
    ("a million brackets", post(EMBED, KEY, b"[" * 1_000_000), 400, "invalid_json"),
    ("a million nested objects", post(EMBED, KEY, b'{"a":' * 200_000), 400, "invalid_json"),
    ("a number of a million digits", post(EMBED, KEY, b'{"texts": ' + b"9" * 1_000_000 + b"}"), 400, "invalid_json"),
    ("infinity", post(EMBED, KEY, b'{"texts": ["a"], "timeout": 1e999}'), 400, "invalid_json"),
    ("NaN", post(EMBED, KEY, b'{"texts": ["a"], "timeout": NaN}'), 400, "invalid_json"),
    ("a NUL in a text", post(EMBED, KEY, text(SECRET + "\0")), 400, "invalid_chunk"),
    ("a NUL between", post(EMBED, KEY, GOOD + b"\0"), 400, "invalid_json"),
    # Sizes and forms of bodies.
    ("a body that is too long", post(EMBED, KEY, b" " * (MOST_BYTES + 1)), 413, "body_too_large"),
    ("gzip", post(EMBED, KEY, gzip.compress(GOOD), ("Content-Encoding", "gzip")), 415, "unsupported_encoding"),
    (
        "a gzip bomb",
        post(EMBED, KEY, 100 * gzip.compress(bytes(10**6), 9), ("Content-Encoding", "gzip")),
        415,
        "unsupported_encoding",
    ),
    ("two encodings", post(EMBED, KEY, GOOD, ("Content-Encoding", "br, gzip")), 415, "unsupported_encoding"),
    (
        "a form",
        post(EMBED, KEY, b"texts=a", ("Content-Type", "application/x-www-form-urlencoded")),
        400,
        "invalid_json",
    ),
    (
        "a file",
        post(EMBED, KEY, GOOD, ("Content-Type", "multipart/form-data; boundary=a")),
        415,
        "unsupported_media_type",
    ),
    ("plain text", post(EMBED, KEY, GOOD, ("Content-Type", "text/plain")), 415, "unsupported_media_type"),
    # Methods.
    ("GET where POST is", head("GET", EMBED, KEY), 405, "method_not_allowed"),
    ("OPTIONS", head("OPTIONS", EMBED, KEY), 405, "method_not_allowed"),
    ("TRACE", head("TRACE", EMBED, KEY), 405, "method_not_allowed"),
    ("PUT", head("PUT", EMBED, KEY, [("Content-Length", "0")]), 405, "method_not_allowed"),
    ("CONNECT", head("CONNECT", "127.0.0.1:22", KEY), 400, "invalid_request"),
    ("a method that does not exist", head("BREW", EMBED, KEY), 400, "invalid_request"),
    # Paths.
    ("a path of dots", head("GET", "/v1/../../etc/passwd", KEY), 404, "not_found"),
    ("encoded dots", head("GET", "/%2e%2e/%2e%2e/etc/passwd", KEY), 404, "not_found"),
    ("an encoded NUL", head("GET", "/live%00", KEY), 404, "not_found"),
    ("a double slash", head("GET", "//live", KEY), 404, "not_found"),
    ("a slash behind", head("GET", "/live/", KEY), 404, "not_found"),
    ("another host's URL", head("GET", "http://evil.example/nowhere", KEY), 404, "not_found"),
    ("bytes in a path that are no UTF-8", head("GET", "/live%ff", KEY), 404, "not_found"),
    ("CRLF in a path", head("GET", "/live%0d%0aSet-Cookie:%20a=b", KEY), 404, "not_found"),
    ("a path of 20,000 characters", head("GET", "/" + "a" * 20_000, KEY), 431, "headers_too_large"),
    # Headers.
    ("a header of 17 KiB", head("GET", "/live", KEY, [("X-A", "a" * 17 * 1024)]), 431, "headers_too_large"),
    (
        "a thousand headers",
        head("GET", "/live", KEY, [(f"X-{i}", "a" * 16) for i in range(1000)]),
        431,
        "headers_too_large",
    ),
    ("a NUL in a header", head("GET", "/live", KEY, [("X-A", "a\0b")]), 400, "invalid_request"),
    ("a space before the colon", b"GET /live HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n", 400, "invalid_request"),
    ("a folded header", b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: a\r\n b\r\n\r\n", 400, "invalid_request"),
    ("no host", b"GET /live HTTP/1.1\r\n\r\n", 400, "invalid_request"),
    ("two hosts", b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", 400, "invalid_request"),
    ("another name for loopback", head("GET", "/live", KEY, host="evil.example"), 421, "invalid_host"),
    ("another name with a port", head("GET", "/live", KEY, host="evil.example:8080"), 421, "invalid_host"),
    ("a name that begins alike", head("GET", "/live", KEY, host="localhost.evil.example"), 421, "invalid_host"),
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400, "invalid_request"),
    ("HTTP/2 without asking", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_request"),
    ("HTTP/9.9", b"GET /live HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n", 400, "invalid_request"),
    # Two readings of where a request ends.
    (
        "length and chunks",
        head("POST", EMBED, KEY, [("Content-Length", "4"), ("Transfer-Encoding", "chunked")]) + b"0\r\n\r\n",
        400,
        "invalid_request",
    ),
    (
        "chunks and length",
        head("POST", EMBED, KEY, [("Transfer-Encoding", "chunked"), ("Content-Length", "4")]) + b"0\r\n\r\n",
        400,
        "invalid_request",
    ),
    (
        "two lengths",
        head("POST", EMBED, KEY, [("Content-Length", "4"), ("Content-Length", "5")]) + b"abcd",
        400,
        "invalid_request",
    ),
    ("a negative length", head("POST", EMBED, KEY, [("Content-Length", "-1")]), 400, "invalid_request"),
    ("a length with a sign", head("POST", EMBED, KEY, [("Content-Length", "+4")]) + b"abcd", 400, "invalid_request"),
    ("a length beyond 64 bits", head("POST", EMBED, KEY, [("Content-Length", "9" * 30)]), 400, "invalid_request"),
    ("a length that is never sent", head("POST", EMBED, KEY, [("Content-Length", str(2**40))]), 413, "body_too_large"),
    (
        "a chunk size that is no number",
        head("POST", EMBED, KEY, [("Transfer-Encoding", "chunked")]) + b"zz\r\n",
        400,
        "invalid_request",
    ),
    (
        "an encoding that is not chunked",
        head("POST", EMBED, KEY, [("Transfer-Encoding", "gzip")]) + b"abcd",
        400,
        "invalid_request",
    ),
    (
        "chunked, disguised",
        head("POST", EMBED, KEY, [("Transfer-Encoding", "xchunked")]) + b"0\r\n\r\n",
        400,
        "invalid_request",
    ),
    # Keys.
    ("no key", post(EMBED, None, GOOD), 401, "invalid_api_key"),
    ("another key", post(EMBED, "sk-1234567890", GOOD), 401, "invalid_api_key"),
    ("a key that is no ASCII", post(EMBED, "\xff\xfe", GOOD), 401, "invalid_api_key"),
    ("a very long key", post(EMBED, "a" * 10_000, GOOD), 401, "invalid_api_key"),
]


@pytest.mark.parametrize(("name", "sent", "status", "code"), CASES, ids=[name for name, *_ in CASES])
def test_what_is_hostile_gets_a_clear_refusal(two: Two, name: str, sent: bytes, status: int, code: str) -> None:
    for gateway in two.gateways:
        answer = exchange(gateway, sent)
        assert (answer.status, answer.json()["error"]["code"]) == (status, code), answer.body
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].endswith(".")
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"].startswith("req_")
        assert SECRET.encode() not in answer.body
        assert KEY.encode() not in answer.body
        assert "set-cookie" not in answer.headers
        assert not answer.rest, "one request has one answer"
    for gateway in two.gateways:
        assert exchange(gateway, head("GET", "/live", None)).status == 200
        assert (gateway.gateway.limits.room.texts, gateway.gateway.limits.room.tokens) == (0, 0)


def exchange(gateway: RunningGateway, sent: bytes) -> RawAnswer:
    with connect(gateway.url) as connection:
        sender = threading.Thread(target=_send, args=[connection, sent])
        sender.start()
        try:
            return read_answer(connection)
        finally:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            sender.join()


def _send(connection: socket.socket, sent: bytes) -> None:
    with contextlib.suppress(OSError):  # the server may answer and leave before it has read everything
        connection.sendall(sent)


def test_what_looks_odd_and_is_right_is_answered(two: Two) -> None:
    chunked = head("POST", EMBED, KEY, [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")])
    for part in (GOOD[:5], GOOD[5:]):
        chunked += b"%x\r\n%s\r\n" % (len(part), part)
    odd = [
        chunked + b"0\r\n\r\n",
        post(EMBED, KEY, b'{"texts": ["x"], "texts": ["a", "b"]}'),  # the last one counts, as with OpenAI
        post(EMBED, KEY, GOOD, ("Content-Type", "application/json; charset=utf-8")),
        post(EMBED, KEY, GOOD, ("Content-Encoding", "identity")),
        post(EMBED, KEY, GOOD, ("Content-Type", "application/x-www-form-urlencoded")),  # as `curl -d` says
        head("GET", "/live", None, host="localhost:8080"),
        head("GET", "/live", None, host="LOCALHOST"),
        head("GET", "/live", None, host="[::1]:8080"),
        head("GET", "/live", None, [("X-A", "a" * 15 * 1024)]),
        b"GET /live HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n",
    ]
    for sent in odd:
        assert exchange(two.gateways[0], sent).status == 200, sent[:100]


def test_a_second_request_behind_the_first_gets_an_answer_of_its_own(two: Two) -> None:
    with connect(two.gateways[0].url) as connection:
        connection.sendall(post(EMBED, KEY, GOOD) + head("GET", "/nowhere", None))
        first = read_answer(connection)
        second = first.rest or connection.recv(65536)
    assert first.status == 200
    assert second.startswith(b"HTTP/1.1 404")


def test_an_answer_to_HEAD_has_no_body(two: Two) -> None:  # noqa: N802 - the method's name
    with connect(two.gateways[0].url) as connection:
        connection.sendall(head("HEAD", "/live", None))
        received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")
    assert received.endswith(b"\r\n\r\n")


def test_a_fault_of_ours_says_nothing_of_it(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    answer = exchange(two.gateways[0], head("GET", "/test/fails", KEY))
    assert (answer.status, answer.json()["error"]["code"]) == (500, "internal")
    assert "a fault of ours" not in answer.body.decode()
    assert answer.headers["x-request-id"] in caplog.text


def test_slow_headers_and_slow_bodies_are_cut(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    gateway = two.gateways[0]
    gateway.gateway.settings = gateway.gateway.settings.model_copy(update={"gateway_body_seconds": 0.3})
    try:
        with connect(gateway.url) as silent, connect(gateway.url) as slow_head, connect(gateway.url) as slow_body:
            slow_head.sendall(b"GET /live HTTP/1.1\r\nX-A: ")
            slow_body.sendall(head("POST", EMBED, KEY, [("Content-Length", "1000")]) + b"{")
            slow = read_answer(slow_head)
            assert (slow.status, slow.json()["error"]["code"]) == (408, "headers_too_slow")
            slow = read_answer(slow_body)
            assert (slow.status, slow.json()["error"]["code"]) == (408, "body_too_slow")
            assert all(map(is_closed, (silent, slow_head, slow_body)))
    finally:
        gateway.gateway.settings = two.settings


def test_a_head_without_an_end_is_cut_at_its_limit(two: Two) -> None:
    with connect(two.gateways[0].url) as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nX-A: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"a" * 1000)
        with contextlib.suppress(ConnectionError):  # what the kernel dropped with the rest of the head
            assert read_answer(connection).status == 431


def test_open_connections_without_a_request_make_room_for_those_with_one(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = two.gateways[0]
    with contextlib.ExitStack() as opened:
        busy = opened.enter_context(connect(gateway.url))
        busy.sendall(head("GET", "/test/wait/1", KEY))
        until(lambda: len(exchanges_of("/test/wait/{number}")) == 1)
        monkeypatch.setattr(protocol_of(gateway), "most_connections", 8)
        idle = [opened.enter_context(connect(gateway.url)) for _ in range(30)]
        assert exchange(gateway, post(EMBED, KEY, GOOD)).status == 200
        idle[0].settimeout(protocol.HEAD_SECONDS / 2)
        assert is_closed(idle[0]), "the oldest goes first"
        until(lambda: len(protocol_of(gateway).idle) <= 8)
        assert len(exchanges_of("/test/wait/{number}")) == 1, "and none that has a request"
        monkeypatch.setattr(protocol_of(gateway), "idle", {})
        monkeypatch.setattr(protocol_of(gateway), "most_connections", 1)
        refused = exchange(gateway, head("GET", "/live", None))
        assert (refused.status, refused.json()["error"]["code"]) == (503, "too_many_connections")


def protocol_of(gateway: RunningGateway) -> type[protocol.GatewayProtocol]:
    port = int(gateway.url.rpartition(":")[2])
    (one,) = {
        type(get_object)
        for get_object in gc.get_objects()
        if isinstance(get_object, protocol.GatewayProtocol) and get_object.server and get_object.server[1] == port
    }
    return one


def exchanges_of(path: str) -> list[Exchange]:
    """The requests for ``path`` that are not answered yet."""
    return [one for one in gc.get_objects() if isinstance(one, Exchange) and one.path == path and not one.status]


def test_when_the_room_is_full_large_requests_are_refused_before_their_body_and_small_ones_are_not(two: Two) -> None:
    gateway = two.gateways[0]
    room = gateway.gateway.limits.room
    two.worker.may.clear()
    with contextlib.ExitStack() as opened:
        try:
            large = json.dumps({"texts": ["a"] * 140}).encode()
            for connection in (opened.enter_context(connect(gateway.url)),):
                connection.sendall(post(EMBED, KEY, large))
            until(lambda: room.texts == 140)
            refused = exchange(gateway, post(EMBED, KEY, large))
            assert (refused.status, refused.json()["error"]["code"]) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["x-should-retry"] == "true"
            unread = exchange(gateway, head("POST", EMBED, KEY, [("Content-Length", str(MOST_BYTES))]))
            assert (unread.status, unread.json()["error"]["code"]) == (429, "overloaded")
            small = opened.enter_context(connect(gateway.url))
            small.sendall(post(EMBED, KEY, GOOD))
            until(lambda: room.texts == 141)
            assert exchange(two.gateways[1], head("GET", "/live", None)).status == 200
        finally:
            two.worker.may.set()
        assert read_answer(small).status == 200
    until(lambda: (room.texts, room.tokens) == (0, 0))


def test_hostile_callers_take_no_memory(two: Two) -> None:
    def once() -> None:
        for _, sent, _, _ in CASES:
            for gateway in two.gateways:
                exchange(gateway, sent)

    once()
    before = resident_bytes()
    for _ in range(2):
        once()
    gc.collect()
    assert resident_bytes() - before < 24 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_log_has_a_line_for_each_request_without_texts_and_keys(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chunkmill.gateway.access")
    answer = exchange(two.gateways[0], post(EMBED, KEY, text(SECRET)))
    assert answer.status == 200
    until(lambda: [one for one in caplog.records if one.name == "chunkmill.gateway.access"])
    (line,) = [one for one in caplog.records if one.name == "chunkmill.gateway.access"]
    fields = vars(line)
    assert (fields["method"], fields["path"], fields["status"], fields["key"]) == ("POST", EMBED, 200, "local")
    assert (fields["model"], fields["texts"]) == (two.settings.embedding_model, 1)
    assert fields["request"] == answer.headers["x-request-id"]
    assert fields["tokens"] == len(SECRET.split()) + 2
    exchange(two.gateways[0], head("GET", f"/test/wait/{SECRET.replace(' ', '-')}?q=secret-query", "wrong-key"))
    said = " ".join(f"{one.getMessage()} {vars(one)}" for one in caplog.records)
    for secret in (SECRET, SECRET.replace(" ", "-"), "secret-query", "wrong-key", KEY):
        assert secret not in said


def test_the_metrics_count_requests_by_scope_result_and_kind_of_key(two: Two) -> None:
    def count(*labels: str) -> float:
        return dict(COUNTS.series(metrics.GATEWAY_REQUESTS, frozenset({metrics.Role.GATEWAY}))).get(labels, 0.0)

    kinds = [("embed", "ok", "other"), ("embed", "refused", "other"), ("other", "ok", "other")]
    before = [count(*kind) for kind in kinds]
    for sent in (post(EMBED, KEY, GOOD), post(EMBED, None, GOOD), head("GET", "/live", None)):
        exchange(two.gateways[0], sent)
    until(lambda: [count(*kind) for kind in kinds] == [number + 1 for number in before])


def test_callers_who_hang_up_leave_no_row_and_nothing_is_computed(two: Two) -> None:
    hang_up(two, 60)


@pytest.mark.slow
def test_two_thousand_callers_who_hang_up_leave_no_row_and_nothing_is_computed(two: Two) -> None:
    hang_up(two, 2000)


def hang_up(two: Two, number: int) -> None:
    for gateway in two.gateways:
        gateway.gateway.limits.room._most_texts = 10 * number
        gateway.gateway.limits.room._most_tokens = 100 * number
    two.worker.may.clear()
    two.worker.asked.clear()
    opened: list[socket.socket] = []
    try:
        for i in range(number):
            opened.append(connect(two.gateways[i % 2].url))
            opened[-1].sendall(post(EMBED, KEY, text(f"text {i}")))
        until(partial(has_rows, two.db, number))
        for connection in opened:
            connection.close()
        until(partial(has_rows, two.db, 0))
    finally:
        two.worker.may.set()
        for connection in opened:
            connection.close()
    assert exchange(two.gateways[0], post(EMBED, KEY, GOOD)).status == 200
    assert two.worker.asked == [("a b",)]
    for gateway in two.gateways:
        assert (gateway.gateway.limits.room.texts, gateway.gateway.limits.room.tokens) == (0, 0)


def has_rows(db: sa.Engine, number: int) -> bool:
    with db.begin() as conn:
        return conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one() == number


def test_hung_up_waits_end(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that does not look for its caller itself."""
    caplog.set_level(logging.INFO, "chunkmill.gateway.access")
    for gateway in two.gateways:
        with connect(gateway.url) as connection:
            connection.sendall(head("GET", "/test/wait/1", KEY))
            until(lambda: len(exchanges_of("/test/wait/{number}")) == 1)
        until(lambda: not exchanges_of("/test/wait/{number}"))
    until(lambda: [getattr(one, "status", 0) for one in caplog.records].count(499) == 2)


def test_an_upload_whose_caller_hangs_up_ends(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chunkmill.gateway.access")
    with connect(two.gateways[0].url) as connection:
        connection.sendall(head("POST", "/test/upload", KEY, [("Content-Length", "1000")]) + b"abc")
    until(lambda: [one for one in caplog.records if getattr(one, "status", 0) == 499])
