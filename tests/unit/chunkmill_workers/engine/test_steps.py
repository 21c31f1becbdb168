"""What a watchdog sees of steps that are under way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from chunkmill_workers.engine import steps
from chunkmill_workers.engine.steps import StepClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    turned = SimpleNamespace(now=1e6, monotonic=lambda: turned.now)
    monkeypatch.setattr(steps, "time", turned)
    return turned


def test_the_step_that_began_first_counts_until_it_ends(clock: SimpleNamespace) -> None:
    clocked = StepClock()
    clocked.begin("hangs")
    clock.now += 100
    clocked.begin("gets on")
    clock.now += 5
    assert clocked.longest() == 105
    clocked.end("gets on")
    assert (clocked.longest(), clocked.quiet()) == (105, 0.0)
    clocked.begin("a third")
    clock.now += 5
    clocked.end("hangs")
    assert clocked.longest() == 5


def test_it_is_quiet_from_the_end_of_the_last_step_on(clock: SimpleNamespace) -> None:
    clocked = StepClock()
    clock.now += 7
    assert clocked.quiet() == 7
    with clocked.step(), clocked.step():
        clock.now += 50
        assert clocked.quiet() == 0.0
    clock.now += 3
    assert (clocked.quiet(), clocked.longest()) == (3, 0.0)


def test_a_step_that_raises_is_over(clock: SimpleNamespace) -> None:
    clocked = StepClock()
    with pytest.raises(ZeroDivisionError), clocked.step():
        raise ZeroDivisionError
    clock.now += 2
    assert (clocked.longest(), clocked.quiet()) == (0.0, 2)
