"""Virtual environments for the peers whose requirements contradict ours.

fastembed 0.9 wants huggingface-hub below 2, optimum-onnx and Infinity want transformers below 5: none of them can be
installed beside transformers 5. They are measured all the same, each with the newest versions that it accepts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs

from chunkmill_workers.benchmarks import machine

REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "fastembed": ("fastembed==0.9.1", "onnxruntime==1.31.1"),
    "sentence-transformers-onnx": (
        "sentence-transformers[onnx]==5.7.0", "transformers==4.57.6", "optimum-onnx==0.1.0", "onnxruntime==1.31.1",
        "torch==2.13.0",
    ),
    "infinity": (
        "infinity-emb[optimum,server,torch]==0.0.78", "transformers==4.57.6", "optimum-onnx==0.1.0",
        "onnxruntime==1.31.1", "torch==2.13.0",
    ),
}  # fmt: skip
INSTALL = "chunkmill bench --install-peers"
EXTRA = "pip install -c constraints.txt '.[bench]'"


def cache() -> Path:
    """What the benchmarks keep between runs: these environments, and the models that peers need exported."""
    return platformdirs.user_cache_path("chunkmill") / "bench"


def python_of(name: str) -> Path:
    """The interpreter of an environment, which need not be there."""
    return cache() / "environments" / name / "bin" / "python"


def installed(name: str) -> bool:
    """Whether all of it is there: the marker is written last, and holds what was asked for."""
    marker = _marker(name)
    return marker.is_file() and marker.read_text(encoding="utf-8").split() == list(REQUIREMENTS[name])


def install(say: Callable[[str], None]) -> None:
    """Make those that are missing or out of date. Raises CalledProcessError where pip finds no way."""
    for name, requirements in REQUIREMENTS.items():
        if installed(name):
            continue
        say(f"installing {' '.join(requirements)}")
        folder = cache() / "environments" / name
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run(
            [python_of(name), "-P", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
            check=True,
            stdout=sys.stderr,
        )
        _marker(name).write_text("\n".join(requirements), encoding="utf-8")


def variables(threads: int, *, own: bool) -> dict[str, str]:
    """The environment of a child: as many threads in every pool that is set there, and no look at the network.

    ``own``: it runs in one of the environments above, which must not see ours.
    """
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        "PYTHONPATH": os.pathsep.join([*map(str, machine.CODE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if own:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            env.pop(name, None)
    return env


def _marker(name: str) -> Path:
    return cache() / "environments" / name / "installed"
