"""Packing under every limit at once, and that what was packed is what is sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkmill.openai.plan.inputs import ProviderInput, TextWindow
from chunkmill.openai.plan.limits import BatchLimits, Headroom
from chunkmill.openai.plan.packing import PackedInput, Packer
from chunkmill.openai.wire.jsonl import RequestForm, custom_id, encode_request

FORM = RequestForm("text-embedding-3-small", 1536)


def item(number: int, *windows: tuple[str, int]) -> ProviderInput:
    many = len(windows) > 1
    made = tuple(TextWindow(text, tokens, weight=tokens if many else 1) for text, tokens in windows)
    return ProviderInput(number.to_bytes(32, "big"), made, sum(tokens for _, tokens in windows))


def pack_all(
    items: Sequence[tuple[ProviderInput, bool]], form: RequestForm, limits: BatchLimits, headroom: Headroom
) -> list[Packer]:
    """As many batches as it takes, as the caller of a packer does."""
    packers: list[Packer] = []
    for one, alone in items:
        if not packers or not packers[-1].add(one, alone=alone):
            packers.append(Packer(len(packers) + 9, form, limits, headroom))
            assert packers[-1].add(one, alone=alone)
    return packers


def encode(packer: Packer, batch_id: int, form: RequestForm, by_hash: dict[bytes, ProviderInput]) -> list[bytes]:
    """The file that the rows describe."""
    return [
        encode_request(
            custom_id(batch_id, number), form, [w.text for row in rows for w in by_hash[row.content_hash].windows]
        )
        for number, rows in groupby(packer.rows, key=lambda row: row.request_no)
    ]


TEXT = st.text(min_size=1, max_size=40) | st.sampled_from(["\u2028", "\x85", '"\\', "\x00", "漢字" * 30, "😀" * 20])
WINDOWS = st.lists(st.tuples(TEXT, st.integers(1, 30)), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    contents=st.lists(st.tuples(WINDOWS, st.sampled_from([False, False, False, True])), min_size=1, max_size=60),
    inputs=st.integers(3, 40),
    requests=st.integers(1, 20),
    per_request=st.integers(3, 9),
    tokens=st.integers(90, 200),
    headroom_tokens=st.none() | st.integers(90, 500),
    headroom_requests=st.none() | st.integers(1, 9),
    dimensions=st.none() | st.integers(1, 4096),
    file_bytes=st.sampled_from([10_000, 30_000]),
)
def test_no_limit_is_passed_and_every_content_is_sent_once(
    contents: list[tuple[list[tuple[str, int]], bool]],
    inputs: int,
    requests: int,
    per_request: int,
    tokens: int,
    headroom_tokens: int | None,
    headroom_requests: int | None,
    dimensions: int | None,
    file_bytes: int,
) -> None:
    limits = BatchLimits(
        inputs=inputs,
        bytes=file_bytes,
        bytes_per_request=10_000,
        requests=requests,
        inputs_per_request=per_request,
        tokens_per_request=tokens,
        tokens_per_input=30,
    )
    headroom = Headroom(headroom_tokens, headroom_requests)
    form = RequestForm("m", dimensions, "float")
    items = [(item(number, *windows), alone) for number, (windows, alone) in enumerate(contents)]
    by_hash = {one.content_hash: one for one, _ in items}
    alone = {one.content_hash for one, is_alone in items if is_alone}

    packers = pack_all(items, form, limits, headroom)

    packed = [row.content_hash for packer in packers for row in packer.rows]
    assert packed == [one.content_hash for one, _ in items]
    for number, packer in enumerate(packers):
        lines = encode(packer, number + 9, form, by_hash)
        sent = [json.loads(line)["body"]["input"] for line in lines]
        assert packer.bytes == sum(map(len, lines)) <= limits.bytes
        assert packer.requests == len(lines) <= min(requests, headroom_requests or requests)
        assert packer.inputs == sum(map(len, sent)) <= inputs
        assert packer.tokens == sum(row.sent_tokens for row in packer.rows) <= (headroom_tokens or packer.tokens)
        for request, texts in enumerate(sent):
            rows = [row for row in packer.rows if row.request_no == request]
            assert sum(row.windows for row in rows) == len(texts) <= per_request
            assert len(lines[request]) <= limits.bytes_per_request
            assert sum(row.sent_tokens for row in rows) <= tokens
            assert len(rows) == 1 or not alone & {row.content_hash for row in rows}
            for row in rows:
                own = by_hash[row.content_hash].windows
                assert texts[row.position : row.position + row.windows] == [window.text for window in own]
                assert row.weights == (tuple(w.weight for w in own) if len(own) > 1 else ())
        assert {row.request_no for row in packer.rows} == set(range(len(lines)))


def test_requests_are_filled_to_the_limit() -> None:
    limits = BatchLimits(inputs=10, inputs_per_request=4)
    packer = Packer(7, FORM, limits)

    taken = [packer.add(item(number, ("text", 5))) for number in range(12)]

    assert taken == [True] * 10 + [False] * 2
    assert [row.request_no for row in packer.rows] == [0] * 4 + [1] * 4 + [2] * 2
    assert [row.position for row in packer.rows] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_requests_are_filled_to_their_tokens() -> None:
    packer = Packer(7, FORM, BatchLimits(tokens_per_request=30, tokens_per_input=16))

    for number in range(9):
        assert packer.add(item(number, ("text", 10)))

    assert [row.request_no for row in packer.rows] == [0] * 3 + [1] * 3 + [2] * 3


def test_requests_are_filled_to_their_bytes() -> None:
    limits = BatchLimits(bytes_per_request=10_000)
    texts = dict.fromkeys(range(9), ("é" * 1500, 10))  # 3 kB each
    packer = Packer(7, FORM, limits)

    for number, text in texts.items():
        assert packer.add(item(number, text))

    assert [row.request_no for row in packer.rows] == [0] * 3 + [1] * 3 + [2] * 3
    lines = encode(packer, 7, FORM, {one.content_hash: one for one in (item(n, text) for n, text in texts.items())})
    assert max(map(len, lines)) <= 10_000
    assert packer.bytes == sum(map(len, lines))


def test_longer_request_numbers_are_counted() -> None:
    packer = Packer(7, FORM, BatchLimits(inputs_per_request=1))

    for number in range(101):
        assert packer.add(item(number, ("text", 10)))

    assert packer.bytes == sum(len(encode_request(custom_id(7, number), FORM, ["text"])) for number in range(101))


def test_the_last_byte_of_a_file_is_used() -> None:
    one, two = item(1, ("a" * 6_000, 10)), item(2, ("b" * 6_000, 10))
    size = len(encode_request(custom_id(7, 0), FORM, ["a" * 6_000, "b" * 6_000]))

    exact, short = (Packer(7, FORM, BatchLimits(bytes=limit)) for limit in (size, size - 1))

    assert [exact.add(one), exact.add(two)] == [True, True]
    assert exact.bytes == size
    assert [short.add(one), short.add(two)] == [True, False]
    assert (short.inputs, short.requests, len(short.rows)) == (1, 1, 1)


def test_a_content_that_must_be_alone_is_and_the_next_begins_a_request() -> None:
    packer = Packer(7, FORM, BatchLimits())

    for number, alone in enumerate([False, False, True, True, False, False]):
        assert packer.add(item(number, ("text", 5)), alone=alone)

    assert [row.request_no for row in packer.rows] == [0, 0, 1, 2, 3, 3]


def test_windows_of_a_content_stay_in_one_request() -> None:
    packer = Packer(7, FORM, BatchLimits(inputs_per_request=4))

    for number in range(3):
        assert packer.add(item(number, ("a", 5), ("b", 6), ("c", 7)))

    assert packer.rows[1] == PackedInput((1).to_bytes(32, "big"), 1, 0, 3, 18, 18, truncated=False, weights=(5, 6, 7))
    assert [row.request_no for row in packer.rows] == [0, 1, 2]


def test_an_empty_batch_refuses_what_the_headroom_does_not_leave() -> None:
    assert not Packer(7, FORM, BatchLimits(), Headroom(tokens=4)).add(item(1, ("text", 5)))
    assert not Packer(7, FORM, BatchLimits(), Headroom(requests=0)).add(item(1, ("text", 5)))
    assert Packer(7, FORM, BatchLimits(), Headroom(tokens=5, requests=1)).add(item(1, ("text", 5)))


def test_a_content_prepared_under_other_limits_is_a_mistake_and_not_a_full_batch() -> None:
    with pytest.raises(ValueError, match="other limits"):
        Packer(7, FORM, BatchLimits(inputs_per_request=2)).add(item(1, ("a", 1), ("b", 1), ("c", 1)))
