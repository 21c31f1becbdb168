"""The machine and the versions with which a result was measured, without host name, user name or path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import chunkmill
import chunkmill_workers
from chunkmill.machine import gpu_names, processor_features, this_machine

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
PACKAGES = (
    "chunkmill", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy", "celery", "psycopg",
    "sqlalchemy", "redis",
)  # fmt: skip
ROOT = Path(__file__).parents[3]
CODE = (ROOT, *sorted({Path(package.__file__).parents[1] for package in (chunkmill, chunkmill_workers)}))
"""Folders that a child process needs on its path to import the same packages."""


def describe() -> dict[str, Any]:
    """CPU, cores that this process may use, memory, and the instructions that matter for matrices."""
    known = processor_features()
    return {
        "cpu": this_machine().cpu,
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "flags": [flag for flag in FLAGS if flag in known],
        "gpu": next(iter(gpu_names()), None),
        "system": f"{platform.system()} {platform.machine()}",
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine for a file name: ``amd-epyc-family-25-model-17-2-cores``, after the GPU's name if there is one."""
    words = f"{machine['gpu'] or ''} {machine['cpu']} {machine['cores']} cores"
    words = re.sub(r"\((R|TM)\)|@.*?GHz|\bCPU\b|\bProcessor\b", " ", words)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def versions() -> dict[str, str]:
    """The versions of Python and of packages. Chunkmill has its git revision, with ``+changes`` if the code differs."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # Only in a checkout of ours, because an installed package may be in somebody else's repository.
    revision = _git("rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else ""
    if revision:
        changed = _git("status", "--porcelain", "--", "app", "workers")
        versions["chunkmill"] = revision + ("+changes" if changed else "")
    return versions


def cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_kib(pid: int | str, field: str) -> int | None:
    """``VmRSS`` or ``VmHWM`` of a process in KiB; None if there is no /proc, or the process has ended.

    ``ru_maxrss`` would be wrong: in a child it begins with the parent's, from before the exec.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) if match else None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],  # noqa: S607 - any git will do
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
