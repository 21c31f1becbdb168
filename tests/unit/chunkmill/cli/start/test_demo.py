"""The last words of the demo."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from chunkmill.cli.output import Screen
from chunkmill.cli.start import demo


def test_a_shell_that_would_not_find_the_command_is_told_what_to_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "my checkout" / ".venv" / "bin"
    programs.mkdir(parents=True)
    monkeypatch.setattr("sys.prefix", str(programs.parent))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert demo._activation() == [], "there is nothing to activate"
    (programs / "activate").touch()
    monkeypatch.chdir(tmp_path)
    assert [command for command, _ in demo._activation()] == [". 'my checkout/.venv/bin/activate'"]
    monkeypatch.chdir(programs)
    assert [command for command, _ in demo._activation()] == [f". '{programs}/activate'"]
    (programs / "chunkmill").touch(0o755)
    monkeypatch.setenv("PATH", str(programs))
    assert demo._activation() == []


def test_each_command_that_comes_next_stands_on_one_line_of_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_activation", lambda: [(". .venv/bin/activate", demo.ACTIVATES)])
    screen = Screen(as_json=False)
    seen = io.StringIO()
    screen.out = Console(file=seen, width=80, force_terminal=True, color_system=None)
    demo._show_end(screen, demo._Run(screen, tmp_path), keep=False)
    told = seen.getvalue().partition("With your own texts\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in told] == [".", *["chunkmill"] * 5]
    assert told[0].rstrip().endswith(demo.ACTIVATES)
