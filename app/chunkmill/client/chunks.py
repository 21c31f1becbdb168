"""The chunks of a collection: get, list, count, delete, change their metadata, stream their vectors, export."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa

from chunkmill.client.base import ClientPart
from chunkmill.client.door import translated
from chunkmill.client.stopping import end_if_stopped
from chunkmill.client.written import new_file, require_free, told, writer_for
from chunkmill.db.retry import transact
from chunkmill.domain import filters
from chunkmill.domain.arguments import as_flag, as_function, as_ids, as_number, as_path, as_text, require_name
from chunkmill.domain.chosen import as_changes, as_chosen
from chunkmill.domain.filters import Filter
from chunkmill.domain.stored import ChunkState, Exported, StoredChunk
from chunkmill.errors import InvalidSetting
from chunkmill.spaces import collections, registry
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space
from chunkmill.store import chunks as store
from chunkmill.store.chunks import ChunkSelection
from chunkmill.store.delete import delete_some
from chunkmill.system.numbers import NDArray, np

DELETE_STEP = 5_000
"""How many chunks one transaction deletes. Enqueues wait while it runs."""
UPDATE_STEP = 5_000
"""How many chunks one transaction changes. Deletions, and enqueues of the same chunks, wait while it runs."""
PAGE = 5_000
"""How many chunks one statement reads."""
MAX_BATCH_SIZE = 100_000
"""The most vectors of one batch, which is in memory."""
TRIES = 8
"""How often reading a page, or writing a step, is tried while Postgres is away: for about 20 seconds."""
SPOOL_BYTES = 1 << 20
"""How much of the list of chunks to delete stays in memory. The rest is written to an unnamed file."""

T = TypeVar("T")


class Chunks(ClientPart):
    """The part of the client that is about the chunks of a collection.

    A ``filter`` is in the language of :meth:`search`'s ``metadata``; docs/search.md describes it.
    """

    def get(
        self, collection: str, ids: Iterable[str], *, with_text: bool = True, with_vector: bool = False
    ) -> dict[str, StoredChunk]:
        """``chunk id → StoredChunk`` of ``ids``, in their order. An id that is not in the collection is left out.

        Raises :class:`NotFound` if there is no such collection.
        """
        wanted = list(dict.fromkeys(as_ids("ids", ids)))
        with_text, with_vector = as_flag("with_text", with_text), as_flag("with_vector", with_vector)
        row, space = self._collection(collection)
        stored: dict[str, StoredChunk] = {}
        # Sorted as Postgres sorts them, because a page may end early.
        for picked in self._sorted(wanted):
            for page in self._pages(row, space, Filter(), picked, with_text=with_text, with_vector=with_vector):
                stored.update((chunk.id, chunk) for chunk in page)
        return {chunk_id: stored[chunk_id] for chunk_id in wanted if chunk_id in stored}

    def chunks(
        self,
        collection: str,
        *,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        after: str = "",
        limit: int | None = None,
        with_text: bool = True,
        with_vector: bool = False,
    ) -> Iterator[StoredChunk]:
        """The chunks of a collection that pass ``filter``, or all, in the order in which Postgres sorts their ids.

        ``after`` begins behind an id, and ``limit`` ends after so many chunks: the next page begins ``after`` the last
        id of this one. The iterator reads as it goes, in constant memory and without an open transaction. A chunk that
        is in the collection all the time comes exactly once. What is added, changed or deleted meanwhile comes as it is
        when its page is read. Raises :class:`NotFound`, also if the collection is dropped meanwhile,
        :class:`SpaceMismatch` if it moves to another space, and :class:`InvalidInput`.
        """
        chosen, after = filters.parse(filter, "filter"), as_text("after", after)
        most = None if limit is None else as_number("limit", limit, least=0)
        with_text, with_vector = as_flag("with_text", with_text), as_flag("with_vector", with_vector)
        row, space = self._collection(collection)

        return self._at_the_door(
            self._read(row, space, chosen, after=after, most=most, with_text=with_text, with_vector=with_vector)
        )

    def count(self, collection: str, *, filter: Mapping[str, Any] | None = None) -> int:  # noqa: A002
        """How many chunks of a collection pass ``filter``; without one, how many there are. Raises :class:`NotFound`
        and :class:`InvalidInput`.
        """
        chosen = filters.parse(filter, "filter")
        row = self._named(collection)
        with self._transaction() as conn:
            return store.count(conn, collection_id=row.id, chosen=chosen)

    def delete(
        self,
        collection: str,
        ids: Iterable[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        all_chunks: bool = False,
    ) -> int:
        """Delete chunks by id, by ``filter``, or with ``all_chunks`` all of the collection. Returns how many.

        A text that no chunk refers to any more is deleted with its vectors. A filter deletes the chunks that pass it
        when the call begins, in several transactions; what an enqueue adds or replaces meanwhile stays, and so does a
        chunk that no longer passes. If the call fails, what it has deleted stays deleted, and the same call deletes the
        rest. Raises :class:`InvalidInput` unless exactly one of ``ids``, ``filter`` and ``all_chunks`` is given, and
        for a filter that is empty, so that a list or a filter that is missing never means everything; and
        :class:`NotFound`.
        """
        named, chosen = as_chosen(ids, filter, all_chunks=all_chunks, verb="delete")
        row = self._named(collection)
        if chosen:
            return self._delete_picked(row, chosen)
        deleted = 0
        for step in itertools.count():
            part = None if named is None else named[step * DELETE_STEP : (step + 1) * DELETE_STEP]
            if part is not None and not len(part):
                break
            with self._transaction() as conn:
                gone = delete_some(conn, collection_id=row.id, chunk_ids=part, limit=DELETE_STEP)
            deleted += gone
            if part is None and gone == 0:
                break
        return deleted

    def update_metadata(
        self,
        collection: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        ids: Iterable[str] | None = None,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        all_chunks: bool = False,
        remove: Iterable[str] = (),
        replace: bool = False,
    ) -> int:
        """Change the metadata of chunks. Nothing is embedded again. Returns how many chunks were chosen.

        The keys of ``metadata`` are set and the keys in ``remove`` are removed; other keys stay. A value takes the
        place of the old one as a whole, also if both are objects. With ``replace``, ``metadata`` takes the place of all
        that the chunk had. The next search finds the chunks by what they have now. An enqueue that names a chunk again
        sets its metadata anew. Many chunks are changed in several transactions; a filter is applied again in each, so a
        chunk that an enqueue has changed meanwhile is left alone unless it still passes. Raises :class:`InvalidInput`
        unless exactly one of ``ids``, ``filter`` and ``all_chunks`` is given, for a filter that is empty, and if the
        result would be larger than an enqueue accepts; and :class:`NotFound`.
        """
        named, chosen = as_chosen(ids, filter, all_chunks=all_chunks, verb="change")
        replaces = as_flag("replace", replace)
        as_json, removed = as_changes(metadata, remove, replaces=replaces)
        row = self._named(collection)
        changes = partial(
            store.update_metadata,
            collection_id=row.id,
            chosen=chosen,
            metadata=as_json,
            removed=removed,
            replaces=replaces,
        )
        windows = self._sorted(named) if named is not None else self._windows_of_ids(row, chosen)
        changed = 0
        for window in windows:
            for first in range(0, len(window), UPDATE_STEP):
                part = window[first : first + UPDATE_STEP]
                changed += self._transact(partial(changes, ids=part), what="changing metadata")
        return changed

    def iter_vectors(
        self,
        collection: str,
        *,
        batch_size: int = 1_000,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        """Batches of ``(ids, vectors)``: the ids of up to ``batch_size`` chunks and their ``(n, d)`` float32 vectors.

        Every batch but the last is full. The chunks are those that pass ``filter`` and have a vector, in the order of
        their ids. As for :meth:`chunks`, memory is constant, no transaction stays open, a chunk that stays comes
        exactly once, and the same errors are raised. The vectors are normalised if the model's are.
        """
        size = as_number("batch_size", batch_size, least=1, most=MAX_BATCH_SIZE)
        chosen = filters.parse(filter, "filter")
        row, space = self._collection(collection)
        return self._at_the_door(self._batches(row, space, chosen, size))

    def _read(
        self,
        row: Collection,
        space: Space,
        chosen: Filter,
        *,
        after: str,
        most: int | None,
        with_text: bool,
        with_vector: bool,
    ) -> Iterator[StoredChunk]:
        left = most
        for picked in self._picked(row, chosen, after=after, most=most):
            for page in self._pages(
                row, space, chosen, picked.ids, with_text=with_text, with_vector=with_vector, most=left
            ):
                yield from page
                left = None if left is None else left - len(page)
            if left == 0:
                return

    def export(
        self,
        collection: str,
        path: str | os.PathLike[str],
        *,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        with_text: bool = True,
        with_vector: bool = True,
        overwrite: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Exported:
        """Write the chunks that pass ``filter``, or all, into a file, in the order of their ids.

        The name says the format: ``.parquet``, which needs the extra ``parquet``, or JSON lines, ``.jsonl`` and
        ``.ndjson``, also with ``.gz``. A chunk has the fields ``id``, ``text``, ``metadata`` (in Parquet as JSON text),
        ``vector`` (``(d,)`` float32, null if there is none), ``truncated`` and ``content_hash``. If others write
        meanwhile, the same holds as for :meth:`chunks`. The file gets its name once it is complete, and an existing
        file is kept unless ``overwrite`` is true. ``on_progress`` is called with the number of chunks written, and of
        all. ``chunkmill enqueue`` takes the file. Raises :class:`InvalidInput`, :class:`NotFound` and what
        :meth:`chunks` raises.
        """
        target = as_path("path", path)
        overwrite = as_flag("overwrite", overwrite)
        with_text, with_vector = as_flag("with_text", with_text), as_flag("with_vector", with_vector)
        as_function("on_progress", on_progress)
        chosen = filters.parse(filter, "filter")
        row, space = self._collection(collection)
        start = writer_for(target, with_text=with_text, with_vector=with_vector, space=space.spec, collection=row.name)
        require_free(target, overwrite=overwrite)
        total = self.count(collection, filter=filter)
        done = without_vector = 0
        with new_file(target, overwrite=overwrite) as file:
            with told(target):
                writer = start(file)
            try:
                for chunk in self._read(
                    row, space, chosen, after="", most=None, with_text=with_text, with_vector=with_vector
                ):
                    with told(target):
                        writer.write(chunk)
                    done += 1
                    without_vector += chunk.state is not ChunkState.EMBEDDED
                    if on_progress:
                        on_progress(done, max(done, total))
            except BaseException:
                with contextlib.suppress(Exception):  # the file is deleted
                    writer.close()
                raise
            with told(target):
                writer.close()
        return Exported(target, done, without_vector, target.stat().st_size)

    def _batches(
        self, row: Collection, space: Space, chosen: Filter, size: int
    ) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        ids: list[str] = []
        parts: list[NDArray[np.float32]] = []

        def take(most: int) -> tuple[list[str], NDArray[np.float32]]:
            vectors = np.concatenate(parts)
            batch = ids[:most], vectors[:most]
            ids[:] = ids[most:]
            parts[:] = [vectors[most:].copy()]
            return batch

        for picked in self._picked(row, chosen, after="", most=None):
            for first in range(0, len(picked.ids), min(size, PAGE)):
                step = picked.ids[first : first + min(size, PAGE)]
                arrays = partial(store.read_arrays, space=space, collection=row, chosen=chosen, ids=step)
                read, vectors = self._transact(arrays, what="reading vectors")
                ids += read
                parts.append(vectors)
                while len(ids) >= size:
                    yield take(size)
        if ids:
            yield take(size)

    def _named(self, collection: str) -> Collection:
        """The collection without its space, which may be of a newer release that this one cannot read."""
        require_name("collection", collection)
        with self._transaction() as conn:
            return collections.find(conn, collection)

    def _collection(self, collection: str) -> tuple[Collection, Space]:
        require_name("collection", collection)
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            return row, registry.get(conn, row.space_id)

    def _transact(self, work: Callable[[sa.Connection], T], *, what: str) -> T:
        end_if_stopped()
        self._require_open()
        return transact(self._db, work, what=what, tries=TRIES)

    def _at_the_door(self, items: Iterator[T]) -> Iterator[T]:
        """The items; an error of Postgres leaves as one of ours, as from any method that is not an iterator."""
        try:
            yield from items
        except (sa.exc.SQLAlchemyError, psycopg.Error) as error:
            raise translated(str(self._db.url), error) from error

    def _picked(self, row: Collection, chosen: Filter, *, after: str, most: int | None) -> Iterator[ChunkSelection]:
        """The chunks behind ``after`` that pass the filter, in the order of their ids.

        ``most`` is how many are wanted, if that is known. More may come.
        """
        if most == 0:
            return
        if chosen:
            look = partial(store.pick_if_few, collection=row, chosen=chosen, after=after)
            few = self._transact(look, what="choosing chunks")
            if few is not None:
                yield few
                return
        size = store.FIRST_WINDOW if chosen else min(most or store.MAX_WINDOW, store.MAX_WINDOW)
        last: str | None = after
        while last is not None:
            window = partial(store.pick_window, collection=row, chosen=chosen, after=last, size=size)
            picked, last = self._transact(window, what="choosing chunks")
            if picked.ids:
                yield picked
            size = min(4 * size, store.MAX_WINDOW)

    def _pages(
        self,
        row: Collection,
        space: Space,
        chosen: Filter,
        ids: Sequence[str],
        *,
        with_text: bool,
        with_vector: bool,
        most: int | None = None,
    ) -> Iterator[list[StoredChunk]]:
        """The chunks of ``ids``, which stand in the order of Postgres; at most ``most`` of them."""
        read = partial(
            store.read_page,
            space=space,
            collection=row,
            chosen=chosen,
            with_text=with_text,
            with_vector=with_vector,
        )
        first, left = 0, len(ids) if most is None else most
        while left and first < len(ids):
            part = ids[first : first + min(PAGE, left)]
            page = self._transact(partial(read, ids=part), what="reading chunks")
            yield page
            left -= len(page)
            # A page ends early if its chunks are large, or if the last ones were deleted meanwhile.
            first += part.index(page[-1].id) + 1 if page else len(part)

    def _sorted(self, ids: Sequence[str]) -> Iterator[list[str]]:
        """The ids in pieces, each in the order of Postgres."""
        for first in range(0, len(ids), PAGE):
            part = list(ids[first : first + PAGE])
            query = (
                "SELECT array_agg(DISTINCT chunk_id ORDER BY chunk_id) FROM unnest(CAST(:ids AS text[])) i(chunk_id)"
            )
            with self._transaction() as conn:
                picked = list(conn.execute(sa.text(query), {"ids": part}).scalar_one())
            yield picked

    def _windows_of_ids(self, row: Collection, chosen: Filter) -> Iterator[list[str]]:
        return (picked.ids for picked in self._picked(row, chosen, after="", most=None))

    def _delete_picked(self, row: Collection, chosen: Filter) -> int:
        """Delete what passes the filter now. The list is made before the first deletion, and kept in a file if it is
        long, so that nothing is deleted that comes later.
        """
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES, "w+", encoding="utf-8") as kept:
            try:
                for picked in self._picked(row, chosen, after="", most=None):
                    for first in range(0, len(picked.ids), DELETE_STEP):
                        step = slice(first, first + DELETE_STEP)
                        kept.write(json.dumps([picked.ids[step], picked.job_ids[step]]) + "\n")
                kept.seek(0)
            except OSError as error:
                raise InvalidSetting(
                    "the list of the chunks to delete is kept in a temporary file, and it cannot be written in "
                    f"{tempfile.tempdir or 'any temporary folder'}: {error.strerror or error}. Nothing was deleted. "
                    "Set TMPDIR to a folder with more room."
                ) from error
            deleted = 0
            for line in kept:
                with self._transaction() as conn:
                    picked = ChunkSelection(*json.loads(line))
                    deleted += store.delete_picked(conn, collection_id=row.id, chosen=chosen, picked=picked)
            return deleted
