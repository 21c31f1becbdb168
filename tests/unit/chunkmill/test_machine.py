"""Which logical CPUs a lane keeps to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chunkmill import machine


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores of two hardware threads each, numbered as Linux does: 0 and 4 share a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "_core", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(machine, "_quota", lambda: None)


@pytest.mark.usefixtures("eight")
def test_a_block_is_whole_cores_and_every_core_is_in_one() -> None:
    assert machine.core_blocks(4) == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    assert machine.core_blocks(2) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert machine.core_blocks(3) == [{0, 4}, {1, 5}, {2, 6, 3, 7}]


@pytest.mark.usefixtures("eight")
def test_without_cores_of_its_own_a_lane_keeps_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.core_blocks(5) == []  # fewer cores than lanes
    monkeypatch.setattr(machine, "_quota", lambda: 2.0)
    assert machine.core_blocks(2) == []  # a container that may use two cores' time, on any of four
    monkeypatch.delattr(os, "sched_setaffinity")
    assert machine.core_blocks(1) == []  # no such call, as on macOS


def test_cores_whose_numbers_come_again_in_each_cluster_are_several(tmp_path: Path) -> None:
    """As on ARM without a package: two clusters of two cores, of which the second has two threads each."""
    for cpu, (core, siblings) in enumerate([(0, "0"), (1, "1"), (0, "2,4"), (1, "3,5"), (0, "2,4"), (1, "3,5")]):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        for name, value in (("core_id", core), ("physical_package_id", -1), ("thread_siblings_list", siblings)):
            (topology / name).write_text(f"{value}\n")
    assert len({machine._core(cpu, tmp_path) for cpu in range(6)}) == 4
    (tmp_path / "cpu0" / "topology" / "core_cpus_list").write_text("0,1\n")
    assert machine._core(0, tmp_path) == "0,1"
    assert machine._core(7, tmp_path) == "7"  # a system that does not say


XEON = "avx avx2 avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_bf16 amx_int8"


@pytest.fixture
def xeon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with all that is asked for, and nothing hidden."""
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"model name": "Xeon", "flags": XEON})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)


@pytest.mark.usefixtures("xeon")
@pytest.mark.parametrize(
    ("variable", "value", "left"),
    [
        ("ONEDNN_MAX_CPU_ISA", "ALL", XEON),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", XEON),
        (
            "ONEDNN_MAX_CPU_ISA",
            "AVX512_CORE_BF16",
            "avx avx2 avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16",
        ),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", "avx avx2 avx512f avx512bw avx512vl avx512dq avx512_vnni"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "avx avx2 avx512f avx512bw avx512vl avx512dq"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI", "avx avx2 avx_vnni"),
        ("ONEDNN_MAX_CPU_ISA", "avx2", "avx avx2"),
        ("ONEDNN_MAX_CPU_ISA", "SSE41", ""),
        ("ATEN_CPU_CAPABILITY", "avx512", XEON),
        ("ATEN_CPU_CAPABILITY", "avx2", "avx avx2"),
        ("ATEN_CPU_CAPABILITY", "default", ""),
    ],
)
def test_what_the_libraries_may_not_use_is_not_there(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, left: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert machine.processor_features() == set(left.split())


@pytest.mark.usefixtures("xeon")
def test_both_masks_count_and_a_masked_machine_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine.this_machine()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    assert machine.this_machine().features == ("avx2", "avx512f", "avx512_vnni")
    assert machine.this_machine() != whole  # its profile was measured with other kernels


def test_a_machine_that_does_not_say_has_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", dict)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.processor_features() == frozenset()
