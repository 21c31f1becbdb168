"""`make gpu` on a machine without a GPU: which commands it would run, and that it says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_python_that_has_everything_is_used_as_it_is() -> None:
    planned = make("-n", "gpu", "VENV=", "PYTHON=/opt/python3", "RESULTS=/tmp/found")

    assert planned.returncode == 0, planned.stderr
    assert "-m pip" not in planned.stdout
    assert "/opt/python3 -m pytest tests/gpu" in planned.stdout
    assert "/opt/python3 -m chunkmill_workers.benchmarks gpu gpu-pipeline" in planned.stdout
    assert "--out /tmp/found" in planned.stdout


def test_wheels_are_unpacked_beside_it_without_a_network(tmp_path: Path) -> None:
    planned = make("-n", "gpu", f"WHEELS={tmp_path}", "PYTHON=/opt/python3")

    assert planned.returncode == 0, planned.stderr
    installing = next(line for line in planned.stdout.splitlines() if "-m pip" in line)
    for word in ("/opt/python3", "--no-index", "--no-deps", "--target .gpu-site", f"{tmp_path}/*.whl"):
        assert word in installing
    assert f"PYTHONPATH={ROOT}/app:{ROOT}/workers:{ROOT}:{ROOT}/.gpu-site /opt/python3 -m pytest" in planned.stdout


def test_a_clean_checkout_gets_an_environment_and_both_parts_a_limit() -> None:
    planned = make("-n", "gpu", "VENV=.venv-of-nobody")

    assert planned.returncode == 0, planned.stderr
    assert "--require-hashes" in planned.stdout
    assert "locked.py --torch cuda gpu" in planned.stdout
    limits = [
        int(line.split("--kill-after=30 ")[1].split()[0]) for line in planned.stdout.splitlines() if "--kill" in line
    ]
    assert len(limits) == 2
    assert sum(limits) <= 480, "two minutes of the ten are for the installation"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_device_it_ends_before_anything_is_run() -> None:
    done = make("gpu", "VENV=", f"PYTHON={sys.executable}")

    assert done.returncode != 0
    assert f"torch {torch.__version__} sees no CUDA device" in done.stderr
    assert "docs/gpu.md" in done.stderr
    assert "pytest" not in done.stdout
