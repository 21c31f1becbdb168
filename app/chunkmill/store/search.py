"""The k nearest chunks by cosine: exactly, or through the segments of the collection's serving index and its tail."""

from __future__ import annotations

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.results import SearchHit
from chunkmill.domain.serving import Segment, SegmentKind
from chunkmill.spaces.registry import Space
from chunkmill.store import segments
from chunkmill.store.segments import ServingIndex

MAX_EXACT = 10_000
"""If a filter leaves no more chunks than this in a collection with graphs, the search is exact. That takes about 0.1 s,
and a graph may give up before it meets enough chunks that pass a narrow filter."""
FLAT_ADVANTAGE = 10
"""So many times faster a row is read in a flat segment than through the indexes of chunks and vectors."""
MAX_K_THROUGH_SEGMENTS = 500
"""A search for more hits is exact, because pgvector keeps at most 1,000 candidates in mind."""
MAX_K_THROUGH_BITS = 100
"""The same for a collection with graphs of bits, which give ten candidates or more for each hit."""
MAX_SCANNED = 100_000
"""How many rows of a graph a search looks at before it gives up and becomes exact."""
BEAM, WIDEST_BEAM = 400, 1_000
"""How many candidates a search of a graph keeps in mind, which pgvector calls ef_search; the latter is the most that it
allows."""
MIN_CANDIDATES = 20
CONTRAST = 1.15
"""If the last candidate is less than so many times as far from the query as the first, the query is far from everything
in the collection. A narrow search of a graph then ends where it began, and so it is made again with the widest beam.
(Relative contrast as a measure of how hard a search is: He, Kumar and Chang, 2012.)"""


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
    prepare = f"""
        SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
               set_config('hnsw.iterative_scan', 'relaxed_order', true),
               set_config('hnsw.max_scan_tuples', :most, true),
               set_config('hnsw.ef_search', :beam, true),
               {segments.ARE_KEPT} AS has_indexes
    """
    # After five searches on a connection Postgres would plan for any collection, be it of 10 rows or of a million.
    beam = min(WIDEST_BEAM, max(BEAM, 2 * k))
    settings = conn.execute(sa.text(prepare), {"most": str(MAX_SCANNED), "beam": str(beam)}).one()
    filtered = "AND c.metadata @> CAST(:metadata AS jsonb)" if where != "{}" else ""
    parameters = {
        "query": "[" + ",".join(map(repr, _direction(query).tolist())) + "]",
        "collection": collection_id,
        "space": space.id,
        "k": max(k, MIN_CANDIDATES),
        "beam": beam,
        "metadata": where,
    }
    index = None
    if settings.has_indexes and not exact and k <= MAX_K_THROUGH_SEGMENTS:
        index = segments.find(conn, collection_id, space.id)
        if index is not None and index.has_bits:
            if k > MAX_K_THROUGH_BITS:
                index = None
            elif 10 * k > beam:
                conn.execute(sa.text(f"SET LOCAL hnsw.ef_search = {WIDEST_BEAM}"))
                beam = parameters["beam"] = WIDEST_BEAM
    if index is not None and index.is_ready and not (filtered and _leaves_few(conn, index, filtered, parameters)):
        statement = _through_segments(space, index.segments, filtered)
        hits = _hits_unless_it_gave_up(conn, statement, parameters)
        if index.has_graphs and beam < WIDEST_BEAM and hits and _is_far_from_all(hits):
            conn.execute(sa.text(f"SET LOCAL hnsw.ef_search = {WIDEST_BEAM}"))
            parameters["beam"] = WIDEST_BEAM
            hits = _hits_unless_it_gave_up(conn, statement, parameters)
        if hits is not None and len(hits) >= k:
            return hits[:k]
        # It gave up in a graph, or the collection is small.
    return _hits(conn, _exact(space, filtered), parameters)[:k]


def _hits(conn: sa.Connection, statement: str, parameters: dict[str, object]) -> list[SearchHit]:
    rows = conn.execute(sa.text(statement), parameters)
    return [SearchHit(float(r.score), r.chunk_id, r.text, r.metadata, r.truncated) for r in rows]


def _hits_unless_it_gave_up(
    conn: sa.Connection, statement: str, parameters: dict[str, object]
) -> list[SearchHit] | None:
    """None if the scan of a graph ended early. Other segments may then have given enough hits that are not nearest."""
    rows = conn.execute(sa.text(statement), parameters).all()
    if any(row.gave_up for row in rows):
        return None
    return [SearchHit(float(r.score), r.chunk_id, r.text, r.metadata, r.truncated) for r in rows]


