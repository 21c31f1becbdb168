"""What can be wrong in the test server's result files, seen once by the official SDK."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from tests.openai_server.asking import Asking, embed, jsonl, line
from tests.openai_server.fixtures import asking, client, server

__all__ = ["asking", "client", "server"]


def test_completed_and_all_of_it_failed(asking: Asking) -> None:
    asking.server.misbehave("all_failed", status=500)
    batch = asking.run()
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert {result["response"]["status_code"] for result in asking.results(batch.error_file_id).values()} == {500}
    assert asking.charged() == [0] * 10


def test_an_error_file_with_nothing_in_it(asking: Asking) -> None:
    asking.server.misbehave("empty_error_file")
    batch = asking.run()
    assert batch.error_file_id is not None
    assert asking.raw(batch.error_file_id) == []


def test_some_lines_fail_by_what_they_hold_or_by_their_number(asking: Asking) -> None:
    asking.server.misbehave("line_failures", status=429, marker=asking.texts[4], times=None)
    batch = asking.run()
    failed = asking.results(batch.error_file_id)
    assert [(key, failure["response"]["status_code"]) for key, failure in failed.items()] == [("t4", 429)]
    assert len(asking.results(batch.output_file_id)) == 9
    once = asking.server.misbehave("line_failures", status=400, marker=asking.texts[7])
    asking.run(jsonl([line("other", asking.texts[0])]))
    assert asking.server.fired(once) == 0, "a batch without such a line is no chance"
    failed = asking.results(asking.run().error_file_id)
    assert {key: failure["response"]["status_code"] for key, failure in failed.items()} == {"t4": 429, "t7": 400}
    asking.server.calm()
    asking.server.misbehave("line_failures", every=5)
    assert len(asking.results(asking.run().error_file_id)) == 2
    assert asking.charged()[4] <= 1


def lines_with(asking: Asking, kind: str, **options: Any) -> list[bytes]:
    asking.server.misbehave(kind, **options)
    batch = asking.run()
    assert asking.charged() == [1] * 10, "what went wrong later was charged all the same"
    return asking.raw(batch.output_file_id)


def ids(lines: list[bytes]) -> list[str | None]:
    return [json.loads(line)["custom_id"] for line in lines]


def test_lines_are_missing(asking: Asking) -> None:
    assert len(ids(lines_with(asking, "missing_line", lines=2))) == 8


def test_a_garbage_line(asking: Asking) -> None:
    lines = lines_with(asking, "garbage_line", marker=asking.texts[2])
    assert len(lines) == 10
    with pytest.raises(json.JSONDecodeError):
        ids(lines)


def test_a_garbage_line_beside_the_result(asking: Asking) -> None:
    assert len(lines_with(asking, "garbage_line", extra=True)) == 11


def test_a_line_comes_twice(asking: Asking) -> None:
    seen = ids(lines_with(asking, "duplicate_line"))
    assert (len(seen), len(set(seen))) == (11, 10)


def test_a_line_nobody_asked_for(asking: Asking) -> None:
    seen = ids(lines_with(asking, "unknown_line"))
    assert len(seen) == 11
    assert len([custom_id for custom_id in seen if custom_id is not None and custom_id.startswith("unknown-")]) == 1


def test_a_line_without_its_custom_id(asking: Asking) -> None:
    assert ids(lines_with(asking, "null_custom_id")).count(None) == 1


BODIES: dict[str, dict[str, Any]] = {
    "wrong_dimensions": {"dimensions": 5},
    "not_finite": {"value": "inf"},
    "zero_vector": {},
    "missing_index": {},
    "missing_item": {},
    "shuffled_data": {},
    "other_encoding": {},
    "missing_usage": {},
    "odd_usage": {"value": -5},
    "odd_index": {"how": "first"},
    "other_model": {"name": "m"},
}


def wrong(kind: str, body: dict[str, Any]) -> bool:
    data = body["data"]
    match kind:
        case "wrong_dimensions":
            return {len(embedding["embedding"]) for embedding in data} == {5}
        case "not_finite":
            return not np.isfinite(data[0]["embedding"]).all()
        case "zero_vector":
            return not np.any(data[0]["embedding"])
        case "missing_index":
            return all("index" not in embedding for embedding in data)
        case "missing_item":
            return [embedding["index"] for embedding in data] == [0, 1, 2]
        case "shuffled_data":
            return (
                sorted(embedding["index"] for embedding in data)
                == [0, 1, 2, 3]
                != [embedding["index"] for embedding in data]
            )
        case "other_encoding":
            return isinstance(data[0]["embedding"], str)
        case "odd_usage":
            return body["usage"]["prompt_tokens"] == -5
        case "odd_index":
            return [embedding.get("index") for embedding in data] == [None, 1, 2, 3]
        case "other_model":
            return body["model"] == "m"
    return "usage" not in body


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_is_wrong_in_a_batch_and_at_the_plain_endpoint(asking: Asking, kind: str) -> None:
    content = jsonl([line("first", asking.texts[:4]), line("second", asking.texts[4:8])])
    asking.server.misbehave(kind, marker=asking.texts[0], **BODIES[kind])
    results = asking.results(asking.run(content).output_file_id)
    asking.server.misbehave(kind, where={"endpoint": "embeddings.create"}, **BODIES[kind])
    sync = embed(asking, asking.texts[:4])
    assert [wrong(kind, answer) for answer in (results["first"]["response"]["body"], sync)] == [True, True]
    good = embed(asking, asking.texts[:4])
    assert [wrong(kind, answer) for answer in (results["second"]["response"]["body"], good)] == [False, False]


def test_not_a_number_in_base64(asking: Asking) -> None:
    asking.server.misbehave("not_finite")
    results = asking.results(asking.run(jsonl([line("a", "x", encoding_format="base64")])).output_file_id)
    vector = np.frombuffer(base64.b64decode(results["a"]["response"]["body"]["data"][0]["embedding"]), "<f4")
    assert np.isnan(vector).sum() == 1


def test_a_body_that_is_json_in_a_string(asking: Asking) -> None:
    asking.server.misbehave("string_body")
    results = asking.results(asking.run(jsonl([line("a", "x")])).output_file_id)
    assert json.loads(results["a"]["response"]["body"])["data"][0]["index"] == 0
