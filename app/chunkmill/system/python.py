"""Starts Python programs that import nothing from the current folder, lets our own start sooner, and reads source.

Python puts the current folder first in its search path when it runs a module or a command, so a folder of documents or
of a model in which a command is started could replace any module of ours. The console script does not look there, and
no process that it starts may.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
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
    """Let the garbage collector of this process look at new objects 280 times less often than Python's default, and
    not at all when the process ends.

    Imports make objects that stay: 180,000 that the collector follows for `chunkmill jobs`. Its looks at them were a
    tenth of the start of a worker, and the one at the end was a tenth of a command that only looks, although all memory
    is given back anyway. Some megabytes more may be waiting for it. For our own processes only: a library leaves the
    collector alone.
    """
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)


def parsed(source: str | bytes) -> ast.Module:
    """The syntax tree of a module.

    Before 3.11.8 and 3.12.2, Python counts the depth of all trees that it builds in one number. If a traceback is
    formatted meanwhile, by another thread or because garbage is collected, Python parses its lines too, and then raises
    SystemError here (https://github.com/python/cpython/issues/106905). So it is tried again.

    :raises SyntaxError, ValueError: it is no Python source.
    """
    for _ in range(9):
        with contextlib.suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)
