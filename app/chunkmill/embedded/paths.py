"""The folders of the embedded servers, and who may enter them.

Postgres refuses to run as root. If root starts the stack, Postgres runs as the system user `chunkmill`, which must be
able to pass through the folders above its data and its programs. Only then, those folders get the one execute bit that
is missing, and never a read bit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pwd
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import platformdirs

from chunkmill.errors import EmbeddedStackError

_log = logging.getLogger(__name__)

_SYSTEM_USER = "chunkmill"
_SOCKET_PATH_BYTES = 103  # what fits into sockaddr_un on macOS; on Linux it is 107


class Account(NamedTuple):
    """The system user a server runs as."""

    uid: int
    gid: int


def default_home() -> Path:
    """The folder in CHUNKMILL_HOME, or else the user's data folder (`~/.local/share/chunkmill` on Linux).

    Raises EmbeddedStackError if the user has no home directory, as a number without a name in a container.
    """
    named = os.environ.get("CHUNKMILL_HOME")
    try:
        return (Path(named) if named else platformdirs.user_data_path("chunkmill")).expanduser()
    except RuntimeError:
        raise EmbeddedStackError(
            f"{user_name(os.geteuid())} has no home directory, and HOME is not set. Set CHUNKMILL_HOME to a folder "
            "that this user may write to."
        ) from None


def user_name(uid: int) -> str:
    """The user's name, or `uid 1234` if the system has no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def postgres_account() -> Account:
    """The account that runs Postgres: the current user or, for root, the system user `chunkmill`, created if missing.

    initdb looks its user up by name, so a bare uid without an entry in the user database is not enough.

    Raises EmbeddedStackError if root cannot create the user.
    """
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid())
    problem = ""
    for _ in range(20):
        try:
            entry = pwd.getpwnam(_SYSTEM_USER)
        except KeyError:
            problem = _create_system_user()
            time.sleep(0.1 if problem else 0)  # useradd fails while another one holds its lock
        else:
            return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedStackError(
        f"Postgres refuses to run as root, and the system user {_SYSTEM_USER!r} could not be created for it "
        f"({problem}). Create that user, or run Chunkmill as an ordinary user."
    )


def _create_system_user() -> str:
    """Run useradd, and return what went wrong, or an empty string."""
    useradd = shutil.which("useradd", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if useradd is None:
        return "there is no useradd on this system"
    done = subprocess.run(
        [useradd, "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
         "--shell", "/bin/false", _SYSTEM_USER],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        _log.info("created the system user %r, because Postgres refuses to run as root", _SYSTEM_USER)
        return ""
    return done.stderr.strip() or f"useradd ended with {done.returncode}"


def let_through(path: Path, account: Account) -> None:
    """Let `account` pass through the folders above `path`, by adding the execute bit if it is missing.

    It does nothing unless root runs it, because every other user starts the servers as itself.
    """
    if os.geteuid() != 0:
        return
    for folder in path.parents:
        status = folder.stat()
        if status.st_uid == account.uid:
            missing = stat.S_IXUSR
        elif status.st_gid == account.gid:
            missing = stat.S_IXGRP
        else:
            missing = stat.S_IXOTH
        if not status.st_mode & missing:
            _log.info(
                "added the execute bit of %s, so that the user %s can pass through", folder, user_name(account.uid)
            )
            folder.chmod(stat.S_IMODE(status.st_mode) | missing)


def private_folder(path: Path, account: Account) -> None:
    """Make `path` a folder that only `account` can enter (mode 0700), and create it if necessary.

    Raises EmbeddedStackError if it already belongs to someone else, which under /tmp may be an attack.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.geteuid(), account.uid):
        owner = user_name(status.st_uid)
        raise EmbeddedStackError(
            f"{path} belongs to {owner}, but the embedded server runs as {user_name(account.uid)} and needs "
            "a folder of its own there. Change its owner, remove it, or set CHUNKMILL_HOME to another folder."
        )
    if status.st_uid != account.uid:
        os.chown(path, account.uid, account.gid)
    path.chmod(0o700)


def socket_folder(folder: Path, socket_name: str) -> Path:
    """Where the server of `folder` puts its socket: there, or in a folder with a short path under /tmp.

    The path of a socket may have about a hundred bytes, and libpq reads a comma in it as the end of a host. The short
    path is derived from `folder`, so every process finds the same one. It is not below TMPDIR or XDG_RUNTIME_DIR,
    because these differ between a login shell and a service.
    """
    path = os.fsencode(folder / socket_name)
    if len(path) <= _SOCKET_PATH_BYTES and b"," not in path:
        return folder
    return Path("/tmp") / f"chunkmill-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"  # noqa: S108


def remove_socket_folder(sockets: Path, folder: Path) -> None:
    """Delete the folder that `socket_folder` chose for a stopped server, unless it is the server's own folder."""
    if sockets != folder:
        shutil.rmtree(sockets, ignore_errors=True)
