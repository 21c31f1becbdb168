"""What enqueue costs: chunks per second, new and cached, and the memory that a million chunks need.

The producer runs in a process of its own, ``python -m chunkmill_workers.benchmarks.enqueue``, to measure its memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from chunkmill import Chunk, Client
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.domain.chunks import content_hash
from chunkmill.models import resolve_spec
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors
from chunkmill.system.python import module_command
from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import Servers, temporary_stack
from chunkmill_workers.benchmarks.stats import Measurement, Target, interleave, slope
from chunkmill_workers.benchmarks.texts import corpus, unique_chunks

NEW, CACHED, UNCHANGED = "all new", "all cached, another collection", "all cached, the same collection again"
TARGETS = {NEW: Target(20_000), CACHED: Target(50_000), UNCHANGED: Target(50_000)}
PRODUCER_MIB, REDIS_MIB = Target(200, at_most=True), Target(50, at_most=True)
SAMPLE_EVERY = 50_000
MIB = 2**20


def run(*, rounds: int, quick: bool, say: Say) -> dict[str, Any]:
    """Three ways to enqueue, interleaved, each in a fresh process against the same servers, without a worker."""
    count = 5_000 if quick else 50_000
    say("starting Postgres and Redis")
    with temporary_stack() as servers:
        say(f"storing {count:,} vectors to find in the cache")
        _fill_cache(servers, count)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in TARGETS}

        def contend(name: str) -> None:
            done = len(answers[name])
            first = (done + 1) * count if name == NEW else 0
            collection = "cached" if name == UNCHANGED else f"{name} {done}"
            answers[name].append(_produce(servers, count, first, collection))
            assert answers[name][-1]["cached"] == (0 if name == NEW else count)

        interleave({name: lambda name=name: contend(name) for name in TARGETS}, rounds, say)  # type: ignore[misc]
        redis_memory, versions = servers.redis_memory(), servers.versions
    group = f"{count:,} chunks"
    measurements = [
        Measurement(
            group, name, "chunks/s", [count / answer["seconds"] for answer in answers[name]], target=TARGETS[name]
        )
        for name in TARGETS
    ]
    measurements += [
        Measurement(group, f"producer's peak memory, {name}", "MiB", peaks, target=PRODUCER_MIB)
        for name in (NEW, CACHED)
        if (peaks := [answer["peak_kib"] / 1024 for answer in answers[name] if answer["peak_kib"]])
    ]
    measurements.append(_redis_peak(group, redis_memory))
    return document("enqueue", measurements, settings=_settings(count), versions=versions)


def run_million(*, rounds: int, quick: bool, say: Say) -> dict[str, Any]:
    """One enqueue of a million new chunks from a generator. Memory is measured every 50,000 chunks."""
    count = 200_000 if quick else 1_000_000
    say("starting Postgres and Redis")
    with temporary_stack() as servers:
        say(f"enqueueing {count:,} chunks")
        answer = _produce(servers, count, 0, "million", say=say)
        redis_memory, versions = servers.redis_memory(), servers.versions
    group = f"{count:,} chunks from a generator"
    measurements = [Measurement(group, NEW, "chunks/s", [count / answer["seconds"]], target=TARGETS[NEW])]
    if answer["peak_kib"]:
        measurements.append(
            Measurement(group, "producer's peak memory", "MiB", [answer["peak_kib"] / 1024], target=PRODUCER_MIB)
        )
    for phase in ("reading", "committing"):
        # In the first fifth buffers and allocators grow. Growth after that is growth with the job.
        late = [s for s in answer["samples"] if s["phase"] == phase and s["chunks"] > count / 5 and s["rss_kib"]]
        grown = slope([s["chunks"] / 100_000 for s in late], [s["rss_kib"] / 1024 for s in late])
        if grown is not None:
            name = f"producer's memory growth while {phase}, per 100,000 chunks"
            measurements.append(Measurement(group, name, "MiB", [grown]))
    committed = [sample for sample in answer["samples"] if sample["phase"] == "committing"]
    for name, part in (("first", committed[: len(committed) // 4 + 1]), ("last", committed[-len(committed) // 4 :])):
        if len(part) > 1:
            pace = (part[-1]["chunks"] - part[0]["chunks"]) / (part[-1]["seconds"] - part[0]["seconds"])
            measurements.append(Measurement(group, f"{NEW}, committing the {name} quarter", "chunks/s", [pace]))
    measurements.append(_redis_peak(group, redis_memory))
    return document(
        "enqueue-million",
        measurements,
        settings=_settings(count),
        versions=versions,
        extra={"samples": answer["samples"]},
    )


def _settings(count: int) -> dict[str, Any]:
    settings = Settings.from_env()
    return {
        "chunks": count,
        "mean_text_bytes": round(sum(len(chunk.text.encode()) for chunk in corpus()) / len(corpus())),
        "metadata_keys": 2,
        "enqueue_window": settings.enqueue_window,
        "chunk_batch_size": settings.chunk_batch_size,
        "workers": 0,
    }


def _redis_peak(group: str, memory: dict[str, Any]) -> Measurement:
    return Measurement(group, "Redis' peak memory", "MiB", [memory["used_memory_peak"] / MIB], target=REDIS_MIB)


def _fill_cache(servers: Servers, count: int) -> None:
    """Enqueue into the collection ``cached`` and write the vectors that a worker would."""
    spec = resolve_spec(servers.settings.embedding_model)
    with servers.client() as client, servers.db() as db:
        client.enqueue(unique_chunks(corpus(), count), collection="cached")
        hashes = [content_hash(chunk.text) for chunk in unique_chunks(corpus(), count)]
        with db.begin() as conn:
            space = registry.register(conn, spec)
            for first in range(0, count, 4096):
                part = hashes[first : first + 4096]
                n_tokens, truncated = np.full(len(part), 64, np.int32), np.zeros(len(part), np.bool_)
                vectors = np.ones((len(part), spec.dimensions), np.float32)
                write_vectors(conn, space, spec.fingerprint, part, n_tokens, truncated, vectors)


def _produce(servers: Servers, count: int, first: int, collection: str, say: Say | None = None) -> dict[str, Any]:
    """Enqueue in a fresh process. Returns its answer, with all measurements of its memory in ``samples``."""
    arguments = module_command("chunkmill_workers.benchmarks.enqueue", str(count), str(first), collection)
    env = os.environ | servers.env
    with subprocess.Popen(
        arguments, env=env, cwd=machine.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin
        try:
            # It goes in by stdin, because reading it from the library's source would need more memory than enqueue.
            json.dump([(chunk.id, chunk.text, dict(chunk.metadata)) for chunk in corpus()], child.stdin)
            child.stdin.close()
            child.stdin = None
            samples = list(_samples(servers, child)) if say else []
            said, _ = child.communicate()
        except BaseException:
            child.kill()
            raise
    assert child.returncode == 0, f"the producer exited with code {child.returncode}; its error is above"
    answer: dict[str, Any] = json.loads(said)
    answer["samples"] = answer.pop("reading") + samples
    return answer


def _samples(servers: Servers, child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Memory of the producer and of Redis each time that another 50,000 chunks are committed."""
    seen, began = 0, time.perf_counter()
    with servers.client() as client:
        while child.poll() is None:
            time.sleep(0.2)
            jobs = client.jobs(1)
            if jobs and jobs[0].chunks >= seen + SAMPLE_EVERY:
                seen = jobs[0].chunks
                rss, used = machine.memory_kib(child.pid, "VmRSS"), servers.redis_memory()["used_memory"]
                seconds = round(time.perf_counter() - began, 2)
                yield {
                    "phase": "committing", "chunks": seen, "rss_kib": rss, "redis_bytes": used, "seconds": seconds,
                }  # fmt: skip


def _main(count: int, first: int, collection: str, route: str = "local") -> None:
    """Enqueue, and print time and memory as JSON. This is the main function of the producer's process."""
    settings = Settings.from_env()
    reading: list[dict[str, Any]] = []
    originals = [Chunk(*fields) for fields in json.load(sys.stdin)]

    def chunks() -> Iterator[Chunk]:
        for number, chunk in enumerate(unique_chunks(originals, count, first=first)):
            if number % SAMPLE_EVERY == 0:
                reading.append({"phase": "reading", "chunks": number, "rss_kib": machine.memory_kib("self", "VmRSS")})
            yield chunk

    with Client(
        create_db(settings.require_database_url(), role="client"), Broker.connect(settings), settings
    ) as client:
        client.jobs(1)  # connects
        began = time.perf_counter()
        job = client.enqueue(chunks(), collection=collection, route=route)
        seconds = time.perf_counter() - began
    peak = machine.memory_kib("self", "VmHWM")
    print(json.dumps({"seconds": seconds, "cached": job.cached, "peak_kib": peak, "reading": reading}))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
