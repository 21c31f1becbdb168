"""Starts Python programs that import nothing from the current folder, and lets our own start sooner.

Python puts the current folder first in its search path when it runs a module or a command, so a folder of documents or
of a model in which a command is started could replace any module of ours. The console script does not look there, and
no process that it starts may.
"""

from __future__ import annotations

import gc
import os
import sys


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs ``module`` with this interpreter, and without the current folder in its path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def keep_children_out_of_the_folder() -> None:
    """Let every Python process below this one leave the current folder out of its path, whoever starts it."""
    os.environ["PYTHONSAFEPATH"] = "1"


def collect_garbage_rarely() -> None:
    """Let the garbage collector of this process look at new objects 70 times less often than Python's default.

    Imports make a million objects that stay, and the collector's looks at them were a tenth of the start of a worker.
    Some megabytes more may be waiting for it. For our own processes only: a library leaves the collector alone.
    """
    gc.set_threshold(50_000)
