from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.busy import ROOT, busy
from tests.support.waiting import PATIENCE, until

STARTS_TWO = """
import time
from tests.support.busy import busy
with busy(2) as pids:
    print(*pids, flush=True)
    time.sleep(3600)
"""


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_the_busy_processes_end_with_the_block_that_fails() -> None:
    with pytest.raises(ZeroDivisionError), busy(2) as pids:
        assert running(pids) == pids
        raise ZeroDivisionError
    assert running(pids) == []


def test_the_busy_processes_end_with_a_process_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS_TWO], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pids = [int(pid) for pid in process.stdout.readline().split()]
            assert running(pids) == pids
        finally:
            process.kill()
            process.wait(PATIENCE)
    until(lambda: not running(pids))
