"""What the supervisor decides: where workers run, and what happens after one ends. Pure."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from chunkmill_workers.host.gpu import short_name

RAN_WELL_SECONDS = 60.0
MAX_DELAY_SECONDS = 60.0
USAGE_ERROR = 2
"""Click's exit code for an option that Celery does not know."""
CRASH_LOOP = 3
"""After this many failures in a row, each soon after a start, the messages in the queue may be the cause."""
NAME_OPTION = re.compile(r"(-n|--hostname=)(.+)", re.DOTALL)
SIGNAL_NAMES = {number.value: number.name for number in signal.Signals}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker runs: on a GPU of its own, or on the CPU."""

    name: str
    environment: Mapping[str, str]
    """The variables that differ from the supervisor's environment."""
    device: str = ""
    """The device as workers' names contain it: ``gpu-1b2f43ad``."""


def plan_places(requested: str, gpus: Sequence[str]) -> list[Place]:
    """A place for each of ``gpus`` that ``requested``, EMBEDDING_DEVICE, allows, or one without a GPU if none does.

    A device that does not exist gets a place too: the worker there exits with a message about it.
    """
    kind, _, index = requested.partition(":")
    if kind == "cuda" and index.isdigit():
        chosen = gpus[int(index) : int(index) + 1]
    else:
        chosen = gpus if requested in ("auto", "cuda") else ()
    if not chosen:
        return [Place("the CPU" if requested in ("auto", "cpu") else requested, {})]
    return [_place_on(gpu) for gpu in chosen]


def _place_on(gpu: str) -> Place:
    # Not `auto`: a worker whose GPU has vanished must say so instead of using the CPU beside the others. Not `cuda:1`
    # either: the worker sees only one device, so that would name a second one that it does not have.
    environment = {"CUDA_VISIBLE_DEVICES": gpu, "EMBEDDING_DEVICE": "cuda"}
    return Place(f"GPU {gpu}" if gpu.isdigit() else gpu, environment, short_name(gpu))


def arguments_for(place: Place, arguments: Sequence[str], *, alone: bool) -> list[str]:
    """Celery's arguments for the worker in ``place``. Unless it is ``alone``, ``-n`` gets its device in the name.

    ``-n spot@%h`` would give the same name to all GPUs of the machine, and Celery and Flower take workers of the same
    name for one worker. Without ``-n`` a worker names itself after its device.
    """
    made: list[str] = []
    follows = False
    for argument in arguments:
        match = NAME_OPTION.fullmatch(argument)
        if alone or not (follows or match):
            made.append(argument)
        else:
            option, name = ("", argument) if match is None or follows else match.groups()
            nodename, at, host = name.partition("@")
            made.append(f"{option}{nodename}-{place.device}{at}{host}")
        follows = not follows and argument in ("-n", "--hostname")
    return made


class AfterExit(Enum):
    """What happens after a worker ended that nobody asked to stop."""

    RESTART = auto()
    DRAINED = auto()
    """It left because its machine is being taken, and is not started again."""
    MISCONFIGURED = auto()
    """It is not started again, because it would meet the same wrong configuration."""


@dataclass(frozen=True, slots=True)
class Ending:
    evidence: str
    then: AfterExit


def read_ending(returncode: int) -> Ending:
    """How a worker ended, by ``returncode`` as subprocess gives it: it is negative for a signal.

    With 0 a worker has drained because its machine is being taken. After 70 (the watchdog), 75 (a server was away) and
    any other code it is started again.
    """
    if returncode < 0:
        name = SIGNAL_NAMES.get(-returncode, f"signal {-returncode}")
        return Ending(f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""), AfterExit.RESTART)
    wrong = AfterExit.MISCONFIGURED
    then = {0: AfterExit.DRAINED, os.EX_CONFIG: wrong, USAGE_ERROR: wrong}.get(returncode, AfterExit.RESTART)
    return Ending(f"exit code {returncode}", then)


def back_off(failures: int, ran_seconds: float) -> tuple[int, float]:
    """The failures in a row, including the one after ``ran_seconds``, and the seconds to wait: 1, 2, 4 … 60."""
    failures = 1 if ran_seconds >= RAN_WELL_SECONDS else failures + 1
    return failures, min(MAX_DELAY_SECONDS, 2.0 ** min(failures - 1, 10))


def is_suspicious(failures: int, returncode: int) -> bool:
    """Whether a worker that ended may have been ended by something in its queue: after 3, 6, 12 … failures in a row.

    Not if a server was away (75). Seldom, because workers of other machines take doorbells from the same queue.
    """
    repeats, rest = divmod(failures, CRASH_LOOP)
    return returncode != os.EX_TEMPFAIL and rest == 0 and repeats.bit_count() == 1
