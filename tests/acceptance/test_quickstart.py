"""docs/quickstart.md, run block by block in one shell, as a newcomer would type it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkmill.embedded import temporary_folder
from tests.support.checkout import PYTHONPATH
from tests.support.waiting import PATIENCE, until

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/quickstart.md").read_text()
BLOCK = re.compile(r"^(<!-- not run.*-->\n)?```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Shell:
    """A bash that keeps its background jobs from block to block."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self._env = env
        self._bash = subprocess.Popen(
            ["bash", "-u"], env=env, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def run(self, block: str) -> str:
        """Run the block and return what it printed. A command that fails ends the test."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"set -e\n{block}\nset +e\necho; echo '== end of the block =='\n")
        self._bash.stdin.flush()
        said = []
        for line in self._bash.stdout:
            if line == "== end of the block ==\n":
                return "".join(said)
            said.append(line)
        raise AssertionError(f"a command failed in:\n{block}\n{''.join(said)}")

    def end(self) -> None:
        """Stop what is left, also after a block that failed: first the shell's jobs, then the servers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGTERM)
        try:
            self._bash.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._bash.pid, signal.SIGKILL)
            self._bash.communicate()
        subprocess.run(
            [sys.executable, "-m", "chunkmill.cli", "down"],
            env=self._env,
            check=True,
            capture_output=True,
            timeout=PATIENCE,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def home() -> Iterator[Path]:
    """Yield a folder with a short path, because the length of a socket's name is limited."""
    folder = temporary_folder("cq-")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def shell(home: Path) -> Iterator[Shell]:
    (home / "docs").symlink_to(ROOT / "docs")
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": PYTHONPATH,
        "CHUNKMILL_HOME": str(home / "data"),
        "FLOWER_PORT": str(free_port()),
        "EMBEDDING_DEVICE": "cpu",  # so that the job is slow enough to kill its worker
        "OMP_NUM_THREADS": "1",
    }
    running = Shell(env, home)
    yield running
    running.end()


def workers_seen(port: str) -> bool:
    """Return whether Flower, asked with the password, has seen the worker."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/workers")
    request.add_header("Authorization", "Basic " + b64encode(b"me:a-password-of-mine").decode())
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
            return "cpu-" in answer.read().decode()
    except urllib.error.HTTPError:
        raise
    except OSError:
        return False  # Flower is not up yet


@pytest.mark.slow
def test_the_quick_start(shell: Shell, home: Path) -> None:
    blocks = [(language, block) for skipped, language, block in BLOCK.findall(PAGE) if not skipped]
    said = {}
    for language, block in blocks:
        if language == "python":
            (home / "example.py").write_text(block)
            said[block] = shell.run(f"{sys.executable} example.py")
        else:
            said[block] = shell.run(block)
        if "chunkmill flower" in block:
            port = shell.run("echo $FLOWER_PORT").split()[0]
            until(lambda port=port: workers_seen(port))

    def output(words: str) -> str:
        (output,) = [text for block, text in said.items() if words in block]
        return output

    searched = output("--collection decisions -k 3")
    assert "0018-deaths-are-not-attempts" in searched
    assert re.search(r"^decisions .* yes$", searched, re.MULTILINE)
    assert "note-2 Green tea" in output("Client.from_env()")
    # The ledger has the kill and its evidence, and it cost only time.
    watched = output("status --watch --times 1 --json")
    (seen,) = [json.loads(line) for line in watched.splitlines() if line.startswith("{")]
    assert any("ended by SIGKILL" in fault["line"] for fault in seen["faults"])
    remembered = output("chunkmill job 3 --attempts")
    assert "state       completed" in remembered
    assert "died: ended by SIGKILL" in remembered
    assert re.search(r"^notices .* 2,000 .* yes$", remembered, re.MULTILINE)
    cost = output("chunkmill cost")
    assert re.search(r"local +2,\d\d\d .* 0\.\d+ ", cost)  # 2,000 notices, and what the decisions are cut into
    assert "already" in output("chunkmill migrate")
    assert "worker " in output("chunkmill migrate")  # the doctor's table
    assert "stopped" in output("chunkmill down")
