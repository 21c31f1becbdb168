"""The whole system, from texts to committed, searchable rows, beside its engine alone and beside a script."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import Chunk, Client
from chunkmill.cli.start.children import Child
from chunkmill.models import DEFAULT_MODEL
from chunkmill.system.python import module_command
from chunkmill_workers.benchmarks import contest
from chunkmill_workers.benchmarks.contest import Contender, Field, Ground
from chunkmill_workers.benchmarks.engine import gated
from chunkmill_workers.benchmarks.names import OUR, REFERENCE
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import Servers, temporary_stack
from chunkmill_workers.benchmarks.stats import OURS, Measurement, Target, add_ratios, cosines, in_turns
from chunkmill_workers.benchmarks.texts import docstrings

SYSTEM, BARE = "chunkmill, the whole system", "chunkmill, its engine alone"
GROUP, COLLECTION, TABLE = "text to vectors", "benchmark", "public.script_rows"
COLD_STARTS = 3


def run(*, rounds: int, quick: bool, say: Say, model: str = DEFAULT_MODEL, texts: Sequence[str] = ()) -> dict[str, Any]:
    """The result. One worker and one poller run, and are idle while others are measured. Each round is deleted."""
    texts = list(texts) or docstrings(200 if quick else 4_000)
    with contest.ground(model, quick=quick) as on:
        tokens = int(on.token_counts(texts).sum())
        word = on.half or "fp32"
        ours, peer = f"{OUR} {word}", f"sentence-transformers {word}"
        script_name = f"a script, {peer} + COPY"
        chosen = [candidate for candidate in on.peers() if candidate.name in {ours, REFERENCE, peer}]
        with (
            contest.enter(chosen, on, texts[: contest.SAMPLE], say) as field,
            temporary_stack() as servers,
            servers.client() as client,
            servers.db() as db,
        ):
            for contender in field.contenders:
                contender.running.ask("texts", name="texts", path=on.file("texts", texts))
            versions, settings = servers.versions, servers.settings
            cold = [_cold_start(servers, client, on.threads, say) for _ in range(1 if quick else COLD_STARTS)]
            script = Script(field[peer], db, on.model.dimensions)
            with _process(servers, "poller", on.threads), _process(servers, "worker", on.threads) as worker:
                say("cosine gate")
                _enqueue_and_wait(client, worker, texts)
                script.write()
                others = {BARE: ours, script_name: peer, REFERENCE: REFERENCE}
                measurements = _gate(field, _stored(client, len(texts)), others, on)
                ways: dict[str, Callable[[], float]] = {
                    SYSTEM: lambda: _enqueue_and_wait(client, worker, texts),
                    BARE: lambda: field[ours].embed("texts"),
                    script_name: script.write,
                    REFERENCE: lambda: field[REFERENCE].embed("texts"),
                }
                # Delete the last round's rows, so that they are not in the cache or in the script's table.
                before = {SYSTEM: lambda: client.delete(COLLECTION, all_chunks=True), script_name: script.empty}
                racing = {
                    measurement.name: ways[measurement.name] for measurement in measurements if not measurement.refused
                }
                seconds = in_turns(racing, rounds, say, before=lambda name: before.get(name, lambda: None)())
    for measured in measurements:
        measured.rounds = [tokens / taken for taken in seconds.get(measured.name, [])]
        measured.details["seconds"] = seconds.get(measured.name, [])
        if measured.rounds:
            measured.details["chunks_per_second"] = len(texts) / float(np.median(measured.details["seconds"]))
    add_ratios(measurements, REFERENCE, targets={SYSTEM: Target(3.4)})
    add_ratios(measurements, BARE, only=SYSTEM, targets={SYSTEM: Target(0.97)})
    add_ratios(measurements, script_name, only=SYSTEM)
    measurements.append(
        Measurement("cold start", "worker: process start to first vector", "s", cold, target=Target(5, at_most=True))
    )
    return document(
        "pipeline",
        measurements,
        versions=versions,
        settings={
            "model": on.folder.name,
            "device": on.device,
            "threads_per_process": on.threads,
            "texts": len(texts),
            "tokens": tokens,
            "chunk_batch_size": settings.chunk_batch_size,
            "parallel_batches": settings.embedding_parallel_batches,
            "clock": f"from the call of enqueue to the return of wait; {REFERENCE} and the engine: text to NumPy; the "
            "script: from the first text to its commit",
            "fsync": "on",
        },
        extra=field.as_json(),
    )


def _gate(field: Field, stored: NDArray[np.float32], others: Mapping[str, str], on: Ground) -> list[Measurement]:
    """The cosine gate for the vectors that the system stored, and for the contenders, which have other names here."""
    reference, _ = field[REFERENCE].vectors("texts", on.path)
    similarities = cosines(stored, reference)
    details = {"cosine_min": float(similarities.min()), "cosine_mean": float(similarities.mean())}
    measurements = [Measurement(GROUP, SYSTEM, "tokens/s", [], refused=OURS.refusal(**details), details=details)]
    for name, contender in others.items():
        vectors, _ = field[contender].vectors("texts", on.path)
        refused, details = gated(field[contender], vectors, reference)
        measurements.append(Measurement(GROUP, name, "tokens/s", [], refused=refused, details=details))
    return measurements


class Script:
    """A script as a person would write it: a library embeds all texts, and COPY writes them with their vectors."""

    def __init__(self, contender: Contender, db: sa.Engine, dimensions: int) -> None:
        self._contender = contender
        self._db = db
        self._url = db.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with db.begin() as conn:
            columns = f"id bigint PRIMARY KEY, content text, embedding vector({dimensions})"
            conn.execute(sa.text(f"CREATE TABLE {TABLE} ({columns})"))

    def write(self) -> float:
        """Seconds from the first text to the commit, in the contender's process."""
        asked = self._contender.running.ask("rows", name="texts", database_url=self._url, table=TABLE)
        return float(asked["seconds"])

    def empty(self) -> None:
        with self._db.begin() as conn:
            conn.execute(sa.text(f"TRUNCATE {TABLE}"))


