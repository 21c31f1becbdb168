"""Every Python program of ours is started by one function, which keeps the current folder out of its path."""

from __future__ import annotations

import ast
import atexit
import gc
import os
import re
import sys
from pathlib import Path

import pytest

from chunkmill.cli import __main__ as command
from chunkmill.system.python import keep_children_out_of_the_folder, module_command, parsed

ROOT = Path(__file__).parents[4]
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


def test_a_command_of_ours_collects_garbage_rarely_and_a_library_leaves_the_collector_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(command, "prepare_streams", lambda: None)
    seen: list[int] = []
    monkeypatch.setattr(command, "cli", lambda **_: seen.append(gc.get_threshold()[0]))
    at_the_end: list[object] = []
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    before = gc.get_threshold()
    assert before[0] < 200_000
    try:
        command.main()
    finally:
        gc.set_threshold(*before)
    assert seen == [200_000]
    assert at_the_end == [gc.freeze]


def test_source_is_read_though_a_traceback_is_formatted_meanwhile() -> None:
    parses = 0

    def deeper(phase: str, info: object, depth: int = 20) -> None:
        """What a traceback of garbage does: it parses a line, deeper in the stack than we are."""
        nonlocal parses
        if depth:
            deeper(phase, info, depth - 1)
        elif phase == "stop" and parses < 2:
            parses += 1
            ast.parse("a.b")

    source = "\n".join(f"x{number} = [{number}, 'a', f(x)]" for number in range(2_000))
    before = gc.get_threshold()
    gc.callbacks.append(deeper)
    gc.set_threshold(100)
    try:
        tree = parsed(source)
    finally:
        gc.callbacks.remove(deeper)
        gc.set_threshold(*before)
    assert (len(tree.body), parses) == (2_000, 2)
