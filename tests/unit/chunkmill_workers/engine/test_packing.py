from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkmill_workers.engine.packing import choose


@st.composite
def queues(draw: st.DrawFn) -> tuple[NDArray[np.int32], int]:
    """Waiting rows, longest first, and which of them must go now."""
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=200))
    return np.array(sorted(lengths, reverse=True), np.int32), draw(st.integers(0, len(lengths) - 1))


budgets = st.integers(1, 2000)


@given(queues(), budgets, st.booleans())
def test_the_choice_holds_its_anchor_and_keeps_the_budget(
    queue: tuple[NDArray[np.int32], int], budget: int, packed: bool
) -> None:
    lengths, anchor = queue

    chosen = choose(lengths, anchor, budget, packed=packed)

    assert 0 <= chosen.start <= anchor < chosen.stop <= len(lengths)
    rows = lengths[chosen]
    cost = int(rows.sum()) if packed else len(rows) * int(rows.max())
    assert cost <= budget or len(rows) == 1


@given(queues(), budgets)
def test_a_packed_choice_leaves_no_room_for_a_neighbour(queue: tuple[NDArray[np.int32], int], budget: int) -> None:
    lengths, anchor = queue

    chosen = choose(lengths, anchor, budget, packed=True)

    total = int(lengths[chosen].sum())
    if chosen.stop < len(lengths):
        assert total + lengths[chosen.stop] > budget
    if chosen.start > 0:
        assert total + lengths[chosen.start - 1] > budget


@given(queues(), budgets)
def test_no_other_end_wastes_less(queue: tuple[NDArray[np.int32], int], budget: int) -> None:
    """Of the choices that begin where this one does, none has a greater share of tokens in its cost."""
    lengths, anchor = queue

    chosen = choose(lengths, anchor, budget, packed=False)

    longest = int(lengths[chosen.start])

    def share(rows: int) -> float:
        return float(lengths[chosen.start : chosen.start + rows].sum()) / (16 + rows * longest)

    rows = chosen.stop - chosen.start
    fitting = range(1, max(budget // longest, 1) + 1)
    if chosen.start == anchor and chosen.stop < len(lengths):
        assert share(rows) == pytest.approx(max(share(size) for size in fitting if anchor + size <= len(lengths)))


def test_a_much_shorter_neighbour_waits_for_its_like() -> None:
    lengths = np.array([250, 250, 249, *[20] * 50], np.int32)

    assert choose(lengths, 0, 1024, packed=False) == slice(0, 3)


def test_a_few_last_rows_go_together() -> None:
    assert choose(np.array([12, 11, 10], np.int32), 1, 1024, packed=False) == slice(0, 3)


def test_a_row_over_the_budget_is_alone() -> None:
    assert choose(np.array([500, 5, 5], np.int32), 0, 100, packed=False) == slice(0, 1)
    assert choose(np.array([500, 5, 5], np.int32), 0, 100, packed=True) == slice(0, 1)
