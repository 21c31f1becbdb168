"""A limit of tokens is read from the words of a refusal, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from chunkmill.openai.plan.limits import limit_in


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        ("Enqueued token limit reached. Limit: 3,000,000 enqueued tokens. Please try again", 3_000_000),
        ("the limit is 90000", 90_000),
        ("Enqueued request limit reached. Limit: 3 enqueued requests. Please try again", None),
        ("Limit: 30 requests", None),
        ("No room.", None),
    ],
)
def test_a_number_of_requests_is_no_limit_of_tokens(message: str, limit: int | None) -> None:
    assert limit_in(message) == limit
