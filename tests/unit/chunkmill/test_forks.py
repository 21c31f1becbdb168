"""A process that is forked while another thread works finds no lock that stays locked for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.support.checkout import CHECKOUT, PYTHONPATH
from tests.support.waiting import PATIENCE

# A fork waits for it, so a thread that keeps it would keep the fork. The child's is looked at like all others.
WAITED_FOR = ["chunkmill.broker._first_use"]

# It is a process of its own, because it imports everything, and only this process may be forked with locks held.
LOOK = '''
import contextlib, importlib, json, os, pkgutil, sys, threading, types
import chunkmill

LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition)
OURS = ("chunkmill.", "chunkmill_workers.")

for module in pkgutil.walk_packages(chunkmill.__path__, "chunkmill."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
extra = json.loads(sys.argv[2])
for module in extra:
    exec(extra[module], importlib.import_module(module).__dict__)


def parts(value):
    """The named parts of an object of ours, and the members of a collection."""
    if isinstance(value, dict):
        return [(f"[{key!r}]", one) for key, one in list(value.items())]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{at}]", one) for at, one in enumerate(value)]
    if isinstance(value, type) or not type(value).__module__.startswith(OURS):
        return []
    names = [*getattr(value, "__dict__", ()), *(n for c in type(value).__mro__ for n in getattr(c, "__slots__", ()))]
    return [(f".{name}", getattr(value, name)) for name in names if hasattr(value, name)]


def locks():
    """Every lock that a module has, or an object that a module has, by the path to it."""
    found, seen, waiting = {}, set(), []
    for name, module in sorted(sys.modules.items()):
        if name.startswith(OURS):
            waiting += [(f"{name}.{key}", one) for key, one in vars(module).items() if not key.startswith("__")]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, LOCKS):
            found.setdefault(id(value), (path, value))
        elif id(value) not in seen and path.count(".") + path.count("[") < 12:
            seen.add(id(value))
            waiting += [(path + name, one) for name, one in parts(value)]
    return dict(found.values())


waited_for = set(json.loads(sys.argv[1]))
before = locks()
held, go = threading.Event(), threading.Event()


def hold():
    with contextlib.ExitStack() as stack:
        for path, lock in before.items():
            if path not in waited_for:
                stack.enter_context(lock)
        held.set()
        go.wait()


thread = threading.Thread(target=hold, daemon=True)
thread.start()
held.wait()
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    after = locks()
    stuck = [path for path, lock in after.items() if not lock.acquire(blocking=False)]
    os.write(write, json.dumps({"stuck": sorted(stuck), "lost": sorted(before.keys() - after.keys())}).encode())
    os._exit(0)
os.close(write)
with open(read, "rb") as pipe:
    said = json.load(pipe)
os.waitpid(pid, 0)
go.set()
thread.join()
print(json.dumps({**said, "locks": sorted(before)}))
'''


def look(extra: dict[str, str]) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOK, json.dumps(WAITED_FOR), json.dumps(extra)],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    said: dict[str, list[str]] = json.loads(done.stdout)
    return said


def test_no_lock_of_a_module_is_locked_in_a_child_of_a_fork() -> None:
    said = look({})
    assert said["stuck"] == []
    assert {
        *WAITED_FOR,
        "chunkmill.chunking.pdf._mutex",
        "chunkmill.client._mutex",
        "chunkmill.openai.plan.tokens._loading",
        "chunkmill.spaces.bridges._mutex",
    } <= set(said["locks"])
    assert any(path.endswith(".COUNTS._mutex") for path in said["locks"])  # many modules have it


def test_a_lock_that_nobody_renews_is_found() -> None:
    said = look(
        {
            "chunkmill.domain.chunks": "import threading\nforgotten = threading.Lock()",
            "chunkmill.telemetry.counts": "forgotten = [Counts()]",
        }
    )
    assert said["stuck"] == ["chunkmill.domain.chunks.forgotten", "chunkmill.telemetry.counts.forgotten[0]._mutex"]
