"""Starts Python programs that import nothing from the current folder.

Python puts the current folder first in its search path when it runs a module or a command, so a folder of documents or
of a model in which a command is started could replace any module of ours. The console script does not look there, and
no process that it starts may.
"""

from __future__ import annotations

import os
import sys


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs ``module`` with this interpreter, and without the current folder in its path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def keep_children_out_of_the_folder() -> None:
    """Let every Python process below this one leave the current folder out of its path, whoever starts it."""
    os.environ["PYTHONSAFEPATH"] = "1"
