"""What `make` says while it installs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT

# Stands for the Python of the environment: it lists a build of torch, and finds those in $FOUND alone.
PYTHON = """#!/bin/sh
case "$*" in
*--torch*) echo "torch $3" ;;
*locked.py*) echo everything else ;;
*-r\\ *torch.txt) for last; do :; done; echo "asked: $(cat "$last")" >&2; echo "$FOUND" | grep -qF "$(cat "$last")" ;;
esac
"""


@pytest.mark.parametrize("target", [".demo", ".dev"])
@pytest.mark.parametrize("found", ["cpu", "cuda"])
def test_whoever_gets_torch_with_cuda_for_want_of_another_is_told_what_it_costs(
    tmp_path: Path, target: str, found: str
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = subprocess.run(
        ["make", f"VENV={tmp_path}", str(tmp_path / target)],
        env={"PATH": "/usr/bin:/bin", "FOUND": f"torch {found}"},
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "torch.txt").read_text().strip() == f"torch {found}"
    assert ("It takes that with CUDA: 3 GB more" in done.stdout) == (found == "cuda")
    assert max(map(len, done.stdout.splitlines())) <= 80
