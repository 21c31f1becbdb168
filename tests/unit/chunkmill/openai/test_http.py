"""What the provider answers over HTTP and what we make of it, against a server that answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from chunkmill.errors import (
    InvalidSetting,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
)
from chunkmill.openai.http import LISTED_PAGES, TOKEN_KEY, Provider
from chunkmill.settings import Settings
from tests.support.waiting import PATIENCE

KEY = "sk-test-of-the-answers"


class Answers:
    """The next answer, if one is set; lists are read page by page."""

    def __init__(self) -> None:
        self.status = 200
        self.body: dict[str, Any] = {}
        self.headers: dict[str, str] = {}
        self.pages: list[list[dict[str, Any]]] = []
        self.asked = 0

    def refuse(
        self,
        status: int,
        *,
        code: str | None = None,
        kind: str = "an_error",
        message: str = "No.",
        param: str | None = None,
        **headers: str,
    ) -> None:
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "code": code, "param": param}}
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def page(self, query: dict[str, list[str]]) -> dict[str, Any]:
        """The page after the item that the client has seen last."""
        after = query.get("after", [None])[0]
        number = 0 if after is None else 1 + next(n for n, page in enumerate(self.pages) if page[-1]["id"] == after)
        return {"object": "list", "data": self.pages[number], "has_more": number + 1 < len(self.pages)}


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def provider(answers: Answers) -> Iterator[Provider]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.asked += 1
            self._answer(200, answers.page(parse_qs(urlsplit(self.path).query)))

        def do_POST(self) -> None:
            answers.asked += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(answers.status, answers.body)

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**answers.headers, "content-type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    made = Provider(Settings.from_env(openai_api_key=KEY, openai_base_url=f"http://127.0.0.1:{server.server_port}/v1"))
    try:
        yield made
    finally:
        made.close()
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()


def error_of(provider: Provider) -> ProviderError:
    """What a plain request raises."""
    with pytest.raises(ProviderError) as raised:
        provider.embed("m", ["a text"], dimensions=None, idempotency_key="k")
    return raised.value


# What a client cannot be made with


@pytest.mark.parametrize(
    "environment",
    [
        {"ALL_PROXY": "socks5://me:QUAGGA@127.0.0.1:1"},
        {"HTTPS_PROXY": "gopher://me:QUAGGA@127.0.0.1:1"},
        {"SSL_CERT_FILE": "/nowhere/QUAGGA.pem"},
        {"SSL_CERT_DIR": "/nowhere/QUAGGA:/nowhere/else"},
    ],
)
def test_proxies_and_certificates_that_cannot_be_used_are_a_wrong_setting(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)  # it counts more than SSL_CERT_DIR
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSetting, match=next(iter(environment))) as caught:
        Provider(Settings.from_env(openai_api_key=KEY))
    assert "QUAGGA" not in str(caught.value)


# How long to wait


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after_ms": "1500"}, 1.5),
        ({"retry_after": "20"}, 20.0),
        ({"retry_after_ms": "2500", "retry_after": "3"}, 2.5),  # the finer one
        ({"retry_after_ms": "soon", "retry_after": "3"}, 3.0),
        ({"retry_after_ms": "0"}, 0.0),
        ({"retry_after": "86399"}, 86_399.0),
        ({"retry_after": "86400"}, None),  # a day is nonsense
        ({"retry_after_ms": "86400000", "retry_after": "4"}, 4.0),
        ({"retry_after": "-1"}, None),
        ({"retry_after": "nan"}, None),
        ({"retry_after": "Sun, 29 Nov 2026 07:28:00 GMT"}, None),
        ({}, None),
    ],
)
def test_a_limit_says_in_seconds_when_to_come_again(
    provider: Provider, answers: Answers, headers: dict[str, str], seconds: float | None
) -> None:
    answers.refuse(429, code="rate_limit_exceeded", **headers)

    busy = error_of(provider)

    assert isinstance(busy, ProviderBusy)
    assert busy.retry_after_s == seconds
    assert answers.asked == 1


# Which kind of no


@pytest.mark.parametrize(
    ("status", "code", "kind", "expected"),
    [
        # These may have been carried out all the same, so they are no refusal.
        (408, None, "timeout", ProviderSilent),
        (409, None, "conflict", ProviderSilent),
        (500, None, "server_error", ProviderSilent),
        (503, "overloaded", "server_error", ProviderSilent),
        (424, None, "Backend", ProviderSilent),
        # Time helps.
        (429, "rate_limit_exceeded", "requests", ProviderBusy),
        (400, "token_limit_exceeded", "invalid_request_error", ProviderBusy),
        # Only the operator helps, under whichever name the account's trouble comes.
        (429, "insufficient_quota", "insufficient_quota", ProviderStopped),
        (429, None, "insufficient_quota", ProviderStopped),
        (400, "billing_hard_limit_reached", "invalid_request_error", ProviderStopped),
        (429, "limit", "account_deactivated", ProviderStopped),
        (401, "invalid_api_key", "invalid_request_error", ProviderStopped),
        (403, None, "forbidden", ProviderStopped),
        (402, None, "payment", ProviderStopped),
        (429, "billing_not_active", "billing_not_active", ProviderStopped),
        (400, "400", "budget_exceeded", ProviderStopped),
        (404, None, "not_found", ProviderStopped),
        (404, "model_not_found", "invalid_request_error", ProviderStopped),
        (405, None, "not_allowed", ProviderStopped),
        (400, "unsupported_parameter", "invalid_request_error", ProviderStopped),
        # The request is at fault.
        (400, "invalid_value", "invalid_request_error", ProviderRefused),
        (413, None, "too_large", ProviderRefused),
        (499, None, "odd", ProviderRefused),
    ],
)
def test_a_refusal_is_told_from_a_limit_and_from_what_may_have_been_carried_out(
    provider: Provider, answers: Answers, status: int, code: str | None, kind: str, expected: type[ProviderError]
) -> None:
    answers.refuse(status, code=code, kind=kind)

    assert type(error_of(provider)) is expected


@pytest.mark.parametrize(
    ("message", "param", "advice"),
    [
        ("You exceeded your current quota, please check your plan.", None, "Pay"),
        ("Budget has been exceeded! Current cost: 2.1, Max budget: 2.0", None, "Pay"),
        ("/embeddings: Invalid model name passed in model=text-embeding-3-small.", None, "OPENAI_MODELS"),
        ("The model `text-embeding` does not exist.", None, "OPENAI_MODELS"),
        ("Something about it.", "model", "OPENAI_MODELS"),
        ("This model does not support specifying dimensions.", None, "can_cut"),
        ("Model m does not support matryoshka representation, changing output dimensions fails.", None, "can_cut"),
        ("`base64` encoding is not currently supported", None, "form"),
        ("Something about it.", "encoding_format", "form"),
    ],
)
def test_what_concerns_everybody_is_known_by_its_words_and_says_what_to_do(
    provider: Provider, answers: Answers, message: str, param: str | None, advice: str
) -> None:
    answers.refuse(400, message=message, param=param)

    stopped = error_of(provider)

    assert isinstance(stopped, ProviderStopped)
    assert message in str(stopped)
    assert advice in stopped.brief
    assert stopped.brief.endswith("chunkmill lanes resume")


@pytest.mark.parametrize("param", ["input", "input[3]", None])
def test_what_concerns_a_text_is_no_stop(provider: Provider, answers: Answers, param: str | None) -> None:
    answers.refuse(400, message="This input is not valid Unicode.", param=param)

    assert type(error_of(provider)) is ProviderRefused


def test_an_object_that_is_gone_concerns_nobody_else(provider: Provider, answers: Answers) -> None:
    """A file or a batch that is not there any more is found missing by its caller; the address is right."""
    answers.refuse(404, message="No batch found with id 'batch_1'.")
    with pytest.raises(ProviderRefused) as gone:
        provider.cancel("batch_1")
    assert gone.value.status == 404

    answers.refuse(404, message="No such File object: file-1")
    with pytest.raises(ProviderRefused):
        provider.create("file-1", "token")
    answers.refuse(404, message="Not Found")
    with pytest.raises(ProviderStopped, match="OPENAI_BASE_URL"):
        provider.create("file-1", "token")


def test_a_request_that_never_left_is_told_from_one_that_got_no_answer(answers: Answers, provider: Provider) -> None:
    answers.refuse(504)
    slow = error_of(provider)
    answers.refuse(500)
    broken = error_of(provider)
    nobody = Provider(Settings.from_env(openai_api_key=KEY, openai_base_url="http://127.0.0.1:9/v1"))
    unreachable = error_of(nobody)
    nobody.close()

    told = [(error.timed_out, error.was_sent) for error in (slow, broken, unreachable)]  # type: ignore[attr-defined]
    assert told == [(True, True), (False, True), (False, False)]


# Looking for a batch that nobody answered for

SINCE = datetime(2026, 11, 20, 12, tzinfo=UTC)
FILE, WORD = "file-ours", "ours"


def batch(number: int, *, minutes: float | None, file: str = "file-other", word: str = "other") -> dict[str, Any]:
    """A batch made so many minutes after `SINCE`; None: the server does not say when. ``word`` is in its metadata."""
    at = None if minutes is None else int(SINCE.timestamp() + 60 * minutes)
    return {
        "id": f"batch_{number}", "object": "batch", "endpoint": "/v1/embeddings", "completion_window": "24h",
        "status": "in_progress", "input_file_id": file, "created_at": at, "metadata": {TOKEN_KEY: word},
    }  # fmt: skip


def ours(number: int, *, minutes: float | None, by: str = "file") -> dict[str, Any]:
    return batch(number, minutes=minutes, **({"file": FILE} if by == "file" else {"word": WORD}))


def ids_found(provider: Provider) -> list[str]:
    return [batch.id for batch in provider.find(FILE, WORD, since=SINCE)]


@pytest.mark.parametrize("by", ["file", "word"])
def test_a_batch_behind_an_old_one_is_found(provider: Provider, answers: Answers, by: str) -> None:
    """The order of the list is not documented: only a page of nothing but old batches ends the reading."""
    answers.pages = [
        [batch(1, minutes=30), batch(2, minutes=-30)],
        [batch(3, minutes=None), ours(4, minutes=5, by=by)],
        [batch(5, minutes=-1), batch(6, minutes=-600)],
        [batch(7, minutes=1)],
    ]

    assert ids_found(provider) == ["batch_4"]
    assert answers.asked == 3


def test_a_batch_of_the_very_moment_is_not_old(provider: Provider, answers: Answers) -> None:
    answers.pages = [[batch(1, minutes=-1), batch(2, minutes=0)], [ours(3, minutes=1)]]

    assert ids_found(provider) == ["batch_3"]


def test_of_several_the_oldest_comes_first(provider: Provider, answers: Answers) -> None:
    answers.pages = [
        [ours(1, minutes=None), ours(2, minutes=30), batch(3, minutes=20)],
        [ours(4, minutes=10, by="word"), ours(5, minutes=10)],
    ]

    assert ids_found(provider) == ["batch_4", "batch_5", "batch_2", "batch_1"]


def test_no_more_pages_are_read_than_two_hours_of_batches_fill(provider: Provider, answers: Answers) -> None:
    pages = [[batch(n, minutes=1)] for n in range(LISTED_PAGES - 1)]
    answers.pages = [*pages, [ours(98, minutes=1)], [ours(99, minutes=1)]]

    assert ids_found(provider) == ["batch_98"]


# Looking for files that nobody answered for


def test_only_files_with_our_prefix_are_ours(provider: Provider, answers: Answers) -> None:
    names = ["chunkmill-aa-7-1.jsonl", "chunkmill-ab-8-1.jsonl", "old-chunkmill-aa-7-1.jsonl", "other.jsonl"]
    files = [{"id": f"file-{n}", "object": "file", "filename": name} for n, name in enumerate(names)]
    answers.pages = [files, [{"id": "file-9", "object": "file", "filename": "chunkmill-aa-7-2.jsonl"}]]

    assert provider.files_named("chunkmill-aa-") == ["file-0", "file-9"]
    assert provider.files_named("chunkmill-aa-", limit=4) == ["file-0"]
