"""One GPU per process, with real processes and made-up devices."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chunkmill.errors import DeviceTaken, DeviceUnavailable, InvalidSetting
from chunkmill_workers.host.gpu import claim_device, visible_gpus
from tests.support.waiting import PATIENCE

TWO = ["GPU-aaaa1111-0", "GPU-bbbb2222-0"]
HOLDER = """
import os, sys
from pathlib import Path
from chunkmill_workers.host.gpu import claim_device
claimed = claim_device("auto", share=False, lock_dir=Path(sys.argv[1]), devices=sys.argv[2:])
assert "torch" not in sys.modules
print(claimed.device, claimed.worker_name, os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, *devices: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process that claims a device and keeps it; what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *devices],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().split()
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored after the test, whatever a claim sets
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def test_two_processes_get_two_devices_and_the_third_is_refused(tmp_path: Path) -> None:
    with holder(tmp_path, *TWO) as (first, one), holder(tmp_path, *TWO) as (second, two):
        assert one == ["cuda:0", "gpu-aaaa1111", TWO[0]]
        assert two == ["cuda:0", "gpu-bbbb2222", TWO[1]]
        with pytest.raises(DeviceUnavailable) as caught:
            claim_device("auto", share=False, lock_dir=tmp_path, devices=TWO)
        message = str(caught.value)
        for part in (*TWO, str(first.pid), str(second.pid), "EMBEDDING_SHARE_GPU=1"):
            assert part in message


def test_a_killed_process_frees_its_device(tmp_path: Path) -> None:
    with holder(tmp_path, *TWO) as (first, _), holder(tmp_path, *TWO):
        os.kill(first.pid, signal.SIGKILL)
        first.wait(PATIENCE)

        claimed = claim_device("cuda", share=False, lock_dir=tmp_path, devices=TWO)

        assert claimed.gpu == TWO[0]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == TWO[0]
        claimed.release()


def test_sharing_joins_a_taken_device_under_another_name(tmp_path: Path) -> None:
    with holder(tmp_path, TWO[0]) as (_, printed):
        claimed = claim_device("auto", share=True, lock_dir=tmp_path, devices=TWO[:1])

        assert claimed.gpu == TWO[0]
        assert claimed.worker_name not in printed


def test_the_refusal_names_the_process_that_holds_each_device_and_no_earlier_one(tmp_path: Path) -> None:
    for gpu in TWO:
        (tmp_path / f"chunkmill-gpu-{gpu}.lock").write_text("47114711471147114711")  # of one that was killed
    with holder(tmp_path, TWO[0]) as (first, _), holder(tmp_path, TWO[1]) as (second, _):
        with pytest.raises(DeviceTaken) as refused:
            claim_device("cuda", share=False, lock_dir=tmp_path, devices=TWO)
        for gpu, process in zip(TWO, (first, second), strict=True):
            assert f"{gpu} (process {process.pid})" in str(refused.value)


def test_an_index_asks_for_that_device_only(tmp_path: Path) -> None:
    claimed = claim_device("cuda:1", share=False, lock_dir=tmp_path, devices=TWO)

    assert (claimed.device, claimed.gpu) == ("cuda:0", TWO[1])
    with pytest.raises(DeviceUnavailable, match=TWO[1]):
        claim_device("cuda:1", share=False, lock_dir=tmp_path, devices=TWO)
    claimed.release()


def test_other_users_may_open_the_lock_file(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        claimed = claim_device("auto", share=False, lock_dir=tmp_path, devices=TWO)
    finally:
        os.umask(before)

    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o666
    claimed.release()


def test_without_a_gpu(tmp_path: Path) -> None:
    assert claim_device("auto", share=False, lock_dir=tmp_path, devices=[]).device == "cpu"
    assert claim_device("cpu", share=False, lock_dir=tmp_path, devices=TWO).lock is None
    with pytest.raises(DeviceUnavailable, match="EMBEDDING_DEVICE=auto"):
        claim_device("cuda", share=False, lock_dir=tmp_path, devices=[])
    with pytest.raises(InvalidSetting):
        claim_device("gpu", share=False, lock_dir=tmp_path, devices=TWO)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, TWO),
        ("", []),
        ("-1", []),
        ("1", TWO[1:]),
        ("1,0", TWO[::-1]),
        ("0,7,1", TWO[:1]),  # CUDA stops at the first entry that does not exist
        ("GPU-bbbb", TWO[1:]),
        ("MIG-1234", ["MIG-1234"]),
    ],
)
def test_cuda_visible_devices_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: list[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{at}, {gpu}'\n" for at, gpu in enumerate(TWO)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)

    assert visible_gpus() == expected


def test_a_driver_that_does_not_answer_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    assert visible_gpus() == []
