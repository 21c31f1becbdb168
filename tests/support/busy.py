"""`make busy`: do the tests hold on a machine that is busy with other things?

Runs pytest beside busy processes of its own, fifteen unless told otherwise, and stops these whatever happens. What
fails here and passes alone waits for a time, or not for long enough; see tests/support/waiting.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Each ends by itself as soon as the process that started it is gone, even if that was killed.
BUSY = """
import os, sys
parent = int(sys.argv[1])
while os.getppid() == parent:
    sum(range(100_000))
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.busy", description=__doc__.partition("\n")[0])
    parser.add_argument("tests", nargs="*", help="tests, and after -- options, for pytest; if omitted, the suite")
    parser.add_argument("--processes", type=int, default=15, help="how many busy processes run beside (default: 15)")
    args = parser.parse_args()
    arguments = args.tests or ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow"]
    with busy(args.processes):
        return run([sys.executable, "-m", "pytest", *arguments])


def run(command: list[str]) -> int:
    """The command's exit code. It is sent SIGTERM, and Ctrl-C by the terminal; both times its end is waited for."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


@contextmanager
def busy(processes: int) -> Iterator[list[int]]:
    """That many processes that do nothing but keep processors busy; their process ids."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        command = [sys.executable, "-c", BUSY, str(os.getpid())]
        # In sessions of their own, because Ctrl-C is for pytest: they stop after it.
        started.extend(subprocess.Popen(command, start_new_session=True) for _ in range(processes))
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
