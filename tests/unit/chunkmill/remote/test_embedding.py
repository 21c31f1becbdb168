from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import socket
import threading

import numpy as np
import pytest

from chunkmill.errors import (
    AccessDenied,
    ChunkmillError,
    EngineError,
    GatewayUnavailable,
    InvalidChunk,
    InvalidInput,
    SpaceMismatch,
    UnknownModel,
    WaitTimeout,
)
from chunkmill.remote import embedding
from chunkmill.remote.embedding import PROBES
from tests.support.gateways import vector_of
from tests.support.remotes import HANGS_UP, KEY, Asked, Said, embedded, refusal, remote, scripted

TEXTS = [f"text number {i} " + "x" * (i % 40) for i in range(300)]


def answer_well(asked: Asked) -> Said:
    if asked.path == "/info":
        return Said(body=b'{"max_client_batch_size": 40}')
    return embedded(asked)


def closed_port() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_many_texts_come_back_in_their_order_from_requests_of_the_size_that_the_gateway_takes(kind: str) -> None:
    with scripted(answer_well) as server, remote(kind, server.url) as client:
        made = client.embed_texts(TEXTS, kind="query")
    assert (made.vectors == np.stack([vector_of(text, "query", 8) for text in TEXTS])).all()
    assert made.tokens.tolist() == [len(text.split()) + 2 for text in TEXTS]
    assert made.truncated.tolist() == [len(text) > 30 for text in TEXTS]
    asked = [one for one in server.asked if one.path == "/v1/embeddings"]
    assert [len(one.json["input"]) for one in asked] == [40] * 7 + [20] or len(asked) == 8
    assert max(len(one.json["input"]) for one in asked) == 40
    assert server.paths().count("GET /info") == 1
    assert {one.json["encoding_format"] for one in asked} == {"base64"}


def test_at_most_eight_requests_run_side_by_side_and_several_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "REQUEST_TEXTS", 4)
    lock, eight_came = threading.Lock(), threading.Event()
    running, most = 0, 0

    def answer(asked: Asked) -> Said:
        nonlocal running, most
        if asked.path == "/info":
            return Said()
        with lock:
            running += 1
            most = max(most, running)
            if running == 8:
                eight_came.set()
        assert eight_came.wait(60)
        with lock:
            running -= 1
        return embedded(asked)

    with scripted(answer) as server, remote(kind, server.url) as client:
        assert client.embed(TEXTS[:128]).shape == (128, 8)
    assert most == 8


def test_a_request_that_is_too_large_is_cut_in_halves_until_the_gateway_takes_them(kind: str) -> None:
    def answer(asked: Asked) -> Said:
        if asked.path == "/info":
            return refusal(404, "not_found")
        if len(asked.json["input"]) > 64:
            return refusal(413, "body_too_large")
        if sum(map(len, asked.json["input"])) > 1_500:
            return refusal(400, "max_tokens_per_request")
        return embedded(asked)

    with scripted(answer) as server, remote(kind, server.url) as client:
        assert (client.embed(TEXTS) == np.stack([vector_of(text, "document", 8) for text in TEXTS])).all()
        with pytest.raises(InvalidInput):
            client.embed(["x" * 2_000])


