"""The chunks of a collection: lists them, reads what is known of each, and changes their metadata.

A large collection is read in windows, in the order of the chunk ids. No statement looks at more than one window, so a
statement timeout ends none of them, and no transaction stays open while the caller works on what it got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import sqlalchemy as sa

from chunkmill.domain.chunks import MAX_METADATA_BYTES
from chunkmill.domain.filters import Filter
from chunkmill.domain.states import ChunkBatchState
from chunkmill.domain.stored import ChunkState, StoredChunk
from chunkmill.errors import InvalidInput, NotFound, SpaceMismatch
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space
from chunkmill.store.delete import begin_deletion, delete_unreferenced
from chunkmill.store.read import keep_deletions_out
from chunkmill.system.numbers import NDArray, np

FIRST_WINDOW, MAX_WINDOW = 1_000, 20_000
"""How many chunks the first statement of a filtered reading looks at, and the most that a later one does."""
MAX_FEW = 5_000
"""If no more chunks than this pass a filter, one query of the index of the metadata finds them all."""
FEW_MS = 2_000
"""How many milliseconds that query may take. With a filter that the index cannot answer it would read the whole
table."""
PAGE_BYTES = 16 * 1024 * 1024
"""About how many bytes of text, metadata and vectors one page has. A chunk that is larger is a page of its own."""


@dataclass(frozen=True, slots=True)
class ChunkSelection:
    """Chunks that pass a filter, in the order of their ids. ``job_ids`` are the jobs that wrote them last."""

    ids: list[str]
    job_ids: list[int]


def count(conn: sa.Connection, *, collection_id: int, chosen: Filter) -> int:
    """How many chunks of the collection pass the filter."""
    condition, values = chosen.sql("c.metadata")
    query = f"""
        SELECT count(*)
        FROM chunks c
        WHERE c.collection_id = :collection AND ({condition})
    """
    _plan_for_these_values(conn)
    return int(conn.execute(sa.text(query), {"collection": collection_id, **values}).scalar_one())


def sort(conn: sa.Connection, ids: Sequence[str]) -> list[str]:
    """The ids, without repetitions, in the order of Postgres, which depends on the database's collation."""
    query = """
        SELECT DISTINCT chunk_id
        FROM unnest(CAST(:ids AS text[])) AS i(chunk_id)
        ORDER BY chunk_id
    """
    return list(conn.execute(sa.text(query), {"ids": list(ids)}).scalars())


def pick_if_few(conn: sa.Connection, *, collection: Collection, chosen: Filter, after: str) -> ChunkSelection | None:
    """All chunks behind the id ``after`` that pass the filter; None if they are many, or if it would take long.

    Call it alone in its transaction, because it sets a limit to the time of each statement.
    """
    has_index = """
        SELECT coalesce((SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('ix_chunks_metadata')), false)
    """
    if not conn.execute(sa.text(has_index)).scalar_one():
        return None
    condition, values = chosen.sql("c.metadata")
    query = f"""
        SELECT chunk_id, job_id
        FROM (
            SELECT c.chunk_id, c.job_id
            FROM chunks c
            WHERE c.collection_id = :collection AND c.chunk_id > :after AND ({condition})
            LIMIT :most
        ) few
        ORDER BY chunk_id
    """
    parameters = {"collection": collection.id, "after": after, "most": MAX_FEW + 1, **values}
    _plan_for_these_values(conn)
    try:
        with conn.begin_nested():
            set_limit = """
                SELECT set_config('statement_timeout', CAST(least(:limit, nullif(setting::integer, 0)) AS text), true)
                FROM pg_settings
                WHERE name = 'statement_timeout'
            """
            conn.execute(sa.text(set_limit), {"limit": FEW_MS})
            rows = conn.execute(sa.text(query), parameters).all()
    except sa.exc.OperationalError as error:
        if not isinstance(error.orig, psycopg.errors.QueryCanceled):
            raise
        return None
    _require_unmoved(conn, collection)
    return None if len(rows) > MAX_FEW else ChunkSelection([row.chunk_id for row in rows], [row.job_id for row in rows])


