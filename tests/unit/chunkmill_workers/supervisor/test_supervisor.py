"""The supervisor: its decisions, and what it does with small processes in the place of workers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from chunkmill.db.connect import create_db
from chunkmill_workers.host.gpu import claim_device, short_name, visible_gpus
from chunkmill_workers.process import lease
from chunkmill_workers.process.lease import owner_name
from chunkmill_workers.supervisor.supervision import (
    AfterExit,
    Place,
    arguments_for,
    back_off,
    is_suspicious,
    plan_places,
    read_ending,
)
from chunkmill_workers.supervisor.supervisor import PARENT, LeaseRecovery, Supervisor, supervisor_is_gone
from tests.support.checkout import CHECKOUT, PYTHONPATH
from tests.support.waiting import PATIENCE, until

TWO = ["GPU-aaaa1111-0000", "GPU-bbbb2222-0000"]


@pytest.mark.parametrize(
    ("requested", "gpus", "places"),
    [
        ("auto", [], {"the CPU": None}),
        ("auto", TWO, {TWO[0]: TWO[0], TWO[1]: TWO[1]}),
        ("auto", ["0", "3"], {"GPU 0": "0", "GPU 3": "3"}),
        ("cuda", TWO, {TWO[0]: TWO[0], TWO[1]: TWO[1]}),
        ("cuda:1", TWO, {TWO[1]: TWO[1]}),
        ("cpu", TWO, {"the CPU": None}),
        ("cuda", [], {"cuda": None}),  # from here on, the one worker ends with its own message
        ("cuda:2", TWO, {"cuda:2": None}),
        ("gpu", TWO, {"gpu": None}),
    ],
)
def test_a_worker_for_each_gpu_that_may_be_used(requested: str, gpus: list[str], places: dict[str, str | None]) -> None:
    planned = plan_places(requested, gpus)
    assert {place.name: place.environment.get("CUDA_VISIBLE_DEVICES") for place in planned} == places


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-c", "2"], None),  # such a worker names itself after its device
        (["-n", "spot@%h", "-c", "2"], "spot-{}@%h"),
        (["-c", "2", "-nspot@%h"], "-nspot-{}@%h"),
        (["--hostname=spot@%h"], "--hostname=spot-{}@%h"),
        (["--hostname", "spot"], "spot-{}"),
    ],
)
def test_workers_of_two_gpus_have_two_names(arguments: list[str], named: str | None) -> None:
    """Celery and Flower take two workers of one name for one."""
    places = plan_places("auto", TWO)
    for place, device in zip(places, ["gpu-aaaa1111", "gpu-bbbb2222"], strict=True):
        made = arguments_for(place, arguments, alone=False)
        changed = [argument for argument in made if argument not in arguments]
        assert changed == ([named.format(device)] if named else [])
        assert len(made) == len(arguments)
        assert arguments_for(place, arguments, alone=True) == arguments


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("GPU-1b2f43ad-9b1c-0e6b-5c2a-000000000001", "gpu-1b2f43ad"),
        ("3", "gpu-3"),
        ("MIG-41b35357-3a5d-5a9f-8a1b-000000000001", "mig-41b35357"),
        ("MIG-GPU-1b2f43ad-9b1c-0e6b-5c2a-000000000001/1/0", "mig-1b2f43ad-1-0"),
    ],
)
def test_a_device_has_a_short_name(gpu: str, name: str) -> None:
    assert short_name(gpu) == name


@pytest.mark.parametrize("requested", ["auto", "cuda:1"])
def test_a_worker_claims_the_gpu_of_its_place(requested: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi: CUDA_VISIBLE_DEVICES is believed
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(TWO))
    claimed = []
    for place in plan_places(requested, visible_gpus()):
        for name, value in place.environment.items():
            monkeypatch.setenv(name, value)
        claimed.append(claim_device(os.environ["EMBEDDING_DEVICE"], share=False, lock_dir=tmp_path))
    assert [claim.gpu for claim in claimed] == (TWO if requested == "auto" else TWO[1:])
    for claim in claimed:
        claim.release()


@pytest.mark.parametrize(
    ("returncode", "evidence", "then"),
    [
        (-signal.SIGSEGV, "ended by SIGSEGV", AfterExit.RESTART),
        (-signal.SIGKILL, "ended by SIGKILL (out of memory?)", AfterExit.RESTART),
        (-(signal.SIGRTMIN + 1), f"ended by signal {signal.SIGRTMIN + 1}", AfterExit.RESTART),
        (1, "exit code 1", AfterExit.RESTART),
        (70, "exit code 70", AfterExit.RESTART),
        (75, "exit code 75", AfterExit.RESTART),
        (0, "exit code 0", AfterExit.DRAINED),
        (78, "exit code 78", AfterExit.MISCONFIGURED),
        (2, "exit code 2", AfterExit.MISCONFIGURED),
    ],
)
def test_what_an_end_says_and_what_follows(returncode: int, evidence: str, then: AfterExit) -> None:
    ending = read_ending(returncode)
    assert (ending.evidence, ending.then) == (evidence, then)


def test_restarts_slow_down_until_one_runs_well() -> None:
    failures, delays = 0, []
    for _ in range(8):
        failures, delay = back_off(failures, 59.0)
        delays.append(delay)
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    assert back_off(failures, 60.0) == (1, 1.0)
    assert back_off(100_000, 0.0)[1] == 60


def test_a_queue_is_under_suspicion_seldom_and_not_if_a_server_is_away() -> None:
    """Workers of other machines take from the same queue, and a GPU that is broken breaks for months."""
    assert [failures for failures in range(1, 100) if is_suspicious(failures, 1)] == [3, 6, 12, 24, 48, 96]
    assert is_suspicious(3, -signal.SIGKILL)
    assert not is_suspicious(3, 75)


def test_the_supervisor_is_there_as_long_as_it_is_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    assert not supervisor_is_gone()
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert not supervisor_is_gone()
    monkeypatch.setenv(PARENT, str(os.getpid()))
    assert supervisor_is_gone()


def test_workers_of_two_containers_on_one_host_have_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "FIRST_PID_NAMESPACE", Path("/proc/self/ns/pid").stat().st_ino)
    assert owner_name(7) == f"{socket.gethostname()}:7"
    monkeypatch.setattr(lease, "FIRST_PID_NAMESPACE", 0)
    assert re.fullmatch(rf"{re.escape(socket.gethostname())}/\d+:7", owner_name(7))


def test_the_supervisor_stays_small() -> None:
    code = (
        "import sys, chunkmill_workers.supervisor.supervisor as _"
        "; print({'torch', 'transformers', 'celery'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_after_the_signal_to_stop_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what waits for its next start: nobody would tell it to stop."""
    started: list[object] = []

    def start(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(pid=1)

    monkeypatch.setattr(subprocess, "Popen", start)
    places = [Place("a", {}), Place("b", {})]
    supervisor = Supervisor(places, ["worker"], lambda pid, evidence: None)

    supervisor._ask_to_stop(signal.SIGTERM)
    supervisor._start_due()

    assert started == []
    assert not any(post.process or post.start_at is not None for post in supervisor._posts)


def test_postgres_away_is_said_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    ledger = LeaseRecovery(create_db("postgresql+psycopg://nobody@127.0.0.1:1/none", role="supervisor", pool_size=1))
    with caplog.at_level(logging.INFO):
        for pid in (1, 2, 3):
            ledger.report(pid, "ended by SIGSEGV")
        ledger.close(60)
    assert not ledger._thread.is_alive()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the poller does it" in caplog.text


# --- small processes in the place of workers ---------------------------------------------------------------

SUPERVISOR = """
import json, os, sys
from chunkmill.telemetry.logging import configure
from chunkmill_workers.supervisor import supervisor
from chunkmill_workers.supervisor.supervision import Place

configure()
supervisor.KILL_SECONDS = float(sys.argv[3])
places = [Place(name, {"PLACE": name}) for name in json.loads(sys.argv[2])]
report = lambda pid, evidence: os.write(1, f"report: {evidence}\\n".encode())
raise SystemExit(supervisor.Supervisor(places, [sys.executable, "-c", sys.argv[1]], report).run())
"""

# How it ends, start after start, is its place's name; it leaves a letter in a file of that name at each start.
ENDS = """
import os, pathlib, signal
place = pathlib.Path(os.environ["PLACE"])
with place.open("a") as starts:
    starts.write("x")
end = place.name.split(",")[len(place.read_text()) - 1]
if end.isdigit():
    os._exit(int(end))
os.kill(os.getpid(), getattr(signal, end))
"""

RUNS = """
import os, signal, sys, time
if os.environ["PLACE"] == "crashes":
    sys.exit(1)
told = []
def hear(number, frame):
    told.append(number)
    os.write(1, f"heard {signal.Signals(number).name}\\n".encode())  # whole: others write there too
    if len(told) == 2:
        sys.exit(0)
ignores = os.environ["PLACE"] == "ignores"
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN if ignores else hear)
os.write(1, f"ready {os.getpid()}\\n".encode())
while True:
    time.sleep(60)
"""

NOTICES = """
import os, time
from chunkmill_workers.supervisor.supervisor import supervisor_is_gone
print("ready", os.getpid(), flush=True)
while not supervisor_is_gone():
    time.sleep(0.02)
print("alone", flush=True)
"""


class Run:
    """A supervisor in a process and a process group of its own, and what it and its children said."""

    def __init__(self, folder: Path, child: str, *places: str, kill_seconds: float = 12) -> None:
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, child, json.dumps(places), str(kill_seconds)],
                cwd=folder, env=os.environ | {"PYTHONPATH": PYTHONPATH}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.output() or self.popen.poll() is not None, self.output)
        assert text in self.output(), self.output()

    def children(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"started, pid (\d+)", self.output())]

    def living(self) -> list[int]:
        return [pid for pid in self.children() if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def start(child: str, *places: str, kill_seconds: float = 12) -> Run:
        started.append(Run(tmp_path, child, *places, kill_seconds=kill_seconds))
        return started[-1]

    yield start
    for run in started:
        if run.popen.poll() is None:
            run.popen.kill()
            run.popen.wait(PATIENCE)
        for pid in run.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "places"),
    [
        (78, ["SIGSEGV,0", "SIGKILL,0", "1,0", "70,0", "75,0", "0", "78", "2"]),
        (0, ["SIGABRT,0", "0"]),
    ],
)
def test_who_is_started_again(code: int, places: list[str], supervise: Callable[..., Run], tmp_path: Path) -> None:
    run = supervise(ENDS, *places)
    assert run.popen.wait(PATIENCE) == code
    for place in places:
        ends = place.split(",")
        assert (tmp_path / place).read_text() == "x" * len(ends), place
        assert run.output().count(f"worker on {place}: started") == len(ends)
    said = {"SIGKILL": "ended by SIGKILL (out of memory?)", "0": "None"}  # a drained worker accuses nothing
    expected = [
        said.get(end, f"ended by {end}" if end.startswith("SIG") else f"exit code {end}")
        for place in places
        for end in place.split(",")
    ]
    assert sorted(re.findall("report: (.*)", run.output())) == sorted(expected)
    assert run.output().count("starting again in 1 s") == sum("," in place for place in places)


