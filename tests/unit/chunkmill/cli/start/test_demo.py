"""The last words of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

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
