"""The dead list: chunks of a job that have no vector, with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.planning import DeadChunk, too_long_reason
from chunkmill.domain.reasons import storable
from chunkmill.domain.results import DeadDetails, DeadEntry, Standing
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import JobState
from chunkmill.errors import NotFound
from chunkmill.ledger.work import attempts
from chunkmill.spaces import others, registry

KILLS_WORKERS = "kills_workers"


@dataclass(frozen=True, slots=True)
class DeadContent:
    """A content that the engine could not embed, or that the policy refuses."""

    content_hash: bytes
    code: str
    reason: str


def damaged_content(content_hash: bytes) -> DeadContent:
    """The dead content of a stored text that is not the one its hash names. It was neither embedded nor sent."""
    return DeadContent(
        content_hash,
        "damaged_text",
        "the text in the database is not the one that was enqueued: its SHA-256 differs. Enqueue the chunk again, "
        "which stores its text anew",
    )


def refused_contents(on_long: OnLong, truncated: Iterable[tuple[bytes, int]]) -> list[DeadContent]:
    """The contents that a job refuses, although another job had them cut and embedded.

    ``truncated`` are the ``(content_hash, n_tokens)`` of cut texts. Only the policy ``reject`` refuses them.
    """
    if on_long is not OnLong.REJECT:
        return []
    return [DeadContent(content_hash, "too_long", too_long_reason(n_tokens)) for content_hash, n_tokens in truncated]


def add_refused(conn: sa.Connection, job_id: int, dead: Sequence[DeadChunk]) -> None:
    """Add chunks that were refused by ``enqueue`` and so never stored."""
    if dead:
        insert = """
            INSERT INTO dead_chunks (job_id, chunk_id, code, reason)
            VALUES (:job_id, :chunk_id, :code, :reason)
        """
        conn.execute(
            sa.text(insert),
            [
                {"job_id": job_id, "chunk_id": chunk.chunk_id, "code": chunk.code, "reason": storable(chunk.reason)}
                for chunk in dead
            ],
        )


# A job that named a chunk is told of it although another job, which was open with it, refused the same text first and
# so deleted the chunk. If the collection has left the job's space since, none of its chunks is the job's.
_ADD_CONTENTS = sa.text("""
INSERT INTO dead_chunks (job_id, chunk_id, content_hash, code, reason)
SELECT :job, named.chunk_id, d.content_hash, d.code, d.reason
FROM unnest(CAST(:hashes AS bytea[]), CAST(:codes AS text[]), CAST(:reasons AS text[])) AS d(content_hash, code, reason)
CROSS JOIN LATERAL (
    SELECT c.chunk_id
    FROM chunks c
    WHERE c.content_hash = d.content_hash AND c.collection_id = :collection
      AND (SELECT space_id FROM jobs WHERE id = :job) = ANY(CAST(:spaces AS integer[]))
    UNION
    SELECT e.chunk_id
    FROM dead_chunks e
    JOIN jobs o ON o.id = e.job_id
    WHERE d.code = 'too_long' AND e.code = 'too_long' AND e.content_hash = d.content_hash
      AND o.collection_id = :collection
      AND (o.finished_at IS NULL OR o.finished_at >= (SELECT created_at FROM jobs WHERE id = :job))
) named
ON CONFLICT DO NOTHING
""")
# A text that is too long for another space of the collection is searched in the active one all the same.
_DELETE_TOO_LONG = sa.text("""
DELETE FROM chunks c
USING unnest(CAST(:hashes AS bytea[]), CAST(:codes AS text[])) AS d(content_hash, code), jobs o, jobs j, collections k
WHERE d.code = 'too_long' AND c.content_hash = d.content_hash
  AND c.collection_id = :collection
  AND o.id = c.job_id AND (o.id = :job OR o.on_long = :reject)
  AND j.id = :job AND j.space_id = o.space_id
  AND k.id = c.collection_id AND k.space_id = j.space_id
