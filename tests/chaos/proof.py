"""What must be true in the end, whatever struck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import Client, JobState
from tests.chaos.work import COLLECTION, Work
from tests.chaos.worker import vector_of

COSINE = 0.9999
"""Of the real engine's vectors to those of a run without faults: TokenBatches are others each time (promise 6)."""


@dataclass(frozen=True, slots=True)
class Proof:
    """``problems`` is empty when every promise held. ``lowest`` is the lowest similarity to the fault-free vectors."""

    problems: list[str]
    lowest: float
    ledger: dict[str, object]


def prove(client: Client, db: sa.Engine, table: str, work: Work, *, real: bool) -> Proof:
    """Look at everything, through the client as a user would and below it in SQL."""
    problems = [*_jobs(client, work), *_audit(client, work), *_rows(db, table, work)]
    vectors = client.vectors(COLLECTION)
    similarity, wrong = _compare(vectors, work, real=real)
    if wrong:
        problems.append(
            f"{len(wrong)} chunks have no vector or another than without faults, {wrong[0]!r} first; lowest "
            f"similarity {similarity:.6f}"
        )
    return Proof(problems, similarity, _ledger(db))


def _jobs(client: Client, work: Work) -> list[str]:
    problems = []
    for job_id in work.jobs:
        job = client.job(job_id)
        if job.state is not JobState.COMPLETED:
            problems.append(f"job {job_id} is {job.state}: {job.error}")
        if job.dead:
            first = job.dead_chunks[0]
            problems.append(f"job {job_id} has {job.dead} dead chunks, {first.chunk_id!r} first: {first.reason}")
    return problems


def _audit(client: Client, work: Work) -> list[str]:
    audit = client.audit(COLLECTION)
    problems = []
    if not audit.complete:
        problems.append(f"the audit misses {audit.missing} chunks: {', '.join(audit.missing_ids[:3])} ...")
    if audit.chunks != len(work.expected):
        problems.append(f"the collection has {audit.chunks} chunks, and {len(work.expected)} were enqueued")
    return problems


def _rows(db: sa.Engine, table: str, work: Work) -> list[str]:
    with db.connect() as conn:
        rows, distinct = conn.execute(sa.text(f"SELECT count(*), count(DISTINCT content_hash) FROM {table}")).one()
        left = conn.execute(
            sa.text("SELECT id, state FROM chunk_batches WHERE state IN ('available', 'running') ORDER BY id")
        ).all()
        dead = conn.execute(sa.text("SELECT count(*) FROM dead_chunks")).scalar_one()
    problems = []
    if not rows == distinct == len(work.contents):
        problems.append(
            f"{rows} vectors of {distinct} contents were written, and {len(work.contents)} contents were enqueued"
        )
    if left:
        problems.append(f"{len(left)} ChunkBatches are left over: {left[0].id} is {left[0].state}")
    if dead:
        problems.append(f"the dead list has {dead} chunks")
    return problems


def _compare(vectors: dict[str, NDArray[np.float32]], work: Work, *, real: bool) -> tuple[float, list[str]]:
    """The lowest similarity, and the chunks whose vector is wrong."""
    wrong = [chunk_id for chunk_id in work.expected if chunk_id not in vectors]
    ids = [chunk_id for chunk_id in work.expected if chunk_id in vectors]
    if not ids:
        return 0.0, wrong
    stored = np.stack([vectors[chunk_id] for chunk_id in ids])
    expected = _without_faults([work.expected[chunk_id] for chunk_id in ids], stored.shape[1], real=real)
    similarity = (stored.astype(np.float64) * expected).sum(axis=1)
    good = similarity >= COSINE if real else (stored == expected).all(axis=1)
    return float(similarity.min()), wrong + [ids[at] for at in np.flatnonzero(~good)]


def _without_faults(texts: Sequence[str], dimensions: int, *, real: bool) -> NDArray[np.float32]:
    """(n, dimensions) float32: what the same engine makes in one process that nothing happens to."""
    if not real:
        return np.stack([vector_of(text, dimensions) for text in texts])
    from chunkmill_workers.engine.engine import Engine

    return np.asarray(Engine.load("all-MiniLM-L6-v2", device="cpu").embed(texts))


def _ledger(db: sa.Engine) -> dict[str, object]:
    """What the product itself says of the run."""
    with db.connect() as conn:
        row = conn.execute(
            sa.text(
                "SELECT count(*) AS attempts, count(*) FILTER (WHERE outcome = 'died') AS deaths, "
                "coalesce(sum(recomputed), 0) AS recomputed, "
                "count(*) FILTER (WHERE recomputed > 0) AS attempts_recomputing, "
                "coalesce(max(at_risk), 0) AS at_risk_max, "
                "coalesce(sum(at_risk) FILTER (WHERE outcome = 'died'), 0) AS at_risk_of_the_dead FROM usage"
            )
        ).one()
        claims = conn.execute(sa.text("SELECT coalesce(sum(attempt), 0) FROM chunk_batches")).scalar_one()
    return {"claims": int(claims), **{name: int(value) for name, value in row._mapping.items()}}
