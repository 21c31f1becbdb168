"""Fills the spaces of a collection from its stored texts, without the producer, and finds contents that were missed.

A pass goes through the contents of a collection in the order of their hashes, page by page, and gives those without a
vector to one sealed job of the space. Each page is a transaction that also notes where the pass stands, so a pass goes
on where a killed one ended. Only when the job has nothing open does the next pass begin; it finds what was deleted,
cancelled, or written by producers that know nothing of the space. If a pass finds nothing to add, the space counts as
complete. That is no proof: the flip checks again under the collection's lock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chunkmill.db.statements import with_constants
from chunkmill.domain import planning
from chunkmill.domain.plurals import count
from chunkmill.domain.states import ChunkBatchState, JobState, Priority
from chunkmill.errors import ChunkmillError
from chunkmill.ledger.jobs.finish import fills_are_kept, finish_if_done
from chunkmill.ledger.jobs.routing import entry, lane_of
from chunkmill.ledger.reembedding.beside import choose
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import SharedFields
from chunkmill.settings import Settings
from chunkmill.spaces import others, registry
from chunkmill.spaces.registry import Space, VectorTable

PAGE = 10_000
"""How many contents one transaction handles, which are 20 ChunkBatches of 512. Measured on two cores with a load of 15,
when all of 300,000 contents were missing: 1.1 s, and 142 MB of memory for the whole process."""
PAGES = 10
"""The most pages of one call."""
SECONDS = 0.5
"""After this many seconds a call begins no further page of a space, so that the poller's bells do not wait."""
OPEN_CHUNK_BATCHES = 2_000
"""While the job has this many open ChunkBatches, no more are added: a million contents, or 40 MB of hashes, are enough
for the workers."""
RECHECK_SECONDS = 60.0
"""How many seconds after a pass that found nothing missing the next one begins, or 20 times as long as the pass took,
if that is more."""
RETRY_SECONDS = 10.0
"""How many seconds after a pass that left failed contents alone the next one begins."""
PASSED_OVER_SECONDS = 600
"""If workers have taken other work for this many seconds and none of the filling, `why_waiting` says so."""
LATEST_JOBS = 1_000
"""How many of the newest jobs are searched for such other work, besides the open ones."""
LOOK_AGAIN_SECONDS = 60.0
"""How many seconds the result of that search is kept, because the search may read all attempts of those jobs."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a collection has in a space. ``pending`` and ``dead`` are parts of ``missing``; all but ``chunks`` are
    distinct contents.
    """

    chunks: int
    contents: int
    missing: int
    """Contents without a vector."""
    pending: int
    """Those of them that are in an open ChunkBatch of a job of this collection and space."""
    dead: int
    """Those of them that are on the dead list of such a job."""

    @property
    def is_complete(self) -> bool:
        """Whether each content has a vector or is dead."""
        return self.missing == self.dead


def coverage(conn: sa.Connection, collection_id: int, space: VectorTable) -> Coverage:
    """Count what a collection has in a space. This reads all of its chunks, 0.4 s for 100,000."""
    query = f"""
        WITH needed AS (
            SELECT content_hash, count(*) AS n
            FROM chunks
            WHERE collection_id = :collection
            GROUP BY content_hash
        ),
        missing AS MATERIALIZED (
            SELECT n.content_hash
            FROM needed n
            LEFT JOIN {space.table_name} v ON v.content_hash = n.content_hash
            WHERE v.content_hash IS NULL
        ),
        pending AS (
            SELECT DISTINCT h.content_hash
            FROM jobs j
            JOIN chunk_batches b ON b.job_id = j.id AND b.state IN (:available, :running)
            CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
            WHERE j.collection_id = :collection AND j.space_id = :space
        ),
        dead AS (
            SELECT DISTINCT d.content_hash
            FROM jobs j
            JOIN dead_chunks d ON d.job_id = j.id
            WHERE j.collection_id = :collection AND j.space_id = :space AND d.content_hash IS NOT NULL
        )
        SELECT (SELECT coalesce(sum(n), 0) FROM needed)::bigint AS chunks,
               (SELECT count(*) FROM needed) AS contents,
               count(*) AS missing,
               count(*) FILTER (WHERE m.content_hash IN (SELECT content_hash FROM pending)) AS pending,
               count(*) FILTER (WHERE m.content_hash IN (SELECT content_hash FROM dead)) AS dead
        FROM missing m
    """
    states = {"available": ChunkBatchState.AVAILABLE, "running": ChunkBatchState.RUNNING}
    row = conn.execute(sa.text(query), {"collection": collection_id, "space": space.id, **states}).one()
    return Coverage(row.chunks, row.contents, row.missing, row.pending, row.dead)