""")


def add_contents(conn: sa.Connection, dead: Sequence[DeadContent], *, job_id: int, collection_id: int) -> None:
    """Add the chunks of each dead content of a job, in the transaction that completes its ChunkBatch.

    A chunk that is too long under the ``reject`` policy is deleted from the collection, as if ``enqueue`` had refused
    it, unless a job with another policy has accepted it too (``ChunkRow.job_id`` says so). It fails no job. Any other
    chunk stays, shows as missing in the audit and fails the job.
    """
    if not dead:
        return
    parameters = {
        "job": job_id,
        "collection": collection_id,
        "hashes": [content.content_hash for content in dead],
        "codes": [storable(content.code) for content in dead],
        "reasons": [storable(content.reason) for content in dead],
        "reject": OnLong.REJECT,
        "spaces": list(others.of(conn, collection_id).ids),
    }
    conn.execute(_ADD_CONTENTS, parameters)
    conn.execute(_DELETE_TOO_LONG, parameters)


@dataclass(frozen=True, slots=True)
class DeadFilter:
    """Selects the entries of the dead list to which every given condition applies."""

    ids: tuple[int, ...] | None = None
    job_id: int | None = None
    collection: str | None = None
    code: str | None = None

    @property
    def parameters(self) -> dict[str, object]:
        ids = None if self.ids is None else list(self.ids)
        return {"ids": ids, "job_id": self.job_id, "collection": self.collection, "code": self.code}


# The entries of a dropped collection are left out, because they are about to be deleted.
_COUNT_CODES = sa.text("""
SELECT d.code, count(*) AS n
FROM dead_chunks d
JOIN jobs j ON j.id = d.job_id
JOIN collections k ON k.id = j.collection_id
WHERE to_jsonb(k) ->> 'dropped_at' IS NULL
  AND (CAST(:ids AS bigint[]) IS NULL OR d.id = ANY(CAST(:ids AS bigint[])))
  AND (CAST(:job_id AS bigint) IS NULL OR d.job_id = CAST(:job_id AS bigint))
  AND (CAST(:collection AS text) IS NULL OR k.name = CAST(:collection AS text))
  AND (CAST(:code AS text) IS NULL OR d.code = CAST(:code AS text))
GROUP BY d.code
ORDER BY 2 DESC, 1
""")


def count_codes(conn: sa.Connection, dead_filter: DeadFilter) -> dict[str, int]:
    """How many entries have each code, the most frequent first."""
    return {row.code: row.n for row in conn.execute(_COUNT_CODES, dead_filter.parameters)}


_IDS = sa.text("""
SELECT d.id
FROM dead_chunks d
JOIN jobs j ON j.id = d.job_id
JOIN collections k ON k.id = j.collection_id
WHERE to_jsonb(k) ->> 'dropped_at' IS NULL
  AND (CAST(:ids AS bigint[]) IS NULL OR d.id = ANY(CAST(:ids AS bigint[])))
  AND (CAST(:job_id AS bigint) IS NULL OR d.job_id = CAST(:job_id AS bigint))
  AND (CAST(:collection AS text) IS NULL OR k.name = CAST(:collection AS text))
  AND (CAST(:code AS text) IS NULL OR d.code = CAST(:code AS text))
""")


def entry_ids(conn: sa.Connection, dead_filter: DeadFilter) -> list[int]:
    """The ids of the entries that a filter selects."""
    return list(conn.execute(_IDS, dead_filter.parameters).scalars())


# A collection that has left the space of a job was empty then, or was re-embedded; either way its chunks are not those
# that the job speaks of.
_ENTRIES = sa.text("""
SELECT d.*, j.state AS job_state, j.sealed_at IS NOT NULL AS sealed, j.space_id, k.name AS collection,
       c.content_hash AS hash_now
FROM dead_chunks d
JOIN jobs j ON j.id = d.job_id
JOIN collections k ON k.id = j.collection_id
LEFT JOIN chunks c ON c.collection_id = j.collection_id AND c.chunk_id = d.chunk_id AND (
    j.space_id = k.space_id
    OR (k.id, j.space_id) IN (
        SELECT o.collection_id, o.space_id
        FROM unnest(CAST(:collections AS integer[]), CAST(:spaces AS integer[])) AS o(collection_id, space_id)))