def pick_window(
    conn: sa.Connection, *, collection: Collection, chosen: Filter, after: str, size: int
) -> tuple[ChunkSelection, str | None]:
    """Those of the next ``size`` chunks behind the id ``after`` that pass the filter, and the id of the last of the
    window, behind which the next one begins; None if this window was the last.
    """
    condition, values = chosen.sql("c.metadata")
    query = f"""
        WITH looked_at AS MATERIALIZED (
            SELECT chunk_id, job_id, metadata
            FROM chunks
            WHERE collection_id = :collection AND chunk_id > :after
            ORDER BY chunk_id
            LIMIT :size
        )
        SELECT array_agg(c.chunk_id ORDER BY c.chunk_id) FILTER (WHERE {condition}) AS ids,
               array_agg(c.job_id ORDER BY c.chunk_id) FILTER (WHERE {condition}) AS job_ids,
               CASE WHEN count(*) = :size THEN max(c.chunk_id) END AS last
        FROM looked_at c
    """
    _plan_for_these_values(conn)
    parameters = {"collection": collection.id, "after": after, "size": size, **values}
    row = conn.execute(sa.text(query), parameters).one()
    _require_unmoved(conn, collection)
    return ChunkSelection(row.ids or [], row.job_ids or []), row.last


def read_page(
    conn: sa.Connection,
    *,
    space: Space,
    collection: Collection,
    chosen: Filter,
    ids: Sequence[str],
    with_text: bool,
    with_vector: bool,
) -> list[StoredChunk]:
    """Those of ``ids`` that are in the collection and pass the filter, in the order of the ids.

    If they have more than ``PAGE_BYTES`` together, only the first of them are returned, and at least one.
    """
    condition, values = chosen.sql("c.metadata")
    query = f"""
        WITH numbered AS MATERIALIZED (
            SELECT c.chunk_id, c.metadata, c.content_hash, c.job_id, v.truncated, v.embedding, t.text,
                   row_number() OVER by_id AS position,
                   sum(octet_length(c.metadata::text) + coalesce(octet_length(t.text), 0) + :vector_bytes)
                       OVER by_id AS n_bytes
            FROM chunks c
            LEFT JOIN {space.table_name} v ON v.content_hash = c.content_hash
            LEFT JOIN contents t ON :with_text AND t.content_hash = c.content_hash
            WHERE c.collection_id = :collection AND c.chunk_id = ANY(:ids) AND ({condition})
            WINDOW by_id AS (ORDER BY c.chunk_id)
        ),
        page AS MATERIALIZED (
            SELECT *
            FROM numbered
            WHERE position = 1 OR n_bytes <= :most_bytes
        ),
        pending AS MATERIALIZED (
            SELECT DISTINCT h.content_hash
            FROM jobs j
            JOIN chunk_batches b ON b.job_id = j.id
            CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
            WHERE EXISTS (SELECT FROM page WHERE truncated IS NULL)
              AND j.collection_id = :collection AND j.space_id = :space AND b.state IN (:available, :running)
              AND h.content_hash IN (SELECT content_hash FROM page WHERE truncated IS NULL)
        )
        SELECT p.chunk_id, p.metadata, encode(p.content_hash, 'hex') AS content_hash, p.job_id, p.truncated, p.text,
               CASE WHEN :with_vector THEN {space.storage}_send(p.embedding) END AS embedding,
               p.truncated IS NULL AND p.content_hash IN (SELECT content_hash FROM pending) AS is_pending,
               p.truncated IS NULL AND EXISTS (
                   SELECT
                   FROM dead_chunks d
                   JOIN jobs j ON j.id = d.job_id
                   WHERE j.collection_id = :collection AND j.space_id = :space
                     AND d.content_hash = p.content_hash AND d.chunk_id = p.chunk_id
               ) AS is_dead
        FROM page p
        ORDER BY p.chunk_id
    """
    parameters = {
        "collection": collection.id,
        "space": space.id,
        "ids": list(ids),
        "with_text": with_text,
        "with_vector": with_vector,
        "vector_bytes": 4 * space.spec.dimensions if with_vector else 0,
        "most_bytes": PAGE_BYTES,
        "available": ChunkBatchState.AVAILABLE,
        "running": ChunkBatchState.RUNNING,
        **values,
    }
    _plan_for_these_values(conn)
    rows = conn.execute(sa.text(query), parameters).all()
    _require_unmoved(conn, collection)
    sent = [row.embedding for row in rows if row.embedding is not None]
    vectors = iter(decoded(space, sent) if sent else ())  # whoever lists chunks needs no NumPy
    return [_stored(row, next(vectors) if row.embedding is not None else None) for row in rows]


