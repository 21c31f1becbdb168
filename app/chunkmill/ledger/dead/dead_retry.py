"""Takes chunks off the dead list: to try them again, or to drop them."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set

import sqlalchemy as sa

from chunkmill.db.locks import DELETE_LOCK, lock
from chunkmill.domain import planning
from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.results import DeadEntry, DroppedDead, RetriedDead, Standing
from chunkmill.domain.states import ChunkBatchState, JobState
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.ledger.dead.dead_chunks import KILLS_WORKERS, DeadFilter, entries, entry_ids
from chunkmill.ledger.jobs.routing import lane_of
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import SharedFields
from chunkmill.spaces import others

_DELETE_ENTRIES_OF_CONTENTS = sa.text("""
DELETE FROM dead_chunks
WHERE job_id = :job AND content_hash = ANY(:hashes)
""")


def retry(
    conn: sa.Connection, dead_filter: DeadFilter, *, max_contents: int, max_bytes: int, max_attempts: int
) -> RetriedDead:
    """Move the contents of dead chunks into new ChunkBatches of their jobs, and delete their entries from the list.

    All entries of its job about such a content are deleted, because they are about one text. Raises :class:`NotFound`,
    and :class:`InvalidInput` if an entry named by its id, or every selected entry, cannot be retried. Nothing is
    changed then.
    """
    selected = _locked(conn, dead_filter)
    refused = [(entry, why) for entry in selected if (why := entry.why_not_retried)]
    if refused and (dead_filter.ids is not None or len(refused) == len(selected)):
        shown = "; ".join(f"{entry.id} (chunk {entry.chunk_id!r}): {why}" for entry, why in refused[:3])
        more = f"; and {len(refused) - 3:,} more" if len(refused) > 3 else ""
        raise InvalidInput(f"dead chunks that cannot be retried: {shown}{more}. Nothing was changed.")
    retried = _by_job(entry for entry in selected if entry.why_not_retried is None)
    chunks = contents = 0
    for job_id, listed in retried.items():
        waiting = {_hash(entry): entry.code for entry in listed if entry.standing is Standing.MISSING}
        deleted = conn.execute(
            _DELETE_ENTRIES_OF_CONTENTS, {"job": job_id, "hashes": list({_hash(entry) for entry in listed})}
        )
        _take_out(conn, job_id, list(waiting))
        _add_again(conn, job_id, waiting, max_contents=max_contents, max_bytes=max_bytes, max_attempts=max_attempts)
        _reopen_if_ended(conn, job_id, even_completed=bool(waiting))
        chunks += deleted.rowcount
        contents += len(waiting)
    return RetriedDead(tuple(retried), chunks, contents, Counter(why for _, why in refused))


_STILL_LISTED = sa.text("""
SELECT content_hash
FROM dead_chunks
WHERE job_id = :job AND content_hash = ANY(:hashes)
""")


def take_off(conn: sa.Connection, ids: Sequence[int], *, require_all: bool) -> tuple[DroppedDead, dict[str, list[str]]]:
    """Delete entries from the list; also returns the chunks to delete from each collection in the same transaction.

    Those are the chunks that still have this text and no vector. Entries of other jobs about the same chunk and text
    are deleted too. An id that is no longer on the list is passed over, or raises :class:`NotFound` with
    ``require_all``. So is a chunk that is dead in a space beside the active one of its collection, where it may be
    searched: it stays, with its entry, or raises :class:`InvalidInput` with ``require_all``. Enqueues and writes wait
    for the end of the transaction: give a few thousand ids.
    """
    # No enqueue may replace a chunk between the look at it and its deletion.
    lock(conn, DELETE_LOCK)
    selected = _lock_and_read(conn, [*conn.execute(_TWINS, {"ids": list(ids)}).scalars()])
    if require_all:
        _require_all(DeadFilter(ids=tuple(ids)), {entry.id for entry in selected})
    beside = _dead_beside(conn, selected)
    if beside and require_all:
        raise InvalidInput(
            f"dead chunk {beside[0].id} (chunk {beside[0].chunk_id!r}) is not dropped, because it is dead in another "
            f"space of collection {beside[0].collection!r} than the active one. Nothing was changed. Retry it, delete "
            "the chunk from the collection, or let it be missing in the other space: chunkmill reembed resume "
            f"{shlex.quote(beside[0].collection)} --missing 1"
        )
    selected = [entry for entry in selected if entry not in beside]
    conn.execute(
        sa.text("DELETE FROM dead_chunks WHERE id = ANY(CAST(:ids AS bigint[]))"),
        {"ids": [entry.id for entry in selected]},
    )
    judged = []
    for job_id, listed in _by_job(selected).items():
        hashes = {_hash(entry) for entry in listed if entry.content_hash and entry.standing is not Standing.EMBEDDED}
        still_listed = conn.execute(_STILL_LISTED, {"job": job_id, "hashes": list(hashes)}).scalars()
        _take_out(conn, job_id, list(hashes.difference(still_listed)))
        if _reopen_if_ended(conn, job_id, even_completed=False):
            judged.append(job_id)
    leaving: dict[str, set[str]] = defaultdict(set)
    for entry in selected:
        if entry.standing is Standing.MISSING:
            leaving[entry.collection].add(entry.chunk_id)
    chunks = {collection: sorted(chunk_ids) for collection, chunk_ids in leaving.items()}
    return DroppedDead(tuple(judged), len(selected), sum(map(len, chunks.values()))), chunks


_OF_OTHER_SPACES = sa.text("""
SELECT d.id
FROM dead_chunks d
JOIN jobs j ON j.id = d.job_id
WHERE d.id = ANY(CAST(:ids AS bigint[]))
  AND (j.collection_id, j.space_id) IN (
      SELECT o.collection_id, o.space_id
      FROM unnest(CAST(:collections AS integer[]), CAST(:spaces AS integer[])) AS o(collection_id, space_id))
