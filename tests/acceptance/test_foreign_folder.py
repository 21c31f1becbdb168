"""A project that has packages named `app` and `workers` of its own, which is FastAPI's usual layout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chunkmill.client import Client
from chunkmill.domain.states import JobState
from tests.acceptance.conftest import Processes
from tests.support.waiting import PATIENCE


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with packages `app`, `workers` and `benchmarks` that end every program that imports them."""
    folder = tmp_path / "project"
    for name in ("app", "workers", "benchmarks"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            f"raise SystemExit('somebody imported the foreign package {name}')\n"
        )
    return folder


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(("celery", "-A", "chunkmill_workers", "worker", "-Q", "gpu"), id="celery", marks=pytest.mark.slow),
        pytest.param(("chunkmill.cli", "worker"), id="chunkmill worker"),
    ],
)
def test_a_worker_and_a_poller_work_in_a_folder_with_foreign_packages(
    processes: Processes, client: Client, project: Path, command: tuple[str, ...]
) -> None:
    poller = processes.start("chunkmill.cli", "poller", cwd=project, fresh=True)
    worker = processes.start(*command, cwd=project, fresh=True)
    worker.wait_for("ready.")
    job = client.enqueue([("a", "a text")], collection="docs")
    assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED
    script = "from chunkmill import Client; print(Client.from_env().audit('docs').missing)"
    producer = subprocess.run(
        [sys.executable, "-c", script], cwd=project, env=processes.env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (producer.stdout, producer.stderr) == ("0\n", "")
    for process in (poller, worker):
        assert "foreign" not in process.output()
