"""Evict vectors that no collection refers to, and texts that nothing needs any more.

They are found without a lock and deleted in slices. A content's age counts from when it was first stored. Each slice
takes the exclusive lock of a deletion for its own transaction, looks again at what it is about to delete, and counts a
deletion. An enqueue that is about to refer to a content either commits before the slice, which then keeps the content,
or after it, and then stores the text anew. A worker that has read a text checks whether it is still wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa

from chunkmill.db.statements import with_constants
from chunkmill.db.temporary import dropping
from chunkmill.domain.retention import Amount, CacheSpace, OnProgress
from chunkmill.domain.states import JobState
from chunkmill.spaces import others
from chunkmill.spaces.registry import Space, VectorTable, all_spaces, all_tables
from chunkmill.store.delete import begin_deletion

AGES_SINCE = "0006"
"""The migration since which contents have an age."""
SLICE = 5_000
"""How many contents one transaction deletes. It keeps enqueues and writes waiting: 0.2 s at 384 dimensions."""

_OPEN = {"enqueueing": JobState.ENQUEUEING, "running": JobState.RUNNING}
"""Vectors that an open job has made are kept, even if its collection has left the job's space."""

# The statements count 60 bytes per text and 64 per vector for the hash, and for what Postgres keeps with each row.


def drop_unreferenced(
    db: sa.Engine,
    *,
    space: Space | None = None,
    before: datetime | None = None,
    max_bytes: int | None = None,
    dry_run: bool,
    on_progress: OnProgress | None = None,
) -> dict[str, Amount]:
    """Delete vectors that no collection refers to, the oldest first, of ``space`` or of all, and texts nobody needs.

    These are the vectors stored ``before``, or as many as it takes for the rest to have ``max_bytes``, or all. Returns
    how much was deleted from each table, or would be in a ``dry_run``.
    """
    with db.connect() as conn, dropping(conn, "doomed"):
        with conn.begin():
            spaces: Sequence[VectorTable] = all_tables(conn)
            _mark_vectors(conn, [space] if space else spaces, before=before, max_bytes=max_bytes)
            if space is None and max_bytes is None:
                _mark_texts(conn, spaces, before=before)
            # The table was filled in this transaction, so the planner knows nothing of it yet.
            conn.execute(sa.text("ANALYZE doomed"))
            total = int(conn.execute(sa.text("SELECT count(*) FROM doomed")).scalar_one())
            if dry_run:
                return _count_doomed(conn, spaces)
        amounts = defaultdict(Amount, contents=Amount())
        after = done = 0
        while True:
            with conn.begin():
                next_slice = "SELECT n, space_id, content_hash FROM doomed WHERE n > :after ORDER BY n LIMIT :limit"
                rows = conn.execute(sa.text(next_slice), {"after": after, "limit": SLICE}).fetchall()
                if not rows:
                    return dict(amounts)
                by_space: dict[int, list[bytes]] = defaultdict(list)
                for row in rows:
                    by_space[row.space_id].append(row.content_hash)
                for table, amount in _delete_slice(conn, spaces, by_space).items():
                    amounts[table] += amount
            after, done = rows[-1].n, done + len(rows)
            if on_progress:
                on_progress("texts", done, total)


def _mark_vectors(
    conn: sa.Connection, spaces: Sequence[VectorTable], *, before: datetime | None, max_bytes: int | None
) -> None:
    """Fill ``doomed``, a table of this session, with the vectors to delete, the oldest first."""
    create_unreferenced = """
        CREATE TEMP TABLE IF NOT EXISTS unreferenced (
            space_id int NOT NULL,
            content_hash bytea NOT NULL,
            bytes bigint NOT NULL,
            created_at timestamptz NOT NULL
        ) ON COMMIT DROP
    """
    conn.execute(sa.text(create_unreferenced))
    create_doomed = """
        CREATE TEMP TABLE IF NOT EXISTS doomed (
            n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            space_id int NOT NULL,
            content_hash bytea NOT NULL,
            bytes bigint NOT NULL
        )
    """
    conn.execute(sa.text(create_doomed))
    conn.execute(sa.text("TRUNCATE doomed RESTART IDENTITY"))
    for space in spaces:
        # A vector whose text is deleted has no age: it counts as the oldest of all.
        insert = f"""
            INSERT INTO unreferenced (space_id, content_hash, bytes, created_at)
            SELECT :space, v.content_hash, 64 + pg_column_size(v.embedding), coalesce(t.created_at, '-infinity')
            FROM {space.table_name} v
            LEFT JOIN contents t ON t.content_hash = v.content_hash
            WHERE NOT EXISTS (
                SELECT
                FROM chunks c
                WHERE c.content_hash = v.content_hash AND (
                    c.collection_id = ANY(CAST(:collections AS integer[]))
                    OR c.collection_id IN (
                        SELECT j.collection_id
                        FROM jobs j
                        WHERE j.space_id = :space AND j.state IN (:enqueueing, :running)
                    )
                )
            )
        """
        parameters = {"space": space.id, "collections": others.collections_in(conn, space.id)}
        conn.execute(with_constants(insert, **_OPEN), parameters)
    choose = """
        INSERT INTO doomed (space_id, content_hash, bytes)
        SELECT space_id, content_hash, bytes
        FROM (
            SELECT *, sum(bytes) OVER (ORDER BY created_at DESC, space_id, content_hash) AS bytes_up_to_here
            FROM unreferenced
        ) u
        WHERE (CAST(:before AS timestamptz) IS NULL OR created_at < :before)
          AND (CAST(:max_bytes AS bigint) IS NULL OR bytes_up_to_here > :max_bytes)
        ORDER BY created_at, space_id DESC, content_hash DESC
    """
    conn.execute(sa.text(choose), {"before": before, "max_bytes": max_bytes})


