"""Which pg_dump a backup takes, of those on a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkmill.db import programs
from chunkmill.db.programs import NAMES, environment, find_programs
from chunkmill.errors import StoreUnavailable


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with the programs of Postgres 15, 17 and 18, a folder of 16 without psql, and one that does not run."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(programs, "_INSTALLED", ((str(tmp_path), "*/bin"),))
    for major in ("18", "16", "15", "17", "broken"):
        folder = tmp_path / major / "bin"
        folder.mkdir(parents=True)
        for name in NAMES:
            if (major, name) != ("16", "psql"):
                said = "exit 1" if major == "broken" else f"echo '{name} (PostgreSQL) {major}.4 (Debian {major}.4-1)'"
                (folder / name).write_text(f"#!/bin/sh\n{said}\n")
                (folder / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(("server", "taken"), [(14, 15), (15, 15), (16, 17), (17, 17), (18, 18)])
def test_the_oldest_programs_are_taken_that_are_as_new_as_the_server(machine: Path, server: int, taken: int) -> None:
    assert find_programs(server).major == taken
    assert find_programs(server).command("psql") == str(machine / str(taken) / "bin" / "psql")


def test_what_is_missing_is_said_with_what_there_is(machine: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"Postgres 19.*15 in .*postgresql-client-19"):
        find_programs(19)


def test_the_programs_get_no_secret_that_they_do_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hushed")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hushed@h/d")
    monkeypatch.setenv("PGSSLROOTCERT", "/root.crt")
    given = environment(PGPASSWORD="its own")
    assert "hushed" not in str(given)
    assert (given["PGSSLROOTCERT"], given["PGPASSWORD"]) == ("/root.crt", "its own")
