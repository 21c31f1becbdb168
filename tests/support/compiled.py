"""Compiles our modules and the tests before pytest-xdist starts its processes, which import all of them at once.

In a fresh checkout each of these processes would else compile every module and write every assertion of the tests
anew: 20 s of a core in each of five processes, and one of them is enough.
"""

from __future__ import annotations

import compileall
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.assertion import rewrite

ROOT = Path(__file__).parents[2]


def compile_once(config: pytest.Config) -> None:
    """Write what the interpreter and pytest keep of each module beside it, unless it is there and is that module's."""
    if sys.dont_write_bytecode:
        return
    state = config.stash[rewrite.assertstate_key]
    rewritten = set(_files_with_assertions(config))
    for source in rewritten:
        folder = rewrite.get_cache_dir(source)
        kept = folder / f"{source.stem}{rewrite.PYC_TAIL}"
        if rewrite._read_pyc(source, kept) is None and rewrite.try_makedirs(folder):
            stamp, code = rewrite._rewrite_test(source, config)
            rewrite._write_pyc(state, code, stamp, kept)
    for folder in (ROOT / "app", ROOT / "workers", ROOT / "tests"):
        for source in set(folder.rglob("*.py")) - rewritten:
            compileall.compile_file(source, quiet=2)  # a test says which files cannot be compiled


def _files_with_assertions(config: pytest.Config) -> Iterator[Path]:
    """The tests, whose assertions pytest writes anew, and its plugins beside them."""
    patterns = ["conftest.py", *config.getini("python_files")]
    for source in (ROOT / "tests").rglob("*.py"):
        if any(fnmatch.fnmatch(source.name, pattern) for pattern in patterns):
            yield source