def _mark_texts(conn: sa.Connection, spaces: Sequence[VectorTable], *, before: datetime | None) -> None:
    """Add to ``doomed``, under space 0, the texts that no chunk and no provider needs and that have no vector."""
    insert = """
        INSERT INTO doomed (space_id, content_hash, bytes)
        SELECT 0, t.content_hash, 0
        FROM contents t
        WHERE (CAST(:before AS timestamptz) IS NULL OR t.created_at < :before)
          AND NOT EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash)
          AND NOT EXISTS (
              SELECT FROM provider_inputs i WHERE i.space_id = ANY(:spaces) AND i.content_hash = t.content_hash
          )
    """
    conn.execute(sa.text(insert), {"before": before, "spaces": [space.id for space in spaces]})
    for space in spaces:
        keep_with_vector = f"""
            DELETE FROM doomed d
            USING {space.table_name} v
            WHERE d.space_id = 0 AND v.content_hash = d.content_hash
        """
        conn.execute(sa.text(keep_with_vector))


def _delete_slice(
    conn: sa.Connection, spaces: Sequence[VectorTable], by_space: Mapping[int, Sequence[bytes]]
) -> dict[str, Amount]:
    """Delete one slice of ``doomed``, except what somebody refers to by now. Returns how much went from each table."""
    begin_deletion(conn)
    spaces = all_tables(conn)  # a space that nothing used may have been dropped since
    deleted = {
        space.table_name: _delete_vectors(conn, space, by_space[space.id]) for space in spaces if space.id in by_space
    }
    hashes = {content_hash for of_space in by_space.values() for content_hash in of_space}
    parameters = {"hashes": list(hashes), "spaces": [space.id for space in spaces]}
    for space in spaces:
        find_vectors = f"SELECT content_hash FROM {space.table_name} WHERE content_hash = ANY(:hashes)"
        hashes.difference_update(conn.execute(sa.text(find_vectors), parameters).scalars())
    delete_texts = """
        WITH deleted AS (
            DELETE FROM contents t
            WHERE t.content_hash = ANY(:hashes)
              AND NOT EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash)
              AND NOT EXISTS (
                  SELECT FROM provider_inputs i WHERE i.space_id = ANY(:spaces) AND i.content_hash = t.content_hash
              )
            RETURNING 60 + pg_column_size(t.text) AS bytes
        )
        SELECT count(*) AS rows, coalesce(sum(bytes), 0)::bigint AS bytes
        FROM deleted
    """
    texts = conn.execute(sa.text(delete_texts), parameters | {"hashes": list(hashes)}).one()
    delete_suspects = """
        DELETE FROM provider_suspects s
        WHERE s.space_id = ANY(:spaces)
          AND s.content_hash = ANY(:hashes)
          AND NOT EXISTS (SELECT FROM contents t WHERE t.content_hash = s.content_hash)
    """
    conn.execute(sa.text(delete_suspects), parameters)
    return deleted | {"contents": Amount(texts.rows, texts.bytes)}


def _delete_vectors(conn: sa.Connection, space: VectorTable, hashes: Sequence[bytes]) -> Amount:
    delete = f"""
        WITH deleted AS (
            DELETE FROM {space.table_name} v
            WHERE v.content_hash = ANY(:hashes)
              AND NOT EXISTS (
                  SELECT
                  FROM chunks c
                  WHERE c.content_hash = v.content_hash AND (
                      c.collection_id = ANY(CAST(:collections AS integer[]))
                      OR c.collection_id IN (
                          SELECT j.collection_id
                          FROM jobs j
                          WHERE j.space_id = :space AND j.state IN (:enqueueing, :running)
                      )
                  )
              )
            RETURNING 64 + pg_column_size(v.embedding) AS bytes
        )
        SELECT count(*) AS rows, coalesce(sum(bytes), 0)::bigint AS bytes
        FROM deleted
    """
    # This is checked in the transaction of the deletion, because a collection may have come to this space until then.
    # If one comes later, none of its windows is written before the deletion ends, and a pass over its texts finds the
    # vectors that it lacks.
    collections = others.collections_in(conn, space.id)
    parameters = {"space": space.id, "collections": collections, "hashes": list(hashes)}
    row = conn.execute(with_constants(delete, **_OPEN), parameters).one()
    return Amount(row.rows, row.bytes)


