"""What searches of a collection need, and how they went, through a gateway."""

from __future__ import annotations

from typing import Any

from chunkmill.domain.arguments import as_seconds, as_text, require_name
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import Index, Keywords, SearchCounts
from chunkmill.remote.asking import RemoteCalls
from chunkmill.remote.collections import path_of
from chunkmill.remote.reading import parse, parse_object, read, read_list
from chunkmill.remote.steps import Steps


class Indexes(RemoteCalls):
    """The verbs about serving indexes and keywords."""

    def index(self, collection: str, *, space: str | None = None) -> Steps[Index]:
        """Build now what searches of the collection need, as :meth:`Client.index` does.

        Raises what that raises. If the connection breaks, the poller goes on with it.
        """
        require_name("collection", collection)
        body = {} if space is None else {"space": as_text("space", space)}
        return self._get_lasting(path_of(collection, "index"), lambda answer: read(Index, parse(answer)), body)

    def keywords(self, collection: str, *, language: str | None = None) -> Steps[Keywords | None]:
        """The keywords of a collection; None if it has none. With ``language`` it gets some, as
        :meth:`Client.keywords` says.

        Raises what that raises. If the connection breaks, the poller goes on with it.
        """
        require_name("collection", collection)
        path = path_of(collection, "keywords")
        if language is None:
            return self._get(path, _keywords)
        require_name("language", language)
        return self._get_lasting(path, _keywords, {"language": language})

    def drop_keywords(self, collection: str) -> Steps[bool]:
        """Delete the keywords of a collection, as :meth:`Client.drop_keywords` does. Returns whether there were any.

        A request whose answer was lost is not repeated. Raises :class:`NotFound`.
        """
        require_name("collection", collection)
        return self._get(
            path_of(collection, "keywords"),
            lambda answer: read(bool, parse_object(answer).get("dropped"), "dropped"),
            method="DELETE",
            is_repeatable=False,
        )

    def search_counts(self, collection: str, *, hours: float = 24.0) -> Steps[Rows[SearchCounts]]:
        """How the searches of the last ``hours`` went in each space of a collection, as :meth:`Client.search_counts`
        says. Raises what that raises."""
        require_name("collection", collection)

        def reader(body: bytes) -> Rows[SearchCounts]:
            return Rows(read_list(SearchCounts, parse_object(body).get("counts"), "counts"), SearchCounts)

        query = {"hours": str(as_seconds("hours", hours))}
        return self._get(path_of(collection, "searches"), reader, query=query)


def _keywords(body: bytes) -> Keywords | None:
    given: Any = parse_object(body).get("keywords")
    return None if given is None else read(Keywords, given, "keywords")
