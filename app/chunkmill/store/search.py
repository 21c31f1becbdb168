"""The k nearest chunks by cosine: exactly, or through the segments of the collection's serving index and its tail."""

from __future__ import annotations

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.results import SearchHit
from chunkmill.domain.serving import Segment, SegmentKind
from chunkmill.spaces.registry import Space
from chunkmill.store import segments

MAX_EXACT = 20_000
"""If a filter leaves no more chunks than this, the search is exact. It takes about 0.1 s for 20,000 chunks."""
MAX_K_THROUGH_SEGMENTS = 1_000
"""The most nearest neighbours that pgvector looks for at once. A search for more is exact."""
MAX_SCANNED = 100_000
"""How many rows of a graph a search looks at before it gives up and becomes exact."""


def search(
    conn: sa.Connection,
    space: Space,
    query: NDArray[np.float32],
    *,
    collection_id: int,
    k: int,
    where: str,
    exact: bool,
) -> list[SearchHit]:
    """The ``k`` chunks of a collection nearest to ``query``, ``(d,)`` float32, by cosine; best first.

    ``where`` is a JSON object that filters by jsonb containment; ``{}`` filters nothing. The search is exact if
    ``exact`` says so, if the collection has no serving index, or if few chunks pass the filter. Otherwise its
    candidates come from the segments and the tail, and are ordered by their exact distance. Call it first in its
    transaction.
    """
    # All statements must see one moment, or a content could leave the tail between them and be in no segment yet.
    conn.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
    # After five searches on a connection Postgres would plan for any collection, be it of 10 rows or of a million.
    conn.execute(sa.text("SET LOCAL plan_cache_mode = force_custom_plan"))
    filtered = "AND c.metadata @> CAST(:metadata AS jsonb)" if where != "{}" else ""
    parameters = {
        "query": "[" + ",".join(map(repr, query.astype(float).tolist())) + "]",
        "collection": collection_id,
        "space": space.id,
        "k": k,
        "metadata": where,
    }
    index = None
    if not exact and k <= MAX_K_THROUGH_SEGMENTS and segments.are_kept(conn):
        index = segments.find(conn, collection_id, space.id)
    if index is not None and index.is_ready and not (filtered and _leaves_few(conn, filtered, parameters)):
        conn.execute(sa.text("SET LOCAL hnsw.iterative_scan = 'relaxed_order'"))
        conn.execute(sa.text(f"SET LOCAL hnsw.max_scan_tuples = {MAX_SCANNED}"))
        conn.execute(sa.text(f"SET LOCAL hnsw.ef_search = {min(1000, max(100, 2 * k))}"))
        hits = _hits(conn, _through_segments(space, index.segments, filtered), parameters)
        if len(hits) == k:
            return hits
        # It gave up in a graph, or the collection is small.
    return _hits(conn, _exact(space, filtered), parameters)


def _hits(conn: sa.Connection, statement: str, parameters: dict[str, object]) -> list[SearchHit]:
    rows = conn.execute(sa.text(statement), parameters)
    return [SearchHit(float(r.score), r.chunk_id, r.text, r.metadata, r.truncated) for r in rows]


def _leaves_few(conn: sa.Connection, filtered: str, parameters: dict[str, object]) -> bool:
    """Whether at most ``MAX_EXACT`` chunks of the collection pass the filter. It stops counting there."""
    count = f"""
        SELECT count(*)
        FROM (
            SELECT
            FROM chunks c
            WHERE c.collection_id = :collection {filtered}
            LIMIT :most
        ) c
    """
    n_chunks: int = conn.execute(sa.text(count), {**parameters, "most": MAX_EXACT + 1}).scalar_one()
    return n_chunks <= MAX_EXACT


def _exact(space: Space, filtered: str) -> str:
    return f"""
        SELECT 1 - n.distance AS score, n.chunk_id, t.text, n.metadata, n.truncated
        FROM (
            SELECT c.chunk_id, c.content_hash, c.metadata, v.truncated,
                   v.embedding <=> CAST(:query AS {space.vector_type}) AS distance
            FROM chunks c
            JOIN {space.table_name} v USING (content_hash)
            WHERE c.collection_id = :collection {filtered}
            ORDER BY distance, c.chunk_id
            LIMIT :k
        ) n
        JOIN contents t USING (content_hash)
        ORDER BY n.distance, n.chunk_id
    """


def _through_segments(space: Space, live: tuple[Segment, ...], filtered: str) -> str:
    candidates = "\nUNION\n".join([_of_tail(space, filtered), *(_of_segment(space, part, filtered) for part in live)])
    return f"""
        WITH candidates AS MATERIALIZED (
            {candidates}
        )
        SELECT 1 - n.distance AS score, n.chunk_id, t.text, n.metadata, n.truncated
        FROM (
            SELECT c.chunk_id, c.content_hash, c.metadata, v.truncated,
                   v.embedding <=> CAST(:query AS {space.vector_type}) AS distance
            FROM candidates n
            JOIN {space.table_name} v USING (content_hash)
            JOIN chunks c ON c.content_hash = v.content_hash AND c.collection_id = :collection {filtered}
            ORDER BY distance, c.chunk_id
            LIMIT :k
        ) n
        JOIN contents t USING (content_hash)
        ORDER BY n.distance, n.chunk_id
    """


def _of_tail(space: Space, filtered: str) -> str:
    return f"""(
        SELECT v.content_hash
        FROM serving_tail t
        JOIN {space.table_name} v USING (content_hash)
        WHERE t.collection_id = :collection AND t.space_id = :space AND {_has_chunk("t", filtered)}
        GROUP BY v.content_hash, v.embedding
        ORDER BY v.embedding <=> CAST(:query AS {space.vector_type})
        LIMIT :k
    )"""


def _of_segment(space: Space, segment: Segment, filtered: str) -> str:
    """The nearest contents of a segment that have a chunk: more than k, because its order is that of half precision.

    The condition is evaluated row by row, in the order of the distances, until there are enough. So a graph is read
    only as far as necessary, and no plan joins the whole segment with the collection's chunks.
    """
    half = f"halfvec({space.spec.dimensions})"
    if segment.kind is SegmentKind.HNSW:
        return f"""(
            SELECT s.content_hash
            FROM {segment.table_name} s
            WHERE {_has_chunk("s", filtered)}
            ORDER BY s.embedding <=> CAST(:query AS {half})
            LIMIT 2 * :k
        )"""
    return f"""(
        SELECT s.content_hash
        FROM (
            SELECT content_hash
            FROM {segment.table_name}
            ORDER BY embedding <=> CAST(:query AS {half})
            OFFSET 0
        ) s
        WHERE {_has_chunk("s", filtered)}
        LIMIT 2 * :k
    )"""


def _has_chunk(table: str, filtered: str) -> str:
    return f"""(
            SELECT true
            FROM chunks c
            WHERE c.content_hash = {table}.content_hash AND c.collection_id = :collection {filtered}
            LIMIT 1
        )"""