def fill_some(db: sa.Engine, settings: Settings, reembedding_id: int) -> bool:
    """Go on filling the spaces of a re-embedding, for a few pages. Returns whether all is there.

    That is said of each space beside the active one, and after a flip of the active one too, because a producer of the
    last release may have written its last windows for the other. All is there if the last pass through the collection
    found a vector of each content, or a dead chunk, or a ChunkBatch of an enqueue that is about to be embedded. Any
    number of pollers may call this, as often as they like: between two passes it costs a few milliseconds.
    """
    with db.begin() as conn:
        targets = _targets(conn, reembedding_id)
    is_there = bool(targets)
    for target in targets:
        stands, began = _WAITS, time.monotonic()
        for _ in range(PAGES):
            with db.begin() as conn:
                stands = _fill_page(conn, settings, target)
            if not stands.goes_on or time.monotonic() - began >= SECONDS:
                break
        is_there = is_there and stands.is_there
    return is_there


class PassedOverJobs:
    """Whether jobs are passed over. The database is asked only once in ``LOOK_AGAIN_SECONDS`` for each job."""

    def __init__(self) -> None:
        self._looks: dict[int, tuple[float, bool]] = {}
        """Job → when the database is asked again, by the clock of this process, and its last answer."""

    def says(self, conn: sa.Connection, job_id: int) -> bool:
        """Whether workers have long had nothing of a job, and something of jobs of a higher priority on its lane."""
        now = time.monotonic()
        again_at, is_passed_over = self._looks.get(job_id, (now, False))
        if now >= again_at:
            self._looks = {job: look for job, look in self._looks.items() if look[0] > now}
            is_passed_over = _is_passed_over(conn, job_id)
            self._looks[job_id] = (now + LOOK_AGAIN_SECONDS, is_passed_over)
        return is_passed_over


def why_waiting(
    conn: sa.Connection, settings: Settings, reembedding_id: int, passed_over: PassedOverJobs
) -> str | None:
    """What keeps the filling from ending, if waiting alone does not help: a sentence that also says what to do."""
    query = """
        SELECT f.space_id, f.job_id, f.failed, j.state, s.fingerprint, s.model
        FROM reembedding_fills f
        JOIN spaces s ON s.id = f.space_id
        LEFT JOIN jobs j ON j.id = f.job_id
        WHERE f.reembedding_id = :id
        ORDER BY f.space_id
    """
    for row in conn.execute(sa.text(query), {"id": reembedding_id}).all():
        space_name = f"{row.fingerprint[:12]} ({row.model!r})"
        if row.state == JobState.CANCELLED:
            return (
                f"Job {row.job_id}, which fills space {space_name}, was cancelled. Go on with `chunkmill retry "
                f"{row.job_id}`."
            )
        if row.failed:
            return (
                f"{count(row.failed, 'content')} cannot be embedded into space {space_name}: their ChunkBatches were "
                "discarded after the last attempt, or their texts are lost. `chunkmill jobs` shows the jobs that "
                f"failed, such as {row.job_id}; `chunkmill retry {row.job_id}` tries its own again."
            )
        if row.job_id is None:
            space = registry.get_if_readable(conn, row.space_id)
            try:
                if space is not None:
                    choose(conn, settings, space.spec, reembedding_id)
            except ChunkmillError as error:
                return f"Space {space_name} cannot be filled from here: {error}"
        elif passed_over.says(conn, row.job_id):
            return (
                f"Nothing of job {row.job_id}, which fills space {space_name}, was embedded for "
                f"{PASSED_OVER_SECONDS // 60} minutes, because workers always have work of a higher priority. Start "
                f"more workers. Or give up the filling with `chunkmill reembed cancel {reembedding_id}`, and begin "
                "again with `chunkmill reembed start COLLECTION MODEL` and a higher --priority."
            )
    return None


