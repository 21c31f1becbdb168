"""k nearest chunks by cosine, exact or through an HNSW index, and the index itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.results import Index, SearchHit
from chunkmill.errors import InvalidInput
from chunkmill.spaces.registry import Space

MAX_INDEXED_VECTOR = 2000
"""pgvector's limit for an HNSW index on ``vector``; past it the index is built on halfvec."""
MAX_INDEXED_HALFVEC = 4000


def search(
    conn: sa.Connection,
    space: Space,
    query: NDArray[np.float32],
    *,
    collection_id: int,
    k: int,
    metadata: Mapping[str, Any] | None,
    exact: bool,
) -> list[SearchHit]:
    """The ``k`` chunks of a collection nearest to ``query``, ``(d,)`` float32, by cosine; best first.

    ``metadata`` filters by jsonb containment. With an index the nearest are found through it and ordered by
    the exact distance; where the index gives fewer than ``k``, the search is exact.
    """
    index = None if exact else find_index(conn, space)
    facts = {
        "query": "[" + ",".join(map(repr, query.astype(float).tolist())) + "]",
        "collection": collection_id,
        "k": k,
        "wide": k * 4,
        "metadata": json.dumps(dict(metadata or {})),
    }
    dimensions = space.spec.dimensions
    full = f"v.embedding <=> CAST(:query AS {space.storage}({dimensions}))"
    filtered = "AND c.metadata @> CAST(:metadata AS jsonb)" if metadata else ""
    joined = (
        f"FROM {space.table_name} v JOIN chunks c ON c.content_hash = v.content_hash "
        f"AND c.collection_id = :collection {filtered}"
    )
    if index is None or not index.valid:
        # The addition keeps the planner from an index that the caller asked not to use.
        nearest = f"SELECT v.content_hash, c.chunk_id, {full} AS distance {joined} ORDER BY ({full}) + 0.0 LIMIT :k"
    else:
        conn.execute(sa.text("SET LOCAL hnsw.iterative_scan = 'strict_order'"))
        conn.execute(sa.text(f"SET LOCAL hnsw.ef_search = {min(1000, max(100, 4 * k))}"))
        ordering = (
            full
            if index.on == space.storage
            else f"v.embedding::halfvec({dimensions}) <=> CAST(:query AS halfvec({dimensions}))"
        )
        nearest = f"SELECT v.content_hash, c.chunk_id, {full} AS distance {joined} ORDER BY {ordering} LIMIT :wide"
    rows = conn.execute(
        sa.text(
            f"SELECT 1 - n.distance AS score, c.chunk_id, t.text, c.metadata, v.truncated FROM ({nearest}) n "
            f"JOIN {space.table_name} v USING (content_hash) JOIN contents t USING (content_hash) "
            "JOIN chunks c ON c.collection_id = :collection AND c.chunk_id = n.chunk_id "
            "ORDER BY n.distance, c.chunk_id LIMIT :k"
        ),
        facts,
    )
    hits = [SearchHit(float(r.score), r.chunk_id, r.text, r.metadata, r.truncated) for r in rows]
    if index is not None and index.valid and len(hits) < k:
        # pgvector ends an iterative scan after hnsw.max_scan_tuples, so a small collection in a large space,
        # or a rare filter, may come up short; then there is little enough to look through.
        return search(conn, space, query, collection_id=collection_id, k=k, metadata=metadata, exact=True)
    return hits


def find_index(conn: sa.Connection, space: Space) -> Index | None:
    """The space's HNSW index, the valid one first."""
    row = conn.execute(
        sa.text(
            "SELECT c.relname, pg_get_indexdef(i.indexrelid) AS definition, i.indisvalid FROM pg_index i "
            "JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam "
            "WHERE i.indrelid = to_regclass(:table) AND a.amname = 'hnsw' ORDER BY i.indisvalid DESC LIMIT 1"
        ),
        {"table": space.table_name},
    ).one_or_none()
    if row is None:
        return None
    on = "halfvec" if "halfvec_cosine_ops" in row.definition else "vector"
    return Index(row.relname, on, row.indisvalid)


def build_index(db: sa.Engine, space: Space, *, halfvec: bool = False) -> Index:
    """Build the HNSW index of a space without blocking writers, and a GIN index on metadata for filters.

    On ``halfvec`` when asked, when the space stores it, or past 2,000 dimensions, which an index on
    ``vector`` does not take. Raises :class:`InvalidInput` past 4,000. An invalid index left by an
    interrupted build is dropped first; a valid one is kept.
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
        found = find_index(conn, space)
        if found and (not found.valid or found.on != on):
            conn.execute(sa.text(f"DROP INDEX CONCURRENTLY {found.name}"))
        conn.execute(
            sa.text(
                f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {space.table_name} "
                f"USING hnsw ({column} {on}_cosine_ops)"
            )
        )
        _drop_if_invalid(conn, "ix_chunks_metadata")
        conn.execute(
            sa.text(
                "CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_chunks_metadata ON chunks "
                "USING gin (metadata jsonb_path_ops)"
            )
        )
        conn.execute(sa.text("RESET maintenance_work_mem"))
        conn.execute(sa.text(f"ANALYZE {space.table_name}"))
    return Index(name, on, valid=True)


def _drop_if_invalid(conn: sa.Connection, index: str) -> None:
    """An interrupted CREATE INDEX CONCURRENTLY leaves an index that costs and does not serve."""
    invalid = conn.execute(
        sa.text("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:index)"), {"index": index}
    ).scalar_one_or_none()
    if invalid:
        conn.execute(sa.text(f"DROP INDEX CONCURRENTLY {index}"))