@pytest.mark.parametrize(
    "failure",
    [
        HANGS_UP,
        refusal(429, "rate_limit_exceeded", after_ms=1),
        refusal(429, "overloaded", retry=True, after_ms=1),
        refusal(503, "no_worker", retry=True, after_ms=1),
        Said(502, b"<html>Bad gateway</html>"),
        Said(504, b""),
        Said(500, b"", {"x-should-retry": "true"}),
    ],
)
def test_what_passes_by_itself_is_asked_again(kind: str, failure: Said) -> None:
    answers = itertools.chain([failure, failure], itertools.repeat(None))
    with scripted(lambda asked: next(answers) or embedded(asked)) as server, remote(kind, server.url) as client:
        assert client.embed(["a"]).shape == (1, 8)
        assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (refusal(400, "invalid_input"), InvalidInput),
        (refusal(401, "invalid_api_key", retry=False), AccessDenied),
        (refusal(403, "scope", retry=False), AccessDenied),
        (refusal(404, "model_not_found", retry=False), UnknownModel),
        (refusal(429, "insufficient_quota", retry=False), ChunkmillError),
        (refusal(503, "store_unavailable", retry=False), ChunkmillError),
        (refusal(500, "engine_error", retry=False), EngineError),
        (refusal(500, "internal"), GatewayUnavailable),
        (Said(302, b"", {"location": "http://elsewhere.example/"}), GatewayUnavailable),
    ],
)
def test_what_does_not_pass_is_asked_once(kind: str, failure: Said, error: type[ChunkmillError]) -> None:
    with scripted(lambda _: failure) as server, remote(kind, server.url) as client:
        with pytest.raises(error):
            client.embed(["a"])
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(kind: str, status: int) -> None:
    with scripted(embedded) as elsewhere:
        with (
            scripted(lambda _: Said(status, b"", {"location": f"{elsewhere.url}/v1/embeddings"})) as server,
            remote(kind, server.url) as client,
            pytest.raises(GatewayUnavailable, match="redirect"),
        ):
            client.embed(["a"])
        assert elsewhere.asked == []


def test_a_pause_that_would_outlast_the_timeout_is_not_begun(kind: str) -> None:
    with scripted(lambda _: refusal(429, "overloaded", after_ms=60_000)) as server, remote(kind, server.url) as client:
        with pytest.raises(GatewayUnavailable, match="overloaded"):
            client.embed(["a"], timeout=20)
        assert len(server.asked) == 1


def test_a_gateway_that_nobody_can_reach_is_unavailable_and_one_that_keeps_silent_times_out(kind: str) -> None:
    with remote(kind, closed_port()) as client, pytest.raises(GatewayUnavailable, match="could not be reached"):
        client.client._verbs._clock = itertools.count(0, 5).__next__
        client.embed(["a"], timeout=60)
    silent = threading.Event()

    def answer(_: Asked) -> Said:
        silent.wait(60)
        return HANGS_UP

    with scripted(answer) as server, remote(kind, server.url) as client:
        with pytest.raises(WaitTimeout, match="did not answer in time"):
            client.embed(["a"], timeout=0.1)
        silent.set()


def test_vectors_of_another_space_are_refused_in_a_later_call_and_inside_of_one(kind: str) -> None:
    spaces = iter(["a" * 64, "a" * 64, "b" * 64])
    with scripted(lambda asked: embedded(asked, space=next(spaces))) as server, remote(kind, server.url) as client:
        client.embed(["a"])
        client.embed(["b"])
        with pytest.raises(SpaceMismatch, match=r"'bbbbbbbbbbbb'.*'aaaaaaaaaaaa'"):
            client.embed(["c"])

    def by_first_text(asked: Asked) -> Said:
        return (
            Said()
            if asked.path == "/info"
            else embedded(asked, space=("a" if TEXTS[0] in asked.json["input"] else "b") * 64)
        )

    with scripted(by_first_text) as server, remote(kind, server.url) as client, pytest.raises(SpaceMismatch):
        client.embed(TEXTS)


def test_another_model_or_size_has_a_space_of_its_own(kind: str) -> None:
    def answer(asked: Asked) -> Said:
        key = (asked.json.get("model"), asked.json.get("dimensions"))
        return embedded(asked, space=f"space of {key}", dimensions=asked.json.get("dimensions") or 8)

    with scripted(answer) as server, remote(kind, server.url) as client:
        assert client.embed(["a"]).shape == (1, 8)
        assert client.embed(["a"], model="other").shape == (1, 8)
        assert client.embed(["a"], dimensions=4).shape == (1, 4)
        assert client.embed([], dimensions=4).shape == (0, 4)
        assert client.embed([]).shape == (0, 8)


def test_an_answer_that_does_not_name_its_space_is_refused(kind: str) -> None:
    def answer(asked: Asked) -> Said:
        return dataclasses.replace(embedded(asked), headers={})

    with (
        scripted(answer) as server,
        remote(kind, server.url) as client,
        pytest.raises(GatewayUnavailable, match="x-chunkmill-fingerprint"),
    ):
        client.embed(["a"])


