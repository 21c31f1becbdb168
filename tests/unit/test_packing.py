from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.engine.packing import pack

lengths_of_texts = st.lists(st.integers(1, 300), max_size=200).map(lambda found: np.array(found, np.int32))
budgets = st.integers(1, 2000)


@given(lengths_of_texts, budgets)
def test_every_index_is_in_one_token_batch(lengths: NDArray[np.int32], budget: int) -> None:
    batches = pack(lengths, budget)

    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    assert all(batch.dtype == np.int32 and len(batch) for batch in batches)


@given(lengths_of_texts, budgets)
def test_no_token_batch_is_over_the_budget_but_a_single_text(lengths: NDArray[np.int32], budget: int) -> None:
    for batch in pack(lengths, budget):
        assert len(batch) == 1 or len(batch) * int(lengths[batch].max()) <= budget


@given(lengths_of_texts, budgets)
def test_no_token_batch_has_room_for_the_next_text(lengths: NDArray[np.int32], budget: int) -> None:
    for batch in pack(lengths, budget)[:-1]:
        assert (len(batch) + 1) * int(lengths[batch].max()) > budget


@given(lengths_of_texts, budgets)
def test_the_same_lengths_give_the_same_cut_longest_first(lengths: NDArray[np.int32], budget: int) -> None:
    batches = pack(lengths, budget)

    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in pack(lengths.copy(), budget)]
    flat = [int(lengths[index]) for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


def test_equal_lengths_keep_their_order() -> None:
    assert [batch.tolist() for batch in pack(np.full(5, 10, np.int32), 20)] == [[0, 1], [2, 3], [4]]


def test_a_text_over_the_budget_is_alone() -> None:
    assert [batch.tolist() for batch in pack(np.array([5, 500, 5], np.int32), 100)] == [[1], [0, 2]]
