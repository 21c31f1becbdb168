"""Applies mutants one at a time in copies of the tree and runs the tests nearest to each."""

from __future__ import annotations

import compileall
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from py_compile import PycInvalidationMode
from queue import SimpleQueue

from tests.mutants.catalogue import ROOT, Mutant, NoLongerApplies

# The tests nearest to a mutant take 5 to 60 seconds on two cores. One that runs for this long hangs.
TIMEOUT_SECONDS = 900
# A wait that a mutant makes endless ends after this; see tests/support/waiting.py.
PATIENCE_SECONDS = 60
# For pytest to stop its servers.
STOP_SECONDS = 60


class Outcome(StrEnum):
    NOTICED = "noticed"  # a test failed
    SURVIVED = "survived"  # every test passed
    HUNG = "hung"  # the tests did not end, which nobody would call noticing
    BROKEN = "broken"  # pytest could not run the tests: an import error, or a test that does not exist
    GONE = "gone"  # the mutant no longer applies


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    outcome: Outcome
    seconds: float
    evidence: str  # the test that failed and its last line, or what went wrong

    @property
    def noticed(self) -> bool:
        return self.outcome is Outcome.NOTICED


def run(mutants: Sequence[Mutant], *, jobs: int) -> Iterator[Result]:
    """Yield a result for each mutant as it comes, ``jobs`` of them at a time, each in a copy of the tree of its own."""
    with copies(jobs) as free, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_try, mutant, free) for mutant in mutants]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def failures_without_mutants(mutants: Sequence[Mutant], *, jobs: int) -> str:
    """Run all tests of ``mutants`` on the clean tree: what failed, or "" if all passed.

    A test that fails there would notice every mutant.
    """
    with copies(1) as free:
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        code, output = _pytest(free.get(), [*tests, "-n", str(jobs), "--dist", "loadfile"], limit=4 * TIMEOUT_SECONDS)
    return "" if code == 0 else "\n".join(output.splitlines()[-40:])


@contextmanager
def copies(number: int) -> Iterator[SimpleQueue[Path]]:
    """A queue of ``number`` folders, each with the files of this checkout, uncommitted ones included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    free: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="chunkmill-mutants-") as folder:
        for n in range(number):
            copy = Path(folder) / str(n)
            for name in filter(None, listed.split("\0")):
                if (ROOT / name).is_file():
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, copy / name)
            # Compiled once, and not by each process of each mutant's tests. A file counts for its source by the digest
            # of that, so that the mutant itself is compiled anew.
            for code in ("app", "workers", "alembic", "tests"):
                compileall.compile_dir(
                    copy / code, quiet=2, workers=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH
                )
            free.put(copy)
        yield free


def _try(mutant: Mutant, free: SimpleQueue[Path]) -> Result:
    copy = free.get()
    begun = time.monotonic()
    path = copy / mutant.file
    before = path.read_bytes() if path.is_file() else None
    try:
        mutant.apply(copy)
        code, output = _pytest(copy, ["-x", *mutant.tests], limit=TIMEOUT_SECONDS)
        outcome = {0: Outcome.SURVIVED, 1: Outcome.NOTICED, None: Outcome.HUNG}.get(code, Outcome.BROKEN)
        return Result(mutant, outcome, time.monotonic() - begun, _evidence(outcome, output))
    except NoLongerApplies as error:
        return Result(mutant, Outcome.GONE, 0.0, str(error))
    finally:
        if before is not None:
            path.write_bytes(before)
        free.put(copy)


def _pytest(copy: Path, arguments: list[str], *, limit: float) -> tuple[int | None, str]:
    """Run pytest in ``copy``: its exit code, None if it had to be killed, and what it printed."""
    env = os.environ | {
        # Before the editable install, whose code is not the mutant's.
        "PYTHONPATH": f"{copy}/app:{copy}/workers:{copy}",
        # A module that Python itself caches is known by second and size: a mutant may share both.
        "PYTHONDONTWRITEBYTECODE": "1",
        "TEST_PATIENCE": str(PATIENCE_SECONDS),
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=copy, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.terminate()  # pytest then stops the servers that it started
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def _evidence(outcome: Outcome, output: str) -> str:
    lines = output.splitlines()
    if outcome is Outcome.NOTICED:
        failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
        return failed[0] if failed else lines[-1]
    if outcome is Outcome.BROKEN:
        return "\n".join(lines[-10:])
    return lines[-1] if lines else ""
