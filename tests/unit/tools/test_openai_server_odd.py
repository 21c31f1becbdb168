"""The test server gives the answers that no server should give, as it is told or as its seed chooses."""

from __future__ import annotations

import gzip
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.openai_server.asking import Asking, embed, jsonl, line
from tests.openai_server.config import DEFAULT_MODEL
from tests.openai_server.fixtures import asking, client, server
from tests.openai_server.odd import IDS, NUMBERS, WORDS, drawn, put
from tests.support.waiting import PATIENCE

__all__ = ["asking", "client", "server"]


def raw(asking: Asking) -> tuple[http.client.HTTPResponse, bytes]:
    """The plain endpoint's answer, byte by byte as it came."""
    parts = urlsplit(asking.server.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=PATIENCE)
    body = json.dumps({"model": DEFAULT_MODEL, "input": asking.texts[0], "dimensions": 8})
    headers = {"Authorization": f"Bearer {asking.server.key}", "Content-Type": "application/json"}
    connection.request("POST", f"{parts.path}/embeddings", body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_a_redirect(asking: Asking) -> None:
    asking.server.misbehave("redirect", status=308, location="https://elsewhere.example/x")
    answer, _ = raw(asking)
    assert (answer.status, answer.headers["location"]) == (308, "https://elsewhere.example/x")
    assert asking.charged()[0] == 0


def test_a_compressed_answer_and_a_bomb(asking: Asking) -> None:
    asking.server.misbehave("encoded")
    answer, content = raw(asking)
    assert answer.headers["content-encoding"] == "gzip"
    assert len(json.loads(gzip.decompress(content))["data"]) == 1
    asking.server.misbehave("encoded", bytes=1 << 24)
    _, content = raw(asking)
    assert len(content) < 100_000 < len(gzip.decompress(content)) == 1 << 24
    assert asking.charged()[0] == 2


def test_an_answer_without_end_and_one_without_bottom(asking: Asking) -> None:
    asking.server.misbehave("endless", bytes=1 << 20)
    assert raw(asking)[1] == b"x" * (1 << 20)
    asking.server.misbehave("deep", levels=5)
    assert raw(asking)[1] == b'{"data":[[[[['


@pytest.mark.parametrize("headers", [False, True])
def test_an_answer_that_drips(asking: Asking, headers: bool) -> None:
    number = asking.server.misbehave("drip", headers=headers, seconds=0.05)
    with pytest.raises(openai.APITimeoutError):
        # No byte takes so long. What ends this is the test's own patience between two reads of the whole.
        asking.client.with_options(timeout=0.01).embeddings.create(model=DEFAULT_MODEL, input="x")
    assert asking.server.fired(number) == 1


@pytest.mark.parametrize("extra", [False, True])
def test_a_line_that_is_too_long(asking: Asking, extra: bool) -> None:
    asking.server.misbehave("long_line", bytes=1_000_000, extra=extra)
    lengths = sorted(map(len, asking.raw(asking.run(jsonl(asking.lines())).output_file_id)))
    assert len(lengths) == 10 + extra
    assert lengths[-2] < lengths[-1] == 1_000_000


@pytest.mark.parametrize(("how", "indexes"), [("first", [None, 1, 2]), ("zero", [0, 0, 0]), ("one", [0, 0, 2])])
def test_odd_indexes(asking: Asking, how: str, indexes: list[int | None]) -> None:
    asking.server.misbehave("odd_index", how=how)
    assert [item.get("index") for item in embed(asking, asking.texts[:3])["data"]] == indexes


def test_odd_fields_of_batches_and_files(asking: Asking) -> None:
    batch = asking.run()
    asking.server.misbehave("odd_id", field="error_file_id", value="a b")
    asking.server.misbehave("odd_count", field="request_counts.failed", value=-3)
    asking.server.misbehave("odd_words", value="a\x00b")
    shown: Any = asking.client.batches.retrieve(batch.id)
    assert (shown.error_file_id, shown.request_counts.failed, shown.request_counts.total) == ("a b", -3, 10)
    assert [error.message for error in shown.errors.data] == ["a\x00b"]
    asking.server.misbehave("odd_file_id", value="../x")
    assert asking.upload(jsonl([line("a", "b")])) == "../x"


def test_the_seed_chooses_what_the_test_leaves_open(asking: Asking) -> None:
    for values in (IDS, NUMBERS, WORDS):
        chosen = [drawn(None, values, seed) for seed in range(50)]
        assert chosen == [drawn(None, values, seed) for seed in range(50)]
        assert len({str(value) for value in chosen}) == len(values)
    assert drawn(7, NUMBERS, 1) == 7
    assert put({"a": {"b": 1, "c": 2}}, "a.b", 3) == {"a": {"b": 3, "c": 2}}
    asking.server.misbehave("odd_usage")
    said = embed(asking, asking.texts[0])["usage"]["prompt_tokens"]
    assert said == drawn(None, NUMBERS, "usage", asking.texts[0])