def test_each_signal_reaches_each_worker_once_and_only_through_the_supervisor(supervise: Callable[..., Run]) -> None:
    run = supervise(RUNS, "a", "b", "crashes")
    until(lambda: run.output().count("ready") == 2, run.output)
    run.wait_for("starting again in")
    os.killpg(run.popen.pid, signal.SIGINT)  # what a terminal does at Ctrl-C
    until(lambda: run.output().count("heard SIGTERM") == 2, run.output)
    run.popen.send_signal(signal.SIGTERM)
    assert run.popen.wait(PATIENCE) == 0
    assert re.findall("heard .*", run.output()) == ["heard SIGTERM"] * 4
    assert not run.living()


def test_a_worker_that_does_not_leave_is_killed(supervise: Callable[..., Run]) -> None:
    run = supervise(RUNS, "ignores", "a", kill_seconds=0.5)
    until(lambda: run.output().count("ready") == 2, run.output)
    run.popen.send_signal(signal.SIGTERM)
    assert run.popen.wait(PATIENCE) == 0
    assert not run.living()
    assert "killed 0.5 s after SIGTERM" in run.output()
    assert re.findall("report: (.*)", run.output()) == ["None"] * 2  # nor does one that was told to go


def test_a_worker_notices_that_its_supervisor_was_killed(supervise: Callable[..., Run]) -> None:
    run = supervise(NOTICES, "a")
    run.wait_for("ready")
    assert "alone" not in run.output()
    run.popen.kill()
    run.popen.wait(PATIENCE)
    until(lambda: "alone" in run.output(), run.output)
    until(lambda: not run.living(), run.output)
