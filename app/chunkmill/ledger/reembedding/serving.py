"""What the searches of the two spaces of a re-embedding were like, as the ramp judges them and as people see them."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from chunkmill.domain.reembedding import ServedBy
from chunkmill.ledger.reembedding.lives import Life
from chunkmill.store import searches
from chunkmill.store.searches import CountedSearches

MINUTE = timedelta(minutes=1)


def served(conn: sa.Connection, life: Life) -> tuple[ServedBy, ...]:
    """The searches of the old and of the new space in this step of the ramp; none unless it is ramping.

    Searches are counted by the minute. The minute in which the step began has those of the step before it too, and is
    left out.
    """
    if life.share_since is None:
        return ()
    since = (life.share_since + MINUTE).replace(second=0, microsecond=0)
    counted = searches.read(conn, life.collection_id, since=since)
    spaces = ((life.from_space_id, life.names["from_space"]), (life.to_space_id, life.names["to_space"]))
    return tuple(_shown(fingerprint, counted[space_id]) for space_id, fingerprint in spaces if space_id in counted)


def _shown(fingerprint: str, counted: CountedSearches) -> ServedBy:
    p50, p95 = counted.milliseconds(0.5), counted.milliseconds(0.95)
    return ServedBy(
        space=fingerprint,
        searches=counted.searches,
        errors=counted.errors,
        p50=None if p50 is None else p50 / 1e3,
        p95=None if p95 is None else p95 / 1e3,
        liked=counted.feedback,
    )
