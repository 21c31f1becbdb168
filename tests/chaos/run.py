"""One run: servers, workers and pollers of its own, the schedule over a job, and the proof in the end."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import sqlalchemy as sa

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db, migrate
from chunkmill.embedded import Stack, temporary_folder
from chunkmill.settings import Settings
from tests.chaos import server_faults  # noqa: F401 - adds its kinds
from tests.chaos.executions import count, read_passes
from tests.chaos.faults import KINDS
from tests.chaos.processes import AGAIN, CELERY_WORKER, SLOW_WORKER, SUPERVISOR, Crew, left_of
from tests.chaos.proof import Proof, prove
from tests.chaos.recovery import follow
from tests.chaos.report import Result, Screen, make_report
from tests.chaos.schedule import Planned, make_schedule
from tests.chaos.watcher import Look, Watcher
from tests.chaos.work import Feeder, Work, docstrings, made_up_texts
from tests.chaos.worker import FOLDER, HURRY, PAUSE
from tests.chaos.world import Hit, World
from tests.support.waiting import PATIENCE

LEASE_SECONDS = 3.0
FEED_SECONDS = 10.0
STALLED_SECONDS = PATIENCE
BEGIN_SECONDS = PATIENCE
"""These three only keep a broken build from hanging."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. ``argv`` is how to say it again."""

    seed: int
    faults: int
    chunks: int
    real: bool
    supervised: bool
    workers: int
    pollers: int
    kinds: tuple[str, ...]
    pause: float
    keep: bool
    argv: tuple[str, ...]

    @property
    def replay(self) -> str:
        return shlex.join(["python", "-m", "tests.chaos", *self.argv])