# The conditions are in the order of their cost: while the filling goes on, the first one decides. Which of the latest
# jobs were embedded is read by their index; the table of attempts has none by time.
_IS_PASSED_OVER = sa.text("""
SELECT CASE
    WHEN EXISTS (SELECT FROM chunk_batches WHERE job_id = :job AND state = :running) THEN false
    WHEN NOT EXISTS (
        SELECT FROM chunk_batches
        WHERE job_id = :job AND state = :available AND not_before < now() - make_interval(secs => :seconds)
    ) THEN false
    WHEN EXISTS (
        SELECT FROM usage
        WHERE job_id = :job AND coalesce(ended_at, created_at) > now() - make_interval(secs => :seconds)
    ) THEN false
    ELSE EXISTS (
        SELECT FROM (
            SELECT id, priority FROM jobs WHERE state IN (:enqueueing, :open)
            UNION
            (SELECT id, priority FROM jobs ORDER BY id DESC LIMIT :latest)
        ) j
        JOIN usage u ON u.job_id = j.id AND coalesce(u.ended_at, u.created_at) > now() - make_interval(secs => :seconds)
        JOIN chunk_batches b ON b.id = u.chunk_batch_id
        WHERE j.priority < (SELECT priority FROM jobs WHERE id = :job)
          AND b.route = (SELECT route FROM chunk_batches WHERE job_id = :job AND state = :available LIMIT 1)
    )
END
""")


def _is_passed_over(conn: sa.Connection, job_id: int) -> bool:
    """Whether workers have long had nothing of a job, and something of jobs of a higher priority on its lane."""
    parameters = {
        "job": job_id,
        "seconds": PASSED_OVER_SECONDS,
        "latest": LATEST_JOBS,
        "available": ChunkBatchState.AVAILABLE,
        "running": ChunkBatchState.RUNNING,
        "enqueueing": JobState.ENQUEUEING,
        "open": JobState.RUNNING,
    }
    return bool(conn.execute(_IS_PASSED_OVER, parameters).scalar_one())


def job_ids(conn: sa.Connection) -> list[int]:
    """The jobs that fill spaces of re-embeddings that have not ended."""
    if not fills_are_kept(conn):
        return []
    query = """
        SELECT f.job_id
        FROM reembedding_fills f
        JOIN reembeddings e ON e.id = f.reembedding_id
        WHERE e.finished_at IS NULL AND f.job_id IS NOT NULL
    """
    return list(conn.execute(sa.text(query)).scalars())


@dataclass(frozen=True, slots=True)
class _PageResult:
    """How a space stands after a page. ``goes_on`` says that there is another page to look at now."""

    goes_on: bool
    is_there: bool
    """The last pass found all, and the present one has found nothing that is missing so far."""


_WAITS = _PageResult(goes_on=False, is_there=False)


@dataclass(frozen=True, slots=True)
class _Target:
    """A space to fill."""

    reembedding_id: int
    collection_id: int
    space_id: int
    on_long: str | None
    """None for the active space."""
    priority: int
    is_new: bool
    """Whether it is the space to which the re-embedding leads."""

    @property
    def key(self) -> str:
        return f"reembed:{self.reembedding_id}" + ("" if self.is_new else ":back")


_TARGETS = sa.text("""
SELECT e.id, e.collection_id, e.to_space_id, e.flipped_at, e.plan ->> 'priority' AS priority
FROM reembeddings e
JOIN collections k ON k.id = e.collection_id
WHERE e.id = :id AND e.finished_at IS NULL AND to_jsonb(k) ->> 'dropped_at' IS NULL
""")


