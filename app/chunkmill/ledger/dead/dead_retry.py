"""How chunks come off the dead list: tried again, or dropped."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from chunkmill.db.locks import DELETE_LOCK
from chunkmill.domain import planning
from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.results import DeadEntry, DroppedDead, RetriedDead, Standing
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.ledger.dead.dead_chunks import KILLS_WORKERS, LISTED, Which, entries
from chunkmill.ledger.jobs.routing import lane_of
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Common


def retry(conn: sa.Connection, which: Which, *, max_contents: int, max_bytes: int, max_attempts: int) -> RetriedDead:
    """Move the contents of dead chunks into new ChunkBatches of their jobs, and their entries off the list.

    All entries about such a content in its job go: they are one text. Raises :class:`NotFound`, and
    :class:`InvalidInput` where an entry named by its id, or every one, cannot be retried. Nothing is changed then.
    """
    found = _locked(conn, which)
    refused = [(entry, why) for entry in found if (why := entry.why_not_retried)]
    if refused and (which.ids is not None or len(refused) == len(found)):
        shown = "; ".join(f"{entry.id} (chunk {entry.chunk_id!r}): {why}" for entry, why in refused[:3])
        more = f"; and {len(refused) - 3:,} more" if len(refused) > 3 else ""
        raise InvalidInput(f"dead chunks that cannot be retried: {shown}{more}. Nothing was changed.")
    again = _by_job(entry for entry in found if entry.why_not_retried is None)
    chunks = contents = 0
    for job_id, listed in again.items():
        waiting = {_hash(entry): entry.code for entry in listed if entry.standing is Standing.MISSING}
        deleted = conn.execute(
            sa.text("DELETE FROM dead_chunks WHERE job_id = :job AND content_hash = ANY(:hashes)"),
            {"job": job_id, "hashes": list({_hash(entry) for entry in listed})},
        )
        _take_out(conn, job_id, list(waiting))
        _add_again(conn, job_id, waiting, max_contents=max_contents, max_bytes=max_bytes, max_attempts=max_attempts)
        _reopen_if_ended(conn, job_id, even_completed=bool(waiting))
        chunks += deleted.rowcount
        contents += len(waiting)
    return RetriedDead(tuple(again), chunks, contents, Counter(why for _, why in refused))


def take_off(conn: sa.Connection, which: Which) -> tuple[DroppedDead, dict[str, list[str]]]:
    """Take entries off the list; also returns the chunks to delete from each collection in the same transaction.

    Those are the chunks that have this text still, and no vector. What other jobs' entries say about the same chunk and
    text goes with it. Raises :class:`NotFound`, and nothing is changed then.
    """
    # No enqueue may replace a chunk between the look at it and its deletion.
    conn.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": DELETE_LOCK})
    found = _locked(conn, which, with_twins=True)
    conn.execute(
        sa.text("DELETE FROM dead_chunks WHERE id = ANY(CAST(:ids AS bigint[]))"), {"ids": [e.id for e in found]}
    )
    judged = []
    for job_id, listed in _by_job(found).items():
        hashes = {_hash(e) for e in listed if e.content_hash and e.standing is not Standing.EMBEDDED}
        still_listed = conn.execute(
            sa.text("SELECT content_hash FROM dead_chunks WHERE job_id = :job AND content_hash = ANY(:hashes)"),
            {"job": job_id, "hashes": list(hashes)},
        ).scalars()
        _take_out(conn, job_id, list(hashes.difference(still_listed)))
        if _reopen_if_ended(conn, job_id, even_completed=False):
            judged.append(job_id)
    leaving: dict[str, set[str]] = defaultdict(set)
    for entry in found:
        if entry.standing is Standing.MISSING:
            leaving[entry.collection].add(entry.chunk_id)
    chunks = {collection: sorted(chunk_ids) for collection, chunk_ids in leaving.items()}
    return DroppedDead(tuple(judged), len(found), sum(map(len, chunks.values()))), chunks


def _locked(conn: sa.Connection, which: Which, *, with_twins: bool = False) -> list[DeadEntry]:
    """The entries, with their jobs locked: nobody ends, cancels or retries these until this transaction is over.

    A twin is another job's entry about the same chunk with the same text. Raises :class:`NotFound` for an id that is
    not there, or where there is nothing at all.
    """
    chosen = f"SELECT d.id FROM {LISTED} WHERE {which.sql}"
    if with_twins:
        chosen += (
            f" UNION SELECT o.id FROM {LISTED} JOIN jobs i ON i.collection_id = k.id JOIN dead_chunks o "
            f"ON o.job_id = i.id AND o.chunk_id = d.chunk_id AND o.content_hash = d.content_hash WHERE {which.sql}"
        )
    ids = tuple(conn.execute(sa.text(chosen), which.facts).scalars())
    conn.execute(
        sa.text(
            "SELECT id FROM jobs WHERE id IN (SELECT job_id FROM dead_chunks WHERE id = ANY(CAST(:ids AS bigint[]))) "
            "ORDER BY id FOR NO KEY UPDATE"
        ),
        {"ids": list(ids)},
    )
    # Read behind the locks: another may have retried or dropped some while this one waited.
    found = entries(conn, Which(ids=ids))
    gone = sorted(set(which.ids or ()) - {entry.id for entry in found})
    if gone or not found:
        what = f"no dead chunk {', '.join(map(str, gone[:10]))}" if gone else "no such dead chunk"
        raise NotFound(
            f"there is {what}; somebody may have retried or dropped it meanwhile. Nothing was changed: "
            "`chunkmill dead list` shows those there are."
        )
    return found


def _take_out(conn: sa.Connection, job_id: int, hashes: Sequence[bytes]) -> None:
    """Take contents out of a job's completed ChunkBatches, so that these do not answer for them when the job ends."""
    if not hashes:
        return
    conn.execute(
        sa.text(
            "WITH parted AS ("
            "  SELECT b.id, array_agg(h.content_hash ORDER BY h.at) FILTER (WHERE x.content_hash IS NULL) AS kept "
            "  FROM chunk_batches b CROSS JOIN unnest(b.content_hashes) WITH ORDINALITY AS h(content_hash, at) "
            "  LEFT JOIN unnest(CAST(:hashes AS bytea[])) AS x(content_hash) ON x.content_hash = h.content_hash "
            "  WHERE b.job_id = :job AND b.state = 'completed' GROUP BY b.id HAVING count(x.content_hash) > 0) "
            "UPDATE chunk_batches b SET content_hashes = coalesce(p.kept, '{}'), "
            "n_contents = coalesce(cardinality(p.kept), 0) FROM parted p WHERE b.id = p.id AND b.state = 'completed'"
        ),
        {"job": job_id, "hashes": list(hashes)},
    )