""")


def _dead_beside(conn: sa.Connection, selected: Sequence[DeadEntry]) -> list[DeadEntry]:
    """The entries of chunks that lack a vector in a space beside the active one. Their collections are locked."""
    pairs = others.all_others(conn)
    if not pairs.spaces:
        return []
    parameters = {
        "ids": [entry.id for entry in selected],
        "collections": pairs.collections,
        "spaces": pairs.spaces,
    }
    ids = set(conn.execute(_OF_OTHER_SPACES, parameters).scalars())
    lacking = (Standing.MISSING, Standing.REFUSED)
    return [entry for entry in selected if entry.id in ids and entry.content_hash and entry.standing in lacking]


# A twin is another job's entry about the same chunk with the same text in the same space. An entry is a twin of itself,
# also if its text was never stored.
_TWINS = sa.text("""
SELECT DISTINCT twin.id
FROM dead_chunks d
JOIN jobs j ON j.id = d.job_id
JOIN jobs i ON i.collection_id = j.collection_id AND i.space_id = j.space_id
JOIN dead_chunks twin ON twin.job_id = i.id AND twin.chunk_id = d.chunk_id
    AND (twin.content_hash = d.content_hash OR twin.id = d.id)
WHERE d.id = ANY(CAST(:ids AS bigint[]))
""")
# No enqueue may move a collection to another space between the look at its chunks and the retry of their texts.
_LOCK_COLLECTIONS = sa.text("""
SELECT id
FROM collections
WHERE id IN (
    SELECT j.collection_id
    FROM dead_chunks d
    JOIN jobs j ON j.id = d.job_id
    WHERE d.id = ANY(CAST(:ids AS bigint[])))
