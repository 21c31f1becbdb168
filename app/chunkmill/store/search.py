"""The k nearest chunks by cosine, exactly or through an HNSW index, and the index itself."""

from __future__ import annotations

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.results import Index, SearchHit
from chunkmill.errors import InvalidInput
from chunkmill.spaces.registry import Space

MAX_INDEXED_VECTOR = 2000
"""The most dimensions of an HNSW index of pgvector on ``vector``; beyond it the index is built on halfvec."""
MAX_INDEXED_HALFVEC = 4000
MAX_EXACT = 20_000
"""Among how many chunks a search is exact. It takes about 0.2 s for 20,000 chunks of 384 dimensions."""


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

    ``where`` is a JSON object that filters by jsonb containment; ``{}`` filters nothing. If the space has an index and
    more than ``MAX_EXACT`` chunks pass the filter, the nearest are found through the index and ordered by their exact
    distance. Otherwise the search is exact, because an index that many collections share would find chunks, but not the
    nearest, of a small one.
    """
    # After five searches on a connection Postgres would plan for any collection, be it of 10 rows or of a million.
    conn.execute(sa.text("SET LOCAL plan_cache_mode = force_custom_plan"))
    index = None if exact else find_index(conn, space)
    parameters = {
        "query": "[" + ",".join(map(repr, query.astype(float).tolist())) + "]",
        "collection": collection_id,
        "k": k,
        "metadata": where,
    }
    filtered = "AND c.metadata @> CAST(:metadata AS jsonb)" if where != "{}" else ""
    if index is None or not index.valid or not _has_many(conn, filtered, parameters):
        rows = conn.execute(sa.text(_exact_search(space, filtered)), parameters)
    else:
        # The rows are ordered by their exact distance afterwards, and 'strict_order' would leave out those that it
        # meets too late.
        conn.execute(sa.text("SET LOCAL hnsw.iterative_scan = 'relaxed_order'"))
        conn.execute(sa.text(f"SET LOCAL hnsw.ef_search = {min(1000, max(100, 4 * k))}"))
        parameters["candidates"] = k if index.on == space.storage else 4 * k
        rows = conn.execute(sa.text(_search_through(index, space, filtered)), parameters)
    return [SearchHit(float(r.score), r.chunk_id, r.text, r.metadata, r.truncated) for r in rows]


def _has_many(conn: sa.Connection, filtered: str, parameters: dict[str, object]) -> bool:
    """Whether more than ``MAX_EXACT`` chunks of the collection pass the filter. It stops counting there."""
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
    return n_chunks > MAX_EXACT


def _exact_search(space: Space, filtered: str) -> str:
    # The addition keeps the planner from using an index, which the caller does not want.
    return f"""
        SELECT 1 - n.distance AS score, n.chunk_id, t.text, n.metadata, n.truncated
        FROM (
            SELECT c.chunk_id, c.content_hash, c.metadata, v.truncated,
                   v.embedding <=> CAST(:query AS {space.vector_type}) AS distance
            FROM chunks c
            JOIN {space.table_name} v USING (content_hash)
            WHERE c.collection_id = :collection {filtered}
            ORDER BY (v.embedding <=> CAST(:query AS {space.vector_type})) + 0.0, c.chunk_id
            LIMIT :k
        ) n
        JOIN contents t USING (content_hash)
        ORDER BY n.distance, n.chunk_id
    """


def _search_through(index: Index, space: Space, filtered: str) -> str:
    indexed_type = f"{index.on}({space.spec.dimensions})"
    return f"""
        SELECT 1 - n.distance AS score, n.chunk_id, t.text, n.metadata, n.truncated
        FROM (
            SELECT c.chunk_id, c.content_hash, c.metadata, v.truncated,
                   v.embedding <=> CAST(:query AS {space.vector_type}) AS distance
            FROM {space.table_name} v
            JOIN chunks c ON c.content_hash = v.content_hash AND c.collection_id = :collection {filtered}
            ORDER BY v.embedding::{indexed_type} <=> CAST(:query AS {indexed_type})
            LIMIT :candidates
        ) n
        JOIN contents t USING (content_hash)
        ORDER BY n.distance, n.chunk_id
        LIMIT :k
    """


def find_index(conn: sa.Connection, space: Space) -> Index | None:
    """The space's HNSW index, a valid one if there is one; None without any."""
    query = """
        SELECT c.relname, pg_get_indexdef(i.indexrelid) AS definition, i.indisvalid
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indexrelid
        JOIN pg_am a ON a.oid = c.relam
        WHERE i.indrelid = to_regclass(:table) AND a.amname = 'hnsw'
        ORDER BY i.indisvalid DESC
        LIMIT 1
    """
    row = conn.execute(sa.text(query), {"table": space.table_name}).one_or_none()
    if row is None:
        return None
    on = "halfvec" if "halfvec_cosine_ops" in row.definition else "vector"
    return Index(row.relname, on, row.indisvalid)


def build_index(db: sa.Engine, space: Space, *, halfvec: bool = False) -> Index:
    """Build the HNSW index of a space without blocking writers, and a GIN index on metadata for filters.

    The index is on ``halfvec`` if the caller asks for it, if the space stores it, or beyond 2,000 dimensions, which an
    index on ``vector`` does not take. Raises :class:`InvalidInput` beyond 4,000. An invalid index that an interrupted
    build left is dropped first; a valid one is kept.
    """
    dimensions = space.spec.dimensions
    if dimensions > MAX_INDEXED_HALFVEC:
        raise InvalidInput(
            f"the space has {dimensions} dimensions and pgvector indexes at most {MAX_INDEXED_HALFVEC} (as halfvec). "
            "Search stays exact; use a model with fewer dimensions to index it."
        )
    on = "halfvec" if halfvec or space.storage == "halfvec" or dimensions > MAX_INDEXED_VECTOR else "vector"
    column = "embedding" if on == space.storage else f"(embedding::halfvec({dimensions}))"
    name = f"ix_{space.table_name}_hnsw_{on}"
    # CREATE INDEX CONCURRENTLY cannot run inside a transaction.
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(sa.text("SET maintenance_work_mem = '512MB'"))
        old = find_index(conn, space)
        if old and (not old.valid or old.on != on):
            conn.execute(sa.text(f"DROP INDEX CONCURRENTLY {old.name}"))
        create_hnsw = f"""
            CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {space.table_name}
            USING hnsw ({column} {on}_cosine_ops)
        """
        conn.execute(sa.text(create_hnsw))
        _drop_if_invalid(conn, "ix_chunks_metadata")
        create_gin = """
            CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_chunks_metadata ON chunks
            USING gin (metadata jsonb_path_ops)
        """
        conn.execute(sa.text(create_gin))
        conn.execute(sa.text("RESET maintenance_work_mem"))
        conn.execute(sa.text(f"ANALYZE {space.table_name}"))
    return Index(name, on, valid=True)


def _drop_if_invalid(conn: sa.Connection, index: str) -> None:
    """Drop an index that an interrupted CREATE INDEX CONCURRENTLY left: writes maintain it, and no query uses it."""
    query = "SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:index)"
    if conn.execute(sa.text(query), {"index": index}).scalar_one_or_none():
        conn.execute(sa.text(f"DROP INDEX CONCURRENTLY {index}"))
