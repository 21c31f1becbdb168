"""GCP's, AWS's and Azure's metadata services on the loopback. Each is as strict as the real one, and can misbehave.

They refuse what the clouds document that they refuse: a wrong or missing header, a token that is missing, unknown or
expired, an unknown version, and any request that a proxy passed on (``X-Forwarded-For``).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.waiting import PATIENCE

Trouble = Callable[["Handler"], None]
"""A function that answers a request wrongly, with the handler's socket."""


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """The names of the headers are in lower case."""
    troubled: bool = False
    status: int = 0


@dataclass
class Answer:
    status: int
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_one_request(self) -> None:
        # Several tests are about a client that ends the connection during its request.
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def answer(self) -> None:
        service = self.server.service
        parts = urlsplit(self.path)
        request = Request(
            self.command,
            parts.path,
            {name: values[0] for name, values in parse_qs(parts.query).items()},
            {name.lower(): value for name, value in self.headers.items()},
        )
        with service.changed:
            service.requests.append(request)
            service.changed.notify_all()  # because an answer may wait for it
            answer = None if service.trouble else service.answer(request)
            # A request that was waiting when the trouble began is affected too.
            trouble = service.trouble
            request.troubled, request.status = trouble is not None, answer.status if answer else 0
            service.changed.notify_all()
        if trouble is not None:
            self.close_connection = True
            trouble(self)
        elif answer is not None:
            self.reply(answer)

    do_GET = do_PUT = do_POST = answer  # noqa: N815 - http.server's names

    def reply(self, answer: Answer) -> None:
        body = answer.body.encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    service: MetadataServer
    daemon_threads = True


class MetadataServer:
    """A service on a free port while its ``with`` block lasts. ``preempt`` lets it say that the machine is taken."""

    cloud: str
    notice_path: str

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.requests: list[Request] = []
        self.trouble: Trouble | None = None
        self.notice = False
        self.closing = threading.Event()

    def __enter__(self) -> MetadataServer:
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.service = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name=self.cloud, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        self._server.shutdown()
        self._thread.join(PATIENCE)
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def preempt(self) -> None:
        with self.changed:
            self.notice = True
            self.changed.notify_all()

    def misbehave(self, trouble: Trouble | None) -> None:
        """Answer with ``trouble`` from now on, also requests that are waiting. None ends the trouble."""
        with self.changed:
            self.trouble = trouble
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE), [(r.method, r.path) for r in self.requests]

    def asked(self, path: str, *, troubled: bool = False) -> int:
        return sum(r.path == path and r.troubled == troubled for r in self.requests)

    def answer(self, request: Request) -> Answer | None:
        """Return the answer. The caller holds ``changed``, and an answer that waits releases it meanwhile."""
        raise NotImplementedError


class GcpServer(MetadataServer):
    cloud = "gcp"
    notice_path = "/computeMetadata/v1/instance/preempted"

    def __init__(self) -> None:
        super().__init__()
        self.value = "FALSE"
        self.etag = secrets.token_hex(8)
        self.after_answer: Callable[[], None] | None = None

    def preempt(self) -> None:
        self.set_value("TRUE")

    def set_value(self, value: str) -> None:
        with self.changed:
            self.value, self.etag = value, secrets.token_hex(8)
            self.changed.notify_all()

    def answer(self, request: Request) -> Answer | None:
        google = {"Metadata-Flavor": "Google", "Server": "Metadata Server for VM"}
        if "x-forwarded-for" in request.headers or request.headers.get("metadata-flavor") != "Google":
            return Answer(403, "<html>Forbidden</html>", google)
        if request.path != self.notice_path:
            return Answer(404, "<html>Not Found</html>", google)
        if request.method != "GET":
            return Answer(405, "", google)
        if request.query.get("wait_for_change") == "true":
            known = request.query.get("last_etag", self.etag)
            seconds = float(int(request.query["timeout_sec"])) if "timeout_sec" in request.query else None
            self.changed.wait_for(lambda: self.etag != known or self.closing.is_set() or self.trouble, seconds)
        answer = Answer(200, self.value, {**google, "ETag": self.etag, "Content-Type": "application/text"})
        if self.after_answer is not None:
            after, self.after_answer = self.after_answer, None
            after()
        return answer


