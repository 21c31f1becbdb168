"""`make lock`: writes requirements.lock from pyproject.toml and the versions in constraints.txt.

uv asks the index for the digests of every file of every package, for all platforms. Those of torch's builds for the CPU
are on another index and are listed here; `TORCH_SHA256` gives the others at install time.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
BUILD = ("hatchling>=1.27", "editables>=0.5")
"""What pip needs to install the checkout itself, without an environment that it fills from the index."""
CPU = {"2.13.0": ("6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",)}  # CPython 3.11, Linux, x86-64
"""Digests of torch's builds for the CPU, by version."""
FOR_TORCH = re.compile(r"torch$|nvidia-|cuda-|triton$")
"""torch as the index has it, and what only that needs: on Linux it is a build for CUDA, elsewhere it needs no more."""
HEAD = """# Written by `make lock`. Each package with the digests of all its files, below the extras that need it: see
# app/chunkmill/system/locked.py. Change constraints.txt and run it again.

"""


def compiled(uv: str, *arguments: str) -> dict[str, str]:
    """The block of each package that these arguments of `uv pip compile` lead to."""
    command = [uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--python-version", "3.11"]
    command += ["--no-header", "--no-annotate", "--no-config", "--constraints", "constraints.txt", *arguments]
    text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    blocks = re.findall(r"^([\w.-]+)(==[^\n]*\n(?: +--hash[^\n]*\n)+)", text, re.MULTILINE)
    return {name: name + rest for name, rest in blocks}


def main(uv: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder) / "build.in"
        build.write_text("\n".join(BUILD))
        locks = {"producer": compiled(uv, "pyproject.toml"), "build": compiled(uv, str(build))}
    for extra in extras:
        locks[extra] = compiled(uv, "--extra", extra, "pyproject.toml")
    packages = {name: lines for blocks in locks.values() for name, lines in blocks.items()}
    packages.pop("pip", None)  # every virtual environment has one, and it is what reads this file
    text = HEAD
    for name, lines in sorted(packages.items()):
        extras_of = [extra for extra, blocks in locks.items() if name in blocks]
        if FOR_TORCH.match(name):
            extras_of = [f"{extra}:cuda" for extra, blocks in locks.items() if "torch" in blocks]
        if name == "torch":
            version = lines.split("==")[1].split()[0]
            hashes = "".join(f" \\\n    --hash=sha256:{digest}" for digest in CPU[version])
            names = " ".join(extra.replace(":cuda", ":cpu") for extra in extras_of)
            text += f"# for: {names}\ntorch=={version}+cpu{hashes}\n\n"
        text += f"# for: {' '.join(extras_of)}\n{lines}\n"
    LOCK.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
