"""What a watchdog sees of steps that are under way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from chunkmill_workers.engine import under_way
from chunkmill_workers.engine.under_way import UnderWay


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    turned = SimpleNamespace(now=1e6, monotonic=lambda: turned.now)
    monkeypatch.setattr(under_way, "time", turned)
    return turned


def test_the_step_that_began_first_counts_until_it_ends(clock: SimpleNamespace) -> None:
    steps = UnderWay()
    steps.begin("hangs")
    clock.now += 100
    steps.begin("gets on")
    clock.now += 5
    assert steps.longest() == 105
    steps.end("gets on")
    assert (steps.longest(), steps.quiet()) == (105, 0.0)
    steps.begin("a third")
    clock.now += 5
    steps.end("hangs")
    assert steps.longest() == 5


def test_it_is_quiet_from_the_end_of_the_last_step_on(clock: SimpleNamespace) -> None:
    steps = UnderWay()
    clock.now += 7
    assert steps.quiet() == 7
    with steps.step(), steps.step():
        clock.now += 50
        assert steps.quiet() == 0.0
    clock.now += 3
    assert (steps.quiet(), steps.longest()) == (3, 0.0)


def test_a_step_that_raises_is_over(clock: SimpleNamespace) -> None:
    steps = UnderWay()
    with pytest.raises(ZeroDivisionError), steps.step():
        raise ZeroDivisionError
    clock.now += 2
    assert (steps.longest(), steps.quiet()) == (0.0, 2)
