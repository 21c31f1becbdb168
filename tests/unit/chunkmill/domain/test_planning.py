from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.chunks import PreparedChunk, prepare
from chunkmill.domain.planning import KnownVector, distinct, into_chunk_batches, plan_window
from chunkmill.domain.spaces import OnLong


def window(*pairs: tuple[str, str]) -> dict[str, PreparedChunk]:
    return distinct([prepare(pair, i) for i, pair in enumerate(pairs)])


def test_the_last_chunk_of_an_id_counts() -> None:
    assert [c.text for c in window(("a", "old"), ("b", "other"), ("a", "new")).values()] == [b"new", b"other"]


def test_hits_misses_and_duplicates() -> None:
    chunks = window(("a", "known"), ("b", "fresh"), ("c", "fresh"), ("d", "known"))
    known = {chunks["a"].content_hash: KnownVector(3, truncated=False)}
    plan = plan_window(chunks, known, OnLong.TRUNCATE)
    assert plan.cached == (chunks["a"].content_hash,)
    assert dict(plan.missing) == {chunks["b"].content_hash: b"fresh"}
    assert [c.id for c in plan.references] == ["a", "b", "c", "d"]


def test_a_truncated_hit_is_dead_only_under_reject() -> None:
    chunks = window(("a", "long"))
    known = {chunks["a"].content_hash: KnownVector(999, truncated=True)}
    assert plan_window(chunks, known, OnLong.TRUNCATE).rejected == ()
    rejected = plan_window(chunks, known, OnLong.REJECT)
    assert [(d.chunk_id, d.code) for d in rejected.rejected] == [("a", "too_long")]
    assert "999 tokens" in rejected.rejected[0].reason
    assert rejected.references == ()
    assert rejected.cached == ()


def test_what_fills_a_chunk_batch_exactly_stays_together() -> None:
    texts = {bytes([n]): b"x" * 10 for n in range(5)}
    assert [len(batch) for batch in into_chunk_batches(texts, 100, 20)] == [2, 2, 1]
    assert [len(batch) for batch in into_chunk_batches(texts, 2, 100)] == [2, 2, 1]
    assert [len(batch) for batch in into_chunk_batches(texts, 5, 50)] == [5]
    assert [len(batch) for batch in into_chunk_batches({b"long": b"x" * 21} | texts, 100, 20)] == [1, 2, 2, 1]


@given(
    st.lists(st.binary(min_size=1, max_size=40), unique=True),
    st.integers(1, 7),
    st.integers(1, 60),
)
def test_cut_loses_nothing_and_keeps_both_limits(texts: list[bytes], contents: int, size: int) -> None:
    missing = {text: text for text in texts}
    batches = into_chunk_batches(missing, contents, size)
    assert [h for batch in batches for h in batch] == texts
    for batch in batches:
        assert 1 <= len(batch) <= contents
        assert len(batch) == 1 or sum(map(len, batch)) <= size
