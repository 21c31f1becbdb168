"""After a death: again, cut up, or buried."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.deaths import DEAD_DEATHS, SUSPECT_DEATHS, Bury, Retry, Split, after_death


def contents(n: int) -> list[bytes]:
    return [i.to_bytes(4, "big") for i in range(n)]


def test_one_death_says_nothing() -> None:
    assert after_death(1, contents(512)) == Retry()
    assert after_death(1, contents(1)) == Retry()


@pytest.mark.parametrize(("n", "sizes"), [(2, {1}), (32, {1}), (33, {6, 3}), (512, {23, 6})])
def test_few_are_cut_into_single_ones_and_many_into_parts(n: int, sizes: set[int]) -> None:
    verdict = after_death(SUSPECT_DEATHS, contents(n))
    assert isinstance(verdict, Split)
    assert {len(part) for part in verdict.parts} == sizes


def test_what_has_all_its_vectors_is_never_cut_or_buried() -> None:
    assert after_death(9, []) == Retry()


def test_a_single_content_is_buried_only_after_it_killed_twice_alone() -> None:
    assert after_death(SUSPECT_DEATHS, contents(1)) == Retry()
    assert after_death(SUSPECT_DEATHS + 1, contents(1)) == Retry()
    assert after_death(DEAD_DEATHS, contents(1)) == Bury(contents(1)[0])


@given(st.integers(2, 16_384))
def test_a_cut_keeps_every_content_once_and_its_order(n: int) -> None:
    verdict = after_death(SUSPECT_DEATHS, contents(n))
    assert isinstance(verdict, Split)
    assert [content for part in verdict.parts for content in part] == contents(n)
    assert len(verdict.parts) > 1
    assert all(verdict.parts)


@given(st.integers(2, 16_384), st.randoms(use_true_random=False))
def test_whatever_kills_stands_alone_after_few_cuts(n: int, random: object) -> None:
    killer = random.choice(contents(n))  # type: ignore[attr-defined]
    suspect, cuts = tuple(contents(n)), 0
    while len(suspect) > 1:
        verdict = after_death(SUSPECT_DEATHS + cuts, suspect)
        assert isinstance(verdict, Split)
        (suspect,) = [part for part in verdict.parts if killer in part]
        cuts += 1
    assert suspect == (killer,)
    assert cuts <= (2 if n <= 1024 else 3)