def _stored(row: sa.Row[Any], vector: NDArray[np.float32] | None) -> StoredChunk:
    if row.truncated is not None:
        state = ChunkState.EMBEDDED
    elif row.is_pending:
        state = ChunkState.PENDING
    else:
        state = ChunkState.DEAD if row.is_dead else ChunkState.MISSING
    return StoredChunk(
        id=row.chunk_id,
        metadata=row.metadata,
        state=state,
        truncated=row.truncated,
        content_hash=row.content_hash,
        job_id=row.job_id,
        text=row.text,
        vector=vector,
    )


def read_arrays(
    conn: sa.Connection, *, space: Space, collection: Collection, chosen: Filter, ids: Sequence[str]
) -> tuple[list[str], NDArray[np.float32]]:
    """The ids and the ``(n, d)`` float32 vectors of those of ``ids`` that pass the filter and have a vector.

    They are in the order of the ids.
    """
    condition, values = chosen.sql("c.metadata")
    query = f"""
        SELECT c.chunk_id, {space.storage}_send(v.embedding) AS embedding
        FROM chunks c
        JOIN {space.table_name} v USING (content_hash)
        WHERE c.collection_id = :collection AND c.chunk_id = ANY(:ids) AND ({condition})
        ORDER BY c.chunk_id
    """
    _plan_for_these_values(conn)
    rows = conn.execute(sa.text(query), {"collection": collection.id, "ids": list(ids), **values}).all()
    _require_unmoved(conn, collection)
    return [row.chunk_id for row in rows], decoded(space, [row.embedding for row in rows])


def decoded(space: Space, sent: Sequence[bytes]) -> NDArray[np.float32]:
    """``(n, d)`` float32 of vectors as pgvector sends them: two bytes with d, two unused ones, d big-endian floats.

    As an array of reals it took four times as long, because Python makes an object of each number (5,000 × 384).
    """
    kind, head = (">f2", 2) if space.is_half else (">f4", 1)
    numbers = np.frombuffer(b"".join(sent), dtype=kind).reshape(len(sent), head + space.spec.dimensions)
    return numbers[:, head:].astype(np.float32)


def delete_picked(conn: sa.Connection, *, collection_id: int, chosen: Filter, picked: ChunkSelection) -> int:
    """Delete chunks that still pass the filter and that no other job has written since, with texts that nothing uses.

    Returns how many were deleted.
    """
    begin_deletion(conn)
    condition, values = chosen.sql("c.metadata")
    delete = f"""
        DELETE FROM chunks c
        USING unnest(CAST(:ids AS text[]), CAST(:job_ids AS bigint[])) AS p(chunk_id, job_id)
        WHERE c.collection_id = :collection AND c.chunk_id = p.chunk_id AND c.job_id = p.job_id AND ({condition})
        RETURNING c.content_hash
    """
    parameters = {"collection": collection_id, "ids": picked.ids, "job_ids": picked.job_ids, **values}
    hashes = conn.execute(sa.text(delete), parameters).scalars().all()
    delete_unreferenced(conn, hashes)
    return len(hashes)


