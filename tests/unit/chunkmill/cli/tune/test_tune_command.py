"""The `tune` command around the measuring: what it asks for, what it writes, what it says. The figures are made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from chunkmill.cli.__main__ import cli
from chunkmill.machine import Machine
from chunkmill.models import DEFAULT_SPEC
from chunkmill.settings import Settings
from chunkmill.tuning.choose import Candidate, Setup, SetupMeasurement
from chunkmill.tuning.profiles import memory_folder, read_profile

MACHINE = Machine("AMD EPYC", 2, ("avx2",))
FAST = Candidate(Setup("native", "bfloat16", 1024, 2, 2), SetupMeasurement(0.99996, 0.99999, 9000.0, 7.0, 700.0, 7))
SMALL = Candidate(Setup("native", "bfloat16", 256, 2, 2), SetupMeasurement(0.99996, 0.99999, 8000.0, 7.0, 500.0, 4))
BROKEN = Candidate(Setup("onnx", "float32", 1024, 2, 2), problem="backend onnx needs onnxruntime")


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Mapping[str, Any]]:
    """What was ordered; the answer is always the same."""
    seen: list[Mapping[str, Any]] = []
    result = {
        "candidates": [asdict(candidate) for candidate in (FAST, SMALL, BROKEN)],
        "fingerprint": DEFAULT_SPEC.fingerprint,
        "model": "all-MiniLM-L6-v2",
        "machine": asdict(MACHINE),
        "versions": {"torch": "2.13.0"},
        "texts": {"pass": 3, "gate": 3},
    }

    def measure(order: Mapping[str, Any], bar: object) -> dict[str, Any]:
        seen.append(json.loads(json.dumps(order)))  # it goes through a pipe
        return json.loads(json.dumps(result))  # type: ignore[no-any-return]

    monkeypatch.setattr("chunkmill.cli.tune.command.measure", measure)
    monkeypatch.setattr("chunkmill.cli.tune.command.docstrings", lambda: ["a docstring"])
    monkeypatch.setenv("CHUNKMILL_HOME", str(tmp_path / "home"))
    return seen


TERMINAL = {"FORCE_COLOR": "1", "COLUMNS": "400"}
PIPE = {"CHUNKMILL_OUTPUT": "auto"}


def tune(*arguments: str, terminal: bool = False) -> Result:
    return CliRunner().invoke(cli, ["tune", *arguments], env=TERMINAL if terminal else PIPE)


def test_the_winner_is_kept_with_all_it_rests_on(orders: list[Mapping[str, Any]]) -> None:
    told = json.loads(tune("--max-latency", "20ms").stdout)
    assert told["winner"] == asdict(FAST.setup)
    profile = read_profile(Path(told["profile"]))
    assert (profile.setup, profile.measured, profile.machine) == (FAST.setup, FAST.measured, MACHINE)
    assert profile.constraints.max_latency_ms == 20.0
    assert (profile.fingerprint, profile.versions) == (DEFAULT_SPEC.fingerprint, {"torch": "2.13.0"})
    assert "<svg" in Path(told["picture"]).read_text()
    assert [row["failed"] for row in told["candidates"]] == [[], [], ["problem"]]
    assert [row["pareto"] for row in told["candidates"]] == [True, True, False]


def test_a_tighter_limit_has_another_winner_and_replaces_the_profile(orders: list[Mapping[str, Any]]) -> None:
    first = json.loads(tune().stdout)
    second = json.loads(tune("--max-memory", "600MB", "--json").stdout)
    assert (first["winner"]["batch_tokens"], second["winner"]["batch_tokens"]) == (1024, 256)
    assert first["profile"] == second["profile"]
    assert read_profile(Path(second["profile"])).setup == SMALL.setup


@pytest.mark.parametrize("terminal", [True, False])
def test_where_none_fits_nothing_is_written(orders: list[Mapping[str, Any]], terminal: bool) -> None:
    done = tune("--max-memory", "600MB", "--min-throughput", "8500", terminal=terminal)
    assert done.exit_code == 1
    assert not Path(Settings.from_env().chunkmill_home or "").exists()
    if terminal:
        assert "No candidate meets all constraints" in done.stdout
        assert "does not run" in done.stdout
    else:
        told = json.loads(done.stdout)
        assert told["winner"] is told["profile"] is told["picture"] is None
        assert [row["failed"] for row in told["candidates"]] == [["memory"], ["throughput"], ["problem"]]


def test_a_dry_run_writes_nothing(orders: list[Mapping[str, Any]]) -> None:
    told = json.loads(tune("--dry-run").stdout)
    assert told["winner"] == asdict(FAST.setup)
    assert told["profile"] is told["picture"] is None
    assert not Path(Settings.from_env().chunkmill_home or "").exists()


def test_on_a_terminal_there_are_a_table_and_the_paths(orders: list[Mapping[str, Any]]) -> None:
    done = tune(terminal=True)
    assert done.exit_code == 0
    for expected in ("9,000", "8,000", "does not run", "backend onnx needs onnxruntime", "★", ".json", ".svg"):
        assert expected in done.stdout


def test_it_says_when_memory_keeps_workers_below_the_winner(orders: list[Mapping[str, Any]]) -> None:
    folder = memory_folder(Settings.from_env())
    folder.mkdir(parents=True)
    lesson = folder / f"amd-epyc-2-cores-{DEFAULT_SPEC.fingerprint[:16]}-native-bfloat16.json"
    lesson.write_text('{"batch_tokens": 300}')
    done = tune(terminal=True)
    assert "Workers use at most 300 tokens in a pass" in done.stderr
    assert str(lesson) in done.stderr


def test_what_is_ordered(orders: list[Mapping[str, Any]], tmp_path: Path) -> None:
    tune()
    file = tmp_path / "mine.jsonl"
    file.write_text('{"id": "1", "text": "one"}\n{"id": "2", "text": "  "}\n{"id": "3", "text": "one"}\n')
    tune("--model", "/m", "--precision", "int8", "--texts", str(file), "--budget", "64", "--dtype", "bf16",
         "--backend", "native", "--threads", "2", "--max-memory", "1GiB")  # fmt: skip
    plain, full = orders
    assert (plain["model"], plain["precision"], plain["texts"]) == ("all-MiniLM-L6-v2", "float", ["a docstring"])
    assert (plain["constraints"]["min_cosine"], plain["constraints"]["of_mean"]) == (0.9999, False)
    assert (full["model"], full["precision"], full["texts"]) == ("/m", "int8", ["one"])
    assert full["constraints"] == {
        "min_cosine": 0.995, "of_mean": True, "max_memory_mib": 1024.0, "max_latency_ms": None, "min_throughput": None,
    }  # fmt: skip
    assert (full["batch_tokens"], full["dtypes"], full["backends"], full["threads"]) == (
        [64],
        ["bfloat16"],
        ["native"],
        [2],
    )


def test_texts_that_are_not_there_are_refused_before_anything_is_measured(
    orders: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for name, said in (("none.jsonl", "there is no file"), ("empty.jsonl", "no text to measure with")):
        done = tune("--texts", str(tmp_path / name), terminal=True)
        assert done.exit_code == 1
        assert said in " ".join(done.stderr.split())
    assert orders == []
