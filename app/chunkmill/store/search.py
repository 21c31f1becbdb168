"""The k nearest chunks by cosine: exactly, or through the segments of the collection's serving index and its tail."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from chunkmill.domain.filters import Filter
from chunkmill.domain.results import Hits, SearchHit, SearchPlan
from chunkmill.domain.serving import Segment, SegmentKind
from chunkmill.errors import NotFound
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space
from chunkmill.store import outdated, read, segments
from chunkmill.store.segments import ServingIndex
from chunkmill.system.numbers import NDArray, np

MAX_EXACT = 30_000
"""If a filter leaves more chunks than this in a collection with graphs, the search is never exact."""
GRAPH_ROW_COST = 4
"""How many times longer it takes to reach a row in a graph and check whether its chunk passes a filter than to compare
a chunk that passes with the query. Measured on 60,000 rows: 16 to 57 µs and 8 to 20 µs, on a busy machine."""
FLAT_ADVANTAGE = 10
"""How many times faster a row is read in a flat segment than through the indexes of chunks and vectors."""
MAX_K_THROUGH_SEGMENTS = 500
"""A search for more hits is exact, because pgvector keeps at most 1,000 candidates."""
MAX_K_THROUGH_BITS = 100
"""The same for a collection with graphs of bits, which give ten candidates or more for each hit."""
PAGED = 200
"""How many hits of a search with an offset are found through the segments; the further ones are found exactly. The
order of the first hits then does not depend on the page, as it would if a deeper page had more candidates."""
MAX_SCANNED = 100_000
"""How many rows of a graph a search looks at before it gives up and becomes exact."""
BEAM, WIDE_BEAM, WIDEST_BEAM = 100, 400, 1_000
"""How many candidates a search of a graph keeps (pgvector's ef_search): of vectors, and of bits, which tell less. The
last number is pgvector's maximum."""
BEAM_ROWS, BEAM_GROWTH = 100_000, 0.4
"""The first number is how many rows a graph may have that is searched with ``BEAM``. If it has ``n`` times as many, the
beam is ``n`` to the power of the second number times wider. For a million rows about 57 topics the recall was 0.96 with
a beam of 100, 0.98 with 150, 0.99 with 200 to 300 and 1.00 with 400."""
BITS_BY_ROWS = 2_000
"""How many candidates there are if all rows of bits are compared. With 1,000 the recall was 0.985 on 60,000 rows, and
with 2,000 0.995."""
MORE_CANDIDATES, MORE_THROUGH_A_FILTER = 10, 5
"""How many more candidates than hits are compared by their vectors at least, because a segment orders its rows in half
precision. There are fewer where a graph is read through a filter, because many rows are read for each of them."""
JUDGED = 50
"""How many of the nearest candidates are used to tell whether a query lies among its neighbours or beside them."""
LEAST_SPREAD, DOUBTFUL_SPREAD = 0.9, 1.0
"""If the first ``JUDGED`` candidates are on average less than the first number times as far from each other as from the
query, the query is not among them but beside them. A search of a graph is then often stuck in the nearest topic while
the hits are in several, so that the segments are read from the first row to the last instead. Below the second number
that is in doubt. (Comparing a point's distance to its neighbours with their own is the idea of the local outlier
factor: Breunig et al., 2000.)

Measured on four graphs of the same 100,000 rows, which no two builds make alike. Of 300 queries about the collection's
own topics 1 % are below 0.9 and 10 % below 1.0; their recall is 1.00. Of 1,200 about other topics 969 miss hits with a
beam of 100; 947 of these are below 0.9, 21 in doubt, and one, which finds 9 of 10 hits, above."""
WIDER = 4
"""A search that is in doubt is made again with a beam that is so many times wider. If the hits are others then, it was
stuck. That told 20 of the 21 above, and the other one finds 9 of 10 hits."""
FIRST_SAMPLED, SAMPLED = 100, 500
"""About how many rows of the largest graph are looked at to tell whether a filter leaves many chunks: as many as the
second number, unless none or a third of the first ones pass. That takes 1 to 3 ms, and saves the list of all chunks
that pass."""
SHARE_SECONDS, MOST_SHARES = 60.0, 1_000
"""How many seconds the share that passes a filter is remembered, and for how many filters and graphs. It decides only
which way of searching is tried first."""
CLEARLY_MANY = 1.25
"""The sample is believed only if it says that this many times more chunks pass than an exact search may have."""


_SHARES: WeakKeyDictionary[sa.Engine, dict[tuple[int, bytes], tuple[float, float]]] = WeakKeyDictionary()
"""The remembered shares, by the segment and a digest of the filter, and the time of ``time.monotonic()`` until which
they are believed."""


class SpaceLeft(Exception):
    """The collection has left the space since the caller chose it, so its vectors may be incomplete."""


SLACK = 4
"""How many times more rows of a graph are read at most than should be enough, given the share that passes."""


# SQLAlchemy takes some time to read such long texts, and there are few different ones.
_read = functools.lru_cache(maxsize=256)(sa.text)


def search(
    conn: sa.Connection,
    space: Space,
    query: NDArray[np.float32],
    *,
    collection_id: int,
    k: int,
    where: Filter | None = None,
    exact: bool = False,
    offset: int | None = None,
    without: str | None = None,
    explain: bool = False,
) -> Hits:
    """The ``k`` chunks of a collection nearest to ``query``, ``(d,)`` float32, by cosine; best first.

    The search is exact if ``exact`` says so, if the collection has no serving index, or if few chunks pass the filter
    ``where``. Otherwise its candidates come from the segments and the tail, and are ordered by their exact distance.
    With an ``offset``, which may be 0, this many of the nearest are left out. The hits of all offsets come from one and
    the same list. ``without`` is the id of a chunk that is left out. Call it first in its transaction.
    """
    see_one_moment(conn)
    (hits,) = search_all(
        conn,
        space,
        query[np.newaxis],
        collection_id=collection_id,
        k=k,
        where=where,
        exact=exact,
        offset=offset,
        without=without,
        explain=explain,
    )
    return hits


def search_all(
    conn: sa.Connection,
    space: Space,
    queries: NDArray[np.float32],
    *,
    collection_id: int,
    k: int,
    where: Filter | None = None,
    exact: bool = False,
    offset: int | None = None,
    without: str | None = None,
    explain: bool = False,
    is_served: str = "true",
) -> list[Hits]:
    """:func:`search` for each row of ``queries``, ``(n, d)`` float32, all at one moment.

    :func:`see_one_moment` must have been the first statement of the transaction. ``is_served`` is a condition in SQL on
    ``:collection`` and ``:space``. If it does not hold at that moment, this raises :class:`SpaceLeft`.
    """
    index, has_outdated = _look(conn, collection_id, space, is_served)
    end = (offset or 0) + k + (without is not None)
    condition, parameters = (where or Filter()).sql("c.metadata")
    asked = _CallContext(
        conn,
        space,
        f"AND {condition}" if where else "",
        parameters | {"collection": collection_id, "space": space.id},
        collection_id=collection_id,
        where=where,
        has_outdated=has_outdated,
    )
    passing, share, because, wanted = None, 1.0, "An exact search was asked for.", end
    if exact:
        index = None
    elif offset is None and end > MAX_K_THROUGH_SEGMENTS:
        index, because = None, f"A search for more than {MAX_K_THROUGH_SEGMENTS} hits is exact."
    else:
        because = "The collection has no serving index. It gets one when it has 1,000 chunks and a poller runs."
        if index is not None and not index.is_ready:
            index, because = None, "The collection's serving index is being built for the first time."
        if index is not None:
            because = f"The collection has {index.rows:,} rows in segments"
            if index.has_bits and offset is None and end > MAX_K_THROUGH_BITS:
                index, because = None, f"A search of compact graphs for more than {MAX_K_THROUGH_BITS} hits is exact."
        if index is not None:
            if offset is not None:
                wanted = MAX_K_THROUGH_BITS if index.has_bits else PAGED
            said = "no filter is given"
            if where:
                passing, share, said = asked.list_passing(index, wanted)
            because = f"{because}, and {said}."
            if passing is not None:
                index, because = None, f"Only {passing.n:,} chunks pass the filter."
    asked = replace(asked, share=share)
    lists = [asked.with_outdated(query, end, wanted, index, passing, because, explain) for query in queries]
    return [
        Hits([hit for hit in hits if hit.chunk_id != without][offset or 0 :][:k], hits.explanation) for hits in lists
    ]


def _look(conn: sa.Connection, collection_id: int, space: Space, is_served: str) -> tuple[ServingIndex | None, bool]:
    """The serving index, and whether replaced chunks are found by their old vectors. Raises :class:`SpaceLeft`."""
    of_outdated = outdated.condition(conn)
    if of_outdated is None and not segments.are_kept(conn):
        parameters = {"collection": collection_id, "space": space.id}
        if not conn.execute(sa.text(f"SELECT {is_served}"), parameters).scalar_one():
            raise SpaceLeft
        return None, False
    try:
        index, holding = segments.find_and_tell(conn, collection_id, space.id, [of_outdated or "false", is_served])
    except sa.exc.ProgrammingError as error:
        outdated.forget_schema(conn, error)
        raise
    has_outdated, is_there = holding
    if not is_there:
        raise SpaceLeft
    return index, has_outdated


def see_one_moment(conn: sa.Connection) -> None:
    """Make all statements of a transaction see the database as it was at the first of them.

    Otherwise a content could leave the tail between two statements of a search and be in no segment yet. The settings
    of a search come with it: statements without parameters go to Postgres in one message.
    """
    # After five searches on a connection Postgres would plan for any collection, be it of 10 rows or of a million.
    settings = f"""
        SET TRANSACTION ISOLATION LEVEL REPEATABLE READ;
        SET LOCAL plan_cache_mode = force_custom_plan;
        SET LOCAL hnsw.iterative_scan = relaxed_order;
        SET LOCAL hnsw.max_scan_tuples = {MAX_SCANNED};
        SET LOCAL hnsw.ef_search = {BEAM}
    """
    conn.execute(_read(settings))


def vector_of(conn: sa.Connection, space: Space, collection: Collection, chunk_id: str) -> NDArray[np.float32]:
    """The stored vector of a chunk, ``(d,)`` float32: its old one if searches find it by that. Raises :class:`NotFound`
    if there is none, and says why."""
    stored = read.read_vectors(conn, space, collection_id=collection.id, chunk_ids=[chunk_id])
    if chunk_id in stored:
        return stored[chunk_id]
    old = outdated.vector_of(conn, space, collection, chunk_id)
    if old is not None:
        return old
    query = "SELECT EXISTS (SELECT FROM chunks WHERE collection_id = :collection AND chunk_id = :id)"
    if conn.execute(sa.text(query), {"collection": collection.id, "id": chunk_id}).scalar_one():
        raise NotFound(
            f"chunk {chunk_id[:200]!r} of collection {collection.name!r} has no vector: "
            f"`chunkmill audit {shlex.quote(collection.name)}` says why."
        )
    raise NotFound(f"there is no chunk {chunk_id[:200]!r} in collection {collection.name!r}.")


@dataclass(frozen=True, slots=True)
class _PassingChunks:
    """The chunks that pass a filter, if they are few: how many, and where they are in the table.

    The places hold for as long as the transaction sees one moment, because no vacuum removes what it sees.
    """

    n: int
    places: str
    """A Postgres array of ``tid``. It is not unpacked here, which would take longer than the search."""


@dataclass(frozen=True, slots=True)
class _NearestHits:
    """The nearest candidates, and what is known of them."""

    hits: list[SearchHit]
    """Best first. There are none if the scan of a graph gave up: other segments may then have given enough that are not
    the nearest."""
    compared: int
    """How many candidates were compared by their vectors."""
    spread: float
    """See ``LEAST_SPREAD``; infinite if it was not looked at."""
    beam: int = 0


@dataclass(frozen=True, slots=True)
class _CallContext:
    """What all queries of a call have in common."""

    conn: sa.Connection
    space: Space
    filtered: str
    """The condition on the chunk ``c``, with an AND before it; empty without a filter."""
    parameters: dict[str, object]
    collection_id: int
    where: Filter | None
    """The filter itself."""
    has_outdated: bool
    """Replaced chunks are found by their old vectors until they have their new ones."""
    share: float = 1.0
    """About what share of the collection passes the filter."""

    def with_outdated(
        self,
        query: NDArray[np.float32],
        k: int,
        wanted: int,
        index: ServingIndex | None,
        passing: _PassingChunks | None,
        because: str,
        explain: bool,
    ) -> Hits:
        """:meth:`nearest`, and among them the chunks that have only an old vector, if the collection is set so."""
        hits = self.nearest(query, k, wanted, index, passing, because, explain)
        if not self.has_outdated:
            return hits
        old = outdated.nearest(
            self.conn,
            self.space,
            query=_written(query),
            collection_id=self.collection_id,
            k=k,
            where=self.where,
        )
        plan = hits.explanation
        if plan and old:
            plan = replace(
                plan, because=f"{plan.because} Chunks that wait for a new vector were compared by the old one."
            )
        # Both lists are in this order, and no chunk is in both.
        return Hits(heapq.merge(hits, old, key=lambda hit: (-hit.score, hit.chunk_id)), plan)

    def nearest(
        self,
        query: NDArray[np.float32],
        k: int,
        wanted: int,
        index: ServingIndex | None,
        passing: _PassingChunks | None,
        because: str,
        explain: bool,
    ) -> Hits:
        """The ``k`` nearest: the first ``wanted`` through ``index``, if it is given, and the others exactly."""
        parameters = self.parameters | {"query": _written(query)}
        head = Hits()
        if index is not None:
            head = self._through_segments(parameters, wanted, index, because, explain)
            if len(head) >= wanted:
                if k <= wanted:
                    return head
                because = f"The first {wanted} hits are from the segments, and the others are exact."
            else:
                because = (
                    f"The segments gave {len(head)} of {wanted} hits: the collection has no more that pass, or a graph "
                    "was left before there were enough."
                )
                head = Hits()
        exactly = self._exactly(parameters, k, passing)
        plan = self._explanation(because, passing) if explain else None
        if head and head.explanation and plan:
            plan = replace(head.explanation, because=because, candidates=plan.candidates)
        before = {hit.chunk_id for hit in head}
        return Hits([*head, *(hit for hit in exactly if hit.chunk_id not in before)], plan)

    def list_passing(self, index: ServingIndex, k: int) -> tuple[_PassingChunks | None, float, str]:
        """The chunks that pass the filter, if they are so few that an exact search is better; else why it is not.

        The number in the middle is about what share of the collection passes.
        """
        few, share = _few(index, k), 1.0
        if index.has_graphs:
            share = self._estimate_share(index)
            if share * index.rows > CLEARLY_MANY * few:
                return None, share, f"about {100 * share:.0f} % pass the filter"
        query = f"""
            SELECT count(*) AS n, coalesce(CAST(array_agg(c.place) AS text), '{{}}') AS places
            FROM (
                SELECT c.ctid AS place
                FROM chunks c
                WHERE c.collection_id = :collection {self.filtered}
                LIMIT :most
            ) c
        """
        row = self.conn.execute(sa.text(query), {**self.parameters, "most": few + 1}).one()
        if row.n > few:
            return None, share, f"more than {few:,} chunks pass the filter"
        return _PassingChunks(row.n, row.places), share, ""

    def _estimate_share(self, index: ServingIndex) -> float:
        """What share of the collection passes the filter, by some blocks of its largest graph: always the same."""
        largest = max(
            (part for part in index.segments if part.kind is not SegmentKind.FLAT), key=lambda part: part.rows
        )
        known = _SHARES.setdefault(self.conn.engine, {})
        asked = hashlib.blake2b(repr((self.filtered, self.parameters)).encode(), digest_size=16).digest()
        share, until = known.get((largest.id, asked), (0.0, 0.0))
        if time.monotonic() < until:
            return share
        query = f"""
            SELECT count(*) AS looked, count(*) FILTER (WHERE {_has_chunk("s", self.filtered)}) AS passed
            FROM {largest.table_name} s TABLESAMPLE SYSTEM (:percent) REPEATABLE (1)
        """
        for rows in (FIRST_SAMPLED, SAMPLED):
            percent = min(100.0, 100 * rows / max(1, largest.rows))
            row = self.conn.execute(sa.text(query), {**self.parameters, "percent": percent}).one()
            share = row.passed / row.looked if row.looked else 0.0
            if not 0 < share < 1 / 3:
                break
        if len(known) >= MOST_SHARES:
            known.clear()
        known[largest.id, asked] = share, time.monotonic() + SHARE_SECONDS
        return share

    def _through_segments(
        self, parameters: dict[str, object], k: int, index: ServingIndex, because: str, explain: bool
    ) -> Hits:
        """The ``k`` nearest among the candidates, or fewer if the segments and the tail have too few candidates."""
        near = self._near_rows(parameters, k, index)
        is_beside = index.has_graphs and near.spread < LEAST_SPREAD
        if near.hits and LEAST_SPREAD <= near.spread < DOUBTFUL_SPREAD and near.beam < WIDEST_BEAM:
            # A search that is not stuck finds with a wider beam what it has found.
            before, near = near, self._near_rows(parameters, k, index, times=WIDER)
            is_beside = [hit.chunk_id for hit in near.hits[:k]] != [hit.chunk_id for hit in before.hits[:k]]
        if is_beside:
            # Among this many of the nearest rows there should be enough that pass. If not, the search becomes exact.
            candidates = _candidates(k)
            scanned = math.ceil(2 * (BITS_BY_ROWS if index.has_bits else candidates) / max(self.share, 0.001))
            rows = _through_segments(self.space, index.segments, self.filtered, by_rows=True)
            near = self._near(rows, {**parameters, "k": candidates, "beam": BITS_BY_ROWS, "scanned": scanned})
            because += " The query is beside all that the graphs gave, so that all rows were compared instead."
        if not explain:
            return Hits(near.hits[:k])
        plan = SearchPlan(
            is_exact=False,
            because=because,
            candidates=near.compared,
            segments=len(index.segments),
            graphs=sum(part.kind is not SegmentKind.FLAT for part in index.segments),
            tail=self._count_tail(),
            beam=near.beam if index.has_graphs and not is_beside else None,
        )
        return Hits(near.hits[:k], plan)

    def _near_rows(self, parameters: dict[str, object], k: int, index: ServingIndex, *, times: int = 1) -> _NearestHits:
        """The nearest that pass the filter, with a beam that is so many times wider than usual."""
        at_once = self._nearest_at_once(parameters, k, index, times)
        return at_once or self._nearest_in_turn(parameters, k, index, times)

    def _nearest_at_once(
        self, parameters: dict[str, object], k: int, index: ServingIndex, times: int
    ) -> _NearestHits | None:
        """The nearest that pass the filter. One statement reads each graph until enough rows have passed, and tells
        from the first ones where the query lies among all rows.

        None if there is no graph or one of bits, if the hits are so many that a wider beam is needed, or if far fewer
        rows passed than the share promises.
        """
        candidates, beam = _candidates(k, MORE_THROUGH_A_FILTER if self.filtered else MORE_CANDIDATES), _beam(index)
        if not index.has_graphs or index.has_bits or 2 * candidates > beam:
            return None
        most = min(MAX_SCANNED, JUDGED + math.ceil(SLACK * candidates / max(self.share, 1e-6)))
        statement = _through_graphs_at_once(
            self.space, index.segments, self.filtered, further=max(0, JUDGED - candidates)
        )
        beam = min(WIDEST_BEAM, times * beam)
        with self._with_beam(beam):
            near = self._near(statement, {**parameters, "k": candidates, "most": most, "beam": beam})
        if near.hits:
            return near
        if self.filtered:
            _SHARES.pop(self.conn.engine, None)  # metadata may have changed since
        return None

    def _nearest_in_turn(self, parameters: dict[str, object], k: int, index: ServingIndex, times: int) -> _NearestHits:
        """The nearest that pass the filter: each graph is read until it has given enough of them."""
        candidates, usual = _candidates(k), _beam(index)
        beam = max(WIDE_BEAM, 10 * candidates) if index.has_bits else max(usual, 2 * candidates)
        beam = min(WIDEST_BEAM, times * beam)
        is_judged = index.has_graphs and bool(self.filtered or index.has_bits) and times == 1
        spread = math.inf
        if is_judged:
            # Rows that pass a filter, or that a wide beam of bits has found, are further away and say less about where
            # the query lies.
            all_of_it = _through_segments(self.space, index.segments, "")
            with self._with_beam(usual):
                spread = self._near(all_of_it, {**parameters, "k": JUDGED, "beam": usual}).spread
            if spread < LEAST_SPREAD:
                return _NearestHits([], 0, spread, usual)
        elif index.has_graphs:
            candidates = max(candidates, JUDGED)
        graphs = _through_segments(self.space, index.segments, self.filtered)
        with self._with_beam(beam):
            near = self._near(graphs, {**parameters, "k": candidates, "beam": beam})
        return replace(near, spread=spread) if is_judged else near

    def _exactly(self, parameters: dict[str, object], k: int, passing: _PassingChunks | None) -> list[SearchHit]:
        if passing is None:
            return self._near(_exact(self.space, self.filtered), {**parameters, "k": k}).hits
        listed = "AND c.ctid = ANY(CAST(:places AS tid[]))"
        return self._near(_exact(self.space, listed), {**parameters, "places": passing.places, "k": k}).hits

    def _explanation(self, because: str, passing: _PassingChunks | None) -> SearchPlan:
        query = f"""
            SELECT count(*)
            FROM chunks c
            JOIN {self.space.table_name} v USING (content_hash)
            WHERE c.collection_id = :collection {self.filtered}
        """
        candidates: int = self.conn.execute(sa.text(query), self.parameters).scalar_one()
        return SearchPlan(True, because, candidates, passing=None if passing is None else passing.n)

    def _count_tail(self) -> int:
        query = "SELECT count(*) FROM serving_tail WHERE collection_id = :collection AND space_id = :space"
        n_rows: int = self.conn.execute(sa.text(query), self.parameters).scalar_one()
        return n_rows

    @contextlib.contextmanager
    def _with_beam(self, beam: int) -> Iterator[None]:
        """What reads graphs here reads them with this beam, and with ``BEAM`` again afterwards."""
        if beam == BEAM:
            yield
            return
        setting = "SET LOCAL hnsw.ef_search = {}"
        self.conn.execute(sa.text(setting.format(beam)))
        yield
        self.conn.execute(sa.text(setting.format(BEAM)))

    def _near(self, statement: str, parameters: dict[str, object]) -> _NearestHits:
        rows = self.conn.execute(_read(statement), parameters).all()
        if not rows or any(row.gave_up for row in rows):
            return _NearestHits([], 0, math.inf)
        hits = [SearchHit(float(r.score), r.chunk_id, r.text, r.metadata, r.truncated) for r in rows]
        first = rows[0]
        spread = _spread(first.judged, first.cosine, first.length)
        return _NearestHits(hits, first.compared, spread, int(str(parameters.get("beam", 0))))


def _written(query: NDArray[np.float32]) -> str:
    """The direction of the query as Postgres reads a vector."""
    return "[" + ",".join(map("{:.9g}".format, _direction(query).tolist())) + "]"


def _direction(query: NDArray[np.float32]) -> NDArray[np.float64]:
    """The query scaled to length 1, so that half precision can hold it. The cosine depends only on the direction."""
    exact = query.astype(np.float64)
    norm = np.linalg.norm(exact)
    return exact / norm if norm > 0 else exact


def _beam(index: ServingIndex) -> int:
    """How many candidates a search of the largest graph keeps, if it has no reason to keep more."""
    if index.has_bits:
        return BEAM
    rows = max((part.rows for part in index.segments if part.kind is not SegmentKind.FLAT), default=0)
    return min(WIDEST_BEAM, math.ceil(BEAM * math.pow(max(1.0, rows / BEAM_ROWS), BEAM_GROWTH)))


def _few(index: ServingIndex, k: int) -> int:
    """If no more chunks pass a filter than this, it is better to compare all of them than to look for ``k`` hits.

    If a share p of n rows passes, a graph that gives c candidates is left after about c / p rows, and the exact search
    compares p n chunks.
    """
    if not index.has_graphs:
        return index.rows // FLAT_ADVANTAGE
    candidates = WIDEST_BEAM if index.has_bits else _candidates(k)
    return min(MAX_EXACT, math.isqrt(candidates * GRAPH_ROW_COST * index.rows))


def _candidates(k: int, more: int = MORE_CANDIDATES) -> int:
    """How many candidates are compared by their vectors for ``k`` hits: so many ``more`` at least."""
    return k + max(more, k // 2)


def _spread(n: int, cosine: float | None, length: float | None) -> float:
    """How many times as far from each other as from the query ``n`` candidates are, on average, by cosine distance.

    ``cosine`` is their mean cosine to the query, and ``length`` is that of the mean of their directions, which tells
    the mean cosine of all pairs of them.
    """
    if n < 2 or cosine is None or length is None or cosine >= 1:
        return math.inf
    return (1 - (n * length**2 - 1) / (n - 1)) / (1 - cosine)


def _in_half_precision(space: Space) -> str:
    """The query as segments hold vectors, in SQL.

    Postgres gives a parameter the type of its first cast. If that were half precision, the comparison with whole
    vectors would have the rounded query too.
    """
    return f"CAST(CAST(:query AS {space.vector_type}) AS halfvec({space.spec.dimensions}))"


def _exact(space: Space, filtered: str) -> str:
    """The ``:k`` nearest of all chunks that pass."""
    # The addition keeps the planner from an index of vectors, which the last release built and an operator may build.
    return f"""
        SELECT 1 - n.distance AS score, n.chunk_id, t.text, n.metadata, n.truncated, 0 AS compared, false AS gave_up,
               0 AS judged, NULL AS cosine, NULL AS length
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


_CANDIDATES = {SegmentKind.FLAT: ":k", SegmentKind.HNSW: ":k", SegmentKind.BITS: ":beam"}
"""How many candidates a segment gives, in SQL. For bits, which tell less, these are all that the search of a graph
keeps."""


def _through_segments(space: Space, live: tuple[Segment, ...], filtered: str, *, by_rows: bool = False) -> str:
    """``by_rows`` reads graphs from the first row to the last too, and needs ``:scanned``."""
    candidates = "\nUNION ALL\n".join(
        [_of_tail(space, filtered), *(_of_segment(space, part, filtered, by_rows=by_rows) for part in live)]
    )
    graphs = ", ".join(
        f"({part.id}, {part.rows}, {_CANDIDATES[part.kind]})" for part in live if part.kind is not SegmentKind.FLAT
    )
    gave_up, judged = "false", "SELECT 0 AS judged, CAST(NULL AS float8) AS cosine, CAST(NULL AS float8) AS length"
    if graphs:
        gave_up = f"""EXISTS (
                   SELECT FROM (VALUES {graphs}) g (part, n_rows, wanted)
                   WHERE (SELECT count(*) FROM candidates x WHERE x.part = g.part) < least(g.wanted, g.n_rows))"""
    if graphs and not by_rows:
        judged = _judged("SELECT embedding, distance FROM nearest")
    return f"""
        WITH candidates AS MATERIALIZED (
            {candidates}
        ),
        nearest AS MATERIALIZED (
            {_nearest(space, filtered)}
        ),
        judged AS MATERIALIZED (
            {judged}
        )
        SELECT 1 - n.distance AS score, n.chunk_id, t.text, n.metadata, n.truncated, n.compared,
               {gave_up} AS gave_up, j.judged, j.cosine, j.length
        FROM nearest n
        CROSS JOIN judged j
        JOIN contents t USING (content_hash)
        ORDER BY n.distance, n.chunk_id
    """


def _judged(rows: str) -> str:
    """What :func:`_spread` needs of the nearest of ``rows``, which have an ``embedding`` and its ``distance``."""
    return f"""
            SELECT count(*) AS judged, avg(1 - j.distance) AS cosine,
                   vector_norm(CAST(avg(l2_normalize(j.embedding)) AS vector)) AS length
            FROM ({rows} ORDER BY distance LIMIT {JUDGED}) j
    """


def _nearest(space: Space, filtered: str) -> str:
    """The ``:k`` nearest chunks of the contents in ``candidates``, by their vectors."""
    return f"""
            SELECT c.chunk_id, c.content_hash, c.metadata, v.truncated, v.embedding,
                   v.embedding <=> CAST(:query AS {space.vector_type}) AS distance,
                   count(*) OVER () AS compared
            FROM (SELECT DISTINCT content_hash FROM candidates) n
            JOIN {space.table_name} v USING (content_hash)
            JOIN chunks c ON c.content_hash = v.content_hash AND c.collection_id = :collection {filtered}
            ORDER BY distance, c.chunk_id
            LIMIT :k
    """


def _through_graphs_at_once(space: Space, live: tuple[Segment, ...], filtered: str, *, further: int) -> str:
    """The nearest rows of graphs of vectors that have a chunk which passes, and the first rows that have a chunk.

    Each graph is read until more than ``:k`` rows have passed, and so many ``further`` rows, or until ``:most`` have
    been read. Postgres stops there, because the count of a window can only grow (the run condition of its WindowAgg).
    Chunks are looked up once for both. The tail and flat segments, which have few rows, are asked for each.
    """
    half = _in_half_precision(space)
    graphs = [part for part in live if part.kind is not SegmentKind.FLAT]
    flat = [part for part in live if part.kind is SegmentKind.FLAT]
    near = "\nUNION ALL\n".join(
        f"""(
            SELECT r.content_hash, {part.id} AS part, r.embedding, r.distance, r.passes, r.number
            FROM (
                SELECT l.content_hash, l.embedding, l.distance, l.passes, row_number() OVER rows_read AS number,
                       count(nullif(l.passes, false)) OVER before AS n_passed
                FROM (
                    SELECT s.content_hash, s.embedding, s.distance, c.passes
                    FROM (
                        SELECT s.content_hash, s.embedding, s.embedding <=> {half} AS distance
                        FROM {part.table_name} s
                        ORDER BY s.embedding <=> {half}
                        LIMIT :most
                    ) s
                    CROSS JOIN LATERAL (
                        SELECT bool_or(true {filtered}) AS passes
                        FROM chunks c
                        WHERE c.content_hash = s.content_hash AND c.collection_id = :collection
                    ) c
                ) l
                WINDOW rows_read AS (ROWS UNBOUNDED PRECEDING),
                       before AS (ROWS BETWEEN UNBOUNDED PRECEDING AND {further} PRECEDING)
            ) r
            WHERE r.n_passed <= :k
        )"""
        for part in graphs
    )
    passing, others = (
        "\nUNION ALL\n".join(
            [_of_tail(space, condition), *(_of_segment(space, part, condition, by_rows=False) for part in flat)]
        )
        for condition in (filtered, "")
    )
    n_rows = ", ".join(f"({part.id}, {part.rows})" for part in graphs)
    judged = _judged(f"""
                SELECT CAST(embedding AS vector) AS embedding, distance
                FROM looked
                WHERE passes IS NOT NULL AND number <= :beam
                UNION ALL
                SELECT CAST(v.embedding AS vector), v.embedding <=> CAST(:query AS {space.vector_type}) AS distance
                FROM ({others}) o
                JOIN {space.table_name} v USING (content_hash)
    """)
    return f"""
        WITH looked AS MATERIALIZED (
            {near}
        ),
        candidates AS MATERIALIZED (
            (SELECT content_hash FROM looked WHERE passes ORDER BY distance LIMIT :k)
            UNION ALL
            SELECT content_hash FROM ({passing}) p
        ),
        nearest AS MATERIALIZED (
            {_nearest(space, filtered)}
        ),
        judged AS MATERIALIZED (
            {judged}
        )
        SELECT 1 - n.distance AS score, n.chunk_id, t.text, n.metadata, n.truncated, n.compared,
               EXISTS (
                   SELECT FROM (VALUES {n_rows}) g (part, n_rows)
                   WHERE (SELECT count(*) FROM looked x WHERE x.part = g.part AND x.passes) < least(:k, g.n_rows)
                     AND (SELECT count(*) FROM looked x WHERE x.part = g.part) < g.n_rows
               ) AS gave_up,
               j.judged, j.cosine, j.length
        FROM nearest n
        CROSS JOIN judged j
        JOIN contents t USING (content_hash)
        ORDER BY n.distance, n.chunk_id
    """


def _of_tail(space: Space, filtered: str) -> str:
    """The ``:k`` nearest contents of the tail that have a chunk which passes."""
    return f"""(
        SELECT v.content_hash, 0 AS part
        FROM serving_tail t
        JOIN {space.table_name} v USING (content_hash)
        WHERE t.collection_id = :collection AND t.space_id = :space AND {_has_chunk("t", filtered)}
        GROUP BY v.content_hash, v.embedding
        ORDER BY v.embedding <=> CAST(:query AS {space.vector_type})
        LIMIT :k
    )"""


def _of_segment(space: Space, segment: Segment, filtered: str, *, by_rows: bool) -> str:
    """The nearest contents of a segment that have a chunk: more than k, because its order is that of half precision, or
    that of the number of equal signs.

    The condition is evaluated row by row, in the order of the distances, until there are enough. So a graph is read
    only as far as necessary, and no plan joins the whole segment with the collection's chunks.
    """
    half = _in_half_precision(space)
    wanted = _CANDIDATES[segment.kind]
    if segment.kind is not SegmentKind.FLAT:
        distance = f"s.embedding <=> {half}"
        if segment.kind is SegmentKind.BITS:
            distance = f"s.embedding <~> binary_quantize({half})::bit({space.spec.dimensions})"
        if by_rows:
            # The addition keeps the planner from the graph.
            return f"""(
                SELECT s.content_hash, {segment.id} AS part
                FROM (
                    SELECT s.content_hash
                    FROM {segment.table_name} s
                    ORDER BY ({distance}) + 0.0
                    LIMIT :scanned
                ) s
                WHERE {_has_chunk("s", filtered)}
                LIMIT {wanted}
            )"""
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
            ORDER BY embedding <=> {half}
            OFFSET 0
        ) s
        WHERE {_has_chunk("s", filtered)}
        LIMIT {wanted}
    )"""


def _has_chunk(table: str, filtered: str) -> str:
    """A condition: whether a chunk of the collection that passes has the content of a row of ``table``."""
    return f"""(
            SELECT true
            FROM chunks c
            WHERE c.content_hash = {table}.content_hash AND c.collection_id = :collection {filtered}
            LIMIT 1
        )"""
