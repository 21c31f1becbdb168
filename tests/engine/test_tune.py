"""`chunkmill tune` on a toy, from the command to the worker that follows the profile. No figure is looked at."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from chunkmill.cli.__main__ import cli
from chunkmill.domain.spaces import Precision
from chunkmill.errors import EngineError
from chunkmill.machine import this_machine, versions
from chunkmill.models import resolve_model
from chunkmill.settings import Settings
from chunkmill.tuning.choose import Constraints, Setup, SetupMeasurement
from chunkmill.tuning.profiles import Profile, memory_folder, profile_path, read_profile, write_profile
from chunkmill_workers.engine.precision import cpu_has_bf16
from chunkmill_workers.tuning.candidate import LoadedEngine
from chunkmill_workers.tuning.process import CandidateFailed, CandidateProcess, Task
from chunkmill_workers.tuning.tune import Order, with_stated
from chunkmill_workers.tuning.tuned import load_engine, process_settings
from tests.engine.conftest import stdlib_docstrings
from tests.support.checkout import PYTHONPATH

SETUP = Setup("native", "float32", 64, 1, 2)


@pytest.fixture
def toy(toy_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy as the default model, and a home of this test's own."""
    model = toy_path("bert-mean")
    monkeypatch.setenv("EMBEDDING_MODEL", str(model))
    monkeypatch.setenv("EMBEDDING_DEVICE", "cpu")
    monkeypatch.setenv("EMBEDDING_PROFILE", "auto")
    monkeypatch.setenv("CHUNKMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return model


@pytest.fixture
def texts(tmp_path: Path) -> str:
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"id": str(at), "text": text}) + "\n" for at, text in enumerate(stdlib_docstrings()[:40]))
    )
    return str(file)


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["tune", *arguments, "--json"])


def documented(done: Result, exit_code: int = 0) -> Any:
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
def test_from_the_command_to_the_worker(toy: Path, texts: str, caplog: pytest.LogCaptureFixture) -> None:
    """One row for each setup, with figures or with what it lacks; the winner is kept, and an engine follows it."""
    tuned = documented(
        tune("--texts", texts, "--budget", "512", "--budget", "2048", "--dtype", "fp32", "--dtype", "bf16",
             "--backend", "native", "--backend", "onnx", "--threads", "1", "--min-cosine", "0.9999999",
             "--seconds", "0.1", "--json")
    )  # fmt: skip
    rows = {(*candidate["setup"].values(),)[:3]: candidate for candidate in tuned["candidates"]}
    broken = rows.pop(("onnx", "float32", 512))
    assert (broken["measured"], broken["failed"]) == (None, ["problem"])
    assert "onnx" in broken["problem"]
    if cpu_has_bf16():  # where it is emulated it is not tried
        gated = rows.pop(("native", "bfloat16", 512))
        assert gated["failed"] == ["cosine"]
        assert gated["measured"]["cosine_min"] < 0.9999999
        assert gated["measured"]["tokens_per_second"] is None  # under the gate there is no speed
    assert set(rows) == {("native", "float32", 512), ("native", "float32", 2048)}
    for row in rows.values():
        measured = row["measured"]
        assert row["failed"] == []
        assert measured["cosine_min"] >= 0.9999999
        assert measured["tokens_per_second"] > 0
        assert measured["latency_ms"] > 0
        assert measured["peak_mib"] > 50
        assert measured["rounds"] == 7  # screened, and twice three interleaved rounds
    fastest = max(rows.values(), key=lambda row: row["measured"]["tokens_per_second"])
    assert tuned["winner"] == fastest["setup"]

    profile = read_profile(Path(tuned["profile"]))
    assert asdict(profile.setup) == fastest["setup"]
    assert profile.measured.tokens_per_second == fastest["measured"]["tokens_per_second"]
    assert Path(tuned["picture"]).read_text().startswith("<svg")
    with caplog.at_level(logging.INFO):
        engine = load_engine(Settings.from_env(), resolve_model(str(toy)), "cpu", this_machine())
    assert (engine.backend, engine.dtype, engine.batch_tokens) == ("native", "float32", profile.setup.batch_tokens)
    assert "by its profile native fp32" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "/no/such/folder"), "not a folder on this machine"),
        (("--dtype", "fp16", "--backend", "onnx"), "suits this device"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    toy: Path, texts: str, arguments: tuple[str, ...], said: str
) -> None:
    done = tune("--texts", texts, *arguments)
    assert done.exit_code == 1
    assert said in json.loads(done.stderr.splitlines()[-1])["message"]
    assert "Traceback" not in done.output


def test_a_candidate_that_dies_has_a_reason(toy: Path) -> None:
    task = Task(str(toy), "float", "cpu", ["a text"], 512)
    with CandidateProcess(task, SETUP) as process:
        assert process.turn().tokens > 0
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(CandidateFailed, match="SIGKILL: out of memory, most likely"):
            process.turn()
    with pytest.raises(CandidateFailed, match="onnx"):
        CandidateProcess(task, replace(SETUP, backend="onnx"))


