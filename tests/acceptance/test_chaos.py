"""A short `make chaos`, with the same processes, faults and proof, and tests that the proof sees what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors
from tests.chaos.proof import prove
from tests.chaos.work import Work, made_up_texts
from tests.chaos.worker import vector_of
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
KINDS = (
    "worker-killed,worker-drained,worker-preempted,worker-frozen,poller-killed,redis-emptied,redis-disconnected,"
    "postgres-crashed"
)


@pytest.mark.slow
def test_eight_faults_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.chaos", "--seed", "4", "--faults", "8", "--chunks", "800"]
    run = subprocess.Popen(
        [*command, "--kinds", KINDS, "--json", str(path)],
        cwd=ROOT, env=os.environ | {"CHAOS_STOP_SECONDS": str(PATIENCE)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = run.communicate(timeout=3 * PATIENCE)
    finally:
        run.terminate()  # on SIGTERM it stops what it has started
        run.wait(PATIENCE)
    assert run.returncode == 0, output
    report = json.loads(path.read_text())
    assert (report["faults"], report["survived"], report["problems"]) == (8, 8, [])
    assert report["chunks"] >= 800
    # This is counted outside the product: every content went through an engine, and nothing else did.
    assert report["texts_executed"] - report["texts_recomputed"] == report["contents"]


def test_the_proof_sees_what_is_wrong(client: Client, db: sa.Engine) -> None:
    work = Work(client, made_up_texts(1), reserve=0, refill=0, name="proof")
    work.add(60)
    autocommit = db.execution_options(isolation_level="AUTOCOMMIT")

    def problems() -> str:
        return "; ".join(prove(client, autocommit, "vectors_1", work, real=False).problems)

    assert "job 301 is running" in problems()
    assert "the audit misses 60 chunks" in problems()
    assert "1 ChunkBatches are left over" in problems()
    texts = sorted(work.contents)
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    with db.begin() as conn:
        space = registry.get(conn, 1)
        n = len(texts)
        vectors = np.stack([vector_of(text, space.spec.dimensions) for text in texts])
        write_vectors(conn, space, space.spec.fingerprint, hashes, np.ones(n, np.int32), np.zeros(n, np.bool_), vectors)
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'completed'"))
        finish_if_done(conn, 301, space)
    assert problems() == ""
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE vectors_1 SET embedding = embedding * embedding WHERE content_hash = :hash"),
            {"hash": hashes[0]},
        )
    assert "1 chunks have no vector or another than without faults" in problems()
    with db.begin() as conn:
        conn.execute(sa.text("DELETE FROM vectors_1 WHERE content_hash = :hash"), {"hash": hashes[0]})
    assert "the audit misses 1 chunks" in problems()
    assert "58 vectors of 58 contents were written, and 59 contents were enqueued" in problems()
