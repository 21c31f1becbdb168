"""`models list`, `models choose` and `models check` around the table and the engine."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from chunkmill.cli.__main__ import cli
from chunkmill.cli.models import check as checking
from chunkmill.cli.models.known import _maker
from chunkmill.cli.output import Screen
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.machine import this_machine, versions
from chunkmill.models import DEFAULT_SPEC, resolve_model
from chunkmill.models.known import known_models
from chunkmill.settings import Settings
from chunkmill.tuning.choose import Constraints, Setup, SetupMeasurement
from chunkmill.tuning.profiles import Profile, profile_path, write_profile
from chunkmill.tuning.yardsticks import yardsticks

BASE = "BAAI/bge-base-en-v1.5"
LOADED = {
    "device": "cpu",
    "backend": "native",
    "dtype": "float32",
    "load_seconds": 1.5,
    "latency_ms": 9.5,
    "tokens_per_second": 4321.0,
    "memory_mib": 400.0,
}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.setenv("CHUNKMILL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    return Settings.from_env()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["models", *arguments])


def document(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def tuned(settings: Settings, *, spec: SpaceSpec = DEFAULT_SPEC, **fields: Any) -> Path:
    """Writes the profile of the bundled model on this machine, with other ``fields``."""
    machine = this_machine(None)
    profile = Profile(
        "all-MiniLM-L6-v2", spec.fingerprint, Setup("native", "bfloat16", 512, 2, 4),
        SetupMeasurement(1.0, 1.0, 8_000.0, 5.0, 500.0, 7), Constraints(0.9999), machine, versions(),
        "2026-11-21T10:00:00+00:00",
    )  # fmt: skip
    profile = replace(profile, **fields)
    path = profile_path(settings, profile.fingerprint, machine)
    write_profile(profile, path)
    return path


def test_the_list_needs_no_server_and_shows_what_was_measured_here(home: Settings) -> None:
    assert "Nothing was measured on this machine yet" in run("list").stderr
    tuned(home)

    rows = {row["name"]: row for row in document("list")}

    assert rows["sentence-transformers/all-MiniLM-L6-v2"]["measured_here"] == {
        "tokens_per_second": 8_000.0, "latency_ms": 5.0, "peak_mib": 500.0
    }  # fmt: skip
    assert rows[BASE]["measured_here"] is None
    assert rows[BASE]["query_prompt"].startswith("Represent this sentence")
    assert rows["text-embedding-3-small"]["usd_per_million_tokens"] == "0.02"
    assert "8,000" in run("list").stdout


@pytest.mark.parametrize(
    "change",
    [
        {"machine": replace(this_machine(None), cores=1_000)},
        {"machine": replace(this_machine(None), gpu="a GPU that is not here")},
        {"versions": {}},
        {"model": "no/such-model"},
        {"measured": SetupMeasurement(1.0, 1.0)},
    ],
)
def test_a_profile_that_does_not_hold_here_measures_nothing(change: dict[str, Any], home: Settings) -> None:
    tuned(home, **change)

    assert yardsticks(home) == []


def test_a_profile_that_cannot_be_read_hides_no_other(home: Settings) -> None:
    tuned(home).with_name("broken.json").write_text("{")

    assert [measured.model.name for measured in yardsticks(home)] == ["sentence-transformers/all-MiniLM-L6-v2"]


def test_of_two_profiles_of_a_model_the_faster_one_counts(home: Settings) -> None:
    int8 = replace(DEFAULT_SPEC, revision="another")
    tuned(home)
    tuned(home, spec=int8, measured=SetupMeasurement(1.0, 1.0, 9_000.0, 4.0, 450.0, 7))

    assert [measured.tokens_per_second for measured in yardsticks(home)] == [9_000.0]


def test_a_latency_cannot_be_promised_on_a_machine_where_nothing_was_measured() -> None:
    refused = run("choose", "--latency", "20ms")

    assert refused.exit_code == 1
    assert "chunkmill tune --model all-MiniLM-L6-v2" in refused.stderr


def test_a_model_is_chosen_with_the_settings_that_serve_it(home: Settings) -> None:
    tuned(home)

    chosen = run("choose", "--latency", "50ms", "--memory", "2GB", "--tokens", "512", "--dimensions", "300")

    assert chosen.exit_code == 0
    assert "EMBEDDING_DIMENSIONS=300" in chosen.stdout
    assert "EMBEDDING_MODEL=google/embeddinggemma-300m@<commit>?prompts=gemma" in chosen.stdout
    fitting = [row for row in document("choose", "--latency", "5ms")["options"] if not row["failures"]]
    assert "sentence-transformers/all-MiniLM-L6-v2" in [row["model"] for row in fitting]
    assert BASE not in [row["model"] for row in fitting]


def test_wishes_that_nothing_meets_end_with_1_and_say_which_they_are() -> None:
    none = run("choose", "--dimensions", "8", "--tokens", "100000", "--commercial")

    assert none.exit_code == 1
    assert "None of" in none.stdout
    assert "dimensions" in none.stdout


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], list[list[str]]]:
    """Lets the process that loads a model end with an exit code and an output; returns the commands that were run."""

    def answer(code: int, output: str) -> list[list[str]]:
        commands: list[list[str]] = []

        def run_one(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            return subprocess.CompletedProcess(command, code, output, "first line\nlast line\n")

        monkeypatch.setattr(checking.subprocess, "run", run_one)
        return commands

    return answer


def test_a_check_says_what_the_model_is_and_that_it_works(loads: Callable[[int, str], list[list[str]]]) -> None:
    commands = loads(0, json.dumps(LOADED))

    said = run("check", "all-MiniLM-L6-v2")

    assert said.exit_code == 0
    assert "384 dimensions, pooling mean" in said.stdout
    assert "It works on cpu (native, float32)" in said.stdout
    assert commands[0][-2:] == ["--", "all-MiniLM-L6-v2"]
    whole = document("check", "all-MiniLM-L6-v2")
    assert whole["fingerprint"] == DEFAULT_SPEC.fingerprint
    assert (whole["works"], whole["loaded"]) == (True, LOADED)


def test_a_model_that_does_not_load_is_refused_with_its_sentence(loads: Callable[[int, str], list[list[str]]]) -> None:
    loads(1, json.dumps({"error": "model_load", "message": "it gives vectors of another width"}))

    said = run("check", "all-MiniLM-L6-v2")

    assert said.exit_code == 1
    assert "It will not work here: it gives vectors of another width" in said.stdout
    assert document("check", "all-MiniLM-L6-v2")["works"] is False


@pytest.mark.parametrize(("code", "cause"), [(-9, "too little memory"), (1, "last line")])
def test_a_process_that_is_killed_is_no_model_that_works(
    code: int, cause: str, loads: Callable[[int, str], list[list[str]]]
) -> None:
    loads(code, "")

    said = document("check", "all-MiniLM-L6-v2")

    assert (said["works"], said["error"]) == (False, "model_load")
    assert cause in said["message"]


def test_files_only_loads_nothing(loads: Callable[[int, str], list[list[str]]]) -> None:
    commands = loads(0, json.dumps(LOADED))

    said = document("check", "all-MiniLM-L6-v2", "--files-only")

    assert (said["works"], said["loaded"], commands) == (None, None, [])


def test_a_folder_that_cannot_be_read_is_refused_before_anything_is_loaded(
    tmp_path: Path, loads: Callable[[int, str], list[list[str]]]
) -> None:
    commands = loads(0, json.dumps(LOADED))

    said = run("check", str(tmp_path))

    assert said.exit_code == 1
    assert "It will not work here" in said.stdout
    assert commands == []


def test_prompts_that_the_card_asks_for_and_the_folder_lacks_are_named(
    tmp_path: Path, loads: Callable[[int, str], list[list[str]]]
) -> None:
    """Only the name of the folder says which model it is, so the advice is careful."""
    loads(0, json.dumps(LOADED))
    folder = shutil.copytree(resolve_model("all-MiniLM-L6-v2").path, tmp_path / "e5-small-v2")

    (line,) = document("check", str(folder))["advice"]

    assert line.startswith("If this is intfloat/e5-small-v2: ")
    assert line.endswith(f"Name it as {folder}?prompts=e5.")
    assert document("check", f"{folder}?prompts=e5")["advice"] == []


@pytest.mark.parametrize(("columns", "last"), [(70, "params"), (80, "MTEB"), (160, "prompts")])
def test_a_terminal_shows_a_line_for_each_model_below_the_beginning_of_its_name(
    columns: int, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Screen, "__init__", _terminal(Screen.__init__, columns))
    lines = run("list").stdout.splitlines()
    assert lines[0].split()[-1] == last
    seen, maker = [], ""
    for line in lines[1 : 1 + len(known_models()) + len({_maker(model) for model in known_models()} - {""})]:
        assert len(line) <= columns
        name, *cells = line.split()
        maker = maker if line.startswith(" ") else name if name.endswith("/") else ""
        seen += [(maker if line.startswith(" ") else "") + name] if cells else []
    assert sorted(seen) == sorted(model.name for model in known_models())


def test_a_pipe_has_the_whole_name_in_each_line() -> None:
    lines = run("list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(known_models())]] == [model.name for model in known_models()]


def _terminal(init: Callable[..., None], columns: int) -> Callable[..., None]:
    def made(screen: Screen, *, as_json: bool, json_in_pipes: bool) -> None:
        init(screen, as_json=as_json)
        plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "color_system": None}
        screen.out = Console(width=columns, force_terminal=True, **plain)

    return made
