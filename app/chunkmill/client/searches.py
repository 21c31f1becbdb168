"""How searches went, with counts, latencies and feedback for each space; and whether they find replaced chunks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from chunkmill.client.base import ClientPart
from chunkmill.client.counting import counting_of
from chunkmill.domain.arguments import as_seconds, as_text, require_name
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import Outdated, SearchCounts
from chunkmill.domain.sessions import SearchId
from chunkmill.errors import InvalidInput, NotFound, StoreUnavailable
from chunkmill.spaces import serving
from chunkmill.spaces.registry import Space
from chunkmill.store import outdated, searches
from chunkmill.store.searches import CountedSearches

MOST_HOURS = 24 * searches.KEPT_DAYS


class Searches(ClientPart):
    """The part of the client that is about searches that were made, and about what they find meanwhile."""

    def feedback(self, search_id: str, chunk_id: str) -> bool:
        """Say that a hit was what somebody wanted, for example because they clicked on it.

        ``search_id`` is that of the hits. It names the space that answered, so that :meth:`search_counts` compares two
        spaces by what their users chose. Returns False if the same was said before. Raises :class:`InvalidInput`, and
        :class:`NotFound` if the collection does not have the chunk any more.
        """
        search, chunk_id = SearchId.read(as_text("search_id", search_id)), as_text("chunk_id", chunk_id)
        with self._transaction() as conn:
            if not searches.are_kept(conn):
                raise StoreUnavailable("the database has no table for feedback yet. Run: chunkmill migrate")
            is_new = searches.add_feedback(
                conn,
                collection_id=search.collection_id,
                space_id=search.space_id,
                number=search.number,
                chunk_id=chunk_id,
            )
        if is_new is None:
            raise NotFound(f"the collection of this search has no chunk {chunk_id[:200]!r} any more.")
        return is_new

    def search_counts(self, collection: str, *, hours: float = 24.0) -> list[SearchCounts]:
        """How the searches of the last ``hours`` went in each space of a collection, the active one first.

        Searches with a ``session`` are counted, while the collection has several spaces. Each process writes its counts
        every 5 s. Counts of more than two hours ago exist for whole hours only, and after 90 days they are deleted.
        Raises :class:`NotFound` and :class:`InvalidInput`.
        """
        require_name("collection", collection)
        length = as_seconds("hours", hours)
        if length > MOST_HOURS:
            raise InvalidInput(f"hours is {length:g}; counts are kept for {MOST_HOURS:,} hours.")
        counting_of(self._db).write(self._db)
        with self._transaction() as conn:
            served = serving.find(conn, collection)
            counted = searches.read(conn, served.id, since=datetime.now(UTC) - timedelta(hours=length))
        listed = [(served.active, serving.ACTIVE, served.active_share)]
        listed += [(other.space, other.role.value, other.share) for other in served.others]
        rows = [_counts(space, role, share, counted.get(space.id)) for space, role, share in listed]
        return Rows(rows, SearchCounts)

    def outdated(self, collection: str, *, serve: bool | None = None) -> Outdated:
        """Whether searches find a replaced chunk by its old vector until it has its new one.

        By default they do not: a chunk whose text was replaced cannot be found until a worker has embedded the new
        text. With ``serve=True`` a chunk that is replaced from then on is found by its old vector and shown with its
        old text, and ``outdated`` of the hit says so. Its metadata are the new ones. A filter must pass both the old
        and the new ones. From the commit that writes the new vector on, the chunk is found by that; a chunk that is
        deleted is not found at all. Old texts and vectors are copied for as long as that takes, and each search
        compares its query with all of them. Keywords find new texts only. ``serve=False`` ends it and deletes the
        copies.

        Raises :class:`NotFound`, and :class:`StoreUnavailable` if the table of chunks was held for 20 s when the first
        collection was set so.
        """
        require_name("collection", collection)
        if serve is not None and not isinstance(serve, bool):
            raise InvalidInput(f"serve is {serve!r}; it must be True or False, or None to change nothing.")
        with self._transaction() as conn:
            row = serving.find(conn, collection)
            if serve is not None:
                outdated.serve(conn, row.id, wanted=serve)
            is_served = outdated.is_served(conn, row.id)
            return Outdated(row.name, is_served, outdated.count(conn, row.active, row.id) if is_served else 0)


def _counts(space: Space, role: str, share: int, counted: CountedSearches | None) -> SearchCounts:
    counted = counted or CountedSearches(space.id)
    return SearchCounts(
        space=space.spec.fingerprint,
        model=space.spec.model,
        role=role,
        share=share,
        searches=counted.searches,
        errors=counted.errors,
        p50_ms=counted.milliseconds(0.5),
        p95_ms=counted.milliseconds(0.95),
        feedback=counted.feedback,
    )