def _add_again(
    conn: sa.Connection,
    job_id: int,
    waiting: dict[bytes, str],
    *,
    max_contents: int,
    max_bytes: int,
    max_attempts: int,
) -> None:
    """New ChunkBatches of a job for contents that died, given with their codes."""
    job = conn.execute(
        sa.text("SELECT space_id, route, routing, priority FROM jobs WHERE id = :id"), {"id": job_id}
    ).one()
    common = Common(job_id, job.space_id, lane_of(job.route, job.routing), job.priority, max_attempts)
    # What killed workers stood alone when it was buried, and stands alone again: a suspect until it is embedded.
    suspects = [content_hash for content_hash, code in waiting.items() if code == KILLS_WORKERS]
    chunk_batches.add(conn, common, [[content_hash] for content_hash in suspects], deaths=SUSPECT_DEATHS)
    lengths = conn.execute(
        sa.text("SELECT content_hash, octet_length(text) FROM contents WHERE content_hash = ANY(:hashes)"),
        {"hashes": list(waiting.keys() - set(suspects))},
    )
    # A range stands for the text: `cut` asks for nothing but its length.
    others = {content_hash: range(length) for content_hash, length in lengths}
    chunk_batches.add(conn, common, planning.cut(others, max_contents, max_bytes))


def _reopen_if_ended(conn: sa.Connection, job_id: int, *, even_completed: bool) -> bool:
    """Let a job that came to its end be judged again. An open one will be, and a cancelled one stays so."""
    result = conn.execute(
        sa.text(
            "UPDATE jobs SET state = 'running', error = NULL, finished_at = NULL WHERE id = :id "
            "AND sealed_at IS NOT NULL AND (state = 'failed' OR (state = 'completed' AND :even_completed))"
        ),
        {"id": job_id, "even_completed": even_completed},
    )
    return result.rowcount == 1


def _by_job(listed: Iterable[DeadEntry]) -> dict[int, list[DeadEntry]]:
    by_job: dict[int, list[DeadEntry]] = defaultdict(list)
    for entry in sorted(listed, key=lambda entry: (entry.job_id, entry.id)):
        by_job[entry.job_id].append(entry)
    return by_job


def _hash(entry: DeadEntry) -> bytes:
    return bytes.fromhex(entry.content_hash or "")