def test_a_token_limit_that_does_not_fit_the_memory_is_no_candidate(toy: Path) -> None:
    """The engine goes on in smaller passes; what is measured then is another setup."""
    task = Task(str(toy), "float", "cpu", ["a text"], 512)
    loaded = LoadedEngine({**asdict(task), "setup": asdict(SETUP)})
    assert loaded.turn()["tokens"] > 0
    loaded._engine._token_limit.shrink(100)  # as after a pass of 100 tokens that did not fit
    with pytest.raises(EngineError, match="a pass of 64 tokens does not fit the device's memory; 50 do"):
        loaded.turn()


def test_what_the_environment_states_is_all_that_is_tried(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(str(toy), Precision.FLOAT, Constraints(0.9999), ["a text"])
    assert with_stated(order, Settings.from_env()) == replace(order, backends=[], dtypes=[], batch_tokens=[])
    monkeypatch.setenv("EMBEDDING_DTYPE", "bf16")
    monkeypatch.setenv("EMBEDDING_BACKEND", "openvino")
    monkeypatch.setenv("EMBEDDING_BATCH_TOKENS", "777")
    stated = with_stated(order, Settings.from_env())
    assert (stated.backends, stated.dtypes, stated.batch_tokens) == (["openvino"], ["bfloat16"], [777])
    asked = replace(order, backends=["native"], dtypes=["float32"], batch_tokens=[64])
    assert with_stated(asked, Settings.from_env()) == asked


# What a worker makes of a profile.


def keep(settings: Settings, **changes: Any) -> Profile:
    """A profile for the toy on this machine."""
    machine = this_machine()
    fingerprint = resolve_model(settings.embedding_model).spec.fingerprint
    profile = Profile(
        settings.embedding_model, fingerprint, replace(SETUP, batch_tokens=96, parallel_batches=5),
        SetupMeasurement(1.0, 1.0, 1000.0, 1.0, 300.0, 7), Constraints(0.9999), machine, versions(), "2026-11-21",
    )  # fmt: skip
    profile = replace(profile, **changes)
    write_profile(profile, profile_path(settings, fingerprint, machine))
    return profile


def test_a_lesson_about_memory_holds_below_the_profile(toy: Path) -> None:
    settings = Settings.from_env()
    profile = keep(settings)
    folder = resolve_model(str(toy))
    engine = load_engine(settings, folder, "cpu", this_machine())
    assert engine.batch_tokens == 96
    engine._token_limit.shrink(120)  # as after a pass of 120 tokens that did not fit
    [lesson] = memory_folder(settings).iterdir()
    assert load_engine(settings, folder, "cpu", this_machine()).batch_tokens == 60
    lesson.write_text('{"batch_tokens": 4096}')
    assert load_engine(settings, folder, "cpu", this_machine()).batch_tokens == profile.setup.batch_tokens


def test_what_is_set_explicitly_wins(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the profile, and over what a worker has learned when memory was short."""
    keep(Settings.from_env())
    learned = memory_folder(Settings.from_env())
    assert learned
    folder = resolve_model(str(toy))
    load_engine(Settings.from_env(), folder, "cpu", this_machine())._token_limit.shrink(100)
    assert load_engine(Settings.from_env(), folder, "cpu", this_machine()).batch_tokens == 50
    monkeypatch.setenv("EMBEDDING_BATCH_TOKENS", "80")
    assert load_engine(Settings.from_env(), folder, "cpu", this_machine()).batch_tokens == 80
    monkeypatch.delenv("EMBEDDING_BATCH_TOKENS")
    monkeypatch.setenv("EMBEDDING_PROFILE", "off")
    if not cpu_has_bf16():  # the default precision is that of the profile then, so that the lesson holds here too
        for lesson in learned.iterdir():
            lesson.unlink()
    assert load_engine(Settings.from_env(), folder, "cpu", this_machine()).batch_tokens > 96


def test_a_profile_that_cannot_be_followed_does_not_stop_a_worker(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.from_env()
    keep(settings, setup=replace(SETUP, backend="onnx"))  # and there is no export of the toy
    engine = load_engine(settings, resolve_model(str(toy)), "cpu", this_machine())
    assert engine.backend == "native"
    assert "cannot be followed" in caplog.text
    assert "run `chunkmill tune` again" in caplog.text


def test_a_stale_profile_is_left_out_with_a_line_in_the_log(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.from_env()
    keep(settings, versions=versions() | {"torch": "1.13.1"})
    assert load_engine(settings, resolve_model(str(toy)), "cpu", this_machine()).batch_tokens != 96
    assert "made with torch 1.13.1" in caplog.text
    assert "run `chunkmill tune` again" in caplog.text


def test_threads_and_chunk_batches_at_a_time_are_the_default_models(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(Settings.from_env())
    chosen = process_settings(Settings.from_env(), "cpu")
    assert (chosen.embedding_threads, chosen.embedding_parallel_batches) == (1, 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert process_settings(Settings.from_env(), "cpu").embedding_threads == 7
    monkeypatch.setenv("EMBEDDING_PRECISION", Precision.INT8)  # another space: its profile is not this one
    assert process_settings(Settings.from_env(), "cpu").embedding_parallel_batches == 2
    monkeypatch.setenv("EMBEDDING_MODEL", "/no/such/folder")  # told when it is loaded
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert process_settings(Settings.from_env(), "cpu").embedding_threads == this_machine().cores
