"""Lines of a batch's files as they are written and streamed, and windows put together again."""

from __future__ import annotations

import base64
import itertools
import json
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkmill.openai.plan.assemble import assemble
from chunkmill.openai.plan.packing import PackedInput
from chunkmill.openai.wire.answers import EmbeddedRequest, SentRequest
from chunkmill.openai.wire.jsonl import (
    TOO_LONG,
    RequestForm,
    custom_id,
    decode_line,
    encode_request,
    parse_custom_id,
    split_lines,
    text_bytes,
)
from chunkmill.openai.wire.vectors import pool


@settings(deadline=None)
@given(text=st.text(max_size=50))
def test_a_request_is_one_line_that_says_what_it_was_given(text: str) -> None:
    line = encode_request("pb1-0", RequestForm("m", 256), [text, "b"])

    assert json.loads(line) == {
        "custom_id": "pb1-0",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "m", "encoding_format": "base64", "dimensions": 256, "input": [text, "b"]},
    }
    assert line.endswith(b"\n")
    assert len(line.decode().splitlines()) == 1  # also for readers that know more line breaks than JSON Lines
    assert text_bytes(text) == len(line) - len(encode_request("pb1-0", RequestForm("m", 256), ["", "b"])) + 2


def test_texts_are_written_as_utf_8_and_dimensions_only_when_asked_for() -> None:
    line = encode_request("pb1-0", RequestForm("m", None, "float"), ["naïve 漢字"])

    assert "naïve 漢字".encode() in line
    assert "dimensions" not in json.loads(line)["body"]


@pytest.mark.parametrize(
    "given",
    [
        "",
        "pb1",
        "pb-1-2",
        "pb01-2",
        "pb1-02",
        "pb1-2 ",
        "pb1-2\n",
        "PB1-2",
        "pb\u0661-2",
        "pb1-2-3",
        12,
        None,
        ["pb1-2"],
    ],
)
def test_only_our_own_custom_ids_are_read(given: object) -> None:
    assert parse_custom_id(given) is None
    assert parse_custom_id(custom_id(31, 0)) == (31, 0)


@settings(deadline=None)
@given(lines=st.lists(st.binary(max_size=30), max_size=8), seed=st.integers(0, 99), at_end=st.booleans())
def test_lines_are_the_same_however_a_stream_is_cut(lines: list[bytes], seed: int, at_end: bool) -> None:
    lines = [line.replace(b"\n", b"").strip() for line in lines]
    content = b"\xef\xbb\xbf" + b"\n".join(lines) + (b"\r\n" if at_end else b"")
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(content) + 1) for _ in range(6))
    chunks = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]

    assert list(split_lines(chunks, 100)) == [line for line in lines if line]


@settings(deadline=None)
@given(seed=st.integers(0, 999))
def test_a_line_without_an_end_is_left_out_and_those_behind_it_are_read(seed: int) -> None:
    rng = random.Random(seed)
    lines = [bytes([65 + n]) * rng.choice((1, 9, 10, 11, 12, 50)) for n in range(6)]
    content = b"\n".join(lines) + rng.choice((b"", b"\n"))
    cuts = sorted(rng.randrange(len(content) + 1) for _ in range(rng.randrange(20)))
    chunks = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]

    assert list(split_lines(chunks, 10)) == [line if len(line) <= 10 else TOO_LONG for line in lines]


def test_a_line_that_is_too_long_is_not_kept_in_memory() -> None:
    tracemalloc.start()
    try:
        lines = list(split_lines(itertools.chain(itertools.repeat(b"x" * 65_536, 2_000), [b"\n{}"]), 1_000_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert lines == [TOO_LONG, b"{}"]
    assert peak < 3_000_000


def test_a_file_is_read_in_flat_memory() -> None:
    vectors = np.random.default_rng(5).standard_normal((32, 1536)).astype(np.float32)
    items = [{"index": n, "embedding": base64.b64encode(vector.tobytes()).decode()} for n, vector in enumerate(vectors)]
    body = {"data": items}
    line = json.dumps({"custom_id": "pb5-2", "response": {"status_code": 200, "body": body}}).encode() + b"\n"
    size = 65_536

    def stream(lines: int) -> Any:
        for _ in range(lines):
            yield from (line[start : start + size] for start in range(0, len(line), size))

    def peak(lines: int) -> int:
        tracemalloc.start()
        try:
            for one in split_lines(stream(lines), 1_000_000):
                read = decode_line(one, batch_id=5, sent={2: SentRequest(32, 32)}.get, dimensions=1536, normalize=True)
                assert isinstance(read, EmbeddedRequest)
                assert not read.problems
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(40) < 1.5 * peak(4)


def test_windows_become_the_content_they_were_cut_from() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0], [-1, 0]], np.float32)
    answered = EmbeddedRequest(0, vectors, {}, 9, None)
    rows = [
        PackedInput(b"single", 0, 0, 1, 4, 4, truncated=False, weights=()),
        PackedInput(b"split", 0, 1, 2, 9, 9, truncated=False, weights=(3, 1)),
        PackedInput(b"cancelled", 0, 3, 2, 9, 9, truncated=False, weights=(1, 1)),
    ]

    done, matrix, problems = assemble(answered, rows, normalize=True)
    hurt = assemble(EmbeddedRequest(0, vectors, {2: "the vector is zero"}, 9, None), rows[:2], normalize=True)

    mean = np.array([0.15, 0.95])
    assert [row.content_hash for row in done] == [b"single", b"split"]
    np.testing.assert_allclose(matrix, [[1, 0], mean / np.linalg.norm(mean)], atol=1e-6)
    assert matrix.dtype == np.float32
    assert problems == [(rows[2], "the mean of the text's windows is zero")]
    assert [row.content_hash for row in hurt.rows] == [b"single"]
    assert hurt.problems == [(rows[1], "the vector is zero")]
    assert assemble(answered, [], normalize=True).vectors.shape == (0, 2)
    plain = pool(vectors[1:3], (3, 1), normalize=False)
    assert plain is not None
    np.testing.assert_allclose(plain, mean, atol=1e-7)
