"""Keeps what was read of a model's folder for as long as no file in it has changed."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from chunkmill.models.folder import ModelFolder, ModelOptions, read_folder
from chunkmill.system.forks import renew_in_child

MOST_KEPT: Final = 64
MOST_ENTRIES: Final = 2_000
"""A folder with more entries is read each time, because to look at them would take longer. It may be no model's."""
MOST_DEPTH: Final = 6
SETTLED_SECONDS: Final = 2.0
"""A folder that was changed so shortly ago is not kept: another change might get the same time, whose steps are as
coarse as a second or two in some file systems."""

_Key = tuple[str, str, ModelOptions]
_Mark = tuple[tuple[str, int, int, int, int], ...]

_kept: OrderedDict[_Key, tuple[_Mark, ModelFolder]] = OrderedDict()
_mutex = threading.Lock()


def read_or_keep(name: str, path: Path, options: ModelOptions) -> ModelFolder:
    """:func:`read_folder`, which takes milliseconds, unless the folder is as it was when this process last read it.

    Each file is known by its name, size, inode, and times of content and of status. A copy that has the old times and
    the old size in place of another file still has another inode or status.
    """
    key = (name, os.path.abspath(path), options)  # noqa: PTH100 - no link is to be followed
    mark = _mark(path)
    with _mutex:
        kept = _kept.get(key)
        if kept is not None and mark is not None and kept[0] == mark:
            _kept.move_to_end(key)
            return kept[1]
    folder = read_folder(name, path, options)
    # A file that changed while the folder was read, or just before, may be kept as it was.
    if mark is not None and _mark(path) == mark and _is_settled(mark):
        with _mutex:
            _kept[key] = (mark, folder)
            _kept.move_to_end(key)
            while len(_kept) > MOST_KEPT:
                _kept.popitem(last=False)
    return folder


def _is_settled(mark: _Mark) -> bool:
    newest = max((max(entry[2], entry[4]) for entry in mark), default=0)
    return newest < time.time_ns() - int(SETTLED_SECONDS * 1e9)


def _mark(path: Path) -> _Mark | None:
    """What would change with any file of the folder. None if that takes too long to find out, or cannot be."""
    entries = []
    try:
        for entry in _walk(os.fspath(path), MOST_DEPTH):
            seen = entry.stat()  # of what a link leads to, as in the cache of Hugging Face
            entries.append((entry.path, seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_ctime_ns))
            if len(entries) > MOST_ENTRIES:
                return None
    except OSError:
        return None
    return tuple(sorted(entries))


def _walk(folder: str, depth: int) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if depth and entry.is_dir():
                yield from _walk(entry.path, depth - 1)


renew_in_child(sys.modules[__name__], "_mutex")
