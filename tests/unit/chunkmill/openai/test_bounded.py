"""A server that answers without end, without haste or in code is left within bounds, by a named error."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from chunkmill.errors import ProviderError, ProviderRefused, ProviderSilent, ProviderStopped
from chunkmill.openai.bounded import LONGEST_ERROR
from chunkmill.openai.http import Provider
from chunkmill.openai.wire.answers import LengthLimits, longest_answer, longest_file
from chunkmill.openai.wire.jsonl import TOO_LONG
from chunkmill.settings import Settings
from tests.openai_server import OpenAIServer
from tests.openai_server.asking import DIMENSIONS, line
from tests.openai_server.asking import jsonl as lines_of
from tests.openai_server.config import DEFAULT_MODEL, Config
from tests.support.waiting import PATIENCE

TIMEOUT_S = 0.5
ENDPOINTS = ("embeddings.create", "files.create", "batches.create", "batches.retrieve", "batches.list", "files.content")
ROOMY = LengthLimits(1 << 22, 1 << 24)


@pytest.fixture(scope="module")
def running() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def server(running: OpenAIServer) -> OpenAIServer:
    running.calm()
    running.control(**Config().as_json())
    return running


@pytest.fixture
def provider(server: OpenAIServer) -> Iterator[Provider]:
    made = provider_of(server, PATIENCE)
    yield made
    made.close()


@pytest.fixture
def hasty(server: OpenAIServer) -> Iterator[Provider]:
    """One that waits half a second for an answer."""
    made = provider_of(server, TIMEOUT_S)
    yield made
    made.close()


def provider_of(server: OpenAIServer, timeout_s: float) -> Provider:
    return Provider(
        Settings.from_env(openai_api_key=server.key, openai_base_url=server.url, openai_timeout_seconds=timeout_s)
    )


def ask(provider: Provider, endpoint: str, file_id: str = "file-none") -> Any:
    match endpoint:
        case "embeddings.create":
            return embed(provider)
        case "files.create":
            return provider.upload("x.jsonl", io.BytesIO(lines_of([line("a", "b")])))
        case "batches.create":
            return provider.create(file_id, "token")
        case "batches.retrieve":
            return provider.retrieve("batch_none")
        case "batches.list":
            return provider.files_named("x")
        case _:
            with provider.lines(file_id, ROOMY) as lines:
                return list(lines)


def embed(provider: Provider, texts: list[str] | None = None, longest: int = 1 << 20) -> dict[str, Any]:
    return provider.embed(
        DEFAULT_MODEL, texts or ["a text"], dimensions=DIMENSIONS, idempotency_key="k", longest=longest
    )


def error_of(provider: Provider, endpoint: str = "embeddings.create", file_id: str = "file-none") -> ProviderError:
    with pytest.raises(ProviderError) as raised:
        ask(provider, endpoint, file_id)
    return raised.value


# Redirects


@pytest.mark.parametrize("endpoint", ["embeddings.create", "files.create", "batches.create", "files.content"])
@pytest.mark.parametrize("status", [301, 307])
def test_no_redirect_is_followed(server: OpenAIServer, provider: Provider, endpoint: str, status: int) -> None:
    with OpenAIServer(key=server.key) as elsewhere:
        number = server.misbehave(
            "redirect", where={"endpoint": endpoint}, status=status, location=f"{elsewhere.url}/embeddings"
        )

        stopped = error_of(provider, endpoint)

        assert server.fired(number) == 1
        assert elsewhere.state()["requests"] == {}
    assert isinstance(stopped, ProviderStopped)
    assert stopped.provider_code == "redirect"
    assert "'127.0.0.1'" in str(stopped) and "OPENAI_BASE_URL" in stopped.brief


@pytest.mark.parametrize("location", ["", "//", "http://[", "ftp://a b\x1b[31m/"])
def test_a_redirect_to_nowhere_is_the_same_error(server: OpenAIServer, provider: Provider, location: str) -> None:
    server.misbehave("redirect", location=location)

    stopped = error_of(provider)

    assert isinstance(stopped, ProviderStopped)
    assert "\x1b" not in str(stopped)


# Compression


@pytest.mark.parametrize("endpoint", ["embeddings.create", "files.create", "batches.create", "files.content"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "x-odd, identity"])
def test_a_compressed_answer_is_not_unpacked(
    server: OpenAIServer, provider: Provider, endpoint: str, encoding: str
) -> None:
    file_id = ask(provider, "files.create")
    server.misbehave("encoded", where={"endpoint": endpoint}, encoding=encoding, bytes=1 << 26)

    silent = error_of(provider, endpoint, file_id)

    assert isinstance(silent, ProviderSilent)
    assert "compress" in str(silent)


def test_a_compressed_refusal_is_told_by_its_status(server: OpenAIServer, provider: Provider) -> None:
    server.misbehave("encoded", status=401, bytes=1 << 26)

    assert type(error_of(provider)) is ProviderStopped


# Endless answers


@pytest.mark.parametrize("endpoint", [name for name in ENDPOINTS if name != "files.content"])
def test_an_answer_without_end_is_left(server: OpenAIServer, provider: Provider, endpoint: str) -> None:
    server.misbehave("endless", bytes=1 << 26, applied=False)

    silent = error_of(provider, endpoint)

    assert isinstance(silent, ProviderSilent)
    assert "bytes, which no answer to this request needs" in str(silent)


def test_a_refusal_without_end_is_told_by_its_status(server: OpenAIServer, provider: Provider) -> None:
    server.misbehave("endless", status=403, bytes=1 << 26)
    assert type(error_of(provider)) is ProviderStopped

    server.misbehave("http_error", status=400, message="z" * (2 * LONGEST_ERROR))
    assert type(error_of(provider)) is ProviderRefused


def test_the_longest_answer_that_is_right_is_read(server: OpenAIServer, provider: Provider) -> None:
    """Numbers of many digits, each on a line of its own, are the longest that a server writes."""
    texts = [f"text {n}" for n in range(8)]
    number = server.misbehave("other_encoding")

    body = embed(provider, texts, longest_answer(8, DIMENSIONS))

    assert server.fired(number) == 1
    assert len(body["data"]) == 8
    with pytest.raises(ProviderSilent, match="more than 500 bytes"):
        embed(provider, texts, 500)


def test_a_line_without_end_costs_only_itself(server: OpenAIServer, provider: Provider) -> None:
    file_id = provider.upload("x.jsonl", io.BytesIO(b"{}\n" + b"x" * 3_000_000 + b"\n[]\n"))

    with provider.lines(file_id, LengthLimits(1_000_000, 10_000_000)) as lines:
        assert list(lines) == [b"{}", TOO_LONG, b"[]"]


def test_a_file_without_end_is_left(server: OpenAIServer, provider: Provider) -> None:
    file_id = ask(provider, "files.create")
    server.misbehave("endless", where={"endpoint": "files.content"}, bytes=1 << 26)

    assert "more than 16,777,216 bytes" in str(error_of(provider, "files.content", file_id))


def test_what_a_file_may_have_follows_from_what_was_sent() -> None:
    few = longest_file(2, 7, 5, 3_072)
    many = longest_file(1_000, 5_000, 5, 3_072)

    assert few.line == many.line == longest_answer(5, 3_072)
    assert few.line > 5 * 3_072 * 25
    assert few.file < many.file < 2_000 * longest_answer(5, 3_072)
    assert longest_file(0, 0, 0, 8).file > 0


# Answers without haste


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("headers", [True, False])
def test_a_whole_request_has_one_deadline(server: OpenAIServer, hasty: Provider, endpoint: str, headers: bool) -> None:
    """Each byte comes well within the time that one read may take."""
    server.misbehave("drip", where={"endpoint": endpoint}, headers=headers, seconds=TIMEOUT_S / 10, applied=False)
    if endpoint == "batches.list":
        server.misbehave(
            "drip", where={"endpoint": "files.list"}, headers=headers, seconds=TIMEOUT_S / 10, applied=False
        )

    silent = error_of(hasty, endpoint)

    assert isinstance(silent, ProviderSilent)
    assert "in time" in str(silent)


def test_a_download_is_not_too_slow_because_its_reader_is(server: OpenAIServer, provider: Provider) -> None:
    content = b"".join(b'{"n": %d, "x": "%s"}\n' % (n, b"y" * 50_000) for n in range(8))
    file_id = provider.upload("x.jsonl", io.BytesIO(content))
    hasty = provider_of(server, TIMEOUT_S)
    never = threading.Event()

    with hasty.lines(file_id, ROOMY) as lines:
        read = []
        for one in lines:
            never.wait(TIMEOUT_S / 4)
            read.append(one)

    assert len(read) == 8
    hasty.close()


# Answers that are nothing


def test_a_body_that_is_nested_without_end_is_a_named_error(server: OpenAIServer, provider: Provider) -> None:
    for endpoint in ("embeddings.create", "files.create", "batches.create", "batches.retrieve"):
        server.misbehave("deep", where={"endpoint": endpoint}, applied=False)
        assert isinstance(error_of(provider, endpoint), ProviderSilent)


def test_an_error_in_a_successful_answer_is_told_in_the_providers_words(
    server: OpenAIServer, provider: Provider
) -> None:
    server.misbehave("http_error", status=200, message="No provider is up.", code="502")
    routed = error_of(provider)
    server.misbehave("http_error", status=200, message="The worker is on strike.", code="strike")
    said = error_of(provider)
    server.misbehave("http_error", status=200, message="Pay.", code="insufficient_quota")
    stopped = error_of(provider)

    assert isinstance(routed, ProviderSilent) and "No provider is up." in str(routed)
    assert isinstance(said, ProviderSilent) and not said.was_sent  # nothing was computed, so that nothing is booked
    assert "strike: The worker is on strike." in str(said)
    assert isinstance(stopped, ProviderStopped)


def test_what_was_answered_and_is_lost_is_told_from_what_had_no_answer(
    server: OpenAIServer, provider: Provider, hasty: Provider
) -> None:
    answered = [{"kind": "endless", "bytes": 1 << 26}, {"kind": "deep"}, {"kind": "encoded"}]
    for wish in answered:
        server.misbehave(**wish)
        error = error_of(provider)
        assert isinstance(error, ProviderSilent) and error.answered, wish
    for wish in ({"kind": "http_error", "status": 500}, {"kind": "cut"}, {"kind": "http_error", "status": 503}):
        server.misbehave(**wish)
        error = error_of(provider)
        assert isinstance(error, ProviderSilent) and not error.answered, wish
    server.misbehave("drip", seconds=TIMEOUT_S / 10)
    error = error_of(hasty)
    assert isinstance(error, ProviderSilent) and error.answered


# Identifiers and words


@pytest.mark.parametrize("value", ["file-\x00", "half \ud800", "blank s", "x" * 501, "../x", "\u202efile", 17, ["id"]])
def test_an_id_that_is_none_is_named(server: OpenAIServer, provider: Provider, value: Any) -> None:
    server.misbehave("odd_file_id", value=value)
    uploaded = error_of(provider, "files.create")
    batch = provider.create(ask(provider, "files.create"), "token")
    server.misbehave("odd_id", value=value, times=1)
    with pytest.raises(ProviderSilent, match="output_file_id is not an id") as seen:
        provider.retrieve(batch.id)

    assert isinstance(uploaded, ProviderSilent) and "id is not an id" in str(uploaded)
    said = f"{uploaded} {seen.value}"
    assert server.url in said
    assert str(value) not in said.replace(server.url, "")  # the port may have these digits
    provider.retrieve(batch.id)


@pytest.mark.parametrize("value", [-1, 2**31, 10**30])
@pytest.mark.parametrize("field", ["request_counts.total", "request_counts.completed", "usage.total_tokens"])
def test_a_count_that_is_out_of_bounds_is_named(
    server: OpenAIServer, provider: Provider, field: str, value: int
) -> None:
    batch = provider.create(ask(provider, "files.create"), "token")
    server.misbehave("odd_count", field=field, value=value)

    with pytest.raises(ProviderSilent, match=f"{field} is out of bounds"):
        provider.retrieve(batch.id)


def test_a_batch_of_ours_with_an_odd_field_is_not_passed_over(server: OpenAIServer, provider: Provider) -> None:
    """To pass over it would be to create it, and to pay for it, once more. Those of others do not matter."""
    mine, others = (ask(provider, "files.create") for _ in range(2))
    at = provider.create(mine, "mine").created_at
    assert at is not None
    provider.create(others, "others")
    server.misbehave("odd_count", where={"endpoint": "batches.list", "id": others}, value=-1, times=None)
    assert len(provider.find(mine, "mine", since=at)) == 1

    server.misbehave("odd_count", where={"endpoint": "batches.list", "id": mine}, value=-1, times=None)
    with pytest.raises(ProviderSilent, match=r"request_counts\.total"):
        provider.find(mine, "mine", since=at)
