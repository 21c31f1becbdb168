"""The golden queries of a collection, and what they chose for its searches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import sqlalchemy as sa

from chunkmill.domain.comparing import Question
from chunkmill.domain.golden import GoldenQuery, rest_of, title_and_rest
from chunkmill.domain.results import SearchTuning

STEP = 1_000
"""How many queries one statement writes."""
TITLE_STEP = 500
"""How many texts are read at once when titles are looked for."""


def add(conn: sa.Connection, collection_id: int, queries: Iterable[GoldenQuery]) -> None:
    """Store queries. One that has the id of an earlier one replaces it."""
    insert = """
        INSERT INTO golden_queries (collection_id, query_id, text, relevant, is_title)
        SELECT :collection, q.query_id, q.text, CAST(q.relevant AS jsonb), q.is_title
        FROM unnest(CAST(:ids AS text[]), CAST(:texts AS text[]), CAST(:relevant AS text[]), CAST(:titles AS boolean[]))
             AS q(query_id, text, relevant, is_title)
        ORDER BY q.query_id
        ON CONFLICT (collection_id, query_id) DO UPDATE
        SET text = excluded.text, relevant = excluded.relevant, is_title = excluded.is_title
    """
    remaining = iter(queries)
    while part := list(itertools.islice(remaining, STEP)):
        parameters = {
            "collection": collection_id,
            "ids": [query.id for query in part],
            "texts": [query.text for query in part],
            "relevant": [json.dumps(dict(query.relevant)) for query in part],
            "titles": [query.is_title for query in part],
        }
        conn.execute(sa.text(insert), parameters)


def read(conn: sa.Connection, collection_id: int, *, most: int | None = None) -> list[GoldenQuery]:
    """The queries of a collection, by id; with ``most`` at most this many, chosen at random, and the same ones each
    time.
    """
    query = """
        SELECT query_id, text, relevant, is_title
        FROM (
            SELECT *
            FROM golden_queries
            WHERE collection_id = :collection
            ORDER BY md5(query_id), query_id
            LIMIT :most
        ) q
        ORDER BY query_id
    """
    rows = conn.execute(sa.text(query), {"collection": collection_id, "most": most})
    return [GoldenQuery(row.query_id, row.text, row.relevant, row.is_title) for row in rows]


def count(conn: sa.Connection, collection_id: int) -> int:
    """How many golden queries a collection has."""
    query = "SELECT count(*) FROM golden_queries WHERE collection_id = :collection"
    return int(conn.execute(sa.text(query), {"collection": collection_id}).scalar_one())


def clear(conn: sa.Connection, collection_id: int, *, only_titles: bool = False) -> int:
    """Delete the queries of a collection, or those that are titles. Returns how many there were."""
    delete = "DELETE FROM golden_queries WHERE collection_id = :collection AND (is_title OR NOT :only_titles)"
    return int(conn.execute(sa.text(delete), {"collection": collection_id, "only_titles": only_titles}).rowcount)


def unknown_chunks(conn: sa.Connection, collection_id: int, chunk_ids: Sequence[str]) -> set[str]:
    """Those of the ids that the collection does not have."""
    query = """
        SELECT i.id
        FROM unnest(CAST(:ids AS text[])) AS i(id)
        WHERE NOT EXISTS (SELECT FROM chunks c WHERE c.collection_id = :collection AND c.chunk_id = i.id)
    """
    unknown: set[str] = set()
    for start in range(0, len(chunk_ids), STEP):
        parameters = {"collection": collection_id, "ids": chunk_ids[start : start + STEP]}
        unknown.update(conn.execute(sa.text(query), parameters).scalars())
    return unknown


def judgeable(conn: sa.Connection, collection_id: int, queries: Sequence[GoldenQuery]) -> list[Question]:
    """Those of the queries that can be judged, with the grades of chunks that are there.

    For a title it is also what follows it, and the grades are those of the chunks that still have that title.
    """
    ids = list(dict.fromkeys(chunk_id for query in queries for chunk_id in query.relevant))
    unknown = unknown_chunks(conn, collection_id, ids)
    titled = dict.fromkeys(chunk_id for query in queries if query.is_title for chunk_id in query.relevant)
    stored = texts(conn, collection_id, list(titled)) if titled else {}
    judged: list[Question] = []
    for query in queries:
        grades = {chunk_id: grade for chunk_id, grade in query.relevant.items() if chunk_id not in unknown}
        rest = None
        if query.is_title and grades:
            rests = {chunk_id: rest_of(stored[chunk_id], query.text) for chunk_id in grades if chunk_id in stored}
            rest = next((rest for rest in rests.values() if rest), None)
            grades = {chunk_id: grade for chunk_id, grade in grades.items() if rests.get(chunk_id) == rest is not None}
        if any(grade > 0 for grade in grades.values()):
            judged.append(Question(query.id, query.text, grades, rest))
    return judged


def texts(conn: sa.Connection, collection_id: int, chunk_ids: Sequence[str]) -> dict[str, str]:
    """Chunk id → text."""
    query = """
        SELECT c.chunk_id, t.text
        FROM unnest(CAST(:ids AS text[])) AS i(id)
        JOIN chunks c ON c.collection_id = :collection AND c.chunk_id = i.id
        JOIN contents t ON t.content_hash = c.content_hash
    """
    rows = conn.execute(sa.text(query), {"collection": collection_id, "ids": list(chunk_ids)})
    return {row.chunk_id: row.text for row in rows}


def titles(conn: sa.Connection, collection_id: int, most: int) -> list[GoldenQuery]:
    """Up to ``most`` titles of chunks chosen at random, as queries for these chunks.

    A content hash is as good as a random number, so chunks are taken in the order of theirs; the same collection gives
    the same titles. A title that several texts have would ask for one of them only, and is left out.
    """
    query = """
        SELECT c.content_hash, c.chunk_ids, t.text
        FROM (
            SELECT content_hash, array_agg(chunk_id ORDER BY chunk_id) AS chunk_ids
            FROM chunks
            WHERE collection_id = :collection AND content_hash > :after
            GROUP BY content_hash
            ORDER BY content_hash
            LIMIT :step
        ) c
        JOIN contents t USING (content_hash)
        ORDER BY c.content_hash
    """
    made: dict[str, GoldenQuery | None] = {}
    after, n_made = b"", 0
    while n_made < most:
        parameters = {"collection": collection_id, "after": after, "step": TITLE_STEP}
        rows = conn.execute(sa.text(query), parameters).all()
        if not rows:
            break
        after = rows[-1].content_hash
        for row in rows:
            split = title_and_rest(row.text)
            if split is None:
                continue
            title = split[0]
            if title in made:
                n_made -= made[title] is not None
                made[title] = None
            elif n_made < most:
                relevant = dict.fromkeys(row.chunk_ids, 1.0)
                made[title] = GoldenQuery(f"title:{row.chunk_ids[0]}", title, relevant, is_title=True)
                n_made += 1
    return [query for query in made.values() if query]


def keep_tuning(conn: sa.Connection, collection_id: int, space_id: int, tuning: SearchTuning) -> None:
    """Store ``tuning``: searches of the collection in this space are mixed in this way from now on."""
    insert = """
        INSERT INTO search_tunings (collection_id, space_id, alpha, report)
        VALUES (:collection, :space, :alpha, CAST(:report AS jsonb))
        ON CONFLICT (collection_id, space_id) DO UPDATE
        SET alpha = excluded.alpha, report = excluded.report, created_at = now()
    """
    report = asdict(tuning) | {"curve": {str(alpha): value for alpha, value in tuning.curve.items()}}
    parameters = {
        "collection": collection_id,
        "space": space_id,
        "alpha": tuning.alpha,
        "report": json.dumps(report),
    }
    conn.execute(sa.text(insert), parameters)


def chosen_alpha(conn: sa.Connection, collection_id: int, space_id: int) -> float | None:
    """The alpha that the golden queries chose; None if there is none, or the vectors alone are to rank."""
    query = "SELECT alpha FROM search_tunings WHERE collection_id = :collection AND space_id = :space"
    alpha: float | None = conn.execute(sa.text(query), {"collection": collection_id, "space": space_id}).scalar()
    return alpha


def hashes_of(conn: sa.Connection, collection_id: int, chunk_ids: Sequence[str]) -> dict[str, bytes]:
    """Chunk id → content hash, of those that the collection has."""
    query = """
        SELECT c.chunk_id, c.content_hash
        FROM unnest(CAST(:ids AS text[])) AS i(id)
        JOIN chunks c ON c.collection_id = :collection AND c.chunk_id = i.id
    """
    known: dict[str, bytes] = {}
    for start in range(0, len(chunk_ids), STEP):
        parameters = {"collection": collection_id, "ids": list(chunk_ids[start : start + STEP])}
        known.update((row.chunk_id, row.content_hash) for row in conn.execute(sa.text(query), parameters))
    return known


def contents_after(conn: sa.Connection, collection_id: int, after: bytes, most: int) -> list[bytes]:
    """The next content hashes of a collection. A hash is as good as a random number, so that these are a sample."""
    query = """
        SELECT DISTINCT content_hash
        FROM chunks
        WHERE collection_id = :collection AND content_hash > :after
        ORDER BY content_hash
        LIMIT :most
    """
    parameters = {"collection": collection_id, "after": after, "most": most}
    return list(conn.execute(sa.text(query), parameters).scalars())


def texts_of(conn: sa.Connection, hashes: Sequence[bytes]) -> dict[bytes, str]:
    """Content hash → text, of those that are stored."""
    query = "SELECT content_hash, text FROM contents WHERE content_hash = ANY(:hashes)"
    rows = conn.execute(sa.text(query), {"hashes": list(hashes)})
    return {row.content_hash: row.text for row in rows}


def count_contents(conn: sa.Connection, collection_id: int) -> int:
    """How many distinct texts a collection has."""
    query = "SELECT count(DISTINCT content_hash) FROM chunks WHERE collection_id = :collection"
    return int(conn.execute(sa.text(query), {"collection": collection_id}).scalar_one())
