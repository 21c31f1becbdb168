"""The steps of the Batch API: how 120,000 contents are split, how long each step takes, and how much memory it needs.

Producer, worker and poller are processes of their own. The provider is ``tests/openai_server``, which answers at once,
so the times are those of our own steps. It is in a checkout only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from chunkmill.cli.start.children import Child
from chunkmill.domain.states import JobState, ProviderBatchState
from chunkmill.system.python import module_command
from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.pipeline import process
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import Servers, temporary_stack
from chunkmill_workers.benchmarks.stats import Measurement, Target
from chunkmill_workers.benchmarks.texts import corpus

MODEL, DIMENSIONS = "text-embedding-3-small", 1536
FULL = 50_000
GROWTH_MIB = Target(40, at_most=True)
"""A tenth of the size of 50,000 results as they arrive. Reading sometimes takes 20 MiB more, and frees them again."""
LOOK_S = 0.2
PARTS = ("worker", "poller", "producer")
PHASES = {
    ProviderBatchState.GATHERING: "gather: count tokens, pack, put in flight",
    ProviderBatchState.GATHERED: "upload the file",
    ProviderBatchState.SUBMITTED: "at the provider, and until it was looked at",
    ProviderBatchState.COLLECTING: "download, decode and write",
}


def run(*, quick: bool, say: Say) -> dict[str, Any]:
    """The result of two jobs. The first is one full ProviderBatch, read alone; the second is split into three."""
    from chunkmill_workers.provider.probe import PROBE
    from tests.openai_server import OpenAIServer, text_hash

    full = 2_000 if quick else FULL
    count = full * 12 // 5
    with temporary_stack() as servers, OpenAIServer(fast_tokens=True) as provider, servers.db() as db:
        settings = {
            "OPENAI_API_KEY": provider.key,
            "OPENAI_BASE_URL": provider.url,
            "OPENAI_BATCH_MAX_INPUTS": str(full),
            "OPENAI_MAX_ENQUEUED_TOKENS": "100000000",
            "OPENAI_POLL_SECONDS": "6",
            "EMBEDDING_MODEL": MODEL,
        }
        alone = _job(servers, db, settings | {"OPENAI_PARALLEL_REQUESTS": "1"}, full, 0, say)
        first = len(_split(db, 0, full, full))
        samples = _job(servers, db, settings, count, full, say)
        batches = _split(db, first, full, count)
        stored = _count(db, f"SELECT count(*) FROM vectors_1 WHERE vector_dims(embedding) = {DIMENSIONS}")
        probe = text_hash(PROBE)  # each worker sends it before its first ProviderBatch
        bill = Counter(times for text, times in provider.bill().items() if text != probe)
        versions = servers.versions
    assert stored == full + count, f"{stored} of {full + count} vectors are stored"
    assert bill == {1: full + count}, f"how often each content was paid for: {bill}"
    return document(
        "provider",
        [*_growth(alone, full), *_peaks(samples, count), *_times(samples, batches, count)],
        versions=versions,
        settings={"contents": count, "dimensions": DIMENSIONS, "workers": 1, "tasks_at_a_time": 4, "fsync": "on"},
        extra={"provider_batches": batches, "alone": _brief(alone), "samples": _brief(samples)},
    )


def _job(
    servers: Servers, db: sa.Engine, settings: Mapping[str, str], count: int, first: int, say: Say
) -> list[dict[str, Any]]:
    """Samples of a job, one every 0.2 s. A producer enqueues new contents, with a fresh worker and poller."""
    worker = module_command("chunkmill_workers", "worker", "-Q", "openai")
    say("starting a worker and a poller")
    with (
        process(servers, "poller", module_command("chunkmill.cli", "poller"), settings) as polling,
        process(servers, "worker", worker, settings) as working,
    ):
        children = {"worker": working, "poller": polling}
        return list(_follow(servers, db, settings, count, first, children, say))


def _follow(
    servers: Servers,
    db: sa.Engine,
    settings: Mapping[str, str],
    count: int,
    first: int,
    children: Mapping[str, Child],
    say: Say,
) -> Iterator[dict[str, Any]]:
    """A sample every 0.2 s, while a producer enqueues and until every ProviderBatch is closed."""
    arguments = module_command("chunkmill_workers.benchmarks.enqueue", str(count), str(first), "paid", "openai")
    env = os.environ | servers.env | settings
    before = _count(db, "SELECT count(*) FROM jobs")
    with subprocess.Popen(
        arguments, env=env, cwd=machine.ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as producer:
        assert producer.stdin
        json.dump([(chunk.id, chunk.text, dict(chunk.metadata)) for chunk in corpus()], producer.stdin)
        producer.stdin.close()
        pids = {name: child.pid for name, child in children.items()} | {"producer": producer.pid}
        began = time.perf_counter()
        said = 0.0
        while True:
            sample = {"seconds": round(time.perf_counter() - began, 2), **_look(db, pids, before + 1)}
            if sample["seconds"] >= said:
                say(f"{sum(sample['written'].values()):,} of {count:,} written; {sample['states']}")
                said = sample["seconds"] + 5
            yield sample
            if sample["state"] == JobState.COMPLETED and set(sample["states"].values()) == {ProviderBatchState.CLOSED}:
                return
            assert sample["state"] in (None, "enqueueing", "running", "completed"), f"the job is {sample['state']}"
            assert producer.poll() in (None, 0), "the producer failed; its error is above"
            for child in children.values():
                child.require_alive()
            time.sleep(LOOK_S)


def _look(db: sa.Engine, pids: Mapping[str, int], job_id: int) -> dict[str, Any]:
    """A sample: the job's own ProviderBatches, and the memory of each process in MiB."""
    with db.begin() as conn:
        rows = conn.execute(
            sa.text("""
                SELECT p.id, p.state, p.n_written
                FROM provider_batches p
                WHERE p.state = :gathering OR EXISTS (
                    SELECT FROM provider_batch_members m JOIN chunk_batches b ON b.id = m.chunk_batch_id
                    WHERE m.provider_batch_id = p.id AND b.job_id = :job
                )
                ORDER BY p.id
            """),
            {"job": job_id, "gathering": ProviderBatchState.GATHERING},
        ).all()
        state = conn.execute(sa.text("SELECT state FROM jobs WHERE id = :job"), {"job": job_id}).scalar()
    memory = {part: machine.memory_kib(pid, "VmRSS") for part, pid in pids.items()}
    return {
        "state": state,
        "states": {row.id: row.state for row in rows},
        "written": {row.id: row.n_written for row in rows},
        **{part: None if kib is None else round(kib / 1024, 1) for part, kib in memory.items()},
    }


