"""Which logical CPUs a lane keeps to."""

from __future__ import annotations

import os

import pytest

from app import machine


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores of two hardware threads each, numbered as Linux does: 0 and 4 share a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "_core", lambda cpu: ("0", str(cpu % 4)))
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
