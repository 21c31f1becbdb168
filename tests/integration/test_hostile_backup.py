"""A backup that somebody made to attack whoever restores it: its rows hold commands of `psql`, and none is obeyed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from psycopg import pq

from chunkmill.db.backup import _conninfo
from chunkmill.db.programs import NAMES, Programs, environment, find_programs
from chunkmill.embedded import StackStatus
from chunkmill.errors import InvalidInput
from chunkmill.settings import Settings
from chunkmill.telemetry.logging import without_passwords
from tests.conftest import TEMPLATE, admin, url_of
from tests.integration.conftest import Runner
from tests.integration.test_backup import ask, refusal, rows_of

BAIT = "BAIT" * 100
"""A text whose place in the file is easy to find. What takes it is as long."""


@pytest.fixture
def copy(stack: StackStatus) -> Iterator[str]:
    admin(stack, f"CREATE DATABASE hostile TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
    yield url_of(stack, "hostile")
    admin(stack, "DROP DATABASE hostile WITH (FORCE)")


@pytest.fixture
def url(settings: Settings) -> str:
    return settings.require_database_url()


def uncompressed(url: str, file: Path, programs: Programs) -> None:
    """A backup whose rows stand in it as they are."""
    command = [
        programs.command("pg_dump"), "--format=custom", "--compress=0", "--schema=chunkmill",
        f"--dbname={_conninfo(url)}", f"--file={file}",
    ]  # fmt: skip
    subprocess.run(command, env=environment(PGPASSWORD=sa.make_url(url).password or ""), check=True)


@pytest.fixture(params=["as they are", "without the fix of August 2025"])
def programs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Postgres' programs, and the same as they were before: ``pg_restore`` did not let ``psql`` refuse its commands."""
    own = find_programs(18)
    if request.param == "as they are":
        return own
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NAMES:
        (folder / name).symlink_to(own.command(name))
    (folder / "pg_restore").unlink()
    (folder / "pg_restore").write_text(
        "#!/bin/bash\nset -o pipefail\n"
        f"{own.command('pg_restore')} \"$@\" | sed '/^\\\\restrict /d; /^\\\\unrestrict /d'\n"
    )
    (folder / "pg_restore").chmod(0o755)
    monkeypatch.setattr("chunkmill.cli.archives.find_programs", lambda _: Programs(folder, own.major))
    return own


@pytest.mark.parametrize("command", ["! touch {mark}", "copy (SELECT 1) TO PROGRAM 'touch {mark}'", "o {mark}"])
def test_a_row_of_a_backup_that_is_a_command_of_psql_is_not_obeyed(
    runner: Runner, url: str, copy: str, tmp_path: Path, programs: Programs, command: str
) -> None:
    runner.client.enqueue([("a", BAIT), ("b", "another text")], collection="docs")
    file, mark = tmp_path / "b.dump", tmp_path / "mark"
    uncompressed(url, file, programs)
    content = file.read_bytes()
    (rest,) = re.findall(BAIT.encode() + rb"(\t.*)\n", content)
    # It ends its row and the rows, and then speaks to psql.
    attack = b"x%b\n\\.\n\\%b\n" % (rest, command.format(mark=mark).encode())
    file.write_bytes(content.replace(BAIT.encode(), attack.ljust(len(BAIT), b"\n")))
    before = rows_of(copy)

    said = refusal("restore", file, url=copy)

    assert not mark.exists()
    assert "nothing was restored" in said
    assert rows_of(copy) == before
    assert ask(copy, "SELECT count(*) FROM contents") == 0


def test_no_secret_of_an_address_is_among_the_arguments_of_a_program() -> None:
    """Every user of a machine can read them. What libpq calls a password is one, so that a new one is noticed here."""
    secrets = [option.keyword.decode() for option in pq.Conninfo.get_defaults() if option.dispchar == b"*"]
    assert {"password", "sslpassword"} <= {*secrets}
    for name in (*secrets, "scram_client_key", "scram_server_key"):
        address = f"postgresql+psycopg://u:QUAGGA@h/d?{name}=QUAGGA"
        assert "QUAGGA" not in without_passwords(address) + without_passwords(f"host=h {name}=QUAGGA")
        if name == "password":
            assert "QUAGGA" not in _conninfo(address)
            continue
        with pytest.raises(InvalidInput, match=f"service=NAME in place of {name}") as refused:
            _conninfo(address)
        assert "QUAGGA" not in str(refused.value)
