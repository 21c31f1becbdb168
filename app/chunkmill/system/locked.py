"""The packages that this version was tested with, each with the digests of its files, for pip's ``--require-hashes``.

It is run as a file, before anything is installed: it needs nothing but Python, and imports nothing of Chunkmill.

::

    python app/chunkmill/system/locked.py worker,embedded > requirements.txt        # everything but torch
    python app/chunkmill/system/locked.py --torch cpu worker,embedded > torch.txt   # or cuda; may be empty
    pip install --require-hashes --no-deps -r requirements.txt
    pip install --require-hashes --no-deps -r torch.txt
    pip install --no-deps --no-build-isolation .

``requirements.lock`` has a block for each package, and names above it the extras that need it. Nothing is resolved, so
pip can install nothing that is not in the file. torch stands in it twice, because of files of one version pip prefers
those whose digest the index names, so it would never take a build for the CPU from a folder. ``TORCH_SHA256`` adds the
digest of another build for the CPU, such as one of PyTorch's own index.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

TORCH = ("cpu", "cuda")
"""Stand behind the extras, with a colon, of what only one of the two builds of torch needs."""
_PLACES = (Path(__file__).parents[1] / "requirements.lock", Path(__file__).parents[3] / "requirements.lock")
_BLOCK = re.compile(r"^# for: (.*)\n((?:.+\n)+)", re.MULTILINE)
_USAGE = "usage: python locked.py [--torch cpu | --torch cuda] EXTRA,EXTRA, beside requirements.lock\n"


def read_lock(text: str) -> list[tuple[set[str], str]]:
    """Each package's extras, and its lines."""
    return [(set(block[1].split()), block[2]) for block in _BLOCK.finditer(text)]


def choose(text: str, extras: set[str], environ: Mapping[str, str], *, torch: str | None = None) -> str:
    """The lines for pip of the packages that these extras need: of one build of torch, or of everything else.

    Raises ValueError for an extra that does not exist.
    """
    blocks = read_lock(text)
    if unknown := sorted(extras - set().union(*(names for names, _ in blocks))):
        raise ValueError(f"there is no extra {unknown[0]!r}")
    names_of = {f"{extra}:{torch}" for extra in extras} if torch else extras
    wanted = "".join(lines for names, lines in blocks if names & names_of)
    if torch == "cpu" and wanted and (digest := environ.get("TORCH_SHA256")):
        wanted = f"{wanted.rstrip()} \\\n    --hash=sha256:{digest}\n"
    return wanted


def main(arguments: list[str]) -> int:
    torch = None
    if arguments[:1] == ["--torch"]:
        torch, arguments = (arguments[1] if len(arguments) > 1 else ""), arguments[2:]
    lock = next((place for place in _PLACES if place.exists()), None)
    if lock is None or len(arguments) != 1 or torch not in (None, *TORCH):
        sys.stderr.write(_USAGE)
        return 2
    try:
        extras = {"producer", *arguments[0].split(",")} - {""}
        sys.stdout.write(choose(lock.read_text(encoding="utf-8"), extras, os.environ, torch=torch))
    except ValueError as error:
        sys.stderr.write(f"{error}; the extras are those of pyproject.toml\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
