"""A worker follows the profile of this machine, and the first lines of its log say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkmill.machine import this_machine, versions
from chunkmill.models import DEFAULT_MODEL, DEFAULT_SPEC
from chunkmill.settings import Settings
from chunkmill.tuning.choose import Constraints, Setup, SetupMeasurement
from chunkmill.tuning.profiles import Profile, profile_path, write_profile
from tests.acceptance.conftest import Processes


@pytest.mark.slow
def test_a_worker_follows_its_machines_profile(processes: Processes, settings: Settings, tmp_path: Path) -> None:
    machine, home = this_machine(), tmp_path / "home"
    profile = Profile(
        DEFAULT_MODEL, DEFAULT_SPEC.fingerprint, Setup("native", "float32", 384, 1, 3),
        SetupMeasurement(1.0, 1.0, 5000.0, 9.0, 500.0, 7), Constraints(0.9999), machine, versions(), "2026-11-21",
    )  # fmt: skip
    path = profile_path(settings.model_copy(update={"chunkmill_home": home}), DEFAULT_SPEC.fingerprint, machine)
    write_profile(profile, path)
    worker = processes.worker(EMBEDDING_PROFILE="auto", EMBEDDING_DEVICE="cpu", CHUNKMILL_HOME=str(home))
    output = worker.output()
    assert "by its profile native fp32, 384 tokens in a pass" in output
    assert "native in float32, 384 tokens per forward pass" in output
    assert "tasks at a time: 3" in output
    assert worker.terminate() == 0
    # -c on the command line and EMBEDDING_BATCH_TOKENS in the environment both override the profile.
    stated = processes.worker("-c", "1", EMBEDDING_PROFILE="auto", EMBEDDING_DEVICE="cpu", CHUNKMILL_HOME=str(home),
                              EMBEDDING_BATCH_TOKENS="512")  # fmt: skip
    assert "native in float32, 512 tokens per forward pass" in stated.output()
    assert "tasks at a time: 1" in stated.output()