ORDER BY id
FOR SHARE
""")
_LOCK_JOBS = sa.text("""
SELECT id
FROM jobs
WHERE id IN (SELECT job_id FROM dead_chunks WHERE id = ANY(CAST(:ids AS bigint[])))
ORDER BY id
FOR NO KEY UPDATE
""")


def _locked(conn: sa.Connection, dead_filter: DeadFilter) -> list[DeadEntry]:
    """The selected entries, with their jobs locked: no other transaction can end, cancel or retry these before this one
    has ended.

    Raises :class:`NotFound` for an id that does not exist, or if nothing is selected at all.
    """
    selected = _lock_and_read(conn, entry_ids(conn, dead_filter))
    _require_all(dead_filter, {entry.id for entry in selected})
    return selected


def _lock_and_read(conn: sa.Connection, ids: Sequence[int]) -> list[DeadEntry]:
    conn.execute(_LOCK_COLLECTIONS, {"ids": ids})
    conn.execute(_LOCK_JOBS, {"ids": ids})
    # Read under the locks: another transaction may have retried or dropped some while this one waited.
    return entries(conn, DeadFilter(ids=tuple(ids)))


def selected_ids(conn: sa.Connection, dead_filter: DeadFilter) -> list[int]:
    """The ids that a filter selects, in order. Raises :class:`NotFound` as a retry of them would."""
    ids = sorted(entry_ids(conn, dead_filter))
    _require_all(dead_filter, set(ids))
    return ids


def _require_all(dead_filter: DeadFilter, selected: Set[int]) -> None:
    gone = sorted(set(dead_filter.ids or ()) - selected)
    if gone or not selected:
        what = f"no dead chunk {', '.join(map(str, gone[:10]))}" if gone else "no such dead chunk"
        raise NotFound(
            f"there is {what}; somebody may have retried or dropped it meanwhile. Nothing was changed: "
            "`chunkmill dead list` shows those that exist."
        )


_TAKE_OUT = sa.text("""
WITH parted AS (
    SELECT b.id, array_agg(h.content_hash ORDER BY h.at) FILTER (WHERE x.content_hash IS NULL) AS kept
    FROM chunk_batches b
    CROSS JOIN unnest(b.content_hashes) WITH ORDINALITY AS h(content_hash, at)
    LEFT JOIN unnest(CAST(:hashes AS bytea[])) AS x(content_hash) ON x.content_hash = h.content_hash
    WHERE b.job_id = :job AND b.state = :completed
    GROUP BY b.id
    HAVING count(x.content_hash) > 0)
UPDATE chunk_batches b
SET content_hashes = coalesce(p.kept, '{}'), n_contents = coalesce(cardinality(p.kept), 0)
FROM parted p
WHERE b.id = p.id AND b.state = :completed
""")


def _take_out(conn: sa.Connection, job_id: int, hashes: Sequence[bytes]) -> None:
    """Take contents out of a job's completed ChunkBatches, which then no longer stand for them when the job ends."""
    if not hashes:
        return
    conn.execute(_TAKE_OUT, {"job": job_id, "hashes": list(hashes), "completed": ChunkBatchState.COMPLETED})


def _add_again(
    conn: sa.Connection,
    job_id: int,
    waiting: dict[bytes, str],
    *,
    max_contents: int,
    max_bytes: int,
    max_attempts: int,
) -> None:
    """Add new ChunkBatches of a job for contents that died, given with their codes."""
    job = conn.execute(
        sa.text("SELECT space_id, route, routing, priority FROM jobs WHERE id = :id"), {"id": job_id}
    ).one()
    shared = SharedFields(job_id, job.space_id, lane_of(job.route, job.routing), job.priority, max_attempts)
    # A content that killed workers was alone when it was buried. It is alone again, as a suspect, until it is embedded.
    suspects = [content_hash for content_hash, code in waiting.items() if code == KILLS_WORKERS]
    chunk_batches.add(conn, shared, [[content_hash] for content_hash in suspects], deaths=SUSPECT_DEATHS)
    lengths = conn.execute(
        sa.text("SELECT content_hash, octet_length(text) FROM contents WHERE content_hash = ANY(:hashes)"),
        {"hashes": list(waiting.keys() - set(suspects))},
    )
    # A range stands in for the text, because `into_chunk_batches` only asks for its length.
    others = {content_hash: range(length) for content_hash, length in lengths}
    chunk_batches.add(conn, shared, planning.into_chunk_batches(others, max_contents, max_bytes))


_REOPEN = sa.text("""
UPDATE jobs
SET state = :running, error = NULL, finished_at = NULL
WHERE id = :id AND sealed_at IS NOT NULL
  AND (state = :failed OR (state = :completed AND :even_completed))
""")


def _reopen_if_ended(conn: sa.Connection, job_id: int, *, even_completed: bool) -> bool:
    """Make a job that ended run again, so that it is judged again. An open or a cancelled job stays as it is."""
    result = conn.execute(
        _REOPEN,
        {
            "id": job_id,
            "even_completed": even_completed,
            "running": JobState.RUNNING,
            "failed": JobState.FAILED,
            "completed": JobState.COMPLETED,
        },
    )
    return result.rowcount == 1


def _by_job(listed: Iterable[DeadEntry]) -> dict[int, list[DeadEntry]]:
    by_job: dict[int, list[DeadEntry]] = defaultdict(list)
    for entry in sorted(listed, key=lambda entry: (entry.job_id, entry.id)):
        by_job[entry.job_id].append(entry)
    return by_job


def _hash(entry: DeadEntry) -> bytes:
    return bytes.fromhex(entry.content_hash or "")
