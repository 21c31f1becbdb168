"""The HTTP side: one thread per connection, bodies spooled to disk, and misbehaviour around every answer."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.openai_server import control, odd, routes
from tests.openai_server.errors import ApiError, Cut, bad, cannot_find_file, no_such_file, rate_limited
from tests.openai_server.exchange import Answer, Request
from tests.openai_server.kinds import ODD
from tests.openai_server.misbehaviours import Subject
from tests.openai_server.store import Store

BLOCK = 1 << 16


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, store: Store) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store = store


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the client's delayed acknowledgement makes every answer 40 ms late
    server: Server
    key_given: str

    def log_message(self, *_: Any) -> None:
        """The books say more than a log would."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # clients are killed in mid-request; that is what they are for
            self.close_connection = True
        except Cut:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self) -> None:
        store = self.server.store
        parts = urlsplit(self.path)
        number = store.new_id("req_")
        with self.spooled(store.folder / number) as body:
            if parts.path.startswith("/_control/"):
                self.control(parts.path.removeprefix("/_control/"), body)
                return
            try:
                route, object_id = routes.find(self.command, unquote(parts.path))
            except ApiError as error:
                self.send_json(error.status, error.body(), {"x-request-id": number})
                return
            query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            with store.under_way():
                self.exchange(route, Request(route.name, object_id, query, headers, body, number))

    do_GET = do_POST = do_DELETE = answer  # noqa: N815 - http.server's names

    def exchange(self, route: routes.Route, request: Request) -> None:
        """One request of a client: trouble before it is carried out, trouble after it, or the true answer."""
        store = self.server.store
        delays = store.config.delays
        store.rest(delays.get(request.endpoint, delays.get("*", 0.0)))
        subject = {"id": request.id, **self.told(request), "endpoint": request.endpoint}
        try:
            self.authorize(request)
            self.refuse(subject)
            kind, wish = self.spoiling(subject)
            if kind is None or wish["applied"]:
                self.check_owner(request)
                answer = route.answer(store, request)
                self.own(request, answer)
            if kind in ODD:
                store.count(request.endpoint, kind)
                odd.send(self, store.rest, kind, wish, answer if wish["applied"] else None)
                return
            if kind is not None:
                answer = self.spoilt(kind, wish)
        except ApiError as error:
            answer = Answer(error.body(), error.status, error.headers)
        except Cut:
            store.count(request.endpoint, "cut")
            raise
        answer.headers = {"x-request-id": request.number, **answer.headers}
        # Before it goes out: whoever has an answer finds it in the books.
        store.count(request.endpoint, str(answer.status) if answer.cut_at is None else "cut")
        self.send_answer(answer)

    def told(self, request: Request) -> Subject:
        """What a misbehaviour's ``where`` may name beside the endpoint and the id."""
        store = self.server.store
        file, batch = store.files.get(request.id), store.batches.get(request.id)
        if file is not None:
            return {"filename": file.filename, "purpose": file.purpose}
        return {} if batch is None else {**batch.subject, "id": batch.id}

    def authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = request.headers.get("api-key", given)
        if not given:
            raise ApiError(401, "You didn't provide an API key.")
        self.key_given = given
        if given != self.server.store.key and given not in self.server.store.config.other_keys:
            raise ApiError(401, f"Incorrect API key provided: {given[:7]}***.", code="invalid_api_key")
        if self.server.store.misbehaviours.strike("unauthorized", {"endpoint": request.endpoint}) is not None:
            raise ApiError(401, f"Incorrect API key provided: {given}.", code="invalid_api_key")

    def check_owner(self, request: Request) -> None:
        """ApiError if the file or batch belongs to another project, whose existence is not admitted."""
        store = self.server.store
        if request.id and store.owner(request.id) not in (None, self.key_given):
            if request.endpoint.startswith("batches."):
                raise ApiError(404, f"No batch found with id '{request.id}'.", param="batch_id")
            raise no_such_file(request.id)
        if request.endpoint == "batches.create":
            file_id = request.json().get("input_file_id")
            if store.owner(str(file_id)) not in (None, self.key_given):
                raise bad(cannot_find_file(str(file_id)), param="file_id")

    def own(self, request: Request, answer: Answer) -> None:
        """Note whose the new object is, and list only what is the asking project's."""
        store = self.server.store
        if answer.body is None:
            return
        if request.endpoint in ("files.create", "batches.create"):
            with store.changed:
                store.owners[str(answer.body["id"])] = self.key_given
        elif request.endpoint in ("files.list", "batches.list"):
            ours = [item for item in answer.body["data"] if store.owner(item["id"]) in (None, self.key_given)]
            answer.body["data"] = ours

    def refuse(self, subject: Subject) -> None:
        """ApiError where the organisation's limits are said to be reached; or a wait before all goes on."""
        strike = self.server.store.misbehaviours.strike
        if (wish := strike("slow", subject)) is not None:
            self.server.store.rest(wish["seconds"])
        if (wish := strike("rate_limited", subject)) is not None:
            error = rate_limited("Rate limit reached. Please slow down.", wish["code"])
            wished = {"retry-after": wish["retry_after"], "retry-after-ms": wish["retry_after_ms"]}
            error.headers = {name: str(value) for name, value in wished.items() if value is not None}
            raise error
        if strike("insufficient_quota", subject) is not None:
            message = "You exceeded your current quota, please check your plan and billing details."
            raise rate_limited(message, "insufficient_quota", "insufficient_quota")

    def spoiling(self, subject: Subject) -> tuple[str | None, dict[str, Any]]:
        """What happens to the answer, if anything."""
        for kind in ("http_error", "hang", "cut", *ODD):
            wish = self.server.store.misbehaviours.strike(kind, subject)
            if wish is not None:
                return kind, wish
        return None, {}

    def spoilt(self, kind: str, wish: dict[str, Any]) -> Answer:
        if kind == "hang":
            self.server.store.rest(wish["seconds"])
        if kind != "http_error":
            raise Cut
        headers = {} if wish["retry_after"] is None else {"retry-after": str(wish["retry_after"])}
        error = ApiError(wish["status"], wish["message"], wish["type"], code=wish["code"])
        return Answer(None if wish["html"] else error.body(), wish["status"], headers)

    def control(self, name: str, body: Path) -> None:
        try:
            asked = json.loads(body.read_bytes() or "{}")
            self.send_json(200, control.answer(self.server.store, self.command, name, asked), {})
        except (ValueError, LookupError, TypeError) as error:
            self.send_json(400, {"error": f"{type(error).__name__}: {error}"}, {})

    def send_answer(self, answer: Answer) -> None:
        if answer.file is not None:
            self.send_file(answer)
        elif answer.body is None:
            page = f"<html><body><h1>{answer.status}</h1></body></html>".encode()
            self.send_bytes(answer.status, page, {**answer.headers, "content-type": "text/html"})
        else:
            self.send_json(answer.status, answer.body, answer.headers)

    def send_json(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.send_bytes(status, json.dumps(body).encode(), {"content-type": "application/json", **headers})

    def send_bytes(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, answer: Answer) -> None:
        assert answer.file is not None
        try:
            opened = answer.file.open("rb")
        except FileNotFoundError:  # deleted this moment
            error = no_such_file(answer.file.name)
            self.send_json(error.status, error.body(), answer.headers)
            return
        with opened:
            self.send_response(200)
            headers = {**answer.headers, "content-type": "application/octet-stream"}
            for name, value in {**headers, "content-length": str(answer.length)}.items():
                self.send_header(name, value)
            self.end_headers()
            left = answer.length if answer.cut_at is None else answer.cut_at
            while left:
                block = opened.read(min(BLOCK, left))
                self.wfile.write(block)
                left -= len(block)
        if answer.cut_at is not None:
            raise Cut

    @contextlib.contextmanager
    def spooled(self, path: Path) -> Iterator[Path]:
        """The request's body as a file, all of it read, so that the connection can go on after any answer."""
        try:
            with path.open("wb") as file:
                self.receive(file)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def receive(self, file: IO[bytes]) -> None:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self.copy(file, size)
                self.rfile.readline()
            self.rfile.readline()
            return
        self.copy(file, int(self.headers.get("content-length", 0)))

    def copy(self, file: IO[bytes], left: int) -> None:
        while left:
            block = self.rfile.read(min(BLOCK, left))
            if not block:
                raise Cut
            file.write(block)
            left -= len(block)