def _direction(query: NDArray[np.float32]) -> NDArray[np.float64]:
    """The query with length 1, which half precision can hold. Cosine asks for the direction alone."""
    exact = query.astype(np.float64)
    norm = np.linalg.norm(exact)
    return exact / norm if norm > 0 else exact


def _is_far_from_all(hits: list[SearchHit]) -> bool:
    return 1 - hits[-1].score < CONTRAST * (1 - hits[0].score)


def _leaves_few(conn: sa.Connection, index: ServingIndex, filtered: str, parameters: dict[str, object]) -> bool:
    """Whether so few chunks of the collection pass the filter that an exact search is better."""
    few = MAX_EXACT if index.has_graphs else index.rows // FLAT_ADVANTAGE
    count = f"""
        SELECT count(*)
        FROM (
            SELECT
            FROM chunks c
            WHERE c.collection_id = :collection {filtered}
            LIMIT :most
        ) c
    """
    n_chunks: int = conn.execute(sa.text(count), {**parameters, "most": few + 1}).scalar_one()
    return n_chunks <= few


def _exact(space: Space, filtered: str) -> str:
    # The addition keeps the planner from an index of vectors, which the last release built and an operator may build.
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


_CANDIDATES = {SegmentKind.FLAT: "2 * :k", SegmentKind.HNSW: "2 * :k", SegmentKind.BITS: ":beam"}
"""How many candidates a segment gives, in SQL. Of bits, which tell less, all that the search of a graph keeps."""


def _through_segments(space: Space, live: tuple[Segment, ...], filtered: str) -> str:
    candidates = "\nUNION ALL\n".join(
        [_of_tail(space, filtered), *(_of_segment(space, part, filtered) for part in live)]
    )
    graphs = ", ".join(
        f"({part.id}, {part.rows}, {_CANDIDATES[part.kind]})" for part in live if part.kind is not SegmentKind.FLAT
    )
    given = "(SELECT count(*) FROM candidates x WHERE x.part = g.part)"
    gave_up = (
        f"EXISTS (SELECT FROM (VALUES {graphs}) g (part, n_rows, wanted) WHERE {given} < least(g.wanted, g.n_rows))"
    )
    return f"""
        WITH candidates AS MATERIALIZED (
            {candidates}
        )
        SELECT 1 - n.distance AS score, n.chunk_id, t.text, n.metadata, n.truncated,
               {gave_up if graphs else "false"} AS gave_up
        FROM (
            SELECT c.chunk_id, c.content_hash, c.metadata, v.truncated,
                   v.embedding <=> CAST(:query AS {space.vector_type}) AS distance
            FROM (SELECT DISTINCT content_hash FROM candidates) n
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
        SELECT v.content_hash, 0 AS part
        FROM serving_tail t
        JOIN {space.table_name} v USING (content_hash)
        WHERE t.collection_id = :collection AND t.space_id = :space AND {_has_chunk("t", filtered)}
        GROUP BY v.content_hash, v.embedding
        ORDER BY v.embedding <=> CAST(:query AS {space.vector_type})
        LIMIT :k
    )"""


def _of_segment(space: Space, segment: Segment, filtered: str) -> str:
    """The nearest contents of a segment that have a chunk: more than k, because its order is that of half precision, or
    that of the number of equal signs.

    The condition is evaluated row by row, in the order of the distances, until there are enough. So a graph is read
    only as far as necessary, and no plan joins the whole segment with the collection's chunks.
    """
    half = f"halfvec({space.spec.dimensions})"
    wanted = _CANDIDATES[segment.kind]
    if segment.kind is not SegmentKind.FLAT:
        distance = f"s.embedding <=> CAST(:query AS {half})"
        if segment.kind is SegmentKind.BITS:
            distance = f"s.embedding <~> binary_quantize(CAST(:query AS {half}))::bit({space.spec.dimensions})"
        return f"""(
            SELECT s.content_hash, {segment.id} AS part
            FROM {segment.table_name} s
            WHERE {_has_chunk("s", filtered)}
            ORDER BY {distance}
            LIMIT {wanted}
        )"""
    return f"""(
        SELECT s.content_hash, {segment.id} AS part
        FROM (
            SELECT content_hash
            FROM {segment.table_name}
            ORDER BY embedding <=> CAST(:query AS {half})
            OFFSET 0
        ) s
        WHERE {_has_chunk("s", filtered)}
        LIMIT {wanted}
    )"""


def _has_chunk(table: str, filtered: str) -> str:
    return f"""(
            SELECT true
            FROM chunks c
            WHERE c.content_hash = {table}.content_hash AND c.collection_id = :collection {filtered}
            LIMIT 1
        )"""