class Run:
    """``go`` returns the report; its ``problems`` are empty when every promise held."""

    def __init__(self, options: Options, screen: Screen) -> None:
        self._options = options
        self._screen = screen
        self.folder = temporary_folder("cm-chaos-")
        self._stack = Stack(self.folder / "stack")
        self._problems: list[str] = []
        self._results: list[Result] = []
        self._mutex = threading.Lock()
        self._server_turn = threading.Lock()

    def go(self) -> dict[str, Any]:
        options = self._options
        started = time.monotonic()
        schedule = make_schedule(options.seed, options.faults, options.kinds)
        self._screen.event("schedule", seed=options.seed, replay=options.replay, folder=str(self.folder))
        for planned in schedule:
            self._screen.event("planned", number=planned.number, kind=planned.kind, gap=planned.gap)
        with contextlib.ExitStack() as leaving:
            leaving.callback(self._stop_servers)
            status = self._stack.up()
            settings = Settings.from_env(
                database_url=status.database_url, redis_url=status.redis_url,
                chunk_batch_size=32, lease_seconds=LEASE_SECONDS,
            )  # fmt: skip
            url = settings.require_database_url()
            migrate(url)
            crew = self._crew(settings)
            leaving.callback(crew.stop)
            crew.start()
            db = create_db(url, role="chaos", pool_size=20).execution_options(isolation_level="AUTOCOMMIT")
            leaving.callback(db.dispose)
            client = leaving.enter_context(Client(create_db(url, role="client"), Broker.connect(settings), settings))
            work = self._work(client)
            work.add(options.chunks)
            table = _vector_table(db, work)
            watcher = Watcher(db, table)
            leaving.callback(watcher.end)
            watcher.start()
            world = World(self._stack, db, crew, watcher, LEASE_SECONDS, table, status.redis_url)
            self._await_begin(watcher, crew)
            feeder = Feeder(work, lambda: look.vectors if (look := watcher.latest) else 0)
            feeder.start()
            self._strike_all(world, work, feeder, schedule)
            feeder.end()
            self._problems += [feeder.problem] if feeder.problem else []
            self._await_end(world, work)
            watcher.end()
            self._problems += crew.stop()
            proof = prove(client, db, table, work, real=options.real)
            attempts = crew.starts
        self._problems += proof.problems
        self._check_exits(crew)
        self._problems += [f"left running: {process}" for process in left_of(f"{FOLDER}={self.folder}")]
        status = self._stack.status()
        self._problems += [f"{s.name} is left running (pid {s.pid})" for s in (status.postgres, status.redis) if s.pid]
        return self._report(work, proof, crew, attempts, time.monotonic() - started)

    def clean_up(self, *, failed: bool) -> None:
        """Remove the folder, unless somebody will want to read it."""
        if failed or self._options.keep:
            self._screen.event("kept", folder=str(self.folder), replay=self._options.replay)
        else:
            shutil.rmtree(self.folder)

    def _stop_servers(self) -> None:
        """For good: an interrupted run may have a fault under way that would start them again."""
        self._server_turn.acquire(timeout=STALLED_SECONDS)
        self._stack.down()

    def _crew(self, settings: Settings) -> Crew:
        """Workers and pollers as users start them: the environment says where, the command line says what."""
        options = self._options
        env = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
        env |= {
            "DATABASE_URL": settings.require_database_url(),
            "REDIS_URL": settings.require_redis_url(),
            "LEASE_SECONDS": str(LEASE_SECONDS),
            "POLL_INTERVAL": "0.2",
            "DOORBELL_REPAIR_SECONDS": "1",
            "CHUNK_BATCH_SIZE": "32",
            "EMBEDDING_DEVICE": "cpu",
            "EMBEDDING_PROFILE": "off",
            "EMBEDDING_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            FOLDER: str(self.folder),
            PAUSE: str(options.pause),
        }
        worker = SUPERVISOR if options.supervised else CELERY_WORKER if options.real else SLOW_WORKER
        return Crew(self.folder, env, workers=options.workers, pollers=options.pollers, worker=worker)

    def _work(self, client: Client) -> Work:
        seed = self._options.seed
        if self._options.real:
            return Work(client, docstrings(seed), reserve=200, refill=200, name=f"chaos-{seed}")
        return Work(client, made_up_texts(seed), reserve=300, refill=500, name=f"chaos-{seed}")

    def _await_begin(self, watcher: Watcher, crew: Crew) -> None:
        deadline = time.monotonic() + BEGIN_SECONDS
        while not ((look := watcher.latest) and look.vectors):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no vector after {BEGIN_SECONDS:g} s and no fault so far; see the logs")
            time.sleep(0.1)
        self._screen.event("begun", workers=[child.pid for child in crew.workers], vectors=look.vectors)

    def _strike_all(self, world: World, work: Work, feeder: Feeder, schedule: list[Planned]) -> None:
        threads = []
        for planned in schedule:
            time.sleep(planned.gap)
            feeder.wait(FEED_SECONDS)
            hit = Hit(planned.number)
            thread = threading.Thread(target=self._strike, args=(world, feeder, planned, hit), daemon=True)
            thread.start()
            threads.append(thread)
            while thread.is_alive() and not hit.begun.wait(0.2):
                pass
            self._show_progress(world, work)
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                self._show_progress(world, work)

    def _strike(self, world: World, feeder: Feeder, planned: Planned, hit: Hit) -> None:
        """One fault from its strike to its recovery; nothing it raises may end the run unseen."""
        kind = KINDS[planned.kind]
        progress = recovery = takeover = None
        try:
            with self._server_turn if kind.server else contextlib.nullcontext():
                if not kind.worker:
                    world.wait_busy()
                kind.strike(world, Random(planned.seed), hit)
            progress, recovery, takeover = follow(world.watcher, feeder, hit)
        except Exception as error:  # noqa: BLE001 - a fault that cannot strike or heal is a result
            hit.problems.append(f"{type(error).__name__}: {error}")
        result = Result(kind.name, hit, progress, recovery, takeover)
        with self._mutex:
            self._results.append(result)
            self._problems += [f"fault {planned.number} ({kind.name}): {problem}" for problem in hit.problems]
        self._screen.event(
            "fault", number=planned.number, kind=kind.name, survived=result.survived, progress_s=_rounded(progress),
            recovery_s=_rounded(recovery), takeover_s=_rounded(takeover), **hit.notes, problems=hit.problems,
        )  # fmt: skip

    def _await_end(self, world: World, work: Work) -> None:
        """Until nothing is open and every job has ended; the slow engines go fast from here on."""
        (self.folder / HURRY).touch()
        self._screen.event("all faults struck", chunks=len(work.expected), jobs=len(work.jobs))
        seen: tuple[int, int] | None = None
        moved = time.monotonic()
        while True:
            look = world.watcher.after(time.monotonic(), STALLED_SECONDS)
            if look is None:
                self._problems.append(f"Postgres did not answer for {STALLED_SECONDS:g} s after the last fault")
                return
            if look.open == 0 and _all_ended(world.db):
                return
            if (now := (look.vectors, look.open)) != seen:
                seen, moved = now, time.monotonic()
            elif time.monotonic() - moved > STALLED_SECONDS:
                self._problems.append(
                    f"nothing moved for {STALLED_SECONDS:g} s after the last fault: {look.vectors} vectors, "
                    f"{look.open} ChunkBatches open"
                )
                return
            self._show_progress(world, work)

    def _show_progress(self, world: World, work: Work) -> None:
        look: Look | None = world.watcher.latest
        with self._mutex:
            done, survived = len(self._results), sum(result.survived for result in self._results)
        self._screen.progress(
            vectors=look.vectors if look else 0, contents=len(work.contents), faults=done, survived=survived
        )

    def _check_exits(self, crew: Crew) -> None:
        for ended in crew.unasked():
            if ended.code not in AGAIN:
                self._problems.append(
                    f"{ended.name} (pid {ended.pid}) ended by itself with {ended.code}: {ended.log.name}"
                )

    def _report(self, work: Work, proof: Proof, crew: Crew, starts: int, seconds: float) -> dict[str, Any]:
        options = self._options
        counted = None
        if not options.real:
            counted = count(read_passes(self.folder), [result.hit.blow for result in self._results])
        results = sorted(self._results, key=lambda result: result.hit.number)
        return {
            "seed": options.seed,
            "engine": "real" if options.real else "slow",
            "supervised": options.supervised,
            "replay": options.replay,
            "machine": f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, {socket.gethostname()}",
            "seconds": round(seconds, 1),
            "chunks": len(work.expected),
            "contents": len(work.contents),
            "jobs": len(work.jobs),
            "enqueues_repeated": work.enqueues_repeated,
            "processes_started": starts,
            "unasked_exits": dict(Counter(f"{ended.name.partition('-')[0]} {ended.code}" for ended in crew.unasked())),
            "lowest_similarity": round(proof.lowest, 6),
            **make_report(results, counted, proof.ledger),
            "problems": self._problems,
        }


def _vector_table(db: sa.Engine, work: Work) -> str:
    with db.connect() as conn:
        space = conn.execute(sa.text("SELECT space_id FROM jobs WHERE id = :id"), {"id": work.jobs[0]}).scalar_one()
    return f"vectors_{space}"


def _all_ended(db: sa.Engine) -> bool:
    with db.connect() as conn:
        return conn.execute(
            sa.text("SELECT NOT EXISTS (SELECT FROM jobs WHERE state IN ('enqueueing', 'running'))")
        ).scalar_one()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)


def usable_kinds(kinds: list[str] | None, *, supervised: bool) -> tuple[str, ...]:
    """The named kinds, or all that can strike. Raises ValueError for a name that is none."""
    for name in kinds or ():
        if name not in KINDS:
            raise ValueError(f"there is no fault {name!r}; there are: {', '.join(KINDS)}")
    return tuple(kinds) if kinds else tuple(kind.name for kind in KINDS.values() if supervised or not kind.supervised)
