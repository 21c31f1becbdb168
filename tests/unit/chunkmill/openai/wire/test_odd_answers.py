"""Thousands of odd answers from a fixed seed: each is read, or is an error that we know, and none stays in memory.

``ODD_ANSWERS=10000`` sends as many to each reader. Without it there are few, so that the suite stays quick.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from chunkmill.errors import ProviderError, ProviderSilent
from chunkmill.openai.plan.endings import after_line_error, after_validation_failure
from chunkmill.openai.wire.answers import EmbeddedRequest, SentRequest, error_of, parse, parse_object, read_plain
from chunkmill.openai.wire.bounds import MAX_COUNT
from chunkmill.openai.wire.jsonl import RefusedRequest, UnreadableLine, decode_line
from chunkmill.openai.wire.redaction import redact
from chunkmill.openai.wire.status import RemoteBatch, remote_batch
from tests.unit.chunkmill.openai.wire.odd_bodies import DIMENSIONS, INPUTS, batch, line, oddly_encoded, plain_or_error

N = int(os.environ.get("ODD_ANSWERS", "200"))
SEED = 15
SECRET = "sk-a-key-of-the-test-1234"
COUNTED = 20
SENT = SentRequest(INPUTS, COUNTED)


def read_line(encoded: bytes) -> object:
    read = decode_line(
        encoded, batch_id=5, sent={2: SENT}.get, dimensions=DIMENSIONS, normalize=True, secrets=(SECRET,)
    )
    if isinstance(read, RefusedRequest):
        after_line_error(read.status, read.code, read.message, n_inputs_in_request=1)
    return read


def read_body(encoded: bytes) -> object:
    """What `Provider.embed` and its callers make of the body of a plain answer."""
    body = parse_object(encoded, "the server")
    error = error_of(body)
    if error is not None:
        return {name: redact(value, (SECRET,)) for name, value in error.items()}
    return read_plain(body, SENT, DIMENSIONS, normalize=True, secrets=(SECRET,))


def read_batch(encoded: bytes) -> object:
    parsed = parse(encoded)
    try:
        read = remote_batch(parsed if isinstance(parsed, dict) else {}, (SECRET,))
    except ValueError as error:
        return str(error)
    after_validation_failure(read.errors, attempts=1, n_inputs=3, n_requests=3, max_attempts=5)
    return read


READERS: list[tuple[Callable[[random.Random], Any], Callable[[bytes], object], tuple[type, ...]]] = [
    (line, read_line, (EmbeddedRequest, RefusedRequest, UnreadableLine)),
    (plain_or_error, read_body, (EmbeddedRequest, dict)),
    (batch, read_batch, (RemoteBatch, str)),
]


@pytest.mark.parametrize(("right", "read", "kinds"), READERS, ids=["line", "plain", "batch"])
def test_an_odd_answer_is_read_or_is_an_error_that_we_know(
    right: Callable[[random.Random], Any], read: Callable[[bytes], object], kinds: tuple[type, ...]
) -> None:
    seen: dict[type, int] = {}
    for n in range(N):
        rng = random.Random(f"{SEED} {n}")
        encoded = oddly_encoded(rng, right(rng))
        try:
            answer = read(encoded)
        except ProviderError as error:
            assert type(error) is ProviderSilent, n
            answer = str(error)
        else:
            assert isinstance(answer, kinds), n
        seen[type(answer)] = seen.get(type(answer), 0) + 1
        _check(answer, n)

    assert len(seen) == len(kinds) + (read is read_body), seen


def _check(answer: object, n: int) -> None:
    """Everything in it can be written into Postgres and onto a terminal, and is within bounds."""
    if isinstance(answer, EmbeddedRequest):
        assert answer.vectors.shape == (INPUTS, DIMENSIONS), n
        assert answer.vectors.dtype == np.float32
        good = [place for place in range(INPUTS) if place not in answer.problems]
        np.testing.assert_allclose(np.linalg.norm(answer.vectors[good], axis=1), 1, atol=1e-5)
        assert answer.prompt_tokens is None or 0 <= answer.prompt_tokens <= 4 * COUNTED + 1_000, n
        answer = (answer.model, *answer.problems.values(), *answer.oddities)
    for value in _leaves(answer):
        if isinstance(value, str):
            value.encode()  # no half of a character
            assert value.isprintable(), (n, value)
            assert len(value) <= 600, n
            assert SECRET not in value, n
        else:
            assert value is None or isinstance(value, datetime) or 0 <= value <= MAX_COUNT, n


def _leaves(value: object) -> list[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [leaf for inner in value for leaf in _leaves(inner)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(("right", "read", "kinds"), READERS, ids=["line", "plain", "batch"])
def test_odd_answers_do_not_stay_in_memory(
    right: Callable[[random.Random], Any], read: Callable[[bytes], object], kinds: tuple[type, ...]
) -> None:
    def read_some(first: int) -> int:
        for n in range(first, first + 50):
            rng = random.Random(f"{SEED} {n}")
            try:
                read(oddly_encoded(rng, right(rng)))
            except ProviderSilent:
                continue
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = read_some(0)
        after = [read_some(50 + 50 * step) for step in range(max(3, N // 500))][-1]
    finally:
        tracemalloc.stop()

    assert after - before < 300_000


def test_a_right_answer_of_each_kind_is_read_whole() -> None:
    """Otherwise the tests above would read nothing but rubbish."""
    rng = random.Random(SEED)
    for right, read, kinds in READERS:
        answers = [read(json.dumps(right(rng)).encode()) for _ in range(40)]
        assert {type(answer) for answer in answers} <= set(kinds)
        whole = [answer for answer in answers if isinstance(answer, EmbeddedRequest | RemoteBatch)]
        assert len(whole) > 10
        assert all(answer.problems == {} for answer in whole if isinstance(answer, EmbeddedRequest))
