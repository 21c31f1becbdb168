"""What decides how fast a model runs on this machine: processor, cores, memory and GPUs. It needs no torch."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import shutil
import socket
import subprocess
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

# The instruction sets that decide which kernels run.
_FEATURES: Final = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
# The instruction sets that each value of the two libraries' environment variables hides.
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
    """What must be the same for a measurement to be valid. It contains no host name."""

    cpu: str
    cores: int
    """The number of physical cores that a process may use."""
    features: tuple[str, ...]
    gpu: str | None = None
    """The name of the one GPU that a worker uses; None if it computes on the CPU."""

    @property
    def slug(self) -> str:
        """The machine as part of a file name: ``amd-epyc-9654-2-cores``, ``nvidia-h200-amd-epyc-9654-16-cores``."""
        words = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b", " ", f"{self.gpu or ''} {self.cpu}")
        return re.sub(r"[^a-z0-9]+", "-", f"{words} {self.cores} cores".lower()).strip("-")


def this_machine(gpu: str | None = None) -> Machine:
    """This machine; ``gpu`` is the name of the GPU in use."""
    info = _cpuinfo()
    name = info.get("model name", platform.processor() or platform.machine())
    if "cpu family" in info:  # many clouds hide the name of the model, but not its family
        name += f" (family {info['cpu family']}, model {info['model']})"
    known = processor_features()
    return Machine(name, cores(), tuple(feature for feature in _FEATURES if feature in known), gpu)


def this_boot() -> str:
    """What tells this machine, since it was started last, from all others. Containers on it have the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{uuid.getnode():x}"


def processor_features() -> frozenset[str]:
    """The processor's instruction sets, by their names in Linux; empty if there is no /proc/cpuinfo.

    Those that ``ONEDNN_MAX_CPU_ISA`` hides from oneDNN or ``ATEN_CPU_CAPABILITY`` from torch are left out, because a
    forward pass is slow if one of the two may not use them. So this machine can stand in for one with fewer.
    """
    info = _cpuinfo()
    features = frozenset(info.get("flags", info.get("Features", "")).split())
    for variable, hidden_by in (("ONEDNN_MAX_CPU_ISA", _HIDDEN_BY_ONEDNN), ("ATEN_CPU_CAPABILITY", _HIDDEN_BY_TORCH)):
        hidden = hidden_by.get(os.environ.get(variable, "").lower())
        if hidden is not None:
            features = frozenset(feature for feature in features if not re.match(hidden, feature))
    return features


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
    """The installed versions of this package and of the libraries that compute vectors."""
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def cores() -> int:
    """The number of physical cores that this process may run on, or its CPU quota if that is smaller.

    Two hardware threads of one core share its multipliers, so they count once. A container with a quota of two cores
    on a machine with 64 would be stopped most of the time if 64 threads ran in it.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    physical = {_core(cpu) for cpu in allowed}
    quota = _quota()
    return len(physical) if quota is None else max(1, min(len(physical), round(quota)))


def core_blocks(n: int) -> list[set[int]]:
    """The logical CPUs of this process in ``n`` blocks of whole physical cores, to which threads can be pinned.

    It is empty if pinning would be wrong: if there is a quota, if there are fewer cores than blocks, or if the system
    has no affinities.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    physical: dict[str, set[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        physical.setdefault(_core(cpu), set()).add(cpu)
    if n > len(physical) or cores() < len(physical):
        return []
    groups = list(physical.values())
    bounds = [len(groups) * i // n for i in range(n + 1)]
    return [set().union(*groups[first:end]) for first, end in itertools.pairwise(bounds)]


def memory_mib() -> float:
    """How many MiB this process may use: the machine's memory, or the container's limit if that is smaller."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()) / 2**20)
        except (OSError, ValueError):  # there is no such group, or it says "max"
            continue
    return min(limits)


def _core(cpu: int, system: Path = Path("/sys/devices/system/cpu")) -> str:
    """What the logical CPUs of one physical core have in common; the CPU itself if the system does not say.

    The number of a core is not enough: it may come again in each cluster of a package, as on ARM.
    """
    topology = system / f"cpu{cpu}" / "topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the name before Linux 5.3
        with contextlib.suppress(OSError):
            return (topology / name).read_text().strip()
    return str(cpu)


def _quota(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores' worth of time the tightest control group grants; None if there is no limit."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    shares: list[float | None] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2, in which the groups above count too
            inside = root / path.lstrip("/")
            groups = [folder for folder in (inside, *inside.parents) if folder.is_relative_to(root)]
            shares += [_share(folder / "cpu.max") for folder in groups]
        elif "cpu" in controllers.split(","):
            folders = (root / controllers / path.lstrip("/"), root / controllers)
            shares += [_share(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in folders]
    return min((share for share in shares if share is not None), default=None)


def _share(*files: Path) -> float | None:
    """The quota divided by the period, from one file or two; None if there is no limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # there is no such group, or it says "max"
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty if that file does not exist."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
