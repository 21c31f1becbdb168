"""A GPU that torch cannot use is told in one sentence. torch's functions are replaced, because there is no GPU here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chunkmill.errors import DeviceUnavailable
from chunkmill.settings import Settings
from chunkmill_workers.engine.precision import resolve_dtype
from chunkmill_workers.host import cuda as cuda_module
from chunkmill_workers.host import gpu as gpu_module
from chunkmill_workers.host.cuda import cuda_problem, require_cuda, runs_on
from chunkmill_workers.host.gpu import ClaimedDevice
from chunkmill_workers.process.worker import EX_CONFIG, WorkerProcess, fatal_errors

T4, L4, H100 = (7, 5), (8, 9), (9, 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU host in order: an L4, and a build of torch with code for it."""
    seen = SimpleNamespace(cuda="13.0", available=True, capability=L4, built_for=["sm_80", "sm_90"], lost=False)

    def ones(*_: Any, **__: Any) -> Any:
        if seen.lost:
            raise RuntimeError("CUDA error: device not ready\nCompile with TORCH_USE_CUDA_DSA")
        return torch.zeros(1)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: seen.capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: seen.built_for)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Tesla V100")
    monkeypatch.setattr(cuda_module, "nvidia_smi", lambda *_: ["535.104.05"])
    monkeypatch.setattr(torch.version, "cuda", seen.cuda)
    seen.set_build = lambda build: monkeypatch.setattr(torch.version, "cuda", build)
    return seen


def test_a_gpu_in_order_has_no_problem(machine: SimpleNamespace) -> None:
    assert cuda_problem() is None
    require_cuda()


def test_a_cpu_build_of_torch_is_named(machine: SimpleNamespace) -> None:
    machine.set_build(None)
    assert "is a build without CUDA: install" in str(cuda_problem())


def test_an_old_driver_is_named_beside_what_torch_needs(machine: SimpleNamespace) -> None:
    machine.available = False
    problem = str(cuda_problem())
    assert "built for CUDA 13.0" in problem
    assert "535.104.05" in problem
    assert "update the driver" in problem


def test_a_gpu_that_torch_has_no_code_for_is_named(machine: SimpleNamespace) -> None:
    machine.capability, machine.built_for = (7, 0), ["sm_75", "sm_80", "sm_90"]
    problem = str(cuda_problem())
    assert "no code for Tesla V100 (sm_70; it has sm_75, sm_80, sm_90)" in problem


def test_a_lost_gpu_is_told_in_one_line(machine: SimpleNamespace) -> None:
    machine.lost = True
    problem = str(cuda_problem())
    assert "CUDA error: device not ready)" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        (L4, ["sm_80", "sm_90"], True),
        (L4, ["sm_90"], False),
        (H100, ["sm_80", "sm_90a"], True),
        (H100, ["sm_80", "compute_80"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((12, 0), ["sm_90", "sm_100"], False),
        (T4, ["sm_80", "compute_80"], False),
        (T4, [], True),
    ],
)
def test_code_runs_on_its_own_generation_and_compiled_on_later_ones(
    capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    assert runs_on(capability, built_for) is runs


def test_a_worker_whose_torch_cannot_use_its_gpu_ends_for_good(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.set_build(None)
    monkeypatch.setattr(gpu_module, "claim_device", lambda *_, **__: ClaimedDevice("cuda:0", "GPU-1"))

    with pytest.raises(SystemExit) as ended, fatal_errors():
        WorkerProcess(Settings.from_env(), {"gpu"}).claim_device()

    assert ended.value.code == EX_CONFIG
    [line] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "build without CUDA" in line.getMessage()
    assert line.exc_info is None
    with pytest.raises(DeviceUnavailable, match="EMBEDDING_DEVICE=cpu"):
        require_cuda()


@pytest.mark.parametrize(
    ("capability", "model_type", "dtype"),
    [
        (T4, "bert", torch.float16),
        (T4, "modernbert", torch.float32),
        (T4, "qwen3", torch.float32),
        (L4, "modernbert", torch.bfloat16),
        (H100, "bert", torch.float16),
    ],
)
def test_a_gpu_gets_a_number_format_that_it_has(
    machine: SimpleNamespace, capability: tuple[int, int], model_type: str, dtype: torch.dtype
) -> None:
    machine.capability = capability
    assert resolve_dtype("auto", torch.device("cuda", 0), model_type) is dtype