def test_the_fallback_answers_while_the_first_cannot_and_the_first_is_asked_again_later(kind: str) -> None:
    is_down = False

    def first_answer(asked: Asked) -> Said:
        return refusal(503, "draining", after_ms=1) if is_down else embedded(asked)

    with (
        scripted(first_answer) as first,
        scripted(embedded) as second,
        remote(kind, first.url, fallback=second.url, fallback_key="cmk_of_the_second") as client,
    ):
        now = 1_000.0
        client.client._verbs._clock = lambda: now
        before = client.embed(["a"])
        assert second.asked == []
        is_down = True
        assert (client.embed(["a"]) == before).all()
        assert [one.json["input"] for one in second.asked] == [list(PROBES), ["a"]]
        assert {one.headers["authorization"] for one in second.asked} == {"Bearer cmk_of_the_second"}
        asked_before = len(first.asked)
        client.embed(["b"])  # the first is left alone for a while, and the second is not checked again
        assert len(first.asked) == asked_before and len(second.asked) == 3
        is_down, now = False, now + 61
        client.embed(["c"])
        assert len(first.asked) == asked_before + 1 and len(second.asked) == 3


def test_the_first_server_is_asked_for_the_probes_once(kind: str) -> None:
    with (
        scripted(answer_well) as first,
        scripted(embedded) as second,
        remote(kind, first.url, fallback=second.url) as client,
    ):
        client.embed(TEXTS)
        client.embed(TEXTS)
        asked = [one.json["input"] for one in first.asked if one.path == "/v1/embeddings"]
        assert asked.count(list(PROBES)) == 1 and len(asked) == 17
        assert second.asked == []


def test_a_fallback_of_another_space_is_never_used(kind: str) -> None:
    is_down = False

    def first_answer(asked: Asked) -> Said:
        return HANGS_UP if is_down else embedded(asked)

    with (
        scripted(first_answer) as first,
        scripted(lambda asked: embedded(asked, space="b" * 64)) as second,
        remote(kind, first.url, fallback=second.url) as client,
    ):
        client.embed(["a"])
        is_down = True
        with pytest.raises(SpaceMismatch):
            client.embed(["a"])
        assert [one.json["input"] for one in second.asked] == [list(PROBES)]


def test_a_fallback_with_the_same_fingerprint_and_other_vectors_is_never_used(kind: str) -> None:
    is_down = False

    def first_answer(asked: Asked) -> Said:
        return HANGS_UP if is_down else embedded(asked)

    def second_answer(asked: Asked) -> Said:
        body = {**asked.json, "kind": "another model"}
        return embedded(dataclasses.replace(asked, body=json.dumps(body).encode()))

    with (
        scripted(first_answer) as first,
        scripted(second_answer) as second,
        remote(kind, first.url, fallback=second.url) as client,
    ):
        client.embed(["a"])
        is_down = True
        with pytest.raises(SpaceMismatch, match="cosine"):
            client.embed(["a"])
        assert [one.json["input"] for one in second.asked] == [list(PROBES)]


def test_without_the_first_servers_vectors_no_fallback_is_used(kind: str) -> None:
    with scripted(embedded) as second, remote(kind, closed_port(), fallback=second.url) as client:
        client.client._verbs._clock = itertools.count(0, 5).__next__
        with pytest.raises(GatewayUnavailable):
            client.embed(["a"], timeout=60)
        assert second.asked == []


def test_the_fallback_gets_its_turn_while_the_first_keeps_silent(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "FIRST_SHARE", 0.01)
    is_silent, ends = False, threading.Event()

    def first_answer(asked: Asked) -> Said:
        if is_silent:
            ends.wait(60)
            return HANGS_UP
        return embedded(asked)

    with (
        scripted(first_answer) as first,
        scripted(embedded) as second,
        remote(kind, first.url, fallback=second.url) as client,
    ):
        client.embed(["a"])
        is_silent = True
        assert client.embed(["a"], timeout=60).shape == (1, 8)
        ends.set()