def _targets(conn: sa.Connection, reembedding_id: int) -> list[_Target]:
    row = conn.execute(_TARGETS, {"id": reembedding_id}).one_or_none()
    if row is None:
        return []
    lives = others.of(conn, row.collection_id)
    wanted: dict[int, str | None] = {other.id: other.on_long for other in lives.others.values()}
    if row.flipped_at is not None and lives.active is not None:
        wanted[lives.active] = None
    priority = Priority(row.priority or Priority.LOW).rank
    return [
        _Target(row.id, row.collection_id, space_id, on_long, priority, space_id == row.to_space_id)
        for space_id, on_long in sorted(wanted.items())
    ]


_FIRST = sa.text("""
INSERT INTO reembedding_fills (reembedding_id, space_id)
VALUES (:id, :space)
ON CONFLICT DO NOTHING
""")
_STAND = sa.text("""
SELECT f.*,
       extract(epoch FROM clock_timestamp() - f.passed_at)::float8 AS ago
FROM reembedding_fills f
WHERE f.reembedding_id = :id AND f.space_id = :space
FOR NO KEY UPDATE SKIP LOCKED
""")
_BEGIN = sa.text("""
UPDATE reembedding_fills
SET began_at = now(), after = NULL, added = 0, failed = 0
WHERE reembedding_id = :id AND space_id = :space
RETURNING *, 0.0 AS ago
""")
_NOTE = sa.text("""
UPDATE reembedding_fills
SET after = :after, added = added + :added, failed = failed + :failed,
    is_there = is_there AND CAST(:added AS bigint) + :failed = 0
WHERE reembedding_id = :id AND space_id = :space
RETURNING is_there
""")
_END = sa.text("""
UPDATE reembedding_fills
SET began_at = NULL, after = NULL, passes = passes + 1, passed_at = clock_timestamp(),
    is_there = added + failed + :open = 0,
    seconds = extract(epoch FROM clock_timestamp() - began_at)
WHERE reembedding_id = :id AND space_id = :space
RETURNING is_there
""")


def _fill_page(conn: sa.Connection, settings: Settings, target: _Target) -> _PageResult:
    """Look at the next page of a pass, or begin one if it is time."""
    named = {"id": target.reembedding_id, "space": target.space_id}
    conn.execute(_FIRST, named)
    stand = conn.execute(_STAND, named).one_or_none()
    if stand is None:
        return _WAITS  # another poller is filling this space
    n_open = _count_open(conn, stand.job_id)
    if stand.began_at is None:
        if not _is_time(stand, n_open):
            return _PageResult(goes_on=False, is_there=stand.is_there and not n_open)
        stand = conn.execute(_BEGIN, named).one()
    if n_open >= OPEN_CHUNK_BATCHES:
        return _WAITS
    table = VectorTable(target.space_id)
    page = _look(conn, target.collection_id, table, after=stand.after or b"")
    if page.last is None:
        is_there = conn.execute(_END, {**named, "open": n_open}).scalar_one()
        if stand.job_id is not None:
            # The job could not end before. If another process is judging it now, the poller ends it later.
            finish_if_done(conn, stand.job_id, table, wait=False)
        return _PageResult(goes_on=False, is_there=is_there)
    failed, wanted = _sorted_out(conn, target, stand, page.missing)
    if wanted:
        lengths = _lengths(conn, wanted)
        failed += len(wanted) - len(lengths)
        if lengths and not _add(conn, settings, target, stand.job_id, lengths):
            return _WAITS
        wanted = list(lengths)
    note = {**named, "after": page.last, "added": len(wanted), "failed": failed}
    return _PageResult(goes_on=True, is_there=conn.execute(_NOTE, note).scalar_one() and not n_open)


def _is_time(stand: sa.Row[Any], n_open: int) -> bool:
    """Whether the next pass may begin."""
    if stand.passed_at is None:
        return True
    if n_open:
        return False
    if stand.is_there:
        return bool(stand.ago >= max(RECHECK_SECONDS, 20 * stand.seconds))
    return bool(stand.added or stand.ago >= RETRY_SECONDS)


_OPEN = with_constants(
    """
SELECT count(*)
FROM (
    SELECT FROM chunk_batches
    WHERE job_id = :job AND state IN (:available, :running)
    LIMIT :most
) b
""",
    available=ChunkBatchState.AVAILABLE,
    running=ChunkBatchState.RUNNING,
)