def _count_doomed(conn: sa.Connection, spaces: Sequence[VectorTable]) -> dict[str, Amount]:
    """How much would be deleted from each table, in the transaction that marked it."""
    count_vectors = """
        SELECT space_id, count(*) AS rows, sum(bytes)::bigint AS bytes
        FROM doomed
        WHERE space_id > 0
        GROUP BY space_id
        ORDER BY space_id
    """
    names = {space.id: space.table_name for space in spaces}
    vectors = {names[row.space_id]: Amount(row.rows, row.bytes) for row in conn.execute(sa.text(count_vectors))}
    create_texts = """
        CREATE TEMP TABLE IF NOT EXISTS doomed_texts (content_hash bytea NOT NULL) ON COMMIT DROP
    """
    conn.execute(sa.text(create_texts))
    mark_texts = """
        INSERT INTO doomed_texts (content_hash)
        SELECT DISTINCT d.content_hash
        FROM doomed d
        WHERE NOT EXISTS (SELECT FROM chunks c WHERE c.content_hash = d.content_hash)
          AND NOT EXISTS (
              SELECT FROM provider_inputs i WHERE i.space_id = ANY(:spaces) AND i.content_hash = d.content_hash
          )
    """
    conn.execute(sa.text(mark_texts), {"spaces": list(names)})
    for space in spaces:
        keep_with_other_vector = f"""
            DELETE FROM doomed_texts t
            USING {space.table_name} v
            WHERE v.content_hash = t.content_hash
              AND NOT EXISTS (SELECT FROM doomed d WHERE d.space_id = :space AND d.content_hash = t.content_hash)
        """
        conn.execute(sa.text(keep_with_other_vector), {"space": space.id})
    count_texts = """
        SELECT count(*) AS rows, coalesce(sum(60 + pg_column_size(t.text)), 0)::bigint AS bytes
        FROM contents t
        JOIN doomed_texts USING (content_hash)
    """
    texts = conn.execute(sa.text(count_texts)).one()
    return vectors | {"contents": Amount(texts.rows, texts.bytes)}


def cache_spaces(conn: sa.Connection, *, recent_days: float) -> list[CacheSpace]:
    """Each space's vectors and hits. This reads the key of every vector once."""
    return [_cache_space(conn, space, recent_days=recent_days) for space in all_spaces(conn)]


def _cache_space(conn: sa.Connection, space: Space, *, recent_days: float) -> CacheSpace:
    measure_vectors = f"""
        SELECT count(*) AS vectors,
               count(*) FILTER (WHERE unreferenced) AS unreferenced,
               coalesce(sum(bytes) FILTER (WHERE unreferenced), 0)::bigint AS bytes,
               min(created_at) FILTER (WHERE unreferenced) AS oldest,
               pg_table_size('{space.table_name}') AS table_bytes,
               pg_indexes_size('{space.table_name}') AS index_bytes
        FROM (
            SELECT 64 + pg_column_size(v.embedding) AS bytes,
                   t.created_at,
                   NOT EXISTS (
                       SELECT
                       FROM chunks c
                       WHERE c.content_hash = v.content_hash AND (
                           c.collection_id = ANY(CAST(:collections AS integer[]))
                           OR c.collection_id IN (
                               SELECT j.collection_id
                               FROM jobs j
                               WHERE j.space_id = :space AND j.state IN (:enqueueing, :running)
                           )
                       )
                   ) AS unreferenced
            FROM {space.table_name} v
            LEFT JOIN contents t ON t.content_hash = v.content_hash
        ) x
    """
    parameters = {"space": space.id, "collections": others.collections_in(conn, space.id)}
    stored = conn.execute(with_constants(measure_vectors, **_OPEN), parameters).one()
    count_hits = """
        SELECT coalesce(sum(n_contents), 0)::bigint AS contents,
               coalesce(sum(n_cached), 0)::bigint AS hits,
               coalesce(sum(n_contents) FILTER (WHERE recent), 0)::bigint AS recent_contents,
               coalesce(sum(n_cached) FILTER (WHERE recent), 0)::bigint AS recent_hits
        FROM (
            SELECT n_contents, n_cached, created_at > now() - make_interval(secs => :seconds) AS recent
            FROM chunk_batches
            WHERE space_id = :space
        ) x
    """
    enqueued = conn.execute(sa.text(count_hits), {"space": space.id, "seconds": recent_days * 86_400}).one()
    return CacheSpace(
        id=space.id,
        space=space.spec.fingerprint,
        model=space.spec.model,
        vectors=stored.vectors,
        unreferenced=Amount(stored.unreferenced, stored.bytes),
        oldest=stored.oldest,
        table_bytes=stored.table_bytes,
        index_bytes=stored.index_bytes,
        contents=enqueued.contents,
        hits=enqueued.hits,
        recent_days=recent_days,
        recent_contents=enqueued.recent_contents,
        recent_hits=enqueued.recent_hits,
    )
