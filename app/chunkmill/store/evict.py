"""Vectors that no collection refers to, and texts that nothing needs any more: found without a lock, dropped in slices.

A content's age counts from when it was first stored. Each slice takes the exclusive lock of a deletion for its own
transaction, looks again, and raises the count of deletions: an enqueue that is about to point at a content comes before
it, and is seen, or after it, and stores the text anew; a worker that has read a text looks whether it is still wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from chunkmill.domain.retention import Amount, CacheSpace, OnProgress
from chunkmill.errors import NotFound
from chunkmill.spaces.registry import DELETE_LOCK, Space, all_spaces

AGES_SINCE = "0006"
"""The migration by which contents have an age."""
SLICE = 5_000
"""Contents of one transaction, which keeps enqueues and writes out while it runs: 0.2 s at 384 dimensions."""

_TEXT_BYTES = "60 + pg_column_size(t.text)"  # of a content: its text, its hash, and what Postgres keeps per row
_VECTOR_BYTES = "64 + pg_column_size(v.embedding)"


def unreferenced(space_id: int) -> str:
    """SQL about a vector ``v`` of this space: no chunk of a collection in it has the text."""
    return (
        f"NOT EXISTS (SELECT FROM chunks c JOIN collections k ON k.id = c.collection_id AND k.space_id = {space_id} "
        "WHERE c.content_hash = v.content_hash)"
    )


def drop_unreferenced(
    db: sa.Engine,
    *,
    space: Space | None = None,
    before: datetime | None = None,
    max_bytes: int | None = None,
    dry_run: bool,
    on_progress: OnProgress | None = None,
) -> dict[str, Amount]:
    """Drop vectors that no collection refers to, the oldest first, of ``space`` or of all, and texts left with nothing.

    Those stored ``before``; or as many as it takes for the rest to have ``max_bytes``; or all. Returns what went, by
    table, or would go.
    """
    with db.connect() as conn:
        with conn.begin():
            every = all_spaces(conn)
            _mark(conn, [space] if space else every, before=before, max_bytes=max_bytes)
            if space is None and max_bytes is None:
                _mark_texts(conn, every, before=before)
            # The table is this session's, and the planner knows nothing of it yet.
            conn.execute(sa.text("ANALYZE doomed"))
            total = int(conn.execute(sa.text("SELECT count(*) FROM doomed")).scalar_one())
            if dry_run:
                return _count(conn, every)
        amounts = defaultdict(Amount, contents=Amount())
        after = done = 0
        while True:
            with conn.begin():
                rows = conn.execute(
                    sa.text("SELECT n, space_id, content_hash FROM doomed WHERE n > :after ORDER BY n LIMIT :limit"),
                    {"after": after, "limit": SLICE},
                ).fetchall()
                if not rows:
                    return dict(amounts)
                by_space: dict[int, list[bytes]] = defaultdict(list)
                for row in rows:
                    by_space[row.space_id].append(row.content_hash)
                for table, amount in _drop(conn, every, by_space).items():
                    amounts[table] += amount
            after, done = rows[-1].n, done + len(rows)
            if on_progress:
                on_progress("texts", done, total)


def _mark(conn: sa.Connection, chosen: Sequence[Space], *, before: datetime | None, max_bytes: int | None) -> None:
    """Put what may go into a table of this session, the oldest first."""
    conn.execute(
        sa.text(
            "CREATE TEMP TABLE IF NOT EXISTS doomed (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
            "space_id int NOT NULL, content_hash bytea NOT NULL, bytes bigint NOT NULL)"
        )
    )
    conn.execute(sa.text("TRUNCATE doomed RESTART IDENTITY"))
    if not chosen:
        return
    # A vector whose text is gone has no age: it is the oldest of all.
    found = " UNION ALL ".join(
        f"SELECT {each.id} AS space_id, v.content_hash, {_VECTOR_BYTES} AS bytes, "
        f"coalesce(t.created_at, '-infinity') AS created_at FROM {each.table_name} v "
        f"LEFT JOIN contents t ON t.content_hash = v.content_hash WHERE {unreferenced(each.id)}"
        for each in chosen
    )
    conn.execute(
        sa.text(
            "INSERT INTO doomed (space_id, content_hash, bytes) SELECT space_id, content_hash, bytes FROM ("
            "  SELECT f.*, sum(bytes) OVER (ORDER BY created_at DESC, space_id, content_hash) AS kept "
            f"  FROM ({found}) f) g WHERE (CAST(:before AS timestamptz) IS NULL OR created_at < :before) "
            "AND (CAST(:most AS bigint) IS NULL OR kept > :most) ORDER BY created_at, space_id DESC, content_hash DESC"
        ),
        {"before": before, "most": max_bytes},
    )


def _mark_texts(conn: sa.Connection, every: Sequence[Space], *, before: datetime | None) -> None:
    """Texts that never got a vector, or lost it, under a space that does not exist."""
    conn.execute(
        sa.text(
            "INSERT INTO doomed (space_id, content_hash, bytes) "
            f"SELECT 0, t.content_hash, 0 FROM contents t WHERE {_text_unneeded(every)} "
            "AND (CAST(:before AS timestamptz) IS NULL OR t.created_at < :before)"
        ),
        {"before": before},
    )


def _text_unneeded(every: Sequence[Space], *, but_doomed: bool = False) -> str:
    """No chunk has the text, no provider is at it, and no space has a vector of it (``but_doomed``: one that stays)."""
    spared = (
        " AND NOT EXISTS (SELECT FROM doomed d WHERE d.space_id = {id} AND d.content_hash = v.content_hash)"
        if but_doomed
        else ""
    )
    conditions = [
        "NOT EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash)",
        *(
            f"NOT EXISTS (SELECT FROM {s.table_name} v WHERE v.content_hash = t.content_hash{spared.format(id=s.id)}) "
            f"AND NOT EXISTS (SELECT FROM provider_inputs i WHERE i.space_id = {s.id} "
            "AND i.content_hash = t.content_hash)"
            for s in every
        ),
    ]
    return " AND ".join(conditions)


def _drop(conn: sa.Connection, every: Sequence[Space], by_space: dict[int, list[bytes]]) -> dict[str, Amount]:
    """One slice. What somebody refers to by now stays."""
    conn.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": DELETE_LOCK})
    # Tells the workers that texts they have read may be gone by the time their vectors are there.
    conn.execute(sa.text("SELECT nextval('deletions')"))
    gone = {
        space.table_name: _delete(
            conn,
            f"{space.table_name} v WHERE v.content_hash = ANY(:hashes) AND {unreferenced(space.id)}",
            _VECTOR_BYTES,
            by_space[space.id],
        )
        for space in every
        if space.id in by_space
    }
    hashes = list({each for listed in by_space.values() for each in listed})
    texts = f"contents t WHERE t.content_hash = ANY(:hashes) AND {_text_unneeded(every)}"
    gone["contents"] = _delete(conn, texts, _TEXT_BYTES, hashes)
    conn.execute(
        sa.text(
            "DELETE FROM provider_suspects s USING spaces p WHERE s.space_id = p.id AND s.content_hash = ANY(:hashes) "
            "AND NOT EXISTS (SELECT FROM contents t WHERE t.content_hash = s.content_hash)"
        ),
        {"hashes": hashes},
    )
    return gone


def _delete(conn: sa.Connection, which: str, size: str, hashes: Sequence[bytes]) -> Amount:
    row = conn.execute(
        sa.text(
            f"WITH gone AS (DELETE FROM {which} RETURNING {size} AS bytes) "
            "SELECT count(*) AS rows, coalesce(sum(bytes), 0)::bigint AS bytes FROM gone"
        ),
        {"hashes": list(hashes)},
    ).one()
    return Amount(row.rows, row.bytes)


def _count(conn: sa.Connection, every: Sequence[Space]) -> dict[str, Amount]:
    """The same, left where it is."""
    names = {space.id: space.table_name for space in every}
    rows = conn.execute(
        sa.text(
            "SELECT space_id, count(*) AS rows, sum(bytes)::bigint AS bytes FROM doomed WHERE space_id > 0 "
            "GROUP BY space_id ORDER BY space_id"
        )
    )
    counted = {names[row.space_id]: Amount(row.rows, row.bytes) for row in rows}
    texts = conn.execute(
        sa.text(
            f"SELECT count(*) AS rows, coalesce(sum({_TEXT_BYTES}), 0)::bigint AS bytes FROM contents t "
            f"WHERE t.content_hash IN (SELECT content_hash FROM doomed) AND {_text_unneeded(every, but_doomed=True)}"
        )
    ).one()
    return counted | {"contents": Amount(texts.rows, texts.bytes)}


def cache_spaces(conn: sa.Connection, *, recent_days: float) -> list[CacheSpace]:
    """Each space's vectors and hits. Reads every vector's key once."""
    found = []
    for space in all_spaces(conn):
        held = conn.execute(
            sa.text(
                "SELECT count(*) AS vectors, count(*) FILTER (WHERE free) AS free, "
                "coalesce(sum(bytes) FILTER (WHERE free), 0)::bigint AS bytes, min(created_at) FILTER (WHERE free) "
                f"AS oldest, pg_table_size('{space.table_name}') AS table_bytes, "
                f"pg_indexes_size('{space.table_name}') AS index_bytes FROM ("
                f"  SELECT {_VECTOR_BYTES} AS bytes, t.created_at, {unreferenced(space.id)} AS free "
                f"  FROM {space.table_name} v LEFT JOIN contents t ON t.content_hash = v.content_hash) x"
            )
        ).one()
        asked = conn.execute(
            sa.text(
                "SELECT coalesce(sum(n_contents), 0)::bigint AS contents, coalesce(sum(n_cached), 0)::bigint AS hits, "
                "coalesce(sum(n_contents) FILTER (WHERE recent), 0)::bigint AS recent_contents, "
                "coalesce(sum(n_cached) FILTER (WHERE recent), 0)::bigint AS recent_hits FROM ("
                "  SELECT n_contents, n_cached, created_at > now() - make_interval(secs => :secs) AS recent "
                "  FROM chunk_batches WHERE space_id = :space) x"
            ),
            {"space": space.id, "secs": recent_days * 86_400},
        ).one()
        found.append(
            CacheSpace(
                id=space.id,
                space=space.spec.fingerprint,
                model=space.spec.model,
                vectors=held.vectors,
                unreferenced=Amount(held.free, held.bytes),
                oldest=held.oldest,
                table_bytes=held.table_bytes,
                index_bytes=held.index_bytes,
                contents=asked.contents,
                hits=asked.hits,
                recent_days=recent_days,
                recent_contents=asked.recent_contents,
                recent_hits=asked.recent_hits,
            )
        )
    return found


def find_space(conn: sa.Connection, beginning: str) -> Space:
    """The space whose fingerprint begins so. Raises :class:`NotFound` for none, or for several."""
    found = [space for space in all_spaces(conn) if beginning and space.spec.fingerprint.startswith(beginning)]
    if len(found) != 1:
        many = "several spaces have" if found else "no space has"
        raise NotFound(f"{many} a fingerprint that begins with {beginning!r}; `chunkmill cache` shows them.")
    return found[0]
