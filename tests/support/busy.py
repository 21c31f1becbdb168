"""`make busy`: runs the tests on a machine that is busy with other things.

It starts busy processes beside pytest, fifteen by default, and stops them whatever happens. A test that fails here and
passes alone waits for a time instead of an event, or not long enough; see tests/support/waiting.py.
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
# Each process ends by itself as soon as the process that started it has ended, even if that one was killed.
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
    arguments = args.tests or ["-n", "8", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow"]
    with busy(args.processes):
        return run([sys.executable, "-m", "pytest", *arguments])


def run(command: list[str]) -> int:
    """Run the command and return its exit code. On SIGTERM, which is passed on, and on Ctrl-C, wait for its end."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


@contextmanager
def busy(processes: int) -> Iterator[list[int]]:
    """Start this many processes that only keep processors busy, and yield their process ids."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        command = [sys.executable, "-c", BUSY, str(os.getpid())]
        # They get process groups of their own, so that Ctrl-C reaches only pytest; they are stopped after it. They stay
        # in its session: Linux may share the processors among sessions, and the tests would get a sixteenth of them.
        started.extend(subprocess.Popen(command, process_group=0) for _ in range(processes))
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
