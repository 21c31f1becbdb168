"""The client's methods for collections as a whole: list, drop, rename, alias; and for spaces that nobody uses."""

from __future__ import annotations

import logging
import shlex

import sqlalchemy as sa

from chunkmill.client.base import ClientPart
from chunkmill.db.connect import refusal, sqlstate
from chunkmill.domain.arguments import as_flag, as_function, require_name
from chunkmill.domain.collections import CollectionInfo, DroppedCollection, OnDropped
from chunkmill.domain.printed import Rows
from chunkmill.errors import StoreUnavailable
from chunkmill.ledger import dropping, overview
from chunkmill.spaces import collections, names

logger = logging.getLogger(__name__)

RENAME_TRIES = 10
"""How often a rename is tried, each time for at most a second, while producers write into the collection."""
LOCK_NOT_AVAILABLE = "55P03"


class Collections(ClientPart):
    """The part of the client that is about collections as a whole."""

    def collections(self, *, exact: bool = False) -> list[CollectionInfo]:
        """All collections, by name, with what is in them and how they are served.

        This is cheap for large collections too: the chunks of one with more than 1,000 are estimated, which
        ``CollectionInfo.counted`` says. ``exact`` counts them, which reads the keys of all chunks and vectors.
        """
        exact = as_flag("exact", exact)
        with self._transaction() as conn:
            return Rows(overview.all_collections(conn, exact=exact), CollectionInfo)

    def drop_collection(
        self, name: str, *, wait: bool = True, on_progress: OnDropped | None = None
    ) -> DroppedCollection:
        """Drop a collection with all of its chunks, their texts and vectors, its serving index and its view.

        The name is free at once: whoever enqueues into it from then on gets a new, empty collection. Open jobs are
        cancelled; what is at a provider is followed to its end and booked. The chunks are deleted in short
        transactions beside everything else. With ``wait=False``, or if the process dies or Postgres ends one of these
        transactions, a poller deletes them, which :attr:`DroppedCollection.complete` says.

        The jobs and their costs stay until they are pruned. They are listed under the name with "(dropped)" and a
        number. Their idempotency keys may be used again. Texts that another collection has stay, with their vectors.

        Raises :class:`NotFound`, and :class:`InvalidInput` if ``name`` is an alias or if the collection has one.
        """
        require_name("name", name)
        wait = as_flag("wait", wait)
        as_function("on_progress", on_progress)
        with self._transaction() as conn:
            collections.require_lives(conn)
            collection = names.drop(conn, name)
        done = [0]

        def note(deleted: int) -> None:
            done.append(deleted)
            if on_progress is not None:
                on_progress(deleted)

        try:
            _, complete = dropping.go_on(self._db, collection.id, slices=None if wait else 0, on_progress=note)
        except sa.exc.DBAPIError as error:
            # The name is free, and the same call made again would drop what somebody has put there since.
            logger.warning("collection %r is dropped; a poller deletes the rest, because: %s", name, refusal(error))
            complete = False
        return DroppedCollection(name, done[-1], complete)

    def rename_collection(self, name: str, to: str) -> None:
        """Give a collection another name. Its jobs, its aliases and its serving index stay, and so does its view.

        Enqueues that are under way go on. The old name is free. Raises :class:`NotFound`, :class:`InvalidInput` if
        ``name`` is an alias or ``to`` is taken, and :class:`StoreUnavailable` if several producers write into the
        collection without a pause for 10 s.
        """
        require_name("name", name)
        require_name("to", to)
        with self._transaction() as conn:
            collections.require_lives(conn)
        for tries_left in reversed(range(RENAME_TRIES)):
            try:
                with self._db.begin() as conn:
                    names.rename(conn, name, to)
            except sa.exc.OperationalError as error:
                if sqlstate(error) != LOCK_NOT_AVAILABLE:
                    raise
                if not tries_left:
                    raise StoreUnavailable(
                        f"collection {name!r} is not renamed, because producers write into it without a pause. Try "
                        f"again when they are done, or give it an alias: chunkmill collections alias {shlex.quote(to)} "
                        f"{shlex.quote(name)}"
                    ) from error
            else:
                return

    def set_alias(self, alias: str, collection: str) -> None:
        """Let ``alias`` be one more name of ``collection``, which every method accepts.

        An alias of another collection moves, at one moment: whoever resolves it gets the old or the new collection.
        Raises :class:`NotFound`, and :class:`InvalidInput` if ``alias`` is the name of a collection.
        """
        require_name("alias", alias)
        require_name("collection", collection)
        with self._transaction() as conn:
            collections.require_lives(conn)
            names.set_alias(conn, alias, collection)

    def remove_alias(self, alias: str) -> None:
        """Take an alias away. Its collection stays. Raises :class:`NotFound`."""
        require_name("alias", alias)
        with self._transaction() as conn:
            collections.require_lives(conn)
            names.remove_alias(conn, alias)
