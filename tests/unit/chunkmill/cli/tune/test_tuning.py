"""What `chunkmill tune` chooses, and how it shows it: facts in, a choice, a picture or a table out."""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.cli.output import Screen
from chunkmill.cli.tune.command import _BYTES, _SECONDS, Quantity
from chunkmill.cli.tune.picture import BOTTOM, LEFT, RIGHT, TOP, WIDTH, draw
from chunkmill.cli.tune.table import show
from chunkmill.machine import Machine, _quota, cores
from chunkmill.tuning.choose import NOISE, Candidate, Constraints, Setup, SetupMeasurement, choose, pareto, ranked
from chunkmill_workers.tuning.search import Grid, take

V1 = "cpu,cpuacct/x/cpu.cfs"
ANY = Constraints(0.9999)
MACHINE = Machine("AMD EPYC <9654>", 2, ("avx2",))


def candidate(speed: float | None, memory: float = 500.0, latency: float = 7.0, **changes: Any) -> Candidate:
    setup = Setup("native", "bfloat16", changes.pop("batch_tokens", 1024), 2, 2)
    measured_values = {"cosine_min": 0.99995, "cosine_mean": 0.99999, "rounds": 1} | changes
    return Candidate(
        setup, SetupMeasurement(tokens_per_second=speed, latency_ms=latency, peak_mib=memory, **measured_values)
    )


FAST, SMALL, QUICK = candidate(900.0, 800.0, 9.0), candidate(500.0, 300.0, 8.0), candidate(400.0, 600.0, 3.0)
BROKEN = Candidate(FAST.setup, problem="its process was ended by SIGKILL")
UNGATED = Candidate(FAST.setup, SetupMeasurement(0.9998, 0.99999))


@pytest.mark.parametrize(
    ("constraints", "winner"),
    [
        (ANY, FAST),
        (Constraints(0.9999, max_memory_mib=700.0), SMALL),
        (Constraints(0.9999, max_latency_ms=5.0), QUICK),
        (Constraints(0.9999, max_memory_mib=800.0, max_latency_ms=9.0, min_throughput=900.0), FAST),  # at the limit
        (Constraints(0.9999, max_memory_mib=700.0, min_throughput=501.0), None),
        (Constraints(0.99996), None),
        (Constraints(0.99996, of_mean=True), FAST),
    ],
)
def test_the_fastest_that_meets_every_constraint_wins(constraints: Constraints, winner: Candidate | None) -> None:
    assert choose([SMALL, BROKEN, QUICK, FAST, UNGATED], constraints) is winner


def test_a_candidate_names_every_constraint_it_breaks() -> None:
    strict = Constraints(0.9999, max_memory_mib=700.0, max_latency_ms=8.5, min_throughput=1000.0)
    assert strict.failures(FAST) == ("memory", "latency", "throughput")
    assert strict.failures(BROKEN) == ("problem",)
    assert strict.failures(UNGATED) == ("cosine",)
    assert ANY.failures(candidate(1.0, cosine_min=math.nan)) == ("cosine",)
    assert ANY.failures(FAST) == ()


def test_equally_fast_ones_are_told_apart_by_memory_then_time_then_batch_tokens() -> None:
    small = candidate(900.0, 700.0, 9.0)
    quick = candidate(900.0, 700.0, 8.0)
    narrow = candidate(900.0, 700.0, 8.0, batch_tokens=512)
    assert choose([FAST, small], ANY) is small
    assert choose([small, quick], ANY) is quick
    assert choose([narrow, quick], ANY) is narrow is choose([quick, narrow], ANY)


def test_one_lucky_pass_does_not_beat_the_median_of_several() -> None:
    lucky, steady = candidate(950.0), candidate(900.0, rounds=4)
    assert choose([lucky, steady], ANY) is steady
    # But what keeps the constraints beats what does not, however often it was measured.
    assert choose([lucky, steady], Constraints(0.9999, min_throughput=920.0)) is lucky


def test_halving_keeps_those_that_fit_before_those_that_are_fast() -> None:
    assert ranked([QUICK, BROKEN, FAST, UNGATED, SMALL], Constraints(0.9999, max_memory_mib=700.0)) == [
        SMALL,
        QUICK,
        FAST,
    ]


def test_what_nothing_beats_in_all_three_is_on_the_front() -> None:
    worse = candidate(FAST.measured.tokens_per_second / (1 + 2 * NOISE), 800.0, 9.0)  # type: ignore[union-attr, operator]
    same = candidate(899.0, 801.0, 9.01)
    assert pareto([worse, SMALL, FAST, QUICK, same, BROKEN, UNGATED]) == [SMALL, FAST, QUICK, same]


@given(st.lists(st.tuples(*[st.floats(1, 1e6)] * 3), min_size=1, max_size=8))
def test_the_front_is_never_empty(numbers: list[tuple[float, float, float]]) -> None:
    assert pareto([candidate(speed, memory, latency) for speed, memory, latency in numbers])


