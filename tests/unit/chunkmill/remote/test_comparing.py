"""Two servers are judged by the same queries, and their hits are told apart by chunk ids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chunkmill.domain.golden import GoldenQuery
from chunkmill.errors import InvalidInput
from chunkmill.remote import compare_searches, comparing

QUERIES = [GoldenQuery(f"q{i}", f"text {i}", {f"c{i}": 1.0, f"c{i + 1}": 0.0}) for i in range(7)]


class Server:
    """A server at the edge: finds the chunk of each query at ``rank``."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.asked: list[tuple[str, list[str], int, float]] = []

    def search(self, query: list[str], *, collection: str, k: int = 10, timeout: float = 30.0) -> Any:
        self.asked.append((collection, list(query), k, timeout))
        return [
            [SimpleNamespace(chunk_id=f"x{r}" if r != self.rank else f"c{text.split()[1]}") for r in range(1, k + 1)]
            for text in query
        ]


def test_both_are_asked_the_same_and_the_better_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "AT_ONCE", 3)
    old, new = Server(2), Server(1)
    told = compare_searches(old, new, QUERIES, collection="docs", new_collection="docs-2", k=20, timeout=9)
    assert (told.mrr.old, told.mrr.new, told.queries) == (0.5, 1.0, 7)
    assert told.sentence.startswith("The new one is better")
    assert [len(texts) for _, texts, _, _ in old.asked] == [3, 3, 1]
    assert {(name, k, timeout) for name, _, k, timeout in new.asked} == {("docs-2", 20, 9)}
    assert [texts for _, texts, _, _ in old.asked] == [texts for _, texts, _, _ in new.asked]


def test_a_query_without_an_answer_is_not_asked() -> None:
    server = Server(1)
    told = compare_searches(server, server, [*QUERIES, GoldenQuery("none", "text 9", {"c9": 0.0})], collection="docs")
    assert told.queries == 7


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([GoldenQuery("t", "a title", {"c": 1.0}, is_title=True)], r"queries\[0\] is the title of its chunk"),
        (["a text"], r"queries\[0\] is of type str"),
        ([], "no query has a relevant chunk"),
        ("text", "queries is a str"),
    ],
)
def test_queries_that_cannot_judge_are_refused(queries: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        compare_searches(Server(1), Server(1), queries, collection="docs")
