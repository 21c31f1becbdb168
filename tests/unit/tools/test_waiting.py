from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.checkout import PYTHONPATH
from tests.support.waiting import PATIENCE, Call, running, together

TWO_TESTS = """
import warnings

class Connection:
    def __del__(self):
        warnings.warn("deleted while still open", ResourceWarning)

def test_that_fails_with_a_connection():
    connection = Connection()
    connection.itself = connection
    assert False

def test_after_it():
    import gc
    gc.collect()
"""


def test_what_a_call_returns_and_raises_comes_to_the_test() -> None:
    assert Call(lambda: 3).result() == 3
    assert together(lambda: 1, lambda: 2) == [1, 2]
    with pytest.raises(ZeroDivisionError), running(lambda: 1 / 0):
        pass


@pytest.mark.parametrize("divisor", [0, 1])
def test_a_block_lets_go_of_what_runs_beside_it_and_waits_for_its_end(divisor: int) -> None:
    go_on = threading.Event()
    with contextlib.suppress(ZeroDivisionError), running(lambda: go_on.wait(PATIENCE), release=go_on.set) as (call,):
        assert call.is_alive()
        1 / divisor
    assert not call.is_alive()


def test_a_failed_test_is_not_blamed_on_the_next(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(TWO_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-W", "error", "test_two.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
