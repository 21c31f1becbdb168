"""All collections at a glance: what is in them, what they wait for, and how they are served.

What it costs to read each number: the last enqueue is one probe of an index; chunks and vectors are probed up to
``COUNTED`` for each collection, and for larger ones a sample of ``SAMPLED_PAGES`` pages of the table is read; pending
reads the open ChunkBatches, dead the dead lists, and the tail the index of the tail. None of them grows with the chunks
of a collection unless they are counted on request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.db.statements import with_constants
from chunkmill.domain.collections import COUNTED, CollectionInfo, embedded_of, quoted, view_name
from chunkmill.domain.results import Index
from chunkmill.domain.serving import SegmentKind, SegmentState
from chunkmill.domain.states import ChunkBatchState, JobState
from chunkmill.spaces import collections
from chunkmill.spaces.collections import IS_KEPT
from chunkmill.spaces.registry import VectorTable
from chunkmill.store import segments

SAMPLED_PAGES = 2_000
"""About how many pages of ``chunks`` are read to estimate how many chunks the large collections have: 16 MB. Postgres'
own statistics are from the last ANALYZE: they do not know a collection that was loaded since, and one that was emptied
since still has its old size."""
ENOUGH = 500
"""A collection with this many chunks in the sample has about ten pages there, so that its estimate is right within a
third in two cases of three. A collection with fewer is a small part of the table, and is counted."""
NO_INDEX = Index(is_ready=False, segments=0, rows=0, graph_rows=0, tail=0, bytes=0)


def all_collections(conn: sa.Connection, *, exact: bool, ids: Sequence[int] | None = None) -> list[CollectionInfo]:
    """All collections, or those with these ids, by name. ``exact`` counts the chunks and the vectors of large ones too,
    which reads them all."""
    chosen = None if ids is None else list(ids)
    query = f"""
        SELECT k.id, k.name, k.space_id, k.created_at, s.fingerprint, s.model,
               (
                   SELECT j.created_at FROM jobs j WHERE j.collection_id = k.id ORDER BY j.id DESC LIMIT 1
               ) AS last_enqueue_at
        FROM collections k
        JOIN spaces s ON s.id = k.space_id
        WHERE {IS_KEPT}
          AND (CAST(:ids AS bigint[]) IS NULL OR k.id = ANY(CAST(:ids AS bigint[])))
        ORDER BY k.name
    """
    rows = conn.execute(sa.text(query), {"ids": chosen}).all()
    most = None if exact else COUNTED
    counts: dict[int, tuple[int, int]] = {}
    dead: dict[int, int] = {}
    for space_id in sorted({row.space_id for row in rows}):
        counts |= _counts(conn, VectorTable(space_id), most=most, ids=chosen)
        dead |= _dead(conn, VectorTable(space_id))
    pending, indexes = _pending(conn), _indexes(conn)
    aliases, views = _aliases(conn), _views(conn)
    large = [row.id for row in rows if most is not None and counts[row.id][0] > most]
    sampled, scale = _sample(conn) if large else ({}, 1.0)
    infos = []
    for row in rows:
        chunks, embedded = counts[row.id]
        waiting = (pending.get(row.id, 0), dead.get(row.id, 0))
        counted = row.id not in large
        if not counted:
            seen = sampled.get(row.id, 0)
            chunks = max(chunks, round(seen * scale)) if seen >= ENOUGH else _count_chunks(conn, row.id)
            embedded = embedded_of(chunks, waiting)
        infos.append(
            CollectionInfo(
                name=row.name,
                aliases=tuple(aliases.get(row.id, ())),
                space=row.fingerprint,
                model=row.model,
                chunks=chunks,
                embedded=embedded,
                counted=counted,
                pending=waiting[0],
                dead=waiting[1],
                index=indexes.get((row.id, row.space_id), NO_INDEX),
                view=views.get(view_name(row.name)),
                created_at=row.created_at,
                last_enqueue_at=row.last_enqueue_at,
            )
        )
    return infos


def _counts(
    conn: sa.Connection, space: VectorTable, *, most: int | None, ids: list[int] | None
) -> dict[int, tuple[int, int]]:
    """``collection id → (chunks, contents with a vector)`` of a space. Where there are more than ``most`` chunks, both
    are those of the first ``most`` + 1.
    """
    query = f"""
        SELECT k.id, n.chunks, n.embedded
        FROM collections k
        CROSS JOIN LATERAL (
            SELECT count(*) AS chunks, count(DISTINCT v.content_hash) AS embedded
            FROM (SELECT content_hash FROM chunks WHERE collection_id = k.id LIMIT :limit) c
            LEFT JOIN {space.table_name} v USING (content_hash)
        ) n
        WHERE k.space_id = :space AND {IS_KEPT}
          AND (CAST(:ids AS bigint[]) IS NULL OR k.id = ANY(CAST(:ids AS bigint[])))
    """
    parameters = {"space": space.id, "limit": None if most is None else most + 1, "ids": ids}
    return {row.id: (row.chunks, row.embedded) for row in conn.execute(sa.text(query), parameters)}


def _dead(conn: sa.Connection, space: VectorTable) -> dict[int, int]:
    query = f"""
        SELECT j.collection_id, count(DISTINCT d.chunk_id) AS dead
        FROM dead_chunks d
        JOIN jobs j ON j.id = d.job_id AND j.space_id = :space
        JOIN collections k ON k.id = j.collection_id AND k.space_id = j.space_id
        JOIN chunks c ON c.collection_id = k.id AND c.chunk_id = d.chunk_id AND c.content_hash = d.content_hash
        WHERE NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = d.content_hash)
        GROUP BY j.collection_id
    """
    return {row.collection_id: row.dead for row in conn.execute(sa.text(query), {"space": space.id})}


# The states are constants, so that the partial index of open jobs is used. ChunkBatches that are to be embedded into
# another space are not counted, because the chunks can be searched without them.
_PENDING = with_constants(
    """
