"""What the benchmark shows of its results: the table, the JSON document, the pictures and where they go."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from chunkmill.cli.__main__ import cli
from chunkmill_workers.benchmarks import __main__ as command
from chunkmill_workers.benchmarks import machine, report, stats, summary
from chunkmill_workers.benchmarks.names import LATENCY, LIMIT, MEMORY, REFERENCE, START
from chunkmill_workers.benchmarks.peers import peers
from chunkmill_workers.benchmarks.stats import Measurement, Target, add_ratios

REFUSED = "CTranslate2 int8"


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    """Made-up rounds of every peer in the shape that the benchmark ``engine`` gives them; one fails its gate."""
    measurements: list[Measurement] = []
    chosen = peers("bf16", "cpu")
    for group in ("docstrings", "short texts"):
        part = []
        for at, peer in enumerate(chosen):
            details = {"cosine_min": 0.99, "cosine_mean": 0.9931, "texts": 100, "mean_tokens": 64.0}
            refused = "below the gate" if peer.name == REFUSED else None
            rounds = [] if refused else [4_000.0 + 1_000 * at, 4_100.0 + 1_000 * at]
            details["precision"] = peer.precision
            part.append(Measurement(group, peer.name, "tokens/s", rounds, refused=refused, details=details))
        add_ratios(part, REFERENCE, targets={"OpenVINO int8": Target(99)})
        ceiling = Measurement(
            group, f"{LIMIT}, bf16", "tokens/s", [20_000.0, 20_000.0], details={"precision": "bf16", "limit": True}
        )
        add_ratios([*part[:1], ceiling], ceiling.name, targets={part[0].name: Target(0.1)})
        measurements += [*part, ceiling]
    for peer in chosen:
        measurements += [Measurement(LATENCY, peer.name, "ms", [5.0, 6.0]), Measurement(START, peer.name, "s", [2.0])]
        measurements.append(Measurement(MEMORY, peer.name, "MiB", [512.0]))
    skipped = [{"name": "Infinity bf16", "reason": "not there", "install": "chunkmill bench --install-peers"}]
    extra = {"contenders": [], "skipped": skipped}
    return report.document("engine", measurements, settings={"model": "all-MiniLM-L6-v2"}, extra=extra)


def test_a_row_holds_all_that_was_found_of_a_contender(engine: dict[str, Any]) -> None:
    rows = summary.rows(engine)

    assert len(rows) == len(peers("bf16", "cpu")) + 1
    speeds = [row["median"] for row in rows if not row.get("limit") and not row["refused"]]
    assert speeds == sorted(speeds, reverse=True)
    assert rows[-1]["name"] == f"{LIMIT}, bf16"
    assert rows[-2]["name"] == REFUSED
    reference = next(row for row in rows if row["name"] == REFERENCE)
    assert reference["by_group"] == {"short texts": reference["median"]}
    assert (reference["peak_mib"], reference["start_seconds"], reference["short_text_ms"]) == (512.0, 2.0, 5.5)


def test_a_program_gets_one_document(engine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    summary.show([engine], ["a.json"], as_json=True)

    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"table", "skipped", "files"}
    assert told["table"] == summary.rows(engine)
    assert told["skipped"] == engine["skipped"]


def test_the_table_fits_a_terminal_of_80_columns(engine: dict[str, Any]) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(summary._table([engine], 80))

    lines = out.getvalue().splitlines()
    assert not [line for line in lines if "…" in line or len(line) > 80]
    expected = next(row["median"] for row in summary.rows(engine) if row["name"] == "OpenVINO int8")
    assert next(line for line in lines if "OpenVINO int8" in line).split()[2] == f"{expected:,.0f}"
    assert "gate" in next(line for line in lines if REFUSED in line)


def test_every_target_is_told_with_whether_it_is_met(engine: dict[str, Any]) -> None:
    told = {line.split(",")[0]: met for met, line in summary.promises(engine) if "docstrings" in line}

    assert told == {"chunkmill bf16": True, "OpenVINO int8": False}


def test_a_person_sees_what_was_skipped_and_why(engine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    summary.show([engine], [], as_json=False)

    assert "skipped: Infinity bf16: not there. Run: chunkmill bench --install-peers" in capsys.readouterr().out


def test_pictures_are_small_and_named_after_the_machine(engine: dict[str, Any], tmp_path: Path) -> None:
    from chunkmill_workers.benchmarks import plots  # Matplotlib, whose import takes most of a second

    results, images = tmp_path / "results", tmp_path / "images"
    report.write(engine, results)
    slug = machine.slug(engine["machine"])

    drawn = plots.draw(results, images, slug)

    assert {path.name for path in drawn} == {
        f"{name}-{slug}.png" for name in ("engine", "engine-lengths", "engine-costs")
    }
    assert all(path.parent == images and 10_000 < path.stat().st_size < 150_000 for path in drawn)


def test_a_quick_run_never_writes_into_a_checkout(tmp_path: Path) -> None:
    assert all(folder.is_relative_to(tempfile.gettempdir()) for folder in command._folders(None, quick=True))
    assert command._folders(tmp_path, quick=True) == (tmp_path, tmp_path)


def test_texts_of_ones_own_are_read_once_each(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"id": str(at), "text": text}) + "\n" for at, text in enumerate("abab")))

    assert command._texts(str(source)) == ["a", "b"]
    assert command._texts(None) == []


def test_what_a_contender_returns_is_kept_by_round() -> None:
    numbers = iter(range(6))
    contend = {name: lambda: float(next(numbers)) for name in "ab"}

    assert stats.in_turns(contend, 3, lambda _: None) == {"a": [0, 3, 4], "b": [1, 2, 5]}


def test_the_command_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes another program, which is caught here and run in this process: torch is imported in it anyway."""
    executed: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, argv: executed.append([program, *argv]))
    asked = CliRunner().invoke(cli, ["bench", "--quick", "--scope", "engine", "--only", "nobody"])
    assert (asked.exit_code, asked.output) == (0, "")
    assert executed[0][:5] == [sys.executable, sys.executable, "-P", "-m", "chunkmill_workers.benchmarks"]

    monkeypatch.setenv("EMBEDDING_MODEL", "which the benchmark sets")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    done = CliRunner().invoke(command.main, executed[0][5:])

    assert done.exit_code == 1
    assert "no peer's name contains 'nobody'" in done.stderr
    assert isinstance(done.exception, SystemExit), "and no other error"
