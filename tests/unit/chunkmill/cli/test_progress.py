"""The progress of a piece of work: a bar that goes on under another name, and lines that do not wait for a count."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from click.testing import CliRunner
from rich.console import Console

from chunkmill import Client, InvalidInput
from chunkmill.cli import lacks, progress
from chunkmill.cli.__main__ import cli
from chunkmill.cli.output import Screen
from chunkmill.cli.progress import Bar
from tests.support.waiting import PATIENCE, until


def test_what_was_counted_under_one_name_does_not_stay_under_the_next() -> None:
    screen, seen = Screen(as_json=False), io.StringIO()
    screen.err = Console(width=80, force_terminal=True, file=seen, color_system=None)
    with Bar(screen, "docs: filling") as bar:
        assert bar._progress is not None
        bar.update(8, 41, "texts")
        bar._progress.refresh()
        assert "8/41 texts" in seen.getvalue()
        seen.truncate(0)
        bar.stage("docs: judging")
        bar._progress.refresh()
    last = seen.getvalue().rpartition("docs: judging")[2]
    assert ("docs: judging" in seen.getvalue(), "8/41" in last) == (True, False)


def test_a_pipe_gets_lines_also_while_nothing_is_counted(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    screen, read = Screen(as_json=False), list[dict[str, object]]()

    def lines() -> list[dict[str, object]]:
        read.extend(map(json.loads, capfd.readouterr().err.splitlines()))
        return read

    with Bar(screen, "tuning docs") as bar:
        until(lambda: len(lines()) >= 2)
        assert {line.pop("progress") for line in read} == {"tuning docs"}
        assert [line.keys() for line in read] == [{"seconds"}] * len(read)
        bar.update(8, 41, "texts", {"per_s": 2.26})
        until(lambda: lines()[-1].get("done") == 8)
        assert {**read[-1], "seconds": 0} == {
            "progress": "tuning docs", "done": 8, "total": 41, "unit": "texts", "per_s": 2.3, "seconds": 0
        }  # fmt: skip
        bar.stage("judging docs")
        until(lambda: lines()[-1]["progress"] == "judging docs")
        assert "done" not in read[-1]
    capfd.readouterr()
    screen.err.print("the end")
    assert capfd.readouterr().err == "the end\n"


def test_a_bar_that_waits_is_drawn_if_the_work_lasts_though_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.01)
    screen, seen = Screen(as_json=False), io.StringIO()
    screen.err = Console(width=80, force_terminal=True, file=seen, color_system=None)
    with Bar(screen, "tuning docs", waits=True):
        until(lambda: "tuning docs" in seen.getvalue())


def test_work_that_is_refused_at_once_draws_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WAIT_SECONDS", PATIENCE)
    screen, seen = Screen(as_json=False), io.StringIO()
    screen.err = Console(width=80, force_terminal=True, file=seen, color_system=None)
    with pytest.raises(ValueError, match="no"), Bar(screen, "tuning docs", waits=True):
        raise ValueError("no")
    assert seen.getvalue() == ""


def test_short_work_prints_no_line(capfd: pytest.CaptureFixture[str]) -> None:
    with Bar(Screen(as_json=False), "reading") as bar:
        bar.update(1, 2, "chunks")
    assert capfd.readouterr().err == ""


LONG = {
    "audit docs": "audit",
    "index docs": "index",
    "map docs": "map",
    "keywords docs --language simple": "keywords",
    "golden tune docs": "tune_search",
    "compare docs org/new": "compare",
    "compare docs org/new --dry-run": "quote_comparison",
    "bridge learn docs org/new": "bridge",
    "bridge learn docs org/new --dry-run": "quote_bridge",
    "reembed start docs org/new --dry-run": "reembed",
    "reembed judge 1": "judge_reembedding",
    "reembed flip 1": "flip",
    "reembed rollback 1": "rollback",
    "export docs docs.jsonl": "export",
    "delete docs c1 --yes": "delete",
    "chunks update docs c1 --set {}": "update_metadata",
    "collections drop docs --yes": "drop_collection",
}
"""Command → the call that may take minutes."""


@pytest.mark.parametrize("command", LONG)
def test_a_command_that_takes_long_says_so_in_a_pipe(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def long(*_: object, **__: object) -> None:
        until(lambda: said)
        raise InvalidInput("it was long enough.")

    client = MagicMock(**{LONG[command]: long})
    monkeypatch.setattr(Client, "from_env", lambda: MagicMock(__enter__=lambda _: client))
    monkeypatch.setattr(lacks, "of_models", lambda *_: [])
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "click", SimpleNamespace(echo=lambda line, err: said.append(line)))
    done = CliRunner().invoke(cli, command.split())
    assert (done.exit_code, "it was long enough" in done.stderr) == (1, True), done.output
    assert json.loads(said[0])["progress"]
