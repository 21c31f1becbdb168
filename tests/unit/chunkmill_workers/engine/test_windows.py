"""Windows over a long text: what they cover, what they share, what they weigh."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.spaces import LongText, OnLong, long_text_for
from chunkmill_workers.engine.windows import Frame, make_rows, split, truncate

IDS = np.arange(10, dtype=np.int32)


def test_cutting_keeps_special_tokens_on_either_side() -> None:
    right = Frame(prefix=IDS[:1], suffix=IDS[-2:])
    left = Frame(prefix=IDS[:1], suffix=IDS[-2:], cut_left=True)

    assert truncate(IDS, 6, right).tolist() == [0, 1, 2, 3, 8, 9]
    assert truncate(IDS, 6, left).tolist() == [0, 5, 6, 7, 8, 9]


def test_neighbours_share_an_eighth_of_a_window_and_all_are_equally_long() -> None:
    ids = np.arange(1000, 1045, dtype=np.int32)  # prefix, one token of prompt, 42 of text, suffix
    frame = Frame(prefix=ids[:1], suffix=ids[-1:], prompt=1)

    rows, weights = split(ids, 19, frame)  # room for 16, of which 2 are shared

    assert [row[0] for row in rows] == [1000] * 3
    assert [row[1] for row in rows] == [1001] * 3
    assert [row[-1] for row in rows] == [1044] * 3
    bodies = [row[2:-1].tolist() for row in rows]
    assert bodies == [[*range(1002, 1017)], [*range(1015, 1030)], [*range(1028, 1044)]]
    assert weights == [2 * 15 - 2, 2 * 15 - 4, 2 * 16 - 2]


@given(
    room=st.integers(1, 70),
    more=st.integers(1, 500),
    prefix=st.integers(0, 2),
    prompt=st.integers(0, 3),
    suffix=st.integers(0, 2),
)
def test_windows_hold_the_text_and_every_token_counts_once(
    room: int, more: int, prefix: int, prompt: int, suffix: int
) -> None:
    length = room + more
    ids = np.arange(prefix + prompt + length + suffix, dtype=np.int32)
    frame = Frame(ids[:prefix], ids[len(ids) - suffix :], prompt)
    limit = room + prefix + prompt + suffix
    overlap = room // 8

    rows, weights = split(ids, limit, frame)

    head, tail = ids[: prefix + prompt].tolist(), ids[len(ids) - suffix :].tolist()
    bodies = []
    for row in rows:
        assert len(row) <= limit
        assert row[: len(head)].tolist() == head
        assert row[len(row) - suffix :].tolist() == tail
        bodies.append(row[len(head) : len(row) - suffix])
    covered = np.zeros(length, np.int64)
    for body in bodies:
        assert np.array_equal(body, np.arange(body[0], body[0] + len(body)))
        covered[body - prefix - prompt] += 1
    assert covered.min() == 1
    assert covered.max() <= 2
    shared = [len(np.intersect1d(one, two)) for one, two in pairwise(bodies)]
    assert shared == [overlap] * (len(rows) - 1)
    lengths = [len(body) for body in bodies]
    assert max(lengths) - min(lengths) <= 1
    # One window less could not hold the text with that much shared.
    assert (len(rows) - 1) * room - (len(rows) - 2) * overlap < length
    # The weight of a window: its tokens, each divided by the windows that hold it. All are given doubled.
    expected = [(1 / covered[body - prefix - prompt]).sum() for body in bodies]
    assert weights == pytest.approx([2 * weight for weight in expected])
    assert sum(weights) == 2 * length


def test_the_rule_has_its_name_in_the_fingerprint() -> None:
    """Whoever changes these windows makes other vectors: give the rule another value, so that they do not mix."""
    rows, weights = split(np.arange(100, dtype=np.int32), 42, Frame(IDS[:1], IDS[-1:]))

    assert [(int(row[1]), int(row[-2])) for row in rows] == [(1, 36), (32, 67), (63, 98)]
    assert weights == [67, 62, 67]
    assert LongText.SPLIT == "split-overlap-8"
    assert long_text_for(OnLong.SPLIT) is LongText.SPLIT


def test_only_the_long_text_becomes_windows() -> None:
    frame = Frame(IDS[:1], IDS[-1:])
    rows = make_rows([IDS[:4], np.arange(100, dtype=np.int32), IDS], 10, frame, OnLong.SPLIT)

    assert rows.windows.tolist() == [1, len(rows.ids) - 2, 1]
    assert rows.n_tokens.tolist() == [4, 100, 10]
    assert not rows.truncated.any()
    own = rows.weight[rows.owner == 1]
    assert own.sum() == 2 * 98
    assert (own > 0).all()
