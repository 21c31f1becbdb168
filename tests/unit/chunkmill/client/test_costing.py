"""What a call spends is counted before and after each of its requests, in all of its spaces."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any, cast

import numpy as np
import pytest

from chunkmill.client.costing import PricedSpace, Spending
from chunkmill.domain.costs import Spent, known_sum, sum_of
from chunkmill.domain.embedded import EmbeddedTexts


class Priced:
    """A space whose tokens cost ``usd`` each. A text is expected to have as many as it has characters."""

    def __init__(self, usd: Decimal | None) -> None:
        self.usd = usd

    def tokens_of(self, texts: list[str]) -> int:
        return sum(map(len, texts))

    def usd_of(self, tokens: int) -> Decimal | None:
        return None if self.usd is None else self.usd * tokens


def spent(texts: int, tokens: int, usd: int) -> Spent:
    return Spent(texts, tokens, Decimal(usd), Decimal(usd))


def priced(usd: int | None) -> PricedSpace:
    return cast(Any, Priced(None if usd is None else Decimal(usd)))


def embedded(*tokens: int) -> EmbeddedTexts:
    n = len(tokens)
    return EmbeddedTexts(np.zeros((n, 2), np.float32), np.array(tokens, np.int32), np.zeros(n, np.bool_))


def test_texts_count_as_expected_while_they_are_with_workers_and_as_they_were_after_that() -> None:
    told: list[Spent] = []
    spending = Spending(told.append)
    spending.embed(priced(1), ["abc", "de"], lambda: embedded(2, 2))
    assert told == [spent(2, 5, 5), spent(2, 4, 4)]
    spending.embed(priced(10), ["abcd"], lambda: embedded(6))
    assert told[2:] == [spent(3, 8, 44), spent(3, 10, 64)]
    spending.embed(priced(1), [], lambda: embedded())
    assert len(told) == 4


def test_texts_stay_counted_if_their_request_fails_and_those_that_were_refused_before_do_not() -> None:
    told: list[Spent] = []
    spending = Spending(told.append)

    def fails() -> EmbeddedTexts:
        raise OSError("the line is cut")

    for ask in (lambda: embedded(1), fails):
        try:
            spending.embed(priced(2), ["abc"], ask)
        except OSError:
            continue
    assert told[-1] == spent(2, 4, 8)
    with pytest.raises(ZeroDivisionError):
        Spending(lambda spent: 1 // 0).embed(priced(2), ["abc"], lambda: pytest.fail("it was sent"))


def test_workers_that_do_not_count_are_believed_to_have_read_what_was_expected() -> None:
    told: list[Spent] = []
    Spending(told.append).embed(priced(2), ["abc", "de"], lambda: embedded(0, 0))
    assert told[-1] == spent(2, 5, 10)


def test_a_text_that_one_worker_has_not_counted_counts_as_expected_beside_those_that_others_have_counted() -> None:
    told: list[Spent] = []
    spending = Spending(told.append)
    spending.embed(priced(2), ["abc", "de", "f"], lambda: embedded(0, 7, 0))
    assert told[-1] == spent(3, 3 + 7 + 1, 22)


def test_a_text_whose_vector_was_known_when_it_was_asked_for_counts_nothing() -> None:
    told: list[Spent] = []
    spending = Spending(told.append)
    known = replace(embedded(0, 7, 9), made=np.array([True, False, True]))
    spending.embed(priced(2), ["abc", "de", "f"], lambda: known)
    assert told[-1] == spent(2, 3 + 9, 24)


def test_a_price_that_is_not_known_makes_the_sum_unknown_and_hides_no_other_price() -> None:
    told: list[Spent] = []
    spending = Spending(told.append)
    for usd in (3, None, 3):
        spending.embed(priced(usd), ["a"], lambda: embedded(1))
    assert [spent.usd for spent in told] == [Decimal(3), Decimal(3), None, None, None, None]
    assert [spent.known_usd for spent in told] == [3, 3, 3, 3, 6, 6]
    assert (sum_of([]), sum_of([Decimal(0), Decimal(2)]), sum_of([Decimal(2), None])) == (0, 2, None)
    assert (known_sum([]), known_sum([Decimal(1), Decimal(2)]), known_sum([Decimal(2), None])) == (0, 3, 2)


def test_nobody_counts_for_a_call_that_nobody_asks() -> None:
    assert len(Spending(None).embed(cast(Any, None), ["a"], lambda: embedded(1))) == 1