class AwsServer(MetadataServer):
    cloud = "aws"
    notice_path = "/latest/meta-data/spot/instance-action"
    hint_path = "/latest/meta-data/events/recommendations/rebalance"
    token_path = "/latest/api/token"

    def __init__(self) -> None:
        super().__init__()
        self.most_seconds = 21600
        self.action = '{"action": "terminate", "time": "2026-11-21T08:22:00Z"}'
        self.hint = ""
        self.tokens: dict[str, float] = {}
        """When each token expires, on the monotonic clock."""

    def answer(self, request: Request) -> Answer | None:
        if request.path == self.token_path:
            return self._token(request)
        if request.method != "GET":
            return Answer(405)
        if self.tokens.get(request.headers.get("x-aws-ec2-metadata-token", ""), 0) < time.monotonic():
            return Answer(401, "<html>Unauthorized</html>")  # IMDSv1 gets this too
        if request.path == self.notice_path and self.notice:
            return Answer(200, self.action, {"Content-Type": "application/json"})
        if request.path == self.hint_path and self.hint:
            return Answer(200, self.hint, {"Content-Type": "application/json"})
        return Answer(404, "<html>Not Found</html>")

    def _token(self, request: Request) -> Answer:
        if request.method != "PUT":
            return Answer(405)
        if "x-forwarded-for" in request.headers:
            return Answer(403)
        asked = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if not asked.isdecimal() or not 1 <= int(asked) <= 21600:
            return Answer(400)
        seconds = min(int(asked), self.most_seconds)
        token = secrets.token_urlsafe(40) + "=="
        self.tokens[token] = time.monotonic() + seconds
        return Answer(200, token, {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": str(seconds)})

    def forget_tokens(self) -> None:
        with self.changed:
            self.tokens.clear()


class AzureServer(MetadataServer):
    cloud = "azure"
    notice_path = "/metadata/scheduledevents"
    name_path = "/metadata/instance/compute/name"

    def __init__(self) -> None:
        super().__init__()
        self.machine = "spot_3"
        self.enabled = True
        """If it is False, the first request for events waits until :meth:`enable` is called."""
        self.events: list[Any] = []

    def preempt(self) -> None:
        self.schedule(event("Preempt", self.machine))

    def schedule(self, *events: Any) -> None:
        with self.changed:
            self.events = list(events)

    def enable(self) -> None:
        with self.changed:
            self.enabled = True
            self.changed.notify_all()

    def answer(self, request: Request) -> Answer | None:
        if request.headers.get("metadata") != "true" or "x-forwarded-for" in request.headers:
            return Answer(400, '{"error": "Bad request"}')
        if request.path not in (self.notice_path, self.name_path):
            return Answer(404, '{"error": "Not found"}')
        if request.method != "GET":
            return Answer(405)
        version = request.query.get("api-version")
        if request.path == self.name_path:
            if version != "2021-02-01" or request.query.get("format") != "text":
                return Answer(400, '{"error": "Bad request. api-version is invalid or was not specified"}')
            return Answer(200, self.machine, {"Content-Type": "text/plain; charset=utf-8"})
        if version != "2020-07-01":
            return Answer(400, '{"error": "Bad request. api-version is invalid or was not specified"}')
        self.changed.wait_for(lambda: self.enabled or self.closing.is_set() or self.trouble)
        return Answer(200, json.dumps({"DocumentIncarnation": 1, "Events": self.events}))


def event(kind: str, *machines: str) -> dict[str, Any]:
    return {
        "EventId": "C7061BAC-AFDC-4513-B24B-AA5F13A16123",
        "EventStatus": "Scheduled",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": list(machines),
        "NotBefore": "Sat, 21 Nov 2026 08:22:30 GMT",
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    }


# --- misbehaviour -------------------------------------------------------------------------------------------------


def says(status: int, body: str = "", **headers: str) -> Trouble:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.reply(Answer(status, body, named))


def sends(raw: bytes) -> Trouble:
    """Send these bytes and end the connection."""
    return lambda handler: _write(handler, raw)


def hangs_up(handler: Handler) -> None:
    """End the connection without an answer."""


def falls_silent(handler: Handler) -> None:
    handler.server.service.closing.wait(PATIENCE)


def drips(handler: Handler) -> None:
    """Send a header byte by byte for ever: no single read is slow, and the answer never ends."""
    _write(handler, b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.server.service.closing.wait(0.02):
        _write(handler, b"x")


def floods(handler: Handler) -> None:
    _write(handler, b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\n\r\n")
    while not handler.server.service.closing.is_set():
        _write(handler, b"x" * 65536)


def _write(handler: Handler, raw: bytes) -> None:
    handler.wfile.write(raw)
    handler.wfile.flush()


@contextlib.contextmanager
def stub(answer: Trouble) -> Iterator[MetadataServer]:
    """A server that answers every request in this way, as a captive portal or a proxy would."""
    server = MetadataServer()
    server.cloud = "stub"
    server.misbehave(answer)
    with server:
        yield server
