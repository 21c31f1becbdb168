"""A million chunks through the whole system: which memory grows with the job.

The producer, a worker and a poller are processes of their own. The worker's engine takes no time, so only queue, ledger
and writes are measured. The producer is faster than the worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.states import JobState
from chunkmill.system.python import module_command
from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.pipeline import process
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import Servers, temporary_stack
from chunkmill_workers.benchmarks.stats import Measurement, Target, slope
from chunkmill_workers.benchmarks.texts import corpus

PRODUCER_MIB, REDIS_MIB = Target(200, at_most=True), Target(50, at_most=True)
LOOK_S = 1.0
MIB = 2**20


def run(*, rounds: int, quick: bool, say: Say) -> dict[str, Any]:
    """The result: the memory of each part every second, from the first chunk to the end of the job."""
    count = 50_000 if quick else 1_000_000
    with temporary_stack() as servers:
        say("starting a worker and a poller")
        with (
            process(servers, "poller", module_command("chunkmill.cli", "poller"), {}) as poller,
            process(servers, "worker", module_command("chunkmill_workers.benchmarks.instant_worker"), {}) as worker,
        ):
            began = time.perf_counter()
            samples = list(_follow(servers, count, {"worker": worker.pid, "poller": poller.pid}, say))
            seconds = time.perf_counter() - began
        versions = servers.versions
    group = f"{count:,} chunks, whole system, an engine that takes no time"
    measurements = [Measurement(group, "enqueued, embedded and committed", "chunks/s", [count / seconds])]
    targets = {"producer": PRODUCER_MIB, "Redis": REDIS_MIB}
    for part in ("producer", "worker", "poller", "Redis"):
        seen = [sample for sample in samples if sample[part] is not None]
        peak = max(sample[part] for sample in seen)
        measurements.append(Measurement(group, f"{part}'s peak memory", "MiB", [peak], target=targets.get(part)))
        # In the first fifth buffers and allocators grow. Growth after that is growth with the job.
        late = [sample for sample in seen if sample["seconds"] > seconds / 5]
        grown = slope([sample["embedded"] / 100_000 for sample in late], [sample[part] for sample in late])
        if grown is not None:
            measurements.append(Measurement(group, f"{part}'s growth per 100,000 chunks embedded", "MiB", [grown]))
    most = max(sample["doorbells"] for sample in samples)
    measurements.append(Measurement(group, "most doorbells in Redis", "doorbells", [most]))
    settings = {"chunks": count, "workers": 1, "chunk_batch_size": servers.settings.chunk_batch_size}
    return document("million", measurements, settings=settings, versions=versions, extra={"samples": samples})


def _follow(servers: Servers, count: int, pids: Mapping[str, int], say: Say) -> Iterator[dict[str, Any]]:
    """A sample every second, while a producer enqueues and until the job is complete."""
    arguments = module_command("chunkmill_workers.benchmarks.enqueue", str(count), "0", "million")
    with (
        subprocess.Popen(
            arguments,
            env=os.environ | servers.env,
            cwd=machine.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as producer,
        servers.db() as db,
        servers.client() as client,
    ):
        assert producer.stdin
        json.dump([(chunk.id, chunk.text, dict(chunk.metadata)) for chunk in corpus()], producer.stdin)
        producer.stdin.close()
        began = time.perf_counter()
        while True:
            sample = _look(servers, db, {**pids, "producer": producer.pid}) | {
                "seconds": round(time.perf_counter() - began, 1)
            }
            say(f"{sample['embedded']:,} of {count:,} embedded")
            yield sample
            jobs = client.jobs(1)
            if jobs and jobs[0].state.is_final:
                assert (jobs[0].state, jobs[0].embedded) == (JobState.COMPLETED, count), jobs[0]
                return
            assert producer.poll() in (None, 0), "the producer failed; its error is above"
            time.sleep(LOOK_S)


def _look(servers: Servers, db: sa.Engine, pids: Mapping[str, int]) -> dict[str, Any]:
    with db.begin() as conn:
        embedded = conn.execute(sa.text("SELECT coalesce(sum(n_embedded), 0) FROM chunk_batches")).scalar_one()
    with servers.client() as client:
        doorbells = sum(client._broker.queued_doorbells().values())
    memory = {part: machine.memory_kib(pid, "VmRSS") for part, pid in pids.items()}
    return {
        "embedded": int(embedded),
        "doorbells": doorbells,
        "Redis": round(servers.redis_memory()["used_memory"] / MIB, 2),
        **{part: None if kib is None else round(kib / 1024, 1) for part, kib in memory.items()},
    }
