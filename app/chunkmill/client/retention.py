"""The client's methods for retention: delete old jobs, and look at and empty the cache."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa

from chunkmill.client.base import ClientPart, store_errors
from chunkmill.client.stopping import stopping_between
from chunkmill.db.connect import require_at_least
from chunkmill.domain.arguments import as_flag, as_function, as_number, as_text
from chunkmill.domain.printed import Rows
from chunkmill.domain.retention import CacheSpace, OnProgress, Pruned, as_age
from chunkmill.errors import InvalidInput
from chunkmill.ledger import dropping
from chunkmill.ledger.prune import prune_jobs
from chunkmill.ledger.served.prune import prune_served
from chunkmill.spaces import collections, registry, unused
from chunkmill.store.evict import AGES_SINCE, cache_spaces, drop_unreferenced


class Retention(ClientPart):
    """The part of the client that is about what is kept, and how long."""

    def prune(
        self,
        older_than: timedelta | float = 30,
        *,
        dry_run: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Pruned:
        """Delete jobs that finished more than ``older_than`` (days) ago, and vectors and texts that were stored before
        then and that no collection refers to. This is safe while everything runs.

        Of the Batch API that a gateway serves, it deletes older files, unless a batch that has not ended needs them,
        and batches that ended before then, with their texts and vectors.

        Deleting a job also deletes its ChunkBatches, attempts, usage, dead list and idempotency key. Charges stay,
        because they are the bill. A failed or cancelled job stays as long as a chunk of it has no vector. At the end it
        drops the spaces that were registered before then, if nothing refers to them and they have no vector left.
        ``dry_run`` only counts; its ``spaces`` do not include a space to which only jobs refer that would be deleted.
        """
        dry_run = as_flag("dry_run", dry_run)
        as_function("on_progress", on_progress)
        on_progress = stopping_between(on_progress)
        before = self._before("older_than", older_than)
        with store_errors(self._db):
            served = prune_served(self._db, before=before, dry_run=dry_run, on_progress=on_progress)
            # Before the jobs, because those of batches stay until their chunks are deleted.
            self._forget_dropped(dry_run=dry_run)
            jobs, kept = prune_jobs(self._db, before=before, dry_run=dry_run, on_progress=on_progress)
            vectors = drop_unreferenced(self._db, before=before, dry_run=dry_run, on_progress=on_progress)
            self._forget_dropped(dry_run=dry_run)
            spaces = unused.drop_all(self._db, before=before, dry_run=dry_run)
        return Pruned(dry_run, before, served | jobs | vectors, kept, tuple(spaces))

    def drop_space(self, space: str) -> None:
        """Drop an embedding space that nothing refers to, with the vectors that are still in it.

        ``space`` is the beginning of its fingerprint. Raises :class:`NotFound`, and :class:`InvalidInput`, which names
        the collection or the job that refers to it. A space that the bill names stays.
        """
        as_text("space", space)
        with self._transaction() as conn:
            collections.require_lives(conn)
            unused.drop(conn, registry.find_by_prefix(conn, space))

    def _forget_dropped(self, *, dry_run: bool) -> None:
        """Delete what dropped collections have left behind, with their rows if the last job was just deleted."""
        with self._transaction() as conn:
            left = [] if dry_run or not collections.have_lives(conn) else dropping.left_behind(conn)
        for collection_id in left:
            dropping.go_on(self._db, collection_id)

    def cache(self, *, recent: timedelta | float = 7) -> list[CacheSpace]:
        """Each space's vectors, their size, and how often enqueues found a vector that they needed, ever and in the
        last ``recent`` days.
        """
        days = as_age("recent", recent) / timedelta(days=1)
        with self._transaction() as conn:
            require_at_least(conn, AGES_SINCE)
            return Rows(cache_spaces(conn, recent_days=days), CacheSpace)

    def evict(
        self,
        *,
        older_than: timedelta | float | None = None,
        max_bytes: int | None = None,
        space: str | None = None,
        dry_run: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Pruned:
        """Delete vectors that no collection refers to, and their texts: those stored more than ``older_than`` (days)
        ago, or the oldest, until ``max_bytes`` of them are left. This is safe while everything runs.

        ``space`` is the beginning of a fingerprint; None means all spaces. Raises :class:`InvalidInput` and
        :class:`NotFound`.
        """
        if (older_than is None) == (max_bytes is None):
            raise InvalidInput("give either older_than or max_bytes, to say what to evict.")
        if max_bytes is not None:
            max_bytes = as_number("max_bytes", max_bytes, least=0)
        if space is not None:
            as_text("space", space)
        dry_run = as_flag("dry_run", dry_run)
        as_function("on_progress", on_progress)
        on_progress = stopping_between(on_progress)
        before = None if older_than is None else self._before("older_than", older_than)
        with self._transaction() as conn:
            require_at_least(conn, AGES_SINCE)
            chosen = None if space is None else registry.find_by_prefix(conn, space)
        with store_errors(self._db):
            deleted = drop_unreferenced(
                self._db, space=chosen, before=before, max_bytes=max_bytes, dry_run=dry_run, on_progress=on_progress
            )
        return Pruned(dry_run, before, deleted)

    def _before(self, argument: str, age: timedelta | float) -> datetime:
        """The time ``age`` ago by Postgres' clock. Raises :class:`StoreUnavailable` if the schema has no ages yet."""
        duration = as_age(argument, age)
        with self._transaction() as conn:
            require_at_least(conn, AGES_SINCE)
            now: datetime = conn.execute(sa.text("SELECT now()")).scalar_one()
        try:
            return now - duration
        except OverflowError:
            raise InvalidInput(f"{argument} is {duration}, which is before the calendar begins.") from None
