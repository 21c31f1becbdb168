"""A fork is the program that `subprocess` would have started."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import forks
from tests.support.checkout import CHECKOUT
from tests.support.waiting import PATIENCE, until


@pytest.fixture
def silent() -> Iterator[dict[str, str]]:
    """An environment whose database never answers, so that a poller waits for it and does not end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        yield os.environ | {
            "DATABASE_URL": f"postgresql://u@127.0.0.1:{port}/silent",
            "REDIS_URL": "redis://127.0.0.1:1",
        }


@pytest.mark.parametrize("arguments", [["chunkmill.cli", "sarch"], ["chunkmill.cli", "jobs", "--latest", "many"]])
def test_it_writes_and_ends_as_the_program_does(arguments: list[str]) -> None:
    """An error that is found before and one that is found after the command's module is imported."""
    env = os.environ | {"COLUMNS": "70"}
    own = subprocess.run([sys.executable, "-m", *arguments], env=env, cwd=CHECKOUT, capture_output=True, text=True)
    fork = forks.run(arguments, env=env, cwd=CHECKOUT)
    assert (fork.returncode, fork.stdout, fork.stderr) == (own.returncode, own.stdout, own.stderr)
    assert fork.returncode == 2


def test_it_has_its_own_environment_and_folder(tmp_path: Path, silent: dict[str, str]) -> None:
    env = os.environ | {"DATABASE_URL": "postgresql://u@127.0.0.1:1/of_its_own", "REDIS_URL": "redis://127.0.0.1:1"}
    said = forks.run(["chunkmill.cli", "status"], env=env, cwd=tmp_path)
    assert "127.0.0.1:1/of_its_own" in said.stdout, said
    with (tmp_path / "log").open("wb") as log:
        fork = forks.start(["chunkmill.cli", "poller"], env=silent, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    until(lambda: Path(f"/proc/{fork.pid}/cwd").readlink() == tmp_path)
    fork.kill()
    fork.wait(PATIENCE)


def test_a_signal_ends_it_and_is_its_exit_code(tmp_path: Path, silent: dict[str, str]) -> None:
    with (tmp_path / "log").open("wb") as log:
        first, second = (
            forks.start(["chunkmill.cli", "poller"], env=silent, stdout=log, stderr=subprocess.STDOUT) for _ in range(2)
        )
    second.send_signal(signal.SIGSTOP)  # nor does it give up waiting
    assert isinstance(first, forks.Fork)
    assert first.poll() is None
    first.kill()
    assert (first.wait(PATIENCE), first.poll()) == (-signal.SIGKILL, -signal.SIGKILL)
    assert second.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0)
    second.send_signal(signal.SIGKILL)
    assert second.wait(PATIENCE) == -signal.SIGKILL


def test_it_knows_that_it_writes_to_a_terminal() -> None:
    mine, its = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color"}
    fork = forks.start(["chunkmill.cli", "--help"], env=env, stdin=its, stdout=its, stderr=its, new_session=True)
    os.close(its)
    written = bytearray()
    try:
        while part := os.read(mine, 65_536):
            written += part
    except OSError:  # on Linux the end of a terminal is an error
        pass
    finally:
        os.close(mine)
    assert fork.wait(PATIENCE) == 0
    assert b"\r\n" in written


def test_what_a_library_reads_at_its_import_is_a_start_from_the_beginning() -> None:
    workers = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert forks.differing(workers, "workers") == set()
    assert forks.differing(workers | {"OMP_NUM_THREADS": "2"}, "workers") == {"OMP_NUM_THREADS"}
    assert forks.differing(workers | {"OMP_NUM_THREADS": "2"}, "commands") == set()
    assert forks.differing(os.environ | {"PYTHONHASHSEED": "0", "OTEL_SERVICE_NAME": "x", "ANY": "1"}, "commands") == {
        "PYTHONHASHSEED", "OTEL_SERVICE_NAME",
    }  # fmt: skip
    with Path(os.devnull).open("wb") as nothing:
        asked = forks.start(["chunkmill.cli", "--help"], env=os.environ, stdout=nothing, stderr=nothing, fresh=True)
        assert isinstance(asked, subprocess.Popen)
        assert asked.wait(PATIENCE) == 0
        started = forks.start(
            ["chunkmill.cli", "--help"], env=os.environ | {"PYTHONHASHSEED": "0"}, stdout=nothing, stderr=nothing
        )
    assert isinstance(started, subprocess.Popen)
    assert started.wait(PATIENCE) == 0


def test_only_a_worker_with_a_model_is_forked_from_what_has_imported_torch() -> None:
    celery = ["celery", "-A", "chunkmill_workers", "worker"]
    assert forks.kind_of(celery) == forks.kind_of([*celery, "-Q", "gpu,openai"]) == "workers"
    assert forks.kind_of([*celery, "-Q", "openai"]) == "paid workers"
    assert forks.kind_of(["celery", "inspect", "ping"]) is None
    assert forks.kind_of(["chunkmill.cli", "poller"]) == "commands"
    assert forks.kind_of(["chunkmill.cli", "worker"]) is forks.kind_of(["chunkmill.cli", "flower"]) is None


def test_the_servers_end_with_the_run_of_pytest_and_so_do_their_forks(tmp_path: Path) -> None:
    env = os.environ | {"DATABASE_URL": "postgresql://u@127.0.0.1:1/none", "REDIS_URL": "redis://127.0.0.1:1"}
    with (
        subprocess.Popen(["sleep", "600"]) as run,
        pytest.MonkeyPatch.context() as patch,
        Path(os.devnull).open("wb") as nothing,
        contextlib.ExitStack() as exits,
    ):
        exits.callback(run.kill)
        patch.setenv(forks.FOLDER, str(tmp_path))
        patch.setenv(forks.OF, str(run.pid))
        fork = forks.start(["chunkmill.cli", "poller"], env=env, stdout=nothing, stderr=nothing)
        assert isinstance(fork, forks.Fork)
        assert fork.poll() is None
        run.kill()
    until(lambda: not is_running(fork.pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
