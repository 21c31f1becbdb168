"""One seed: two jobs that share texts, workers and pollers that die at points the seed chooses, and the proof."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.states import JobState
from chunkmill.settings import Settings
from chunkmill_workers.provider.probe import PROBE
from tests.openai_chaos.odd import ODDITIES, Person, choose, start
from tests.openai_chaos.points import POLLER_POINTS, WORKER_POINTS
from tests.openai_server import OpenAIServer, text_hash, vector_for
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
MODEL, DIMENSIONS = "text-embedding-3-small", 16
LEASE_SECONDS = 1.5


@dataclass
class Report:
    seed: int
    contents: int
    kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    provider_batches: int = 0
    odd: list[str] = field(default_factory=list)
    """What the provider did wrong, beside the kills."""
    billed: int = 0
    """Contents that the server charged, as often as it did."""
    charged: int = 0
    """Contents that we booked because an answer confirmed them."""
    unconfirmed: dict[str, int] = field(default_factory=dict)
    """Contents that we booked without an answer, by kind: lost, or maybe charged."""
    booked: dict[str, int] = field(default_factory=dict)
    """Tokens that no answer confirmed, by kind."""
    months: int = 0
    """How many new months began because the budget held all work."""
    peak_mb: int = 0
    """The most memory that one process took."""
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "contents": self.contents,
            "kills": dict(sorted(self.kills.items())),
            "provider_batches": self.provider_batches,
            "odd": self.odd,
            "complete": not self.problems,
            "billed": self.billed,
            "charged": self.charged,
            "unconfirmed": self.unconfirmed,
            "unconfirmed_tokens": self.booked,
            "months": self.months,
            "peak_mb": self.peak_mb,
            "seconds": round(self.seconds, 1),
            "problems": self.problems,
        }


class Slot:
    """Keeps one process going: each life dies at the next point of its list, the last one lives."""

    def __init__(self, kind: str, points: list[tuple[str, int]], env: dict[str, str], folder: Path) -> None:
        self._kind = kind
        self._points = points
        self._env = env
        self._folder = folder
        self._lives = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.peak_mb = 0

    def tend(self) -> None:
        self._measure()
        if self._process is not None and self._process.poll() is None:
            return
        point = self._points.pop(0) if self._points else None
        more = {} if point is None else {"DIE_AT": point[0], "DIE_NTH": str(point[1])}
        log = self._folder / f"{self._kind}-{id(self)}-{self._lives}.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.openai_chaos.dying", self._kind, "-n", f"{self._kind}{id(self)}@%h"][
                    : None if self._kind == "worker" else 4
                ],
                cwd=ROOT, env=self._env | more, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        self._lives += 1

    def _measure(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            self.peak_mb = max(self.peak_mb, int(status.split("VmHWM:")[1].split()[0]) // 1024)

    def stop(self) -> None:
        self._measure()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
                return
            self._process.kill()
            self._process.wait(PATIENCE)


def run(
    settings: Settings, seed: int, *, kills: int, contents: int, odd: bool = False, limit_s: float = 2 * PATIENCE
) -> Report:
    """``settings`` name an empty, migrated database and an empty Redis. ``odd``: the provider misbehaves as well."""
    rng = random.Random(seed)
    # Every point is somebody's turn, whatever the number of seeds: they are dealt out in an order of the first seed.
    deck = list(WORKER_POINTS)
    random.Random(0).shuffle(deck)
    points = [(deck[(seed * kills + i) % len(deck)], rng.choice((1, 1, 2))) for i in range(kills)]
    report = Report(seed, contents)
    began = time.monotonic()
    with (
        OpenAIServer(in_progress_seconds=rng.choice((0.0, 0.3)), list_lag_seconds=0.3, seed=seed) as server,
        tempfile.TemporaryDirectory(prefix="cm-openai-") as name,
    ):
        folder = Path(name)
        report.odd = choose(rng) if odd else []
        start(server, report.odd, rng)
        env = _environment(settings, server, folder)
        mine = Settings.from_env(
            database_url=settings.require_database_url(), redis_url=settings.require_redis_url(), chunk_batch_size=40,
            embedding_model=MODEL, embedding_dimensions=DIMENSIONS,
        )  # fmt: skip
        db = create_db(mine.require_database_url(), role="proof")
        slots = [
            Slot("worker", points[0::2], env, folder),
            Slot("worker", points[1::2], env, folder),
            Slot(
                "poller",
                [(rng.choice(POLLER_POINTS), rng.randint(1, 3)) for _ in range(max(1, kills // 5))],
                env,
                folder,
            ),
        ]
        try:
            with Client(create_db(mine.require_database_url(), role="client"), Broker.connect(mine), mine) as client:
                person = Person(client, db, server, report.odd) if odd else None
                _work(client, slots, report, contents, person, deadline=began + limit_s)
                _prove(client, db, server, report, contents)
        finally:
            for slot in slots:
                slot.stop()
            report.peak_mb = max(slot.peak_mb for slot in slots)
            if report.problems:
                for log in sorted(folder.glob("*.log")):
                    sys.stderr.write(f"--- {log.name}\n{log.read_text()[-3000:]}\n")
            db.dispose()
        died = folder / "died"
        report.kills.update(died.read_text().split("\n")[:-1] if died.exists() else [])
    report.seconds = time.monotonic() - began
    return report


def texts_of(contents: int) -> dict[str, dict[str, str]]:
    """Two collections: the second has half of its texts from the first."""
    first = {f"a-{i}": f"the text with number {i}" for i in range(contents * 2 // 3)}
    rest = contents - len(first)
    second = {f"b-{i}": f"the text with number {len(first) - rest + i}" for i in range(2 * rest)}
    return {"first": first, "second": second}


def _work(
    client: Client, slots: list[Slot], report: Report, contents: int, person: Person | None, *, deadline: float
) -> None:
    jobs = []
    for collection, texts in texts_of(contents).items():
        for slot in slots:
            slot.tend()
        jobs.append(client.enqueue(texts.items(), collection=collection, route="openai"))
    while True:
        for slot in slots:
            slot.tend()
        if person is not None:
            person.look(jobs)
        states = [client.job(job.id).state for job in jobs]
        is_given_up = person is not None and JobState.FAILED in states  # the person retries it
        if all(state.is_final for state in states) and not is_given_up and not _open(client):
            break
        if time.monotonic() > deadline:
            report.problems.append(
                f"not done in time: jobs {[str(s) for s in states]}, ProviderBatches {_open(client)}"
            )
            return
        time.sleep(0.05)
    report.problems += [
        f"job {job.id} is {state}" for job, state in zip(jobs, states, strict=True) if state is not JobState.COMPLETED
    ]


def _open(client: Client) -> list[tuple[Any, ...]]:
    with client._db.begin() as conn:
        rows = conn.execute(sa.text("SELECT id, state, failures, error FROM provider_batches WHERE state <> 'closed'"))
        return [tuple(row) for row in rows]


def _prove(client: Client, db: sa.Engine, server: OpenAIServer, report: Report, contents: int) -> None:
    """Complete, right, and paid once."""
    wanted: set[str] = set()
    for collection, texts in texts_of(contents).items():
        wanted |= set(texts.values())
        if not client.audit(collection).complete:
            report.problems.append(f"the audit of {collection} is not empty")
        vectors = client.vectors(collection)
        wrong = [
            i
            for i, text in texts.items()
            if i not in vectors or not np.allclose(vectors[i], vector_for(text, DIMENSIONS), atol=1e-6)
        ]
        if wrong:
            report.problems.append(
                f"{len(wrong)} vectors of {collection} are missing or wrong, the first of {wrong[0]}"
            )
    bill = server.bill()
    bill.pop(text_hash(PROBE), None)  # each worker sends one before its first ProviderBatch
    twice = sum(times - 1 for times in bill.values())
    never = len({text_hash(text) for text in wanted} - bill.keys())
    with db.begin() as conn:
        one = conn.execute(
            sa.text("""
                SELECT (SELECT count(*) FROM provider_inputs) AS in_flight,
                       (SELECT coalesce(sum(contents), 0)::int FROM charges WHERE job_id <> 0) AS charged,
                       (SELECT coalesce(sum(tokens), 0)::int FROM charges WHERE job_id <> 0) AS tokens,
                       (SELECT coalesce(sum(contents), 0)::int FROM adjustments WHERE job_id <> 0) AS unconfirmed,
                       (SELECT count(*) FROM provider_batches) AS batches,
                       (SELECT count(*) FROM chunk_batches WHERE state = 'running') AS running
            """)
        ).one()
        rows = conn.execute(
            sa.text("""
                SELECT kind, sum(contents)::int AS contents, sum(tokens)::int AS tokens
                FROM adjustments
                WHERE job_id <> 0
                GROUP BY kind
            """)
        ).all()
        report.unconfirmed = {row.kind: row.contents for row in rows}
        report.booked = {row.kind: row.tokens for row in rows}
    report.provider_batches = one.batches
    if never or len(bill) != len(wanted):
        report.problems.append(f"{never} contents were never charged, {len(bill)} of {len(wanted)} in all")
    may_lose = any(ODDITIES[name].books for name in report.odd)
    if twice > one.unconfirmed or (one.unconfirmed and not may_lose):
        report.problems.append(f"{twice} charges too many, and {one.unconfirmed} contents booked without an answer")
    # Plain charges are those of probes, which belong to no job.
    batches = [charge for charge in server.charges() if charge["kind"] == "batch"]
    billed, inputs = sum(charge["tokens"] for charge in batches), sum(charge["inputs"] for charge in batches)
    report.billed, report.charged = inputs, one.charged
    for what, booked, more, right in (
        ("contents", one.charged, one.unconfirmed, inputs),
        ("tokens", one.tokens, sum(report.booked.values()), billed),
    ):
        # What may have been charged may not have been.
        wrong = booked > right or booked + more < right if may_lose else booked + more != right
        if wrong:
            report.problems.append(f"{what}: {booked} charged and {more} lost or maybe charged, but billed are {right}")
    left = {"in flight": one.in_flight, "running": one.running}
    report.problems += [f"{what}: {n} are left" for what, n in left.items() if n]
    files = [file for file in server.state()["files"] if file["purpose"] == "batch" or not may_lose]
    if files:
        report.problems.append(f"{len(files)} files are left at the provider")


def _environment(settings: Settings, server: OpenAIServer, folder: Path) -> dict[str, str]:
    return os.environ | {
        "DATABASE_URL": settings.require_database_url(),
        "REDIS_URL": settings.require_redis_url(),
        "LEASE_SECONDS": str(LEASE_SECONDS),
        "POLL_INTERVAL": "0.1",
        "DOORBELL_REPAIR_SECONDS": "1",
        "PREEMPTION_NOTICE": "off",
        "OPENAI_API_KEY": server.key,
        "OPENAI_BASE_URL": server.url,
        "OPENAI_GATHER_SECONDS": "0.2",
        "OPENAI_POLL_SECONDS": "0.3",
        "OPENAI_ADOPT_SECONDS": "5",  # the list is behind by 0.3 s, and a busy machine by some more
        "OPENAI_BATCH_MAX_INPUTS": "150",
        "OPENAI_REQUEST_INPUTS": "16",
        "DIED_LOG": str(folder / "died"),
    }
