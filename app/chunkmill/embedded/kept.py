"""What a home keeps about its servers beside their data: passwords, ports, and where sockets with a short path are."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from chunkmill.embedded.paths import Account, private_folder, socket_folder, write_private
from chunkmill.errors import EmbeddedStackError

KEPT_FILE = "servers.json"
USER = "chunkmill"
"""Who logs in at a port, to Postgres as to Redis."""


def password(home: Path, server: str, *, make: bool = False) -> str:
    """The password of `server` for its port, or an empty string. `make` creates it if there is none."""
    known = _read(home, server, "password")
    if known or not make:
        return known
    return _write(home, server, "password", secrets.token_hex(24))


def port(home: Path, server: str, wanted: int | None) -> int | None:
    """The port that `server` is started with: the wanted one or, if that is None, the one that it had; 0 means none."""
    if wanted is None:
        wanted = int(_read(home, server, "port") or 0)
    return wanted or None


def keep_port(home: Path, server: str, used: int | None) -> None:
    """Remember the port that `server` was started with, so that it has it again after a kill or a reboot."""
    if _read(home, server, "port") != (str(used) if used else ""):
        _write(home, server, "port", str(used or ""))


def sockets_of(home: Path, server: str, socket_name: str) -> Path:
    """The folder of the server's socket."""
    return socket_folder(home / server, socket_name, _read(home, server, "salt"))


def claim_sockets(home: Path, server: str, socket_name: str, account: Account) -> Path:
    """Make the folder of the server's socket, and return it.

    Anybody can take a name under /tmp. Then the server gets another one that nobody can guess.
    Raises EmbeddedStackError.
    """
    folder = sockets_of(home, server, socket_name)
    try:
        private_folder(folder, account)
    except EmbeddedStackError:
        if folder == home / server:
            raise
        _write(home, server, "salt", secrets.token_hex(8))
        folder = sockets_of(home, server, socket_name)
        private_folder(folder, account)
    return folder


def _read(home: Path, server: str, name: str) -> str:
    return str(_load(home).get(server, {}).get(name, ""))


def _load(home: Path) -> dict[str, dict[str, str]]:
    try:
        kept: dict[str, dict[str, str]] = json.loads((home / KEPT_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return kept


def _write(home: Path, server: str, name: str, value: str) -> str:
    kept = _load(home)
    kept.setdefault(server, {})[name] = value
    write_private(home / KEPT_FILE, json.dumps(kept), Account(os.geteuid(), os.getegid()))
    return value