def _split(db: sa.Engine, after: int, full: int, count: int) -> list[dict[str, Any]]:
    """The ProviderBatches after ``after``. All but the last are full, all contents written, and each created once."""
    with db.begin() as conn:
        rows = conn.execute(
            sa.text("""
                SELECT id, n_contents, n_inputs, n_requests, n_tokens, n_bytes, n_written, creates, downloads
                FROM provider_batches
                WHERE id > :after
                ORDER BY id
            """),
            {"after": after},
        )
        batches = [dict(row._mapping) for row in rows]
    sizes = [batch["n_contents"] for batch in batches]
    assert sizes == [full] * (count // full) + [count % full] * (count % full > 0), f"split into {sizes}"
    assert sizes == [batch["n_written"] for batch in batches], batches
    assert {batch["creates"] for batch in batches} == {1}, batches
    return batches


def _count(db: sa.Engine, query: str) -> int:
    with db.begin() as conn:
        return int(conn.execute(sa.text(query)).scalar_one())


def _brief(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples with the fields that the picture needs."""
    return [
        {
            "seconds": sample["seconds"],
            "written": sum(sample["written"].values()),
            **{part: sample[part] for part in PARTS},
        }
        for sample in samples
    ]


def _growth(samples: Sequence[dict[str, Any]], full: int) -> list[Measurement]:
    """How much the worker's memory grows between the first tenth of the results and the last: medians of samples."""
    reading = [s for s in samples if ProviderBatchState.COLLECTING in s["states"].values()]
    first = [s["worker"] for s in reading if 0 < sum(s["written"].values()) <= full / 10]
    last = [s["worker"] for s in reading if sum(s["written"].values()) >= full * 9 / 10]
    group = f"memory while {full:,} results of {DIMENSIONS:,} dimensions are read, nothing beside it"
    measurements = [Measurement(group, "worker's peak", "MiB", [max(s["worker"] for s in reading)])]
    if first and last:
        grown = statistics.median(last) - statistics.median(first)
        name = "worker's growth from the first tenth to the last"
        measurements.append(Measurement(group, name, "MiB", [round(grown, 1)], target=GROWTH_MIB))
    return measurements


def _peaks(samples: Sequence[dict[str, Any]], count: int) -> list[Measurement]:
    group = f"memory, {count:,} contents of {DIMENSIONS:,} dimensions, four steps at a time"
    return [
        Measurement(group, f"{part}'s peak", "MiB", [max(s[part] for s in samples if s[part] is not None)])
        for part in PARTS
    ]


def _times(samples: Sequence[dict[str, Any]], batches: Sequence[dict[str, Any]], count: int) -> list[Measurement]:
    """How long each step took, to 0.2 s. Several ProviderBatches are in work at a time and share the cores."""
    group = f"{count:,} contents, ProviderBatches of {', '.join(str(batch['n_contents']) for batch in batches)}"
    measurements = [Measurement(group, "from enqueue to all vectors written", "s", [_all_written(samples, count)])]
    measurements.append(Measurement(group, "contents", "contents/s", [count / measurements[0].rounds[0]]))
    for state, name in PHASES.items():
        seconds = [_seconds_in(samples, batch["id"], state) for batch in batches]
        measurements.append(Measurement(group, f"{name}, each ProviderBatch", "s", seconds))
    writing = [s["seconds"] for s in samples if ProviderBatchState.COLLECTING in s["states"].values()]
    if len(writing) > 1:
        rate = count / (writing[-1] - writing[0] + LOOK_S)
        measurements.append(Measurement(group, "download, decode and write, all together", "rows/s", [rate]))
    return measurements


def _all_written(samples: Sequence[dict[str, Any]], count: int) -> float:
    return float(next(s["seconds"] for s in samples if sum(s["written"].values()) == count))


def _seconds_in(samples: Sequence[dict[str, Any]], batch_id: int, state: ProviderBatchState) -> float:
    at = [s["seconds"] for s in samples if s["states"].get(batch_id) == state]
    return round(at[-1] - at[0] + LOOK_S, 1) if at else 0.0
