"""Keeps the serving indexes up to date, in two threads beside the poller's rounds: one flushes, the other merges.

The one that flushes also gives old chunks the keywords of a collection that has just got some.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import sqlalchemy as sa

from chunkmill.domain.serving import BuilderKind
from chunkmill.poller.steps import Steps
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.store import indexing, keywords, segments
from chunkmill.store.indexing import BuiltSegment

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 3600.0
"""How long a collection whose build failed waits for the next try. A build may fail because the disk is full, or end
Postgres itself because the memory is, and then nobody else could work either if it were tried again at once."""

KEYWORD_SECONDS = 5.0
"""How many seconds one round fills the keywords of a collection, so that the others get their turn."""


class Indexer:
    """Looks every INDEX_SECONDS seconds which collections need a segment, and builds it.

    A flush takes seconds and a merge may take hours, so that each has a thread of its own. Any number of pollers may do
    this: one of them builds, and the others leave that collection alone.
    """

    def __init__(self, db: sa.Engine, settings: Settings) -> None:
        self._db = db
        self._settings = settings
        self._failed: dict[str, tuple[float, float]] = {}
        """What failed: when to try it again, and after how many seconds of pause."""

    def start(self, stop: threading.Event) -> list[threading.Thread]:
        """Start both threads, which end soon after ``stop``. A build that is under way is left to the next poller."""
        if self._settings.index_seconds == 0:
            return []
        threads = []
        for name, round_of in (("flush", self._flush_all), ("merge", self._merge_all)):
            steps = Steps()
            work = partial(round_of, steps, stop)
            args = (f"the round of the {name}", work, stop, self._settings.index_seconds)
            threads.append(threading.Thread(target=steps.repeat, args=args, name=name, daemon=True))
        for thread in threads:
            thread.start()
        return threads

    def round(self) -> int:
        """Flush and merge what is due. Returns how many segments were built."""
        return self._flush_all(Steps()) + self._merge_all(Steps())

    def _flush_all(self, steps: Steps, stop: threading.Event | None = None) -> int:
        steps.run("the drop of segments that nobody reads", self._drop_left_behind)
        n_built = self._build_all("flush", self._flush, steps, stop)
        self._fill_keywords(steps, stop)
        return n_built

    def _merge_all(self, steps: Steps, stop: threading.Event | None = None) -> int:
        return self._build_all("merge", self._merge, steps, stop)

    def _build_all(
        self,
        name: str,
        build: Callable[[Space, int], BuiltSegment | None],
        steps: Steps,
        stop: threading.Event | None = None,
    ) -> int:
        n_built = 0
        for collection_id, space in (
            steps.run(f"the search for collections to {name}", lambda: self._collections(BuilderKind(name))) or ()
        ):
            if stop is not None and stop.is_set():
                break
            what = f"the {name} of the serving index of collection {collection_id}"
            if built := self._try(what, lambda space=space, number=collection_id: build(space, number), steps):  # type: ignore[misc]
                n_built += 1
                logger.info(
                    "collection %s: segment %s (%s, %s rows) is live, in place of %s segments",
                    self._named(collection_id),
                    built.segment.id,
                    built.segment.kind,
                    built.segment.rows,
                    len(built.replaced),
                )
        return n_built

    def _try(self, what: str, build: Callable[[], BuiltSegment | None], steps: Steps) -> BuiltSegment | None:
        """What ``build`` built; None if it had nothing to do, failed, or failed so lately that it is not tried."""
        until, pause = self._failed.get(what, (0.0, FIRST_PAUSE_S / 2))
        if time.monotonic() < until:
            return None
        done = None
        try:
            done = steps.run(what, lambda: (build(),))
        finally:
            if done is None:  # also after an outage, which this build may have caused
                pause = min(LONGEST_PAUSE_S, 2 * pause)
                self._failed[what] = time.monotonic() + pause, pause
            else:
                self._failed.pop(what, None)
        return done[0] if done else None

    def _drop_left_behind(self) -> None:
        with self._db.begin() as conn:
            if not segments.are_kept(conn):
                return
        if dropped := indexing.drop_left_behind(self._db):
            logger.info("%s segments of collections that moved or are gone were dropped", dropped)

    def _fill_keywords(self, steps: Steps, stop: threading.Event | None = None) -> None:
        for collection_id in steps.run("the search for keywords to fill", self._unfinished) or ():
            if stop is not None and stop.is_set():
                break
            until = time.monotonic() + KEYWORD_SECONDS
            fill = lambda number=collection_id, until=until: keywords.fill(self._db, number, deadline=until)  # noqa: E731
            if steps.run(f"filling the keywords of collection {collection_id}", fill):
                logger.info("collection %s: its keywords are ready", self._named(collection_id))

    def _named(self, collection_id: int) -> str:
        """The collection as people know it; its number if it was dropped meanwhile."""
        with self._db.begin() as conn:
            name = conn.execute(
                sa.text("SELECT name FROM collections WHERE id = :id"), {"id": collection_id}
            ).scalar_one_or_none()
        return str(collection_id) if name is None else repr(name)

    def _unfinished(self) -> list[int]:
        with self._db.begin() as conn:
            return keywords.unfinished(conn) if keywords.are_kept(conn) else []

    def _collections(self, builder: BuilderKind) -> list[tuple[int, Space]]:
        with self._db.begin() as conn:
            if not segments.are_kept(conn):
                return []
            wanted = indexing.collections_to_index(conn, builder)
            spaces = {space_id: registry.get_if_readable(conn, space_id) for _, space_id in wanted}
        return [(collection_id, space) for collection_id, space_id in wanted if (space := spaces[space_id])]

    def _flush(self, space: Space, collection_id: int) -> BuiltSegment | None:
        return indexing.flush(self._db, space, collection_id)

    def _merge(self, space: Space, collection_id: int) -> BuiltSegment | None:
        return indexing.merge(
            self._db,
            space,
            collection_id,
            memory_mb=self._settings.index_memory_mb,
            compact=self._settings.index_compact,
        )