def test_two_servers_that_fail_are_both_asked_again(kind: str) -> None:
    down = {"first": False, "second": False}
    failures = itertools.count()

    def answer_as(name: str, asked: Asked) -> Said:
        if down[name]:
            if next(failures) == 9:
                down["first"] = False
            return refusal(503, "draining", after_ms=1)
        return embedded(asked)

    with (
        scripted(lambda asked: answer_as("first", asked)) as first,
        scripted(lambda asked: answer_as("second", asked)) as second,
        remote(kind, first.url, fallback=second.url) as client,
    ):
        client.embed(["a"])
        down.update(first=True, second=True)
        assert client.embed(["b"]).shape == (1, 8)
        assert len(first.asked) >= 4 and len(second.asked) >= 4


HUGE = b"x" * 5_000_000


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Said(body=HUGE, headers={"x-chunkmill-fingerprint": "a"}), "sent more than"),
        (Said(body=b"\x1f\x8b", headers={"content-encoding": "gzip"}), "compressed"),
        (Said(body=b"[" * 100_000, headers={"x-chunkmill-fingerprint": "a"}), "not JSON"),
        (Said(body=b'{"data": 3}', headers={"x-chunkmill-fingerprint": "a"}), "2 texts"),
        (Said(body=b'{"data": [{"index": 0}, {"index": 0}]}', headers={"x-chunkmill-fingerprint": "a"}), "vector"),
        (
            Said(
                body=b'{"data": [{"index": 1, "embedding": [1]}, {"index": 1, "embedding": [1]}]}',
                headers={"x-chunkmill-fingerprint": "a"},
            ),
            "each index once",
        ),
        (
            Said(
                body=b'{"data": [{"index": 0, "embedding": [1, 2]}, {"index": 1, "embedding": [1]}]}',
                headers={"x-chunkmill-fingerprint": "a"},
            ),
            "dimensions",
        ),
        (
            Said(
                body=b'{"data": [{"index": 0, "embedding": "AADAfw=="}, {"index": 1, "embedding": [1]}]}',
                headers={"x-chunkmill-fingerprint": "a"},
            ),
            "finite",
        ),
        (Said(body=b'{"data": [NaN, 1]}', headers={"x-chunkmill-fingerprint": "a"}), "not JSON"),
    ],
)
def test_a_hostile_answer_is_refused_at_once(kind: str, said: Said, words: str) -> None:
    with scripted(lambda _: said) as server, remote(kind, server.url) as client:
        with pytest.raises(GatewayUnavailable, match=words):
            client.embed(["a", "b"])
        assert len(server.asked) == 1


def test_an_endless_refusal_is_read_to_its_first_bytes_only(kind: str) -> None:
    said = Said(400, json.dumps({"error": {"code": "c", "message": "m" * 50_000_000}}).encode())
    with scripted(lambda _: said) as server, remote(kind, server.url) as client:
        with pytest.raises(InvalidInput) as raised:
            client.embed(["a"])
        assert len(str(raised.value)) < 3_000


def test_a_server_that_sends_a_byte_at_a_time_holds_the_call_no_longer_than_its_timeout(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ends = threading.Event()

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                for byte in b"HTTP/1.1 200 OK\r\ncontent-type: " + b"x" * 10_000:
                    try:
                        connection.send(bytes([byte]))
                    except OSError:
                        return
                    if ends.wait(0.02):
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with remote(kind, url) as client, pytest.raises((WaitTimeout, GatewayUnavailable)):
            client.embed(["a"], timeout=0.3)
        ends.set()
        thread.join(60)


def test_a_wrong_text_is_named_before_anything_is_sent(kind: str) -> None:
    with scripted(embedded) as server, remote(kind, server.url) as client:
        with pytest.raises(InvalidChunk, match=r"texts\[1\]"):
            client.embed(["a", " "])
        with pytest.raises(InvalidInput):
            client.embed("abc")
        with pytest.raises(InvalidInput):
            client.embed(["a"], kind="passage")
        assert server.asked == []


def test_the_key_is_in_no_repr_no_log_and_no_error(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = refusal(400, "invalid_input", message=f"the key {KEY} is odd")
    with scripted(lambda _: echo) as server, remote(kind, server.url) as client:
        with pytest.raises(InvalidInput) as raised:
            client.embed(["a secret text"])
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
        verbs = client.client._verbs
        said = [str(raised.value), repr(raised.value), repr(client.client), caplog.text]
        said += [repr(verbs._server), repr(verbs._server.key), repr(vars(client.client))]
    for words in said:
        assert KEY not in words and "a secret text" not in words