def update_metadata(
    conn: sa.Connection,
    *,
    collection_id: int,
    chosen: Filter,
    ids: Sequence[str],
    metadata: str,
    removed: Sequence[str],
    replaces: bool,
) -> int:
    """Change the metadata of those of ``ids`` that are in the collection and pass the filter. Returns how many.

    ``metadata`` is a JSON object. It takes the place of the chunk's own metadata if ``replaces`` says so; otherwise its
    keys are set and the keys ``removed`` are removed. Raises :class:`InvalidInput` if a chunk would get more metadata
    than an enqueue accepts. Nothing is written then.
    """
    # A deletion locks its rows in any order, so the two could deadlock without this lock.
    keep_deletions_out(conn)
    condition, values = chosen.sql("c.metadata")
    # The rows are locked in the order in which an enqueue locks them, so that the two cannot deadlock.
    lock_rows = f"""
        SELECT c.chunk_id
        FROM chunks c
        WHERE c.collection_id = :collection AND c.chunk_id = ANY(:ids) AND ({condition})
        ORDER BY c.chunk_id
        FOR NO KEY UPDATE
    """
    parameters = {"collection": collection_id, "ids": list(ids), **values}
    locked = list(conn.execute(sa.text(lock_rows), parameters).scalars())
    parameters = {
        "collection": collection_id,
        "ids": locked,
        "metadata": metadata,
        "removed": list(removed),
        "most": MAX_METADATA_BYTES,
    }
    if replaces:
        update = """
            UPDATE chunks
            SET metadata = CAST(:metadata AS jsonb)
            WHERE collection_id = :collection AND chunk_id = ANY(:ids) AND metadata <> CAST(:metadata AS jsonb)
        """
    else:
        find_too_large = """
            SELECT min(chunk_id)
            FROM chunks
            WHERE collection_id = :collection AND chunk_id = ANY(:ids)
              AND octet_length(((metadata - CAST(:removed AS text[])) || CAST(:metadata AS jsonb))::text) > :most
        """
        if (too_large := conn.execute(sa.text(find_too_large), parameters).scalar_one()) is not None:
            raise InvalidInput(
                f"chunk {too_large!r} would have more than {MAX_METADATA_BYTES:,} bytes of metadata as JSON, which is "
                "the limit. Chunks whose ids come before it may have been changed: set less, or remove other keys."
            )
        update = """
            UPDATE chunks
            SET metadata = (metadata - CAST(:removed AS text[])) || CAST(:metadata AS jsonb)
            WHERE collection_id = :collection AND chunk_id = ANY(:ids)
              AND metadata <> (metadata - CAST(:removed AS text[])) || CAST(:metadata AS jsonb)
        """
    conn.execute(sa.text(update), parameters)
    return len(locked)


def _require_unmoved(conn: sa.Connection, collection: Collection) -> None:
    """Raise an error if the collection was dropped or moved to another space since the caller found it.

    It is called after a page was read, so that a collection that was dropped does not look like one whose chunks are
    all read.
    """
    query = "SELECT space_id FROM collections WHERE id = :id"
    space_id = conn.execute(sa.text(query), {"id": collection.id}).scalar_one_or_none()
    if space_id is None:
        raise NotFound(
            f"collection {collection.name!r} was dropped while its chunks were read. Not all of them were returned."
        )
    if space_id != collection.space_id:
        raise SpaceMismatch(
            f"collection {collection.name!r} was emptied and filled in another space while its chunks were read, and "
            "vectors of two spaces cannot be compared. Read it again from its beginning."
        )


def _plan_for_these_values(conn: sa.Connection) -> None:
    """Let Postgres plan the next statements for their values, also after a connection has run them many times."""
    conn.execute(sa.text("SET LOCAL plan_cache_mode = force_custom_plan"))
