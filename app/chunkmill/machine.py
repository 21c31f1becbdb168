"""The machine as far as it decides how fast a model runs on it, without torch: a producer may ask too."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

# What decides which kernels run.
_FEATURES: Final = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
# What each value of the two libraries' variables hides.
_HIDDEN_BY_ONEDNN: Final = {
    "sse41": r"avx|amx",
    "avx": r"avx2|avx_|avx512|amx",
    "avx2": r"avx_|avx512|amx",
    "avx2_vnni": r"avx_(?!vnni$)|avx512|amx",
    "avx2_vnni_2": r"avx512|amx",
    "avx512_core": r"avx_|avx512_|amx",
    "avx512_core_vnni": r"avx_|avx512_(?!vnni$)|amx",
    "avx512_core_bf16": r"avx_|avx512_fp16|amx",
    "avx512_core_fp16": r"amx",
}
_HIDDEN_BY_TORCH: Final = {"default": r"avx|amx", "avx2": r"avx_|avx512|amx"}
_PACKAGES: Final = ("chunkmill", "torch", "transformers", "tokenizers", "onnxruntime", "openvino")


@dataclass(frozen=True, slots=True)
class Machine:
    """What must be equal for a measurement to hold. No host name."""

    cpu: str
    cores: int
    """Physical cores that a process here may use."""
    features: tuple[str, ...]
    gpu: str | None = None
    """The one GPU that a worker uses; None: it computes on the CPU."""

    @property
    def slug(self) -> str:
        """A part of a file's name: ``amd-epyc-9654-2-cores``, ``nvidia-h200-amd-epyc-9654-16-cores``."""
        words = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b", " ", f"{self.gpu or ''} {self.cpu}")
        return re.sub(r"[^a-z0-9]+", "-", f"{words} {self.cores} cores".lower()).strip("-")


def this_machine(gpu: str | None = None) -> Machine:
    """This machine; ``gpu`` is the name of the GPU in use."""
    info = _cpuinfo()
    name = info.get("model name", platform.processor() or platform.machine())
    if "cpu family" in info:  # many clouds hide the model's name, not its family
        name += f" (family {info['cpu family']}, model {info['model']})"
    known = processor_features()
    return Machine(name, cores(), tuple(each for each in _FEATURES if each in known), gpu)


def processor_features() -> frozenset[str]:
    """The processor's instruction sets, by Linux's names for them: the only place where this code looks for them.

    Without what ``ONEDNN_MAX_CPU_ISA`` and ``ATEN_CPU_CAPABILITY`` hide from oneDNN and from torch: what one of the two
    may not use makes a forward pass slow. So this machine can stand in for one with fewer. Empty where there is no
    /proc/cpuinfo.
    """
    info = _cpuinfo()
    found = frozenset(info.get("flags", info.get("Features", "")).split())
    for variable, hidden_by in (("ONEDNN_MAX_CPU_ISA", _HIDDEN_BY_ONEDNN), ("ATEN_CPU_CAPABILITY", _HIDDEN_BY_TORCH)):
        hidden = hidden_by.get(os.environ.get(variable, "").lower())
        if hidden is not None:
            found = frozenset(feature for feature in found if not re.match(hidden, feature))
    return found


def gpu_names() -> list[str]:
    """The names of this machine's NVIDIA GPUs; empty if there is no driver or it does not answer."""
    return nvidia_smi("name") or []


def nvidia_smi(*fields: str) -> list[str] | None:
    """One line for each GPU, with ``fields`` between commas.

    It is None if nvidia-smi is not installed, and empty if nvidia-smi finds no GPU or does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        # A wedged driver makes nvidia-smi hang.
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return done.stdout.strip().splitlines()


def versions() -> dict[str, str]:
    """Of this package and of what computes the vectors, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Physical cores that this process may use: those it may run on, and no more than its CPU quota pays for.

    Two hardware threads of one core share its multipliers, and a container with a quota of two cores on a
    machine of sixty-four is stopped most of the time when sixty-four threads spin in it.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    physical = {_core(cpu) for cpu in allowed}
    quota = _quota()
    return len(physical) if quota is None else max(1, min(len(physical), round(quota)))


def core_blocks(n: int) -> list[set[int]]:
    """The logical CPUs of this process in ``n`` blocks of whole physical cores, for threads that keep to their own.

    Empty where that would be wrong: a quota or fewer cores than blocks, or a system without affinities.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    physical: dict[tuple[str, str], set[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        physical.setdefault(_core(cpu), set()).add(cpu)
    if n > len(physical) or cores() < len(physical):
        return []
    groups = list(physical.values())
    bounds = [len(groups) * i // n for i in range(n + 1)]
    return [set().union(*groups[first:end]) for first, end in itertools.pairwise(bounds)]


def memory_mib() -> float:
    """What this process may hold: the machine's memory, or less where its container says so."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path("/sys/fs/cgroup", name).read_text()) / 2**20)
        except (OSError, ValueError):  # no such group, or the word max
            continue
    return min(found)


def _core(cpu: int) -> tuple[str, str]:
    """Socket and core of a logical CPU; itself where the system does not say."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _quota(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the control groups grant, the tightest of them; None for no limit."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    found: list[float | None] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2: every group above counts too
            inside = root / path.lstrip("/")
            found += [_share(folder / "cpu.max") for folder in (inside, *inside.parents) if folder.is_relative_to(root)]
        elif "cpu" in controllers.split(","):
            folders = (root / controllers / path.lstrip("/"), root / controllers)
            found += [_share(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in folders]
    return min((each for each in found if each is not None), default=None)


def _share(*files: Path) -> float | None:
    """Quota and period, from one file or two; None where there is none."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such group, or the word max
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
