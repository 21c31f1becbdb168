"""What searches of a collection need, how they went, and how models compare, through a gateway."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from chunkmill.domain.arguments import as_number, as_seconds, as_text, as_usd, as_word, require_name
from chunkmill.domain.comparing import Comparison, ComparisonQuote
from chunkmill.domain.golden import MAX_JUDGED
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import Index, Keywords, Outdated, SearchCounts, SearchTuning
from chunkmill.domain.spaces import Precision
from chunkmill.errors import InvalidInput
from chunkmill.remote.asking import RemoteCalls
from chunkmill.remote.collections import path_of
from chunkmill.remote.reading import parse, parse_object, read, read_list
from chunkmill.remote.steps import Steps


class Indexes(RemoteCalls):
    """The verbs about serving indexes, keywords, and what golden queries say."""

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

    def search_counts(self, collection: str, *, hours: float = 24.0) -> Steps[list[SearchCounts]]:
        """How the searches of the last ``hours`` went in each space of a collection, as :meth:`Client.search_counts`
        says. Raises what that raises."""
        require_name("collection", collection)

        def reader(body: bytes) -> list[SearchCounts]:
            return Rows(read_list(SearchCounts, parse_object(body).get("counts"), "counts"), SearchCounts)

        query = {"hours": str(as_seconds("hours", hours))}
        return self._get(path_of(collection, "searches"), reader, query=query)

    def outdated(self, collection: str, *, serve: bool | None = None) -> Steps[Outdated]:
        """Whether searches find a replaced chunk by its old vector until it has its new one, as
        :meth:`Client.outdated` says, which describes the argument. Raises what that raises."""
        require_name("collection", collection)
        path = path_of(collection, "outdated")
        if serve is None:
            return self._get(path, lambda answer: read(Outdated, parse(answer)))
        if not isinstance(serve, bool):
            raise InvalidInput(f"serve is {serve!r}; it must be True or False, or None to change nothing.")
        return self._get_lasting(path, lambda answer: read(Outdated, parse(answer)), {"serve": serve})

    def tune_search(self, collection: str, *, timeout: float = 600.0, space: str | None = None) -> Steps[SearchTuning]:
        """Judge searches by vectors, by keywords and by both with the collection's golden queries, and choose, as
        :meth:`Client.tune_search` does.

        The queries count for the limits of the key. A request that was begun is not repeated. Raises what that raises.
        """
        require_name("collection", collection)
        body = {} if space is None else {"space": as_text("space", space)}
        return self._get_lasting(
            path_of(collection, "tune-search"),
            lambda answer: read(SearchTuning, parse(answer)),
            body,
            as_seconds("timeout", timeout),
        )

    def compare(
        self,
        collection: str,
        model: str,
        *,
        against: str | None = None,
        sample: int = 20_000,
        queries: int = MAX_JUDGED,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        max_usd: Decimal | int | str | None = None,
        timeout: float = 3600.0,
    ) -> Steps[Comparison]:
        """Judge ``model`` against the model of a collection on a sample of it, as :meth:`Client.compare` does, which
        describes the arguments.

        What it costs counts for the limits of the key. A request that was begun is not repeated. Raises what that
        raises.
        """
        body = _compared(collection, model, against, sample, queries, dimensions, precision)
        if max_usd is not None:
            body["max_usd"] = str(as_usd("max_usd", max_usd))
        return self._get_lasting(
            path_of(collection, "compare"),
            lambda answer: read(Comparison, parse(answer)),
            body,
            as_seconds("timeout", timeout),
        )

    def quote_comparison(
        self,
        collection: str,
        model: str,
        *,
        against: str | None = None,
        sample: int = 20_000,
        queries: int = MAX_JUDGED,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> Steps[ComparisonQuote]:
        """What :meth:`compare` with these arguments would have embedded, and what that would cost. Nothing is sent.

        Raises what :meth:`compare` raises before it sends anything.
        """
        body = {**_compared(collection, model, against, sample, queries, dimensions, precision), "dry_run": True}
        return self._get_lasting(
            path_of(collection, "compare"), lambda answer: read(ComparisonQuote, parse(answer)), body
        )


def _compared(
    collection: str,
    model: str,
    against: str | None,
    sample: int,
    queries: int,
    dimensions: int | None,
    precision: Precision | str | None,
) -> dict[str, Any]:
    body = judged_model(collection, model, sample, queries, dimensions, precision)
    return body if against is None else {**body, "against": as_text("against", against)}


def judged_model(
    collection: str, model: str, sample: int, queries: int, dimensions: int | None, precision: Precision | str | None
) -> dict[str, Any]:
    """The body of a request to judge a model on a sample of a collection."""
    require_name("collection", collection)
    body: dict[str, Any] = {
        "model": as_text("model", model),
        "sample": as_number("sample", sample, least=1),
        "queries": as_number("queries", queries, least=1),
    }
    if dimensions is not None:
        body["dimensions"] = as_number("dimensions", dimensions, least=1)
    if precision is not None:
        body["precision"] = as_word(Precision, precision, "precision").value
    return body


def _keywords(body: bytes) -> Keywords | None:
    given: Any = parse_object(body).get("keywords")
    return None if given is None else read(Keywords, given, "keywords")
