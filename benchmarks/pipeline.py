"""The whole system: texts to committed, searchable rows through queue, worker and poller, beside what it is made of."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app import Chunk, Client
from app.cli.children import Child
from app.models import DEFAULT_MODEL
from benchmarks import peers
from benchmarks.peers import REFERENCE
from benchmarks.report import Say, document
from benchmarks.servers import Servers, temporary_stack
from benchmarks.stats import Measurement, Target, add_ratios, interleave
from benchmarks.texts import docstrings

SYSTEM, BARE = "chunkmill, the whole system", "chunkmill, its engine alone"
COLLECTION = "benchmark"
COLD_STARTS = 3


def run(*, rounds: int, quick: bool, say: Say) -> dict[str, Any]:
    """One worker and one poller, which idle while the others run. The same texts every round, deleted in between."""
    threads = peers.use_all_cores()
    texts = docstrings(200 if quick else 4_000)
    say("loading models")
    engine, encode = peers.our_engine(), peers.sentence_transformer("fp32")
    say("starting Postgres and Redis")
    with temporary_stack() as servers, servers.client() as client:
        versions, settings = servers.versions, servers.settings
        cold = [_cold_start(servers, client, threads, say) for _ in range(1 if quick else COLD_STARTS)]
        with _process(servers, "poller", threads), _process(servers, "worker", threads) as worker:
            say("cosine gate")
            reference = encode(texts)
            bare = engine.embed(texts)
            tokens = int(np.minimum(bare.n_tokens, engine.max_tokens).sum())
            _enqueue_and_wait(client, worker, texts)
            vectors = {SYSTEM: _stored(client, len(texts)), BARE: bare.vectors, REFERENCE: reference}
            found = []
            for name, each in vectors.items():
                refused, facts = peers.gated(name, each, reference)
                found.append(Measurement("text to vectors", name, "tokens/s", [], refused=refused, facts=facts))
            ways = {
                SYSTEM: lambda: _enqueue_and_wait(client, worker, texts),
                BARE: lambda: engine.embed(texts),
                REFERENCE: lambda: encode(texts),
            }
            racing = {each.name: ways[each.name] for each in found if not each.refused}
            seconds = interleave(racing, rounds, say, before=lambda name: _forget(client) if name == SYSTEM else None)
    for measured in found:
        measured.rounds = [tokens / taken for taken in seconds.get(measured.name, [])]
        measured.facts["seconds"] = seconds.get(measured.name, [])
        if measured.rounds:
            measured.facts["chunks_per_second"] = len(texts) / float(np.median(measured.facts["seconds"]))
    add_ratios(found, REFERENCE, targets={SYSTEM: Target(3.4)})
    add_ratios(found, BARE, only=SYSTEM, targets={SYSTEM: Target(0.97)})
    found.append(
        Measurement("cold start", "worker: process start to first vector", "s", cold, target=Target(5, at_most=True))
    )
    return document(
        "pipeline",
        found,
        versions=versions,
        settings={
            "model": DEFAULT_MODEL,
            "device": engine.device,
            "dtype": engine.dtype,
            "threads_per_process": threads,
            "texts": len(texts),
            "tokens": tokens,
            "chunk_batch_size": settings.chunk_batch_size,
            "parallel_batches": settings.embedding_parallel_batches,
            "clock": f"from the call of enqueue to the return of wait; {REFERENCE} and the engine: text to NumPy",
            "fsync": "on",
        },
    )


@contextlib.contextmanager
def _process(servers: Servers, kind: str, threads: int) -> Iterator[Child]:
    """A worker or a poller, as a user starts it; stopped by its own process id."""
    module = {"worker": ["celery", "-A", "workers", "worker", "-Q", "gpu"], "poller": ["app.cli", "poller"]}[kind]
    env = os.environ | servers.env | {"OMP_NUM_THREADS": str(threads)}
    child = Child(kind, [sys.executable, "-m", *module], env=env, log=servers.folder / f"{kind}.log")
    try:
        yield child
    except Exception:
        print(*child.tail(), sep="\n", file=sys.stderr)
        raise
    finally:
        child.stop()


def _cold_start(servers: Servers, client: Client, threads: int, say: Say) -> float:
    """Seconds from the start of a worker's process to the first vector in this one. Its files are in the page cache."""
    say("cold start of a worker")
    began = time.perf_counter()
    with _process(servers, "worker", threads):
        client.embed(["a first short text"], timeout=120)
        return time.perf_counter() - began


def _enqueue_and_wait(client: Client, worker: Child, texts: Sequence[str]) -> None:
    job = client.enqueue((Chunk(str(number), text) for number, text in enumerate(texts)), collection=COLLECTION)
    job = client.wait(job.id, timeout=3600, on_progress=lambda _: worker.require_alive())
    assert job.embedded == len(texts), f"{job.embedded} of {len(texts)} embedded: the rest was in the cache"


def _stored(client: Client, count: int) -> NDArray[np.float32]:
    """``(n, d)`` vectors as a search finds them, in the order of the texts."""
    stored = client.vectors(COLLECTION)
    return np.stack([stored[str(number)] for number in range(count)])


def _forget(client: Client) -> None:
    """Delete the collection with its contents and vectors, so that nothing of the last round is in the cache."""
    client.delete(COLLECTION)
