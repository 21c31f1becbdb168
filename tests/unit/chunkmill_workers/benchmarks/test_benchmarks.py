"""The benchmarks' arithmetic and the shape of what they write. No time is measured here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from chunkmill import Chunk
from chunkmill_workers.benchmarks import machine, report, stats, texts
from chunkmill_workers.benchmarks.stats import OURS, PEER, Gate, Measurement, Target


def measured(name: str, *rounds: float, group: str = "g", **given: object) -> Measurement:
    return Measurement(group, name, "rows/s", rounds, **given)  # type: ignore[arg-type]


def test_a_summary_has_median_and_spread() -> None:
    assert stats.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [3.0, 1.0, 2.0]}
    assert stats.summary([])["median"] is None


def test_ratios_are_taken_round_by_round() -> None:
    measurements = [
        measured("ours", 30, 80, 20),
        measured("peer", 10, 20, 10),
        measured("elsewhere", 1, 1, 1, group="h"),
    ]

    stats.add_ratios(measurements, "peer", targets={"ours": Target(2.5)})

    ours = measurements[0].ratios["to peer"]
    assert ours["rounds"] == [3, 4, 2]
    assert (ours["median"], ours["target"], ours["met"]) == (3, 2.5, True)
    assert not measurements[1].ratios
    assert not measurements[2].ratios


def test_a_refused_contender_has_no_number_and_no_ratio() -> None:
    refused = measured("ours", 30, refused="too far off", target=Target(1))
    measurements = [refused, measured("peer", 10)]

    stats.add_ratios(measurements, "peer")
    stats.add_ratios(measurements, "ours")

    told = refused.as_json()
    assert (told["median"], told["rounds"], told["refused"]) == (None, [], "too far off")
    assert "met" not in told
    assert not refused.ratios
    assert not measurements[1].ratios


@pytest.mark.parametrize(
    ("gate", "cosine_min", "cosine_mean", "passes"),
    [
        (OURS, 0.99995, 0.99999, True),
        (OURS, 0.9998, 0.99999, False),
        (PEER, 0.9962, 0.9999, True),
        (PEER, 0.994, 0.9999, False),
        (PEER, 0.996, 0.9989, False),
        (PEER, math.nan, 1.0, False),
    ],
)
def test_the_gate(gate: Gate, cosine_min: float, cosine_mean: float, passes: bool) -> None:
    refusal = gate.refusal(cosine_min, cosine_mean)

    assert (refusal is None) == passes
    if refusal:
        assert str(gate.least_min) in refusal


def test_cosines_are_per_row_and_ignore_length() -> None:
    reference = np.array([[1, 0], [0, 2]], np.float32)

    assert stats.cosines(np.array([[3, 0], [1, 1]], np.float32), reference) == pytest.approx([1, math.sqrt(0.5)])


def test_targets_go_both_ways() -> None:
    assert Target(10).met_by(10)
    assert not Target(10).met_by(9)
    assert Target(10, at_most=True).met_by(9)
    assert not Target(10, at_most=True).met_by(11)


def test_rounds_are_interleaved_and_begin_with_another_each_time() -> None:
    ran: list[str] = []
    contenders = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    prepared: list[str] = []

    seconds = stats.interleave(contenders, 3, lambda _: None, before=prepared.append)

    assert "".join(ran) == "abcbcacab"
    assert prepared == ran
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_slope() -> None:
    assert stats.slope([1, 2, 3], [5, 7, 9]) == pytest.approx(2)
    assert stats.slope([1, 2], [5, 7]) is None


def test_texts_are_unique_and_near_the_length_asked_for() -> None:
    originals = [Chunk("x", "one text", {"module": "m"}), Chunk("y", "another", {})]
    chunks = list(texts.unique_chunks(originals, 5, first=2))

    assert len({chunk.text for chunk in chunks}) == len({chunk.id for chunk in chunks}) == 5
    assert chunks[0].metadata == {"module": "m"}
    assert {chunk.text for chunk in chunks}.isdisjoint(chunk.text for chunk in texts.unique_chunks(originals, 2))


def test_a_result_is_json_that_names_machine_and_versions_but_no_host(tmp_path: Path) -> None:
    measurements = [measured("ours", 1.0, 2.0, target=Target(1), details={"rows": 7})]
    result = report.document("write", measurements, settings={"fsync": "on"}, versions={"postgres": "18.4"})

    path = report.write(result, tmp_path)

    told = json.loads(path.read_text())
    assert told["machine"].keys() == {"cpu", "cores", "memory_gib", "flags", "gpu", "system"}
    assert told["versions"]["postgres"] == "18.4"
    assert told["versions"]["python"]
    assert told["settings"] == {"fsync": "on"}
    assert told["measurements"][0] == {
        "group": "g", "name": "ours", "unit": "rows/s", "median": 1.5, "min": 1.0, "max": 2.0, "rounds": [1.0, 2.0],
        "refused": None, "target": 1, "target_is": "at least", "met": True, "ratios": {}, "rows": 7,
    }  # fmt: skip
    assert path.name == f"write-{machine.slug(told['machine'])}.json"
    report.show(told)


def test_a_machines_name_is_fit_for_a_file() -> None:
    known = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 85)", "cores": 8, "gpu": None}

    assert machine.slug(known) == "intel-xeon-family-6-model-85-8-cores"
    assert machine.slug(known | {"gpu": "NVIDIA H200"}).startswith("nvidia-h200-intel-xeon")
