"""The benchmark's peers: the list, the sweep, and the processes they run in. Only the order of speeds is looked at."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkmill.errors import InvalidInput
from chunkmill.models import resolve_model
from chunkmill_workers.benchmarks import contest, flops, machine
from chunkmill_workers.benchmarks.contest import AbsentPeer, Field, Ground
from chunkmill_workers.benchmarks.names import OUR, REFERENCE
from chunkmill_workers.benchmarks.peers import Peer, environments, export, peers
from chunkmill_workers.benchmarks.peers.process import PeerError, PeerProcess

LETTERS = Peer("letters", "tests.fixtures.bench_adapter", "fp32", "none", ("numpy",))


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = resolve_model("all-MiniLM-L6-v2")
    folder = replace(folder, spec=replace(folder.spec, dimensions=3))
    return Ground(folder, "cpu", 2, tmp_path, quick=True)


def start(on: Ground, options: Mapping[str, Any] | None = None, **setting: Any) -> PeerProcess:
    return contest.start(replace(LETTERS, options=options or {}), setting, on)


@pytest.mark.parametrize(("half", "device"), [("bf16", "cpu"), (None, "cpu"), ("fp16", "cuda:0")])
def test_every_peer_can_be_found(half: str | None, device: str) -> None:
    contenders = peers(half, device)

    names = [peer.name for peer in contenders]
    assert len(set(names)) == len(names)
    assert names[0] == f"{OUR} {half or 'fp32'}"
    assert REFERENCE in names
    for peer in contenders:
        assert importlib.util.find_spec(peer.adapter), peer.adapter
        assert peer.settings
        assert peer.needs is None or peer.needs in export.KINDS
        assert peer.environment is None or peer.environment in environments.REQUIREMENTS
        assert peer.precision in {"fp32", "bf16", "fp16", "int8"}
        assert peer.threads


def test_the_reference_runs_as_it_comes() -> None:
    (reference,) = (peer for peer in peers("bf16", "cpu") if peer.name == REFERENCE)

    assert reference.settings == ({"batch_size": 32},)
    assert reference.options == {"dtype": "fp32"}


def test_our_gate_is_the_stricter_one() -> None:
    gates = {peer.name: peer.gate for peer in peers("bf16", "cpu")}

    assert gates[f"{OUR} bf16"].least_min > gates["OpenVINO bf16"].least_min
    assert gates[f"{OUR} int8"].least_mean == 0.995
    assert gates["ONNX Runtime int8"].least_mean == 0.99


def test_only_keeps_those_whose_names_hold_the_word_and_the_reference() -> None:
    known = peers("bf16", "cpu")

    chosen = [peer.name for peer in contest.select(known, ["openvino"])]

    assert chosen == [f"{OUR} openvino bf16", REFERENCE, "OpenVINO bf16", "OpenVINO int8"]
    assert contest.select(known, []) == known
    with pytest.raises(InvalidInput, match=r"no peer's name contains 'tei'.*OpenVINO int8"):
        contest.select(known, ["openvino", "tei"])


def test_a_process_embeds_in_order_and_answers_whatever_its_library_prints(on: Ground) -> None:
    with start(on) as running:
        running.ask("texts", name="t", path=on.file("t", ["abc", "cab cab", "b"]))
        saved = on.path / "vectors.npy"
        seconds = running.ask("embed", name="t", save=str(saved))["seconds"]

        assert np.load(saved).tolist() == [[1, 1, 1], [2, 2, 2], [0, 1, 0]]
        assert seconds >= 0
        assert running.ask("short", calls=3)["ms"] >= 0
        assert running.ask("versions") == {"numpy": np.__version__}
        assert running.ask("memory")["peak_kib"] is None or running.ask("memory")["peak_kib"] > 1_000
        assert running.start_seconds > 0
    assert "threads 2 OMP 2" in running.tail()
    assert running.ended


@pytest.mark.parametrize(
    ("text", "reason"),
    [("break", "^RuntimeError from its bench_adapter$"), ("leave", "its process ended with exit code 3")],
)
def test_a_peer_that_breaks_says_why(on: Ground, text: str, reason: str) -> None:
    with start(on) as running:
        running.ask("texts", name="t", path=on.file("t", [text]))
        with pytest.raises(PeerError, match=reason) as caught:
            running.ask("embed", name="t")
    assert not caught.value.unavailable
    assert running.ended


def test_a_reason_names_files_and_no_folders() -> None:
    reason = "'/home/somebody/.cache/x/model.onnx' is not there (see /var/log/a.log), unlike ./b/c and 3/4/5 GB"

    told = "'.../model.onnx' is not there (see .../a.log), unlike ./b/c and 3/4/5 GB"
    assert str(PeerError(reason)) == told


def test_vectors_of_another_shape_are_no_vectors(on: Ground) -> None:
    with start(on, extra=1) as running:
        running.ask("texts", name="t", path=on.file("t", ["abc"]))
        with pytest.raises(PeerError, match=r"1 texts gave an array of \(1, 4\)"):
            running.ask("embed", name="t")


def test_a_missing_package_comes_with_the_command_that_installs_it(on: Ground) -> None:
    with pytest.raises(PeerError, match="No module named 'onnxruntime'") as caught:
        start(on, {"missing": "onnxruntime"})
    assert caught.value.unavailable
    assert caught.value.install == "pip install -c constraints.txt '.[bench]'"

    with pytest.raises(PeerError, match="no kernels here") as caught:
        start(on, {"unavailable": "no kernels here"})
    assert caught.value.unavailable
    assert caught.value.install is None


def test_the_sweep_goes_on_when_a_setting_fails(on: Ground) -> None:
    peer = replace(LETTERS, settings=({"fails": True}, {"batch": 1}))
    sample = on.file("sample", ["abc"])

    setting, tried = contest.best_setting(peer, on, sample, 5, lambda _: None)

    assert setting == {"batch": 1}
    assert tried[0] == {"setting": {"fails": True}, "error": "ValueError: this setting fails"}
    assert tried[1]["tokens_per_second"] > 0
    with pytest.raises(PeerError, match="this setting fails"):
        contest.best_setting(replace(LETTERS, settings=({"fails": True},) * 2), on, sample, 5, lambda _: None)


def test_the_fastest_setting_wins() -> None:
    tried = [
        {"setting": {"budget": 512}, "tokens_per_second": 10.0},
        {"setting": {"budget": 1024}, "tokens_per_second": 12.0},
        {"setting": {"budget": 2048}, "error": "too big"},
    ]

    assert contest.fastest(tried) == {"budget": 1024}


def test_others_are_skipped_but_ours_and_the_reference_must_run(on: Ground) -> None:
    broken = replace(LETTERS, settings=({"fails": True},))
    needs_more = replace(LETTERS, name="elsewhere", environment="fastembed", settings=({},))

    with contest.enter([LETTERS, replace(broken, name="broken"), needs_more], on, ["abc"], lambda _: None) as field:
        assert [contender.peer.name for contender in field.contenders] == ["letters"]
        assert field.skipped[0] == AbsentPeer("broken", "ValueError: this setting fails")
        assert field.skipped[1].install == "chunkmill bench --install-peers"
        process = field["letters"].running
        assert field.as_json()["contenders"][0]["versions"] == {"numpy": np.__version__}
    assert process.ended

    unavailable = replace(LETTERS, options={"unavailable": "no kernels here"}, name=f"{OUR} int8")
    with contest.enter([unavailable], on, ["abc"], lambda _: None) as field:
        assert field == Field([], [AbsentPeer(f"{OUR} int8", "no kernels here")])
    for name in (f"{OUR} bf16", REFERENCE):
        with (
            pytest.raises(PeerError, match="this setting fails"),
            contest.enter([replace(broken, name=name)], on, ["abc"], lambda _: None),
        ):
            pass


def test_an_environment_is_there_when_it_holds_what_is_asked_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = environments.python_of("fastembed").parents[1]
    assert folder.is_relative_to(tmp_path)
    assert not environments.installed("fastembed")

    folder.mkdir(parents=True)
    (folder / "installed").write_text("\n".join(environments.REQUIREMENTS["fastembed"]))
    assert environments.installed("fastembed")
    (folder / "installed").write_text("fastembed==0.0.1")
    assert not environments.installed("fastembed")


def test_another_environment_does_not_see_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "somewhere")

    ours, own = environments.variables(3, own=False), environments.variables(3, own=True)

    assert ours["PYTHONPATH"].split(":") == [*map(str, machine.CODE), "somewhere"]
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & own.keys()
    assert {own[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")} == {"3"}


def test_tokens_are_counted_as_the_model_sees_them(on: Ground) -> None:
    assert on.token_counts(["", "one two", "word " * 1_000]).tolist() == [2, 4, 256]


def test_flops_of_a_text() -> None:
    config = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 4, "intermediate_size": 8}

    # Per token and layer: 2 x (4 x 16 + 2 x 32) for the weights, 4 x 4 x length for attention.
    assert flops.text_flops(config, np.array([3, 1])) == 2 * (3 * (256 + 48) + 1 * (256 + 16))
    assert flops.counts(config)
    assert not flops.counts({"model_type": "modernbert"})


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels in question are those of x86 Linux wheels")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_gemm_rate_is_a_rate(precision: str) -> None:
    if not flops.has(precision, "cpu"):
        pytest.skip(f"this processor does not multiply {precision}")
    assert flops.gemm_rate({"hidden_size": 64, "intermediate_size": 128}, precision, "cpu") > 0