def _count_open(conn: sa.Connection, job_id: int | None) -> int:
    if job_id is None:
        return 0
    return int(conn.execute(_OPEN, {"job": job_id, "most": OPEN_CHUNK_BATCHES}).scalar_one())


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of a collection's contents: the last of them, None if there was none, and those without a vector."""

    last: bytes | None
    missing: Sequence[bytes]


def _look(conn: sa.Connection, collection_id: int, space: VectorTable, *, after: bytes) -> _Page:
    query = f"""
        WITH page AS MATERIALIZED (
            SELECT DISTINCT content_hash
            FROM chunks
            WHERE collection_id = :collection AND content_hash > :after
            ORDER BY content_hash
            LIMIT :page
        )
        SELECT (SELECT content_hash FROM page ORDER BY content_hash DESC LIMIT 1) AS last,
               (
                   SELECT array_agg(p.content_hash ORDER BY p.content_hash)
                   FROM page p
                   WHERE NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = p.content_hash)
               ) AS missing
    """
    # The plan that is kept for a prepared statement does not know how large the collection is. For a small one beside
    # large ones it would read the index of all contents.
    conn.execute(sa.text("SET LOCAL plan_cache_mode = force_custom_plan"))
    row = conn.execute(sa.text(query), {"collection": collection_id, "after": after, "page": PAGE}).one()
    return _Page(row.last, row.missing or ())


# ChunkBatches that the present pass has made are left out: the pass visits each content once, so they have no content
# of this page. A ChunkBatch whose vectors were deleted again and again, as those of a text that comes and goes, did not
# fail.
_IN_CHUNK_BATCHES = sa.text("""
SELECT h.content_hash, bool_or(b.state = :discarded) AS has_failed
FROM jobs j
JOIN chunk_batches b ON b.job_id = j.id AND b.state IN (:available, :running, :discarded)
CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
WHERE j.collection_id = :collection AND j.space_id = :space
  AND (b.state <> :discarded OR b.error_code IS DISTINCT FROM 'vectors_missing')
  AND (b.state = :discarded OR j.id IS DISTINCT FROM CAST(:job AS bigint) OR b.created_at < :began_at)
  AND h.content_hash = ANY(CAST(:hashes AS bytea[]))
GROUP BY h.content_hash
""")
_DEAD = sa.text("""
SELECT DISTINCT d.content_hash
FROM dead_chunks d
JOIN jobs j ON j.id = d.job_id
WHERE d.content_hash = ANY(CAST(:hashes AS bytea[])) AND j.collection_id = :collection AND j.space_id = :space
""")


def _sorted_out(
    conn: sa.Connection, target: _Target, stand: sa.Row[Any], missing: Sequence[bytes]
) -> tuple[int, list[bytes]]:
    """How many of the contents failed before, and those that nobody has tried, in order.

    A content on the dead list of the space, or in a discarded ChunkBatch, waits for somebody who retries it. One in an
    open ChunkBatch is about to be embedded.
    """
    if not missing:
        return 0, []
    parameters: dict[str, object] = {
        "hashes": list(missing),
        "collection": target.collection_id,
        "space": target.space_id,
        "job": stand.job_id,
        "began_at": stand.began_at,
        "available": ChunkBatchState.AVAILABLE,
        "running": ChunkBatchState.RUNNING,
        "discarded": ChunkBatchState.DISCARDED,
    }
    dead = set(conn.execute(_DEAD, parameters).scalars())
    tried = {row.content_hash: row.has_failed for row in conn.execute(_IN_CHUNK_BATCHES, parameters)}
    failed = sum(has_failed and content_hash not in dead for content_hash, has_failed in tried.items())
    return failed, [content_hash for content_hash in missing if content_hash not in dead and content_hash not in tried]


def _lengths(conn: sa.Connection, hashes: Sequence[bytes]) -> dict[bytes, range]:
    """A range as long as each stored text, in place of the text, because ``into_chunk_batches`` only asks for its
    length.
    """
    query = "SELECT content_hash, bytes FROM content_bytes(CAST(:hashes AS bytea[])) ORDER BY content_hash"
    return {row.content_hash: range(row.bytes) for row in conn.execute(sa.text(query), {"hashes": list(hashes)})}


