"""No form of an address shows its password, through any command that prints or uses an address."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkmill.broker import make_celery
from chunkmill.cli.__main__ import cli
from chunkmill.errors import InvalidSetting
from chunkmill.settings import Settings
from chunkmill.telemetry.logging import without_passwords

HEAD, TAIL = "HEAD7", "TAIL9"
SCHEMES = (
    *("redis", "rediss", "valkey", "unix", "redis+socket", "sentinel", "redis+cluster"),
    *("postgresql", "postgres", "postgresql+psycopg"),
)
FORMS = (
    *("{scheme}://u:{password}@127.0.0.1:1/0", "{scheme}://:{password}@127.0.0.1:1/0"),
    *("{scheme}://u:{password}@/tmp/x?db=0", "{scheme}:///tmp/x?password={password}&db=0"),
    *("{scheme}://127.0.0.1:1/0?password={password}", "{scheme}://127.0.0.1:1/0?sslpassword={password}"),
    *("{scheme}://a:1,u:{password}@b:2/0", "{scheme}://u:{password}@a:1;{scheme}://u:{password}@b:2"),
    *("{scheme}://u:{password}@[::1]:1/0", "//u:{password}@h/0", "u:{password}@h/0"),
    *("host=h password={password} dbname=x", "host=h password='{password}'", "sslpassword={password} host=h"),
)
COMMANDS = (
    *(("doctor",), ("doctor", "--json"), ("status",), ("status", "--json"), ("migrate",), ("jobs", "--json")),
    *(("poller", "--check"), ("enqueue", "docs", "-c", "c"), ("worker",), ("poller",)),
)


def shows(said: str) -> bool:
    return HEAD in said or TAIL in said


@given(
    form=st.sampled_from(FORMS),
    scheme=st.sampled_from(SCHEMES),
    between=st.text(st.sampled_from("/#@?%:&;,'\"\\ ()[]=+!$*|<>^`{}~\t\n\u202e\x1b"), min_size=1, max_size=3),
    encoded=st.booleans(),
    field=st.sampled_from(["database_url", "redis_url"]),
)
@settings(max_examples=100, derandomize=True)
def test_an_address_is_read_or_refused_without_its_password(
    form: str, scheme: str, between: str, encoded: bool, field: str
) -> None:
    password = f"{HEAD}{between}{TAIL}"
    address = form.format(scheme=scheme, password=quote(password, safe="") if encoded else password)
    try:
        read = Settings.from_env(**{field: address})
    except InvalidSetting as error:
        assert not shows(str(error))
        assert not shows(repr(error.__cause__))
        return
    assert not shows(repr(read) + str(read))
    own = read.require_database_url() if field == "database_url" else read.require_redis_url()
    assert not shows(without_passwords(f"cannot connect to {own}: refused"))
    if field == "redis_url":
        report = make_celery(read).bugreport()
        assert not shows(report)


def addresses(form: str) -> Iterator[tuple[str, str]]:
    """Those that are taken, so that a command goes on to use them, and one of each kind that is refused."""
    for scheme in SCHEMES:
        for password in (f"{HEAD}%2F%23%40{TAIL}", f"{HEAD}/#@{TAIL}"):
            address = form.format(scheme=scheme, password=password)
            for name, field in (("DATABASE_URL", "database_url"), ("REDIS_URL", "redis_url")):
                try:
                    Settings.from_env(**{field: address})
                except InvalidSetting:
                    if scheme != "redis" or form != FORMS[0]:
                        continue
                yield name, address


OTHER = {"DATABASE_URL": "postgresql://u@127.0.0.1:1/x?connect_timeout=2", "REDIS_URL": "redis://127.0.0.1:1/0"}


@pytest.mark.parametrize("form", FORMS)
def test_no_command_shows_the_password_of_an_address(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkmill.cli.processes.processes._become", lambda *_: None)
    monkeypatch.setattr("chunkmill.cli.start.doctor._cuda_problem", lambda: "")
    tried = list(addresses(form))
    assert tried or "://" not in form or ";" in form
    for name, address in tried:
        for variable, other in (OTHER | {name: address}).items():
            monkeypatch.setenv(variable, other)
        for command in COMMANDS:
            done = CliRunner().invoke(cli, command)
            assert not shows(done.output), (command, name, address)
            assert not shows(str(done.exception)), (command, name, address)
