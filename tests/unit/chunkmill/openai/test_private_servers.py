"""What compatible servers on a private network differ in: their address, their encoding, the size of a request."""

from __future__ import annotations

import io
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from chunkmill.errors import ProviderError
from chunkmill.openai.http import Provider
from chunkmill.openai.wire.answers import LengthLimits
from chunkmill.settings import Settings
from tests.support.waiting import PATIENCE

KEY = "sk-of-a-private-server"
VLLM = "base64 encoding is not currently supported"
MODELS = '{"told": {"dimensions": 2, "encoding": "%s"}, "a": {"dimensions": 2}, "b": {"dimensions": 2}}'


@dataclass
class PrivateServer:
    """It takes floats only, and keeps what it was asked."""

    port: int = 0
    refusal: tuple[int, dict[str, Any]] = (400, {"error": {"message": VLLM, "code": 400}})
    takes: tuple[str, ...] = ("float",)
    asked: list[tuple[str, dict[str, list[str]], dict[str, str]]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def encodings(self) -> list[tuple[str, str]]:
        return [(body["model"], body["encoding_format"]) for body in self.bodies]

    def answer(self, path: str, data: bytes) -> tuple[int, dict[str, Any]]:
        if path.endswith("/embeddings"):
            self.bodies.append(json.loads(data))
            if self.bodies[-1]["encoding_format"] not in self.takes:
                return self.refusal
            return 200, {"object": "list", "data": [{"index": 0, "embedding": [0.6, 0.8]}], "model": "m"}
        batch = {"id": "batch_1", "object": "batch", "status": "completed", "input_file_id": "file-1", "created_at": 1}
        if path.endswith("/batches") and not data:
            number = len([1 for asked, _, _ in self.asked if asked == path])
            return 200, {"object": "list", "data": [batch | {"id": f"batch_{number}"}], "has_more": number < 4}
        return 200, batch


@pytest.fixture
def server() -> Iterator[PrivateServer]:
    made = PrivateServer()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            parts = urlsplit(self.path)
            made.asked.append((parts.path, parse_qs(parts.query), dict(self.headers)))
            status, body = made.answer(parts.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _do  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.port = listening.server_port
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield made
    listening.shutdown()
    thread.join(PATIENCE)
    listening.server_close()


@pytest.fixture
def provider_of(server: PrivateServer) -> Iterator[Callable[..., Provider]]:
    made: list[Provider] = []

    def make(path: str = "/v1", **settings: Any) -> Provider:
        url = f"http://127.0.0.1:{server.port}{path}"
        made.append(Provider(Settings.from_env(openai_api_key=KEY, openai_base_url=url, **settings)))
        return made[-1]

    yield make
    for provider in made:
        provider.close()


def embed(provider: Provider, model: str) -> dict[str, Any]:
    return provider.embed(model, ["a text"], dimensions=None, idempotency_key="k")


def test_azures_version_is_sent_with_every_request(server: PrivateServer, provider_of: Callable[..., Provider]) -> None:
    server.takes = ("base64",)
    provider = provider_of("/openai/deployments/a?api-version=2024-10-21")
    embed(provider, "a")
    provider.upload("x.jsonl", io.BytesIO(b"{}\n"))
    provider.create("file-1", "token")
    provider.retrieve("batch_1")
    provider.cancel("batch_1")
    assert len(provider.find("file-1", "token", since=datetime.fromtimestamp(0, UTC))) == 3  # pages
    with provider.lines("file-1", LengthLimits(line=1_000, file=10_000)) as lines:
        list(lines)
    provider.delete_file("file-1")
    provider.files_named("x")
    assert len(server.asked) == 11
    for path, query, headers in server.asked:
        assert path.startswith("/openai/deployments/a/")
        assert query["api-version"] == ["2024-10-21"]
        # Azure reads a key from the first of these, and a token of Entra from the second.
        assert (headers["api-key"], headers["authorization"]) == (KEY, f"Bearer {KEY}")
    # The ledger knows the server without the version: a newer version is no other server.
    assert provider.server == f"http://127.0.0.1:{server.port}/openai/deployments/a"


def test_only_azure_gets_the_key_in_azures_header(server: PrivateServer, provider_of: Callable[..., Provider]) -> None:
    embed(provider_of(), "a")
    assert all("api-key" not in headers and not query for _, query, headers in server.asked)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_what_goes_by_http_goes_through_no_proxy(
    variable: str, server: PrivateServer, provider_of: Callable[..., Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would read the key and the texts, and it does not know hosts such as ``tei``."""
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    assert embed(provider_of(), "a")["data"]
    assert server.asked


def test_for_what_goes_by_http_no_certificates_are_read(
    server: PrivateServer, provider_of: Callable[..., Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []

    def counts(context: ssl.SSLContext, *files: object, **more: object) -> None:
        read.append((files, more))

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", counts)
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", counts)
    assert embed(provider_of(), "a")["data"]
    assert read == []
    settings = Settings.from_env(openai_api_key=KEY, openai_base_url="https://127.0.0.1:1/v1")
    Provider(settings).close()
    assert read


@pytest.mark.parametrize(
    "refusal",
    [
        (400, {"error": {"message": VLLM, "code": 400}}),
        (400, {"object": "error", "message": VLLM, "type": "BadRequestError"}),  # vLLM before 0.9
        (422, {"detail": [{"loc": ["body", "encoding_format"], "msg": "Input should be 'float'"}]}),
        (400, {"error": {"message": "Not supported.", "param": "encoding_format", "code": None}}),
        (501, {"error": "base64"}),
    ],
)
def test_a_server_that_refuses_base64_is_asked_for_floats_from_then_on(
    refusal: tuple[int, dict[str, Any]], server: PrivateServer, provider_of: Callable[..., Provider]
) -> None:
    server.refusal = refusal
    provider = provider_of(openai_models=MODELS % "float")
    for model in ("a", "a", "b", "told", "a"):
        assert embed(provider, model)["data"][0]["embedding"] == [0.6, 0.8]
    # One refusal for each model: two models behind one gateway may be two servers.
    assert server.encodings == [
        ("a", "base64"), ("a", "float"), ("a", "float"), ("b", "base64"), ("b", "float"), ("told", "float"),
        ("a", "float"),
    ]  # fmt: skip
    assert [provider.encoding(model) for model in ("a", "b", "told", "new")] == ["float", "float", "float", "base64"]


@pytest.mark.parametrize(
    ("refusal", "model"),
    [
        ((400, {"error": {"message": "The text 'what is base64?' is refused.", "code": "bad"}}), "a"),
        ((400, {"error": {"message": VLLM}}), "told"),  # OPENAI_MODELS says base64
    ],
)
def test_what_is_refused_for_another_reason_teaches_nothing(
    refusal: tuple[int, dict[str, Any]], model: str, server: PrivateServer, provider_of: Callable[..., Provider]
) -> None:
    server.refusal, server.takes = refusal, ()
    provider = provider_of(openai_models=MODELS % "base64")
    for _ in range(2):
        with pytest.raises(ProviderError, match="400"):
            embed(provider, model)
    assert server.encodings == ([("a", "base64"), ("a", "float")] * 2 if model == "a" else [("told", "base64")] * 2)
    server.takes = ("base64",)
    assert embed(provider, model)["data"]


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_refusal_that_concerns_no_encoding_is_sent_once(
    status: int, server: PrivateServer, provider_of: Callable[..., Provider]
) -> None:
    server.refusal, server.takes = (status, {"error": {"message": "No."}}), ()
    with pytest.raises(ProviderError):
        embed(provider_of(), "a")
    assert len(server.bodies) == 1
