"""Every Python program of ours is started by one function, which keeps the current folder out of its path."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from chunkmill.python import keep_children_out_of_the_folder, module_command

ROOT = Path(__file__).parents[3]
STARTS = re.compile(r"""(?:sys\.executable|python\w*\([^)]*\)), "(?!-P")""")


def test_a_module_is_run_without_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    assert module_command("a.b", "-c", "1") == [sys.executable, "-P", "-m", "a.b", "-c", "1"]
    keep_children_out_of_the_folder()
    assert os.environ == {"PYTHONSAFEPATH": "1"}


def test_no_other_place_starts_python_with_the_current_folder_in_its_path() -> None:
    files = [*(ROOT / "app").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]
    assert len(files) > 200
    assert [str(file) for file in files if STARTS.search(file.read_text())] == []