def test_the_picture_is_svg_and_names_model_machine_winner_and_limits() -> None:
    limits = Constraints(0.9999, max_latency_ms=8.0, min_throughput=450.0)
    candidates = [FAST, SMALL, QUICK, BROKEN, UNGATED]
    picture = draw(candidates, limits, SMALL, model="a<b>&c", machine=MACHINE, on="2026-01-02T03:04:05")
    svg = ET.fromstring(picture)  # noqa: S314 - made here
    words = " ".join(element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}text"))
    for expected in ("a<b>&c on AMD EPYC <9654>, 2 cores", "chosen: native bf16, 1,024 tokens in a pass: 500 tokens/s",
                     "over 8 ms", "under 450 tokens/s", "native bf16", "2026-01-02"):  # fmt: skip
        assert expected in words
    titles = [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3  # what did not run, or has no speed, is in the table alone


def test_a_picture_of_one_candidate_shows_it_within_the_frame_with_its_label() -> None:
    """Where there is no difference between candidates to make a scale of."""
    alone = candidate(900.0, latency=7.0, batch_tokens=2048)
    svg = ET.fromstring(draw([alone], ANY, alone, model="m", machine=MACHINE, on="2026-01-02"))  # noqa: S314
    space = "{http://www.w3.org/2000/svg}"
    (group,) = svg.findall(f"{space}g")
    (dot,) = group.findall(f"{space}circle")
    (ring,) = [circle for circle in svg.findall(f"{space}circle") if circle.get("r") == "11"]
    at = float(dot.attrib["cx"]), float(dot.attrib["cy"])
    assert (float(ring.attrib["cx"]), float(ring.attrib["cy"])) == at
    assert LEFT < at[0] < WIDTH - RIGHT
    assert TOP < at[1] < BOTTOM
    assert dot.get("fill") == dot.get("stroke")  # nothing beats it
    assert group.get("opacity") is None  # it breaks nothing
    texts = {element.text: element for element in svg.iter(f"{space}text")}
    label = float(texts["2k"].attrib["x"]), float(texts["2k"].attrib["y"])
    assert math.dist(label, at) < 40
    # And it stands over its own number.
    assert float(texts["7"].attrib["x"]) == pytest.approx(at[0], abs=1)


def test_the_table_marks_the_winner_and_says_what_each_of_the_others_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    show(Screen(as_json=False), [UNGATED, BROKEN, QUICK, SMALL, FAST], Constraints(0.9999, max_memory_mib=700.0))
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines[1:6]]
    assert [row[4] for row in cells[:3]] == ["900", "500", "400"]
    assert [row[0] for row in cells[:3]] == ["◆", "★", "◆"]
    assert cells[0][-1] == "memory"
    assert cells[1][-1] == "0.999990"  # breaks nothing
    assert cells[3][-1] == "cosine"
    assert lines[5].endswith("does not run")
    assert "native bf16 1,024: its process was ended by SIGKILL" in lines
    assert "★ the fastest candidate that meets --max-memory 700 MiB, --min-cosine 0.9999" in lines


def test_the_table_says_that_nothing_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    show(Screen(as_json=False), [FAST], Constraints(0.9999, max_latency_ms=1.0))
    out = capsys.readouterr().out
    assert "No candidate meets all constraints: --max-latency 1 ms, --min-cosine 0.9999. Nothing was written." in out
    assert "★" not in out


@pytest.mark.parametrize(
    ("units", "unit", "given_", "expected"),
    [
        (_BYTES, "mib", "2GB", 1907.35),
        (_BYTES, "mib", "1.5 GiB", 1536.0),
        (_BYTES, "mib", "512mb", 488.28),
        (_SECONDS, "ms", "20ms", 20.0),
        (_SECONDS, "ms", "0.5s", 500.0),
    ],
)
def test_quantities_have_units(units: dict[str, float], unit: str, given_: str, expected: float) -> None:
    assert Quantity("amount", units, unit, "2GB").convert(given_, None, None) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("given_", ["2", "GB", "0GB", "-1GB", "2 parsecs"])
def test_a_quantity_without_a_unit_is_refused_with_an_example(given_: str) -> None:
    with pytest.raises(click.UsageError, match="such as 2GB"):
        Quantity("amount of memory", _BYTES, "mib", "2GB").convert(given_, None, None)


def test_texts_are_taken_in_order_until_they_fill_a_pass_and_from_the_start_again() -> None:
    assert take(["a", "b", "c"], [3, 3, 3], 5) == ["a", "b"]
    assert take(["a", "b"], [1, 1], 5) == ["a", "b", "a", "b", "a"]
    assert take(["a"], [100], 5) == ["a"]


def test_the_progress_bar_knows_how_many_measurements_there_are_at_most() -> None:
    one = Grid([("native", "float32")], [256], 256, [2], [2])
    assert one.steps == 1 + 3 * (1 + 1)
    many = Grid(
        [("native", "float32"), ("native", "bfloat16"), ("onnx", "float32")], [256, 512, 1024], 512, [4, 2], [2]
    )
    assert many.steps == 3 + 2 * 2 + 2 * 1 + 3 * (4 + 2)


@pytest.mark.parametrize(
    ("groups", "files", "share"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2.0),
        ("4:cpu,cpuacct:/x", {f"{V1}_quota_us": "50000", f"{V1}_period_us": "100000"}, 0.5),
        ("4:cpu,cpuacct:/x", {f"{V1}_quota_us": "-1", f"{V1}_period_us": "100000"}, None),
    ],
)  # fmt: skip
def test_a_container_is_given_no_more_cores_than_its_quota(
    tmp_path: Path, groups: str, files: dict[str, str], share: float | None
) -> None:
    (tmp_path / "cgroup").write_text(groups + "\n")
    for name, content in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    assert _quota(tmp_path / "cgroup", tmp_path / "fs") == share


def test_cores_are_at_least_one_and_no_more_than_this_process_may_run_on() -> None:
    assert 1 <= cores() <= len(os.sched_getaffinity(0))
