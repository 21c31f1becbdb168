"""Folders for embedded stacks of tests. No server that was started in one outlives it, however the test ended."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chunkmill.embedded import Stack, temporary_folder
from tests.support.waiting import until

MEMORY = Path("/dev/shm")  # noqa: S108 - each folder in it gets a name of its own
MEMORY_NEEDED = 4 * 1024**3
"""Bytes. With less, the folders are where temporary files belong."""


def place_for_homes() -> Path | None:
    """A file system in memory if there is one with room, in which a test's database is made ten times as fast."""
    has_room = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_NEEDED
    return MEMORY if has_room else None


@contextmanager
def folder_for_homes(prefix: str = "chunkmill-test-") -> Iterator[Path]:
    """Yield a new folder. At the end its stacks are stopped, servers that still run are killed, and it is removed.

    `tmp_path` does not work here: every pytest that starts takes the execute bits off root's shared temporary folder,
    and a Postgres that another pytest is starting could not reach its files.
    """
    folder = temporary_folder(prefix, place_for_homes())
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
    pids = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # the process has just ended, or belongs to another user
            if str(output.readlink()).startswith(f"{folder}/"):
                pids.append(int(output.parts[2]))
    return pids
