"""What the supervisor decides: where workers run, and what follows the end of one. Pure."""

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
"""Click's, for an option that Celery does not know."""
NAME_OPTION = re.compile(r"(-n|--hostname=)(.+)", re.DOTALL)
SIGNAL_NAMES = {number.value: number.name for number in signal.Signals}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker runs: on a GPU of its own, or on the CPU."""

    name: str
    environment: Mapping[str, str]
    """What its environment differs in from the supervisor's."""
    device: str = ""
    """In the names of workers: ``gpu-1b2f43ad``."""


def plan_places(requested: str, gpus: Sequence[str]) -> list[Place]:
    """A place for each of ``gpus`` that ``requested``, EMBEDDING_DEVICE, allows; one without a GPU where there is none.

    A device that does not exist gets one place too: the worker that goes there ends with the message about it.
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
    # Not `auto`: a worker whose GPU has vanished must say so, and not use the CPU beside the others. And not `cuda:1`,
    # which would be the second of the one that it sees.
    environment = {"CUDA_VISIBLE_DEVICES": gpu, "EMBEDDING_DEVICE": "cuda"}
    return Place(f"GPU {gpu}" if gpu.isdigit() else gpu, environment, short_name(gpu))


def arguments_for(place: Place, arguments: Sequence[str], *, alone: bool) -> list[str]:
    """Celery's arguments for the worker in ``place``: unless it is ``alone``, with its device in the name of ``-n``.

    ``-n spot@%h`` would be one name for all GPUs of the machine, and Celery and Flower take workers of one name for
    one worker. Without ``-n`` a worker names itself after its device.
    """
    made: list[str] = []
    follows = False
    for argument in arguments:
        found = NAME_OPTION.fullmatch(argument)
        if alone or not (follows or found):
            made.append(argument)
        else:
            option, name = ("", argument) if found is None or follows else found.groups()
            nodename, at, host = name.partition("@")
            made.append(f"{option}{nodename}-{place.device}{at}{host}")
        follows = not follows and argument in ("-n", "--hostname")
    return made


class AfterExit(Enum):
    """What follows the end of a worker that nobody asked to stop."""

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
    """``returncode`` as subprocess gives it: negative for a signal.

    0 is a worker that has drained because its machine is going. 70 (the watchdog) and 75 (a server was away) ask for
    another start, and so does everything unknown.
    """
    if returncode < 0:
        name = SIGNAL_NAMES.get(-returncode, f"signal {-returncode}")
        return Ending(f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""), AfterExit.RESTART)
    wrong = AfterExit.MISCONFIGURED
    then = {0: AfterExit.DRAINED, os.EX_CONFIG: wrong, USAGE_ERROR: wrong}.get(returncode, AfterExit.RESTART)
    return Ending(f"exit code {returncode}", then)


def back_off(failures: int, ran_seconds: float) -> tuple[int, float]:
    """Failures in a row, the one after ``ran_seconds`` counted, and the seconds to wait: 1, 2, 4 … 60."""
    failures = 1 if ran_seconds >= RAN_WELL_SECONDS else failures + 1
    return failures, min(MAX_DELAY_SECONDS, 2.0 ** min(failures - 1, 10))