@contextlib.contextmanager
def process(servers: Servers, kind: str, argv: Sequence[str], env: Mapping[str, str]) -> Iterator[Child]:
    """A process beside the servers. It is stopped by its process id, and the end of its log is shown if it fails."""
    child = Child(kind, argv, env=os.environ | servers.env | env, log=servers.folder / f"{kind}.log")
    try:
        yield child
    except Exception:
        print(*child.tail(), sep="\n", file=sys.stderr)
        raise
    finally:
        child.stop()


def _process(servers: Servers, kind: str, threads: int) -> contextlib.AbstractContextManager[Child]:
    """A worker or a poller, as a user starts it."""
    module = {
        "worker": ["chunkmill_workers", "worker", "-Q", "gpu"],
        "poller": ["chunkmill.cli", "poller"],
    }[kind]
    return process(servers, kind, module_command(*module), {"OMP_NUM_THREADS": str(threads)})


def _cold_start(servers: Servers, client: Client, threads: int, say: Say) -> float:
    """Seconds from the start of a worker's process to its first vector in this process. Its files are cached."""
    say("cold start of a worker")
    began = time.perf_counter()
    with _process(servers, "worker", threads):
        client.embed(["a first short text"], timeout=120)
        return time.perf_counter() - began


def _enqueue_and_wait(client: Client, worker: Child, texts: Sequence[str]) -> float:
    """Seconds until the job is complete and its rows are committed and searchable."""
    began = time.perf_counter()
    job = client.enqueue((Chunk(str(number), text) for number, text in enumerate(texts)), collection=COLLECTION)
    job = client.wait(job.id, timeout=3600, on_progress=lambda _: worker.require_alive())
    seconds = time.perf_counter() - began
    assert job.embedded == len(texts), f"{job.embedded} of {len(texts)} embedded: the rest was in the cache"
    return seconds


def _stored(client: Client, count: int) -> NDArray[np.float32]:
    """``(n, d)`` vectors as a search finds them, in the order of the texts."""
    stored = client.vectors(COLLECTION)
    return np.stack([stored[str(number)] for number in range(count)])
