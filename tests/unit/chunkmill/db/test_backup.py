"""What Postgres' programs are told, and where everybody can read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkmill.db.backup import dump
from chunkmill.db.programs import Programs
from chunkmill.errors import InvalidInput, StoreUnavailable


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """A ``pg_dump`` that writes down how it was called, and fails."""
    said = tmp_path / "said"
    program = tmp_path / "pg_dump"
    program.write_text(f'#!/bin/sh\necho "$@" > {said}.arguments\necho "$PGPASSWORD" > {said}.password\nexit 3\n')
    program.chmod(0o700)
    return Programs(tmp_path, 18)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:s3cret@127.0.0.1:1/one",
        "postgresql+psycopg://me@127.0.0.1:1/two?password=s3cret",
        "postgresql+psycopg://me:other@/three?host=127.0.0.1&password=s3cret&schema=elsewhere",
    ],
)
def test_the_password_reaches_the_program_in_its_environment_only(programs: Programs, tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreUnavailable, match="pg_dump ended with 3") as told:
        dump(url, "chunkmill", tmp_path / "b.dump", programs, lambda *_: None)
    assert (tmp_path / "said.password").read_text() == "s3cret\n"
    assert "s3cret" not in (tmp_path / "said.arguments").read_text()
    assert "s3cret" not in str(told.value)


def test_a_passphrase_that_would_be_an_argument_is_refused(programs: Programs, tmp_path: Path) -> None:
    url = "postgresql+psycopg://me@127.0.0.1:1/one?sslkey=/k&sslpassword=s3cret"
    with pytest.raises(InvalidInput, match="file of services") as told:
        dump(url, "chunkmill", tmp_path / "b.dump", programs, lambda *_: None)
    assert "s3cret" not in str(told.value)
    assert not (tmp_path / "said.arguments").exists()
