"""Whatever a server does, both clients ask the same of it, and return or raise the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from chunkmill.errors import ChunkmillError
from chunkmill.remote import embedding
from tests.support.remotes import HANGS_UP, SPACE, Asked, Remote, Said, Scripted, embedded, refusal, scripted
from tests.support.waiting import until
from tests.unit.chunkmill.remote.test_enqueue import CHUNKS, JOB

PIECE = 4
_numbers = itertools.count(10_000)
TRANSIENT = st.sampled_from(
    [
        HANGS_UP,
        Said(502, b"<html>"),
        refusal(429, "overloaded", after_ms=1),
        refusal(503, "no_worker", after_ms=1),
        refusal(504, "timeout", after_ms=1),
    ]
)
# A body that cannot be read names the space of all other answers. With another space, it would depend on which piece
# comes first whether the body or the space is found wrong.
FINAL = st.sampled_from(
    [
        None,
        None,
        refusal(400, "invalid_input"),
        refusal(401, "invalid_api_key", retry=False),
        refusal(404, "not_found"),
        refusal(409, "space_mismatch", retry=False),
        refusal(429, "insufficient_quota", retry=False),
        refusal(500, "engine_error", retry=False),
        refusal(503, "overloaded", after_ms=10_000_000),
        Said(200, b"[]", {"x-chunkmill-fingerprint": SPACE}),
        Said(200, b'{"data": []}', {"x-chunkmill-fingerprint": SPACE}),
        Said(200, b"", {"content-encoding": "br"}),
        Said(302, b"", {"location": "/elsewhere"}),
    ]
)
STORED = {
    "metadata": {"n": [1, None]},
    "state": "embedded",
    "truncated": False,
    "content_hash": "f" * 64,
    "job_id": 7,
    "text": "text",
    "vector": [0.5, 1.0],
}


def well(asked: Asked) -> Said:
    """What a gateway answers."""
    if asked.path == "/info":
        return Said(body=b'{"max_client_batch_size": 4}')
    if asked.path == "/v1/embeddings":
        return embedded(asked)
    if "/chunks" in asked.path:
        after = int(re.findall(r"after=(\d+)", asked.path)[0]) if "after=" in asked.path else 0
        page = [{"id": str(i), **STORED} for i in range(after + 1, after + 3)]
        return Said(body=json.dumps({"chunks": page, "next": None if after >= 4 else str(after + 2)}).encode())
    if "/search" in asked.path:
        hit = {"score": 1, "chunk_id": "c", "text": "t", "metadata": {}, "truncated": False}
        return Said(body=json.dumps({"hits": [hit], "explanation": None}).encode())
    return Said(body=json.dumps({**JOB, "jobs": [JOB], "next": None, "deleted": 3, "count": 3}).encode())


CALLS: dict[str, Any] = {
    "embed": lambda c, n: c.embed([f"text {i}" for i in range(n)], model="m"),
    "job": lambda c, n: c.job(n),
    "jobs": lambda c, n: c.jobs(n),
    "cancel": lambda c, n: c.cancel(n),
    "enqueue": lambda c, n: c.enqueue(iter(CHUNKS[:n]), collection="docs", idempotency_key="k"),
    "chunks": lambda c, n: c.chunks("docs", with_vector=True, limit=n),
    "search": lambda c, n: c.search("q", collection="docs", k=n),
    "count": lambda c, n: c.count("docs", filter={"n": n}),
    "delete": lambda c, n: c.delete("docs", [str(n)]),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    with scripted(well) as running:
        yield running


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    verb=st.sampled_from(sorted(CALLS)),
    n=st.integers(1, 11),
    failures=st.lists(TRANSIENT, max_size=3),
    final=FINAL,
    which=st.integers(0, 2),
)
def test_both_clients_do_the_same_whatever_the_server_does(
    server: Scripted, verb: str, n: int, failures: list[Said], final: Said | None, which: int
) -> None:
    outcomes = []
    for kind in ("sync", "async"):
        asked_before = len(server.asked)
        left = list(failures)
        # A request of an earlier call, which was stopped after an error, may arrive now. It has another key.
        key = f"key-{next(_numbers)}"

        def answer(asked: Asked, left: list[Said] = left, key: str = key) -> Said:
            if key not in asked.headers["authorization"]:
                return well(asked)
            # Pieces of one call come in any order, so the one that fails is named by its first text.
            is_chosen = asked.path != "/v1/embeddings" or asked.json["input"][0] == f"text {which * PIECE}"
            if not is_chosen or asked.path == "/info":
                return well(asked)
            return left.pop(0) if left else well(asked) if final is None else final

        server.answer = answer
        client = Remote(kind, server.url, key)
        with contextlib.closing(client):
            try:
                result: Any = CALLS[verb](client, n)
            except ChunkmillError as error:
                result = (type(error), str(error))
            # The threads of a call that failed end with the requests that they have.
            until(lambda: not any(thread.name == "chunkmill-remote" for thread in threading.enumerate()))
        asked = [
            (one.method, one.path, re.sub(rb'"timeout_ms": \d+', b"", one.body))
            for one in server.asked[asked_before:]
            if one.headers["authorization"] == f"Bearer {key}"
        ]
        # A call that failed may have been stopped before the last of its pieces was asked for.
        outcomes.append((result, sorted(asked) if not isinstance(result, tuple) else None))
    (first, asked_first), (second, asked_second) = outcomes
    if isinstance(first, np.ndarray):
        assert (first == second).all()
    else:
        assert first == second and type(first) is type(second)
    assert asked_first == asked_second


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "REQUEST_TEXTS", PIECE)
