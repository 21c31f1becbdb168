"""The health checks of docker-compose.yml, as they stand there, asked about real processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from chunkmill.settings import Settings
from tests.acceptance.conftest import Process, Processes
from tests.support.waiting import PATIENCE, until

SERVICES = yaml.safe_load((Path(__file__).parents[2] / "docker-compose.yml").read_text())["services"]
TMP = "/tmp/"  # noqa: S108
NOBODY = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "REDIS_URL": "redis://127.0.0.1:1/0"}


def healthy(service: str, folder: Path, env: dict[str, str]) -> bool:
    """Whether the service's check passes, with the container's /tmp in ``folder``."""
    kind, command = SERVICES[service]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    command = command.replace("$$", "$").replace(TMP, f"{folder}/").replace("--timeout 10", "--timeout 2")
    done = subprocess.run(["/bin/sh", "-c", command], env=env, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode == 0


def poller(processes: Processes, folder: Path, **env: str) -> Process:
    folder.mkdir()
    program, *arguments = SERVICES["poller"]["command"]
    assert program == "chunkmill"
    return processes.start("chunkmill.cli", *(a.replace(TMP, f"{folder}/") for a in arguments), **env)


def make_old(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (time.time() - 180,) * 2)


def test_a_poller_that_hangs_is_unhealthy_and_the_one_beside_it_is_not(processes: Processes, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    frozen, other = poller(processes, first), poller(processes, second)
    assert not healthy("poller", tmp_path / "third", processes.env)
    for folder, process in ((first, frozen), (second, other)):
        until(lambda folder=folder: healthy("poller", folder, processes.env), process.output)

    frozen.popen.send_signal(signal.SIGSTOP)
    try:
        make_old(first)
        make_old(second)
        assert not healthy("poller", first, processes.env)
        until(lambda: healthy("poller", second, processes.env), other.output)
    finally:
        frozen.popen.send_signal(signal.SIGCONT)
    until(lambda: healthy("poller", first, processes.env), frozen.output)


def test_a_poller_that_waits_for_redis_is_healthy(processes: Processes, tmp_path: Path) -> None:
    waiting = poller(processes, tmp_path / "tmp", REDIS_URL=NOBODY["REDIS_URL"])
    waiting.wait_for("trying again")
    make_old(tmp_path / "tmp")
    until(lambda: healthy("poller", tmp_path / "tmp", processes.env), waiting.output)
    assert waiting.popen.poll() is None


def test_a_heartbeat_that_cannot_be_written_is_refused(processes: Processes, tmp_path: Path) -> None:
    refused = processes.start("chunkmill.cli", "poller", "--heartbeat", str(tmp_path / "none/poller"))
    assert refused.popen.wait(PATIENCE) == 1
    assert "Name a file in a folder that this process may write" in refused.output()


@pytest.fixture
def env(processes: Processes) -> Iterator[dict[str, str]]:
    """The environment of a check in a container."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield processes.env | {"PATH": path, "HOSTNAME": socket.gethostname()}


@pytest.mark.slow
def test_a_worker_that_hangs_is_unhealthy_and_one_without_redis_is_not(
    processes: Processes, env: dict[str, str], tmp_path: Path, settings: Settings
) -> None:
    node = SERVICES["worker-cpu"]["command"][-1]
    worker = processes.worker("-n", node)
    assert healthy("worker-cpu", tmp_path, env)
    worker.popen.send_signal(signal.SIGSTOP)
    try:
        assert not healthy("worker-cpu", tmp_path, env)
        assert healthy("worker-cpu", tmp_path, env | NOBODY)
        assert healthy("worker-openai", tmp_path, env | NOBODY)
        assert not healthy("worker-openai", tmp_path, env)
    finally:
        worker.popen.send_signal(signal.SIGCONT)


def session(leader: int) -> list[int]:
    """The processes that live in the session which this process leads."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    problems = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == leader and pid != leader:
                problems.append(pid)
    return problems


@pytest.mark.parametrize(
    ("service", "program"), [("worker-cpu", "celery"), ("worker-openai", "celery"), ("redis", "redis-cli")]
)
def test_a_check_that_hangs_ends_by_itself_and_leaves_nothing(service: str, program: str, tmp_path: Path) -> None:
    """After its timeout Docker kills only the shell of the check, and what the shell started would stay."""
    hanging = tmp_path / program
    hanging.write_text("#!/bin/sh\nexec sleep 3600\n")
    hanging.chmod(0o755)
    _, command = SERVICES[service]["healthcheck"]["test"]
    command = re.sub(r"(timeout -s KILL) \d+", r"\1 1", command.replace("$$", "$"))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOSTNAME": "none", "REDIS_PASSWORD": "none"}
    check = subprocess.Popen(["/bin/sh", "-c", command], env=env, start_new_session=True)
    try:
        assert check.wait(PATIENCE) != 0
        until(lambda: not session(check.pid), lambda: f"{program} is still there")
    finally:
        for pid in [*session(check.pid), *([check.pid] if check.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)
