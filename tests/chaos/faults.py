"""The kinds of fault. Each strikes, waits out what it does, and heals; recovery is watched by ``tests.chaos.run``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from signal import SIGCONT, SIGKILL, SIGSEGV, SIGSTOP, SIGTERM, Signals

from tests.chaos.processes import AT_ONCE, STOP_SECONDS, Child
from tests.chaos.world import CannotStrike, Hit, World, kill, wait_gone

Strike = Callable[[World, Random, Hit], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """``server``: only one such fault at a time, for they share servers that have to come back. ``supervised``: it
    strikes where workers have a supervisor."""

    name: str
    does: str
    strike: Strike
    server: bool
    supervised: bool

    @property
    def worker(self) -> bool:
        """It chooses a worker itself."""
        return "worker" in self.name or self.supervised


KINDS: dict[str, Kind] = {}


def kind(name: str, does: str, *, server: bool = False, supervised: bool = False) -> Callable[[Strike], Strike]:
    def register(strike: Strike) -> Strike:
        KINDS[name] = Kind(name, does, strike, server, supervised)
        return strike

    return register


@kind("worker-killed", "SIGKILL to a worker")
def worker_killed(world: World, random: Random, hit: Hit) -> None:
    _end_worker(world, random, hit, SIGKILL)


@kind("worker-crashed", "SIGSEGV to a worker, as from a broken kernel or driver")
def worker_crashed(world: World, random: Random, hit: Hit) -> None:
    _end_worker(world, random, hit, SIGSEGV)


def _end_worker(world: World, random: Random, hit: Hit, how: Signals) -> None:
    with world.victim(random) as (child, pid):
        child.asked = not child.supervised
        hit.pids.add(pid)
        hit.strikes()
        kill(pid, how)
        hit.is_healed()
        world.note_held(hit)


@kind("all-workers-killed", "SIGKILL to every worker at once")
def all_workers_killed(world: World, random: Random, hit: Hit) -> None:
    with world.victim(random) as (_, first):
        doomed = {child: pid for child in world.crew.workers if (pid := child.worker_pid()) is not None}
        hit.pids |= {first, *doomed.values()}
        hit.strikes()
        for child, pid in doomed.items():
            child.asked = not child.supervised
            kill(pid, SIGKILL)
        hit.is_healed()
        hit.notes["killed"] = len(doomed)
        world.note_held(hit)


@kind("worker-drained", "SIGTERM to a worker: it must end with 0 in time")
def worker_drained(world: World, random: Random, hit: Hit) -> None:
    with world.victim(random) as (child, pid):
        child.asked = True
        hit.strikes()
        child.send(SIGTERM)
        _await_drain(world, child, pid, hit)


@kind("worker-preempted", "the cloud says that a worker's machine is taken: it must end with 0 in time")
def worker_preempted(world: World, random: Random, hit: Hit) -> None:
    with world.victim(random) as (child, pid):
        machine = world.crew.machines[child.name]
        child.asked = True
        hit.strikes()
        machine.preempt()
        try:
            _await_drain(world, child, pid, hit)
        finally:
            machine.set_value("FALSE")  # the next one is another machine


def _await_drain(world: World, child: Child, pid: int, hit: Hit) -> None:
    hit.pids.add(pid)
    code = child.wait(STOP_SECONDS)
    hit.is_healed()
    hit.notes |= {"exit": code, "drain_s": round(hit.healed - hit.struck, 2)}
    if code is None:
        hit.problems.append(f"{child.name} (pid {pid}) still ran {STOP_SECONDS:g} s later")
        child.send(SIGKILL)
    elif code != 0:
        hit.problems.append(f"the drain of {child.name} (pid {pid}) ended with {code}, not 0")
    world.note_held(hit)


@kind("supervisor-killed", "SIGKILL to a supervisor: its worker must go, too", supervised=True)
def supervisor_killed(world: World, random: Random, hit: Hit) -> None:
    with world.victim(random) as (child, pid):
        child.asked = True
        hit.pids.add(pid)
        hit.strikes()
        child.send(SIGKILL)
        try:
            wait_gone(pid, STOP_SECONDS)
        finally:
            hit.is_healed()
        hit.notes["drain_s"] = round(hit.healed - hit.struck, 2)
        world.note_held(hit)


@kind("worker-hurried", "SIGTERM to a worker and a second one before it is done: it must go at once")
def worker_hurried(world: World, random: Random, hit: Hit) -> None:
    with world.victim(random) as (child, pid):
        child.asked = True
        hit.pids.add(pid)
        hit.strikes()
        child.send(SIGTERM)
        time.sleep(random.uniform(0.0, 0.2))
        child.send(SIGTERM)
        code = child.wait(STOP_SECONDS)
        hit.is_healed()
        hit.notes |= {"exit": code, "drain_s": round(hit.healed - hit.struck, 2)}
        if code is None:
            hit.problems.append(f"still ran {STOP_SECONDS:g} s after a second SIGTERM")
            child.send(SIGKILL)
        elif code not in AT_ONCE:
            hit.problems.append(f"ended with {code} after a second SIGTERM, not with {' or '.join(map(str, AT_ONCE))}")
        world.note_held(hit)


@kind("worker-frozen", "SIGSTOP to a worker until others have its lease, then SIGCONT")
def worker_frozen(world: World, random: Random, hit: Hit) -> None:
    with world.victim(random) as (_, pid):
        hit.pids.add(pid)
        hit.strikes()
        kill(pid, SIGSTOP)
        try:
            world.note_held(hit)
            time.sleep(world.lease * random.uniform(1.2, 1.7))
        finally:
            kill(pid, SIGCONT)
            hit.is_healed()
        hit.notes["frozen_s"] = round(hit.healed - hit.struck, 1)


@kind("poller-killed", "SIGKILL to a poller")
def poller_killed(world: World, random: Random, hit: Hit) -> None:
    alive = [child for child in world.crew.pollers if child.code() is None]
    if not alive:
        raise CannotStrike("no poller runs")
    child = random.choice(alive)
    child.asked = True
    hit.pids.add(child.pid)
    hit.strikes()
    child.send(SIGKILL)
    hit.is_healed()
