from __future__ import annotations

import pytest

from chunkmill.domain.latencies import LAST, bucket_of, quantile
from chunkmill.domain.sessions import SearchId, percent_of
from chunkmill.errors import InvalidInput

SESSIONS = [f"user {i}" for i in range(4_000)]


def test_a_share_of_the_sessions_is_as_large_as_it_says() -> None:
    for share in (10, 25, 50, 90):
        n = sum(percent_of(session, 7) < share for session in SESSIONS)
        # Four standard deviations of a binomial distribution.
        assert abs(n - share / 100 * len(SESSIONS)) < 4 * (len(SESSIONS) * share / 100 * (1 - share / 100)) ** 0.5


def test_a_session_has_the_same_number_in_each_process() -> None:
    assert [percent_of("a", 1), percent_of("b", 1), percent_of("é", 12)] == [88, 23, 72]


def test_another_re_embedding_begins_with_other_sessions() -> None:
    first, second = ({s for s in SESSIONS if percent_of(s, number) < 10} for number in (1, 2))
    assert len(first & second) < 0.2 * len(first)


def test_a_search_id_says_which_space_answered_and_is_never_the_same() -> None:
    made, other = SearchId.new(201, 2), SearchId.new(201, 2)
    assert SearchId.read(str(made)) == made
    assert str(made) != str(other)


@pytest.mark.parametrize(
    "wrong",
    ["", "a", "é", "AAAA", str(SearchId.new(1, 1))[:-4], "B" + str(SearchId.new(1, 1))[1:]],
    ids=["empty", "a letter", "not ASCII", "too short", "cut", "of another version"],
)
def test_what_is_not_a_search_id_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidInput, match="search_id"):
        SearchId.read(wrong)


def test_a_quantile_of_a_histogram_is_off_by_a_twentieth_at_most() -> None:
    seconds = [0.001 * 1.01**i for i in range(1_000)]
    counts: dict[int, int] = {}
    for one in seconds:
        counts[bucket_of(one)] = counts.get(bucket_of(one), 0) + 1
    for share in (0.1, 0.5, 0.95, 1.0):
        right = 1_000 * seconds[round(share * len(seconds)) - 1]
        assert quantile(counts, share) == pytest.approx(right, rel=0.05)


def test_the_ends_of_a_histogram_take_what_is_beyond() -> None:
    assert (bucket_of(0.0), bucket_of(1e-9), bucket_of(1e9)) == (0, 0, LAST)
    assert quantile({}, 0.5) is None