# A job that ended runs again, and is judged again. The lock keeps it from ending before its ChunkBatches can be seen.
_REOPEN = sa.text("""
UPDATE jobs
SET state = :running, error = NULL, finished_at = NULL, n_chunks = n_chunks + :n
WHERE id = :id AND state IN (:running, :completed, :failed)
RETURNING space_id, route, routing, priority
""")


def _add(
    conn: sa.Connection, settings: Settings, target: _Target, job_id: int | None, lengths: dict[bytes, range]
) -> bool:
    """Give contents to the job of the space. False if it was cancelled, or if no lane serves the space here."""
    states = {"running": JobState.RUNNING, "completed": JobState.COMPLETED, "failed": JobState.FAILED}
    job = None
    if job_id is not None:
        job = conn.execute(_REOPEN, {"id": job_id, "n": len(lengths), **states}).one_or_none()
        if job is None and _exists(conn, job_id):
            return False  # it was cancelled
    if job is None:
        job_id = _open(conn, settings, target)
        if job_id is None:
            return False
        job = conn.execute(_REOPEN, {"id": job_id, "n": len(lengths), **states}).one_or_none()
        if job is None:
            return False
    assert job_id is not None  # noqa: S101 - the job was opened or found
    shared = SharedFields(job_id, job.space_id, lane_of(job.route, job.routing), job.priority, settings.max_attempts)
    chunk_batches.add(
        conn, shared, planning.into_chunk_batches(lengths, settings.chunk_batch_size, planning.MAX_BATCH_BYTES)
    )
    return True


def _exists(conn: sa.Connection, job_id: int) -> bool:
    query = "SELECT EXISTS (SELECT FROM jobs WHERE id = :id)"
    return bool(conn.execute(sa.text(query), {"id": job_id}).scalar_one())


def _open(conn: sa.Connection, settings: Settings, target: _Target) -> int | None:
    """The job that fills the space, which is opened if there is none. None if no lane serves the space here."""
    space = registry.get_if_readable(conn, target.space_id)
    if space is None:
        return None
    try:
        route, choice = choose(conn, settings, space.spec, target.reembedding_id)
    except ChunkmillError:
        return None  # `why_waiting` tells the reason
    at = conn.execute(sa.text("SELECT now()")).scalar_one()
    call = """
        SELECT open_fill_job(
            :id, :space, :route, CAST(:priority AS smallint), :on_long, :key, CAST(:routing AS jsonb))
    """
    parameters = {
        "id": target.reembedding_id,
        "space": target.space_id,
        "route": route,
        "priority": target.priority,
        "on_long": target.on_long or space.spec.long_text.policy,
        "routing": json.dumps([entry(choice, at)]),
    }
    key, job_id = target.key, None
    while job_id is None:
        job_id = conn.execute(sa.text(call), {**parameters, "key": key}).scalar_one()
        job_id = job_id or _of_key(conn, target, space, key)
        key += "."  # somebody has used the key for an enqueue
    conn.execute(
        sa.text("UPDATE reembedding_fills SET job_id = :job WHERE reembedding_id = :id AND space_id = :space"),
        {"job": job_id, "id": target.reembedding_id, "space": target.space_id},
    )
    if target.is_new:
        update = "UPDATE reembeddings SET job_id = :job WHERE id = :id AND job_id IS DISTINCT FROM :job"
        conn.execute(sa.text(update), {"job": job_id, "id": target.reembedding_id})
    return int(job_id)


def _of_key(conn: sa.Connection, target: _Target, space: Space, key: str) -> int | None:
    """The job of a key, if it is one that fills this space of this collection."""
    query = """
        SELECT id
        FROM jobs
        WHERE idempotency_key = :key AND collection_id = :collection AND space_id = :space AND state <> :cancelled
          AND NOT EXISTS (SELECT FROM job_streams s WHERE s.job_id = jobs.id)
    """
    parameters = {
        "key": key,
        "collection": target.collection_id,
        "space": space.id,
        "cancelled": JobState.CANCELLED,
    }
    return conn.execute(sa.text(query), parameters).scalar_one_or_none()