SELECT j.collection_id, sum(b.n_contents - b.n_cached - b.n_embedded)::bigint AS pending
FROM jobs j
JOIN collections k ON k.id = j.collection_id AND k.space_id = j.space_id
JOIN chunk_batches b ON b.job_id = j.id AND b.state IN (:available, :chunk_batch_running)
WHERE j.state IN (:enqueueing, :running)
GROUP BY j.collection_id
""",
    available=ChunkBatchState.AVAILABLE,
    chunk_batch_running=ChunkBatchState.RUNNING,
    enqueueing=JobState.ENQUEUEING,
    running=JobState.RUNNING,
)


def _pending(conn: sa.Connection) -> dict[int, int]:
    return {row.collection_id: row.pending for row in conn.execute(_PENDING)}


def _indexes(conn: sa.Connection) -> dict[tuple[int, int], Index]:
    """``(collection id, space id) → its serving index``; none on the schema of the last release."""
    if not segments.are_kept(conn):
        return {}
    query = """
        SELECT i.collection_id, i.space_id, i.is_ready, coalesce(t.tail, 0) AS tail, g.*
        FROM serving_indexes i
        LEFT JOIN (
            SELECT collection_id, space_id, count(*) AS tail
            FROM serving_tail
            GROUP BY collection_id, space_id
        ) t USING (collection_id, space_id)
        CROSS JOIN LATERAL (
            SELECT count(*) AS segments,
                   coalesce(sum(n_rows), 0)::bigint AS rows,
                   coalesce(sum(n_rows) FILTER (WHERE kind = :hnsw), 0)::bigint AS graph_rows,
                   coalesce(sum(pg_total_relation_size(to_regclass('segment_' || id))), 0)::bigint AS bytes
            FROM segments
            WHERE collection_id = i.collection_id AND space_id = i.space_id AND state = :live
        ) g
    """
    rows = conn.execute(sa.text(query), {"live": SegmentState.LIVE, "hnsw": SegmentKind.HNSW})
    return {
        (row.collection_id, row.space_id): Index(
            row.is_ready, row.segments, row.rows, row.graph_rows, row.tail, row.bytes
        )
        for row in rows
    }


def _aliases(conn: sa.Connection) -> dict[int, list[str]]:
    """``collection id → its aliases``; none on the schema of the last release."""
    aliases: dict[int, list[str]] = defaultdict(list)
    if collections.have_lives(conn):
        for row in conn.execute(sa.text("SELECT collection_id, name FROM collection_aliases ORDER BY name")):
            aliases[row.collection_id].append(row.name)
    return aliases


def _views(conn: sa.Connection) -> dict[str, str]:
    """``name → the same with its schema, quoted`` of the views of this installation.

    The schema is known by its comment, which the function ``view_schema_mark`` makes; a reader may not call that.
    """
    query = """
        SELECT n.nspname AS schema, c.relname AS name
        FROM pg_namespace n
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind = 'v'
        WHERE obj_description(n.oid, 'pg_namespace') = format(
            'The collections of Chunkmill in the schema %s, each as a view. They come and go with it.', current_schema()
        )
    """
    return {row.name: quoted(row.schema, row.name) for row in conn.execute(sa.text(query))}


def _sample(conn: sa.Connection) -> tuple[dict[int, int], float]:
    """``collection id → chunks`` in a sample of the pages of ``chunks``, and how many chunks each stands for."""
    size = "SELECT pg_relation_size(to_regclass('chunks')) / CAST(current_setting('block_size') AS bigint)"
    share = min(1.0, SAMPLED_PAGES / max(1, conn.execute(sa.text(size)).scalar_one()))
    query = """
        SELECT collection_id, count(*) AS chunks
        FROM chunks TABLESAMPLE SYSTEM (:percent)
        GROUP BY collection_id
    """
    rows = conn.execute(sa.text(query), {"percent": 100 * share})
    return {row.collection_id: row.chunks for row in rows}, 1 / share


def _count_chunks(conn: sa.Connection, collection_id: int) -> int:
    query = "SELECT count(*) FROM chunks WHERE collection_id = :id"
    return int(conn.execute(sa.text(query), {"id": collection_id}).scalar_one())
