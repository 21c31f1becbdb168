"""Opens files in folders that others made. Only a regular file is opened, so nothing blocks, and no link is followed
where the caller says so."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

NOT_REGULAR = "it is not a regular file"
"""The reason of the OSError for a folder, a FIFO, a socket or a device."""
Kind = Literal["file", "folder", "link", "other"]
"""What an entry of a folder is; a link is not followed."""
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def open_regular(path: str | Path) -> BinaryIO:
    """The file, opened for reading in binary. Links are followed. Raises OSError, also for what is not a regular file.

    It is looked at before it is opened, because to open some devices is to use them, and again afterwards, because it
    may have been replaced in between; a FIFO that was put in its place does not block.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    return _checked(os.open(path, _FLAGS), str(path))


def read_at_most(path: Path, limit: int) -> bytes:
    """The content of a regular file. Raises OSError, also if it has more than ``limit`` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is longer than {limit:,} bytes", str(path))
    return content


class Folder:
    """A folder in which files are opened by their path below it, and no link is followed on the way.

    A name that becomes a link after it was looked at leads nowhere: OSError (ELOOP or ENOTDIR).
    """

    def __init__(self, root: str | Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root)

    def list(self, parts: Sequence[str]) -> list[tuple[str, Kind]]:
        """The names in the folder below, in their order, and what each of them is."""
        with self._folder(parts) as folder, os.scandir(folder) as entries:
            return sorted((entry.name, _kind(entry)) for entry in entries)

    def open(self, parts: Sequence[str]) -> BinaryIO:
        """The regular file below, opened for reading in binary."""
        with self._folder(parts[:-1]) as folder:
            mode = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                raise OSError(errno.EINVAL, NOT_REGULAR, "/".join(parts))
            return _checked(os.open(parts[-1], _FLAGS | os.O_NOFOLLOW, dir_fd=folder), "/".join(parts))

    @contextlib.contextmanager
    def _folder(self, parts: Sequence[str]) -> Iterator[int]:
        folder = os.dup(self._root)
        try:
            for part in parts:
                below = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = below
            yield folder
        finally:
            os.close(folder)


def _kind(entry: os.DirEntry[str]) -> Kind:
    if entry.is_symlink():
        return "link"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "other"


def _checked(descriptor: int, name: str) -> BinaryIO:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, NOT_REGULAR, name)
