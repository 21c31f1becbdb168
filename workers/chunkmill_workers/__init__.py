"""What Celery runs: worker processes, the engine, the paid routes, the supervisor and the benchmarks."""

import os
import sys


def leave_current_folder() -> None:
    """Take the current folder out of the search path if this process is Celery's command.

    ``celery -A`` puts that folder first in each of its own imports, so that files in it could replace any module that
    is imported below. Nothing is imported before this runs: `os` and `sys` are loaded before any program starts. A
    folder that PYTHONPATH names in full stays, because somebody asked for it.
    """
    if "celery.bin.celery" not in sys.modules:
        return
    imports = sys.modules["celery.utils.imports"]
    imports.cwd_in_path = sys.modules["contextlib"].nullcontext  # type: ignore[attr-defined]
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes below this one
    os.environ.setdefault("FLOWER_CONF", os.devnull)  # by default Flower runs flowerconfig.py of the current folder
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = {os.path.realpath(entry) for entry in entries if entry.startswith(os.sep)}
    folder = os.path.realpath(os.curdir)
    if folder not in named:
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != folder]


leave_current_folder()
