"""Two servers that search the same chunks, judged by the same queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from chunkmill.domain.arguments import as_items, as_number, require_name
from chunkmill.domain.comparing import DEEP, Changes, Side, changes
from chunkmill.domain.golden import GoldenQuery
from chunkmill.errors import InvalidInput

AT_ONCE = 50
"""How many queries one call asks, which is what a gateway answers in some seconds."""


class Searches(Protocol):
    """What can search a collection for several texts: a :class:`RemoteClient` or a :class:`chunkmill.Client`."""

    def search(self, query: list[str], *, collection: str, k: int = 10, timeout: float = 30.0) -> Any:
        """A list of hit lists, in the order of the texts. A hit has a ``chunk_id``."""


def compare_searches(
    old: Searches,
    new: Searches,
    queries: Iterable[GoldenQuery],
    *,
    collection: str,
    new_collection: str | None = None,
    k: int = DEEP,
    timeout: float = 300.0,
) -> Changes:
    """How the searches of two servers differ, judged by the same golden queries, and how sure that is.

    Both hold the same chunks, by their ids, in ``collection``, or the new one in ``new_collection``. ``k`` hits of each
    query are read, from 10 to 100, and ``timeout`` is in seconds for each call. Queries that were made of titles are
    refused, because only the store can cut the titles off the chunks; :meth:`Client.compare` does that. Raises
    :class:`InvalidInput` also if no query has a relevant chunk, and what the searches raise.
    """
    require_name("collection", collection)
    if new_collection is not None:
        require_name("new_collection", new_collection)
    k = as_number("k", k, least=10, most=DEEP)
    asked = [_checked(i, query) for i, query in enumerate(as_items("queries", queries))]
    asked = [query for query in asked if any(grade > 0 for grade in query.relevant.values())]
    if not asked:
        raise InvalidInput("no query has a relevant chunk, so there is nothing to judge by.")
    sides = (Side(), Side())
    for first in range(0, len(asked), AT_ONCE):
        part = asked[first : first + AT_ONCE]
        texts = [query.text for query in part]
        for side, server, name in zip(sides, (old, new), (collection, new_collection or collection), strict=True):
            hits: Sequence[Any] = server.search(texts, collection=name, k=k, timeout=timeout)
            for query, of_query in zip(part, hits, strict=True):
                side.add([hit.chunk_id for hit in of_query], query.relevant)
    return changes([query.id for query in asked], *sides)


def _checked(i: int, query: object) -> GoldenQuery:
    if not isinstance(query, GoldenQuery):
        raise InvalidInput(f"queries[{i}] is of type {type(query).__name__}; it must be a GoldenQuery.")
    if query.is_title:
        raise InvalidInput(
            f"queries[{i}] is the title of its chunk, so that every server would find it. Give queries that people ask."
        )
    return query
