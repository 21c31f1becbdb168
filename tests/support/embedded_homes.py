"""Folders for embedded stacks of tests. No server that was started in one outlives it, however the test ended."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chunkmill.embedded import Stack
from tests.support.waiting import until


@contextmanager
def folder_for_homes(prefix: str = "chunkmill-test-") -> Iterator[Path]:
    """Yield a new folder. At the end its stacks are stopped, servers that still run are killed, and it is removed.

    `tmp_path` does not work here: every pytest that starts takes the execute bits off root's shared temporary folder,
    and a Postgres that another pytest is starting could not reach its files.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    try:
        yield folder
    finally:
        try:
            for lock in folder.rglob("chunkmill.lock"):
                Stack(lock.parent).down()
        finally:
            kill_servers_of(folder)
            shutil.rmtree(folder)


def kill_servers_of(folder: Path) -> None:
    """Kill whatever still writes its log into `folder` (Linux only), and return when it has ended.

    `down` recognizes a server by its pid file, its command line and the owner of its home. If a test, or a wrong
    change to the code, removed one of these, the server would run for ever.
    """
    for pid in servers_of(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not servers_of(folder), lambda: f"servers of {folder} that cannot be killed: {servers_of(folder)}")


def servers_of(folder: Path) -> list[int]:
    """Return the processes whose output goes into a file of `folder`, even if that file has been removed since."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # the process has just ended, or belongs to another user
            if str(output.readlink()).startswith(f"{folder}/"):
                found.append(int(output.parts[2]))
    return found