WHERE to_jsonb(k) ->> 'dropped_at' IS NULL
  AND (CAST(:ids AS bigint[]) IS NULL OR d.id = ANY(CAST(:ids AS bigint[])))
  AND (CAST(:job_id AS bigint) IS NULL OR d.job_id = CAST(:job_id AS bigint))
  AND (CAST(:collection AS text) IS NULL OR k.name = CAST(:collection AS text))
  AND (CAST(:code AS text) IS NULL OR d.code = CAST(:code AS text))
ORDER BY d.id DESC
LIMIT :limit
""")


def entries(conn: sa.Connection, dead_filter: DeadFilter, *, limit: int | None = None) -> list[DeadEntry]:
    """The entries that a filter selects, the newest first."""
    pairs = others.all_others(conn)
    beside = {"collections": pairs.collections, "spaces": pairs.spaces}
    rows = conn.execute(_ENTRIES, {**dead_filter.parameters, **beside, "limit": limit}).all()
    by_space = defaultdict(list)
    for row in rows:
        if row.content_hash is not None:
            by_space[row.space_id].append(row.content_hash)
    embedded = {(space_id, h) for space_id, hashes in by_space.items() for h in _embedded(conn, space_id, hashes)}
    return [_entry(row, embedded=(row.space_id, row.content_hash) in embedded) for row in rows]


_METADATA = sa.text("""
SELECT c.metadata
FROM chunks c
JOIN collections k ON k.id = c.collection_id
WHERE k.name = :collection AND c.chunk_id = :chunk AND c.content_hash = :hash
""")
_TEXT = sa.text("""
SELECT length(text) AS characters, octet_length(text) AS bytes, CASE WHEN :with_text THEN text END AS text
FROM contents
WHERE content_hash = :hash
""")


def details(conn: sa.Connection, dead_id: int, *, with_text: bool) -> DeadDetails:
    """All that is known of one entry. Raises :class:`NotFound`."""
    listed = entries(conn, DeadFilter(ids=(dead_id,)))
    if not listed:
        raise NotFound(f"there is no dead chunk {dead_id}; `chunkmill dead list` shows those that exist.")
    (entry,) = listed
    content_hash = bytes.fromhex(entry.content_hash or "")
    metadata = conn.execute(
        _METADATA, {"collection": entry.collection, "chunk": entry.chunk_id, "hash": content_hash}
    ).scalar_one_or_none()
    stored = conn.execute(_TEXT, {"hash": content_hash, "with_text": with_text}).one_or_none()
    died = attempts.died_with(conn, entry.job_id, content_hash) if content_hash and entry.code == KILLS_WORKERS else ()
    if stored is None:
        return DeadDetails(entry, metadata, None, None, tuple(died))
    return DeadDetails(entry, metadata, stored.characters, stored.bytes, tuple(died), stored.text)


def _embedded(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> Iterable[bytes]:
    table = registry.VectorTable(space_id).table_name
    return conn.execute(
        sa.text(f"SELECT content_hash FROM {table} WHERE content_hash = ANY(:hashes)"), {"hashes": list(hashes)}
    ).scalars()


def _entry(row: sa.Row[Any], *, embedded: bool) -> DeadEntry:
    if row.content_hash is None or row.code == "too_long":
        standing = Standing.REFUSED
    elif row.hash_now is None:
        standing = Standing.DELETED
    elif row.hash_now != row.content_hash:
        standing = Standing.REPLACED
    else:
        standing = Standing.EMBEDDED if embedded else Standing.MISSING
    return DeadEntry(
        id=row.id,
        job_id=row.job_id,
        job_state=JobState(row.job_state),
        sealed=row.sealed,
        collection=row.collection,
        chunk_id=row.chunk_id,
        content_hash=row.content_hash.hex() if row.content_hash is not None else None,
        code=row.code,
        reason=row.reason,
        standing=standing,
        created_at=row.created_at,
    )
