"""Whom Flower lets in: judged on what Flower itself makes of its variables, options and configuration file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flower import command

from chunkmill.cli.processes.flower import DEFAULTS, USER, FlowerAddress, judge, prepare
from chunkmill.errors import InvalidInput

LOGIN = "operator:not-for-strangers"
HERE = FlowerAddress(address="127.0.0.1", port=5555, unix_socket="", logins=(), oauth=False)
Prepare = Callable[..., tuple[FlowerAddress, str, dict[str, str]]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Prepare]:
    """`chunkmill flower` up to its start: what it would open, the password it made, and the variables Flower gets."""
    known = command.options._options
    before = {name: option._value for name, option in known.items()}
    monkeypatch.chdir(tmp_path)  # where Flower looks for a configuration file that nobody named
    (tmp_path / "flowerconfig.py").write_text("raise SystemExit('a file of the current folder was run')\n")
    environ: dict[str, str] = {}
    monkeypatch.setattr("os.environ", environ)

    def start(*arguments: str, no_auth: bool = False, terminal: bool = True, config: str = "", **given: str) -> object:
        for name, option in known.items():
            option._value = before[name]
        environ.clear()
        environ.update({f"FLOWER_{name.upper()}": value for name, value in given.items()})
        file = tmp_path / "config.py"
        file.write_text(config)
        if config:
            environ["FLOWER_CONF"] = str(file)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        return *prepare(arguments, no_auth=no_auth, environ=environ), environ

    yield start  # type: ignore[misc]
    for name, option in known.items():
        option._value = before[name]


def test_unless_told_otherwise_it_is_read_only_here_with_a_password_made_for_this_start(start: Prepare) -> None:
    opening, password, environ = start()
    assert (opening.url, opening.logins) == ("http://127.0.0.1:5555/", ())
    assert len(password) >= 16
    assert environ == DEFAULTS | {"FLOWER_BASIC_AUTH": f"{USER}:{password}"}
    assert start(basic_auth="")[1] not in ("", password)


def test_what_the_operator_says_comes_before_our_defaults(start: Prepare) -> None:
    opening, password, environ = start("--address=::1", "--port=5556", "--read-only=False", basic_auth=LOGIN)
    assert (opening.url, password) == ("http://[::1]:5556/", "")
    assert environ == DEFAULTS | {"FLOWER_BASIC_AUTH": LOGIN}
    assert command.options.read_only is False
    assert command.options.purge_offline_workers == 600
    opening, _, _ = start(config="address = 'localhost'\nurl_prefix = '/flower/'", no_auth=True)
    assert opening.url == "http://localhost:5555/flower/"
    opening, _, environ = start(address="127.0.0.2", read_only="False", no_auth=True)
    assert (opening.address, environ["FLOWER_READ_ONLY"]) == ("127.0.0.2", "False")


def test_a_configuration_file_is_run_only_if_it_is_named(start: Prepare) -> None:
    opening, _, _ = start(no_auth=True)
    assert opening.address == "127.0.0.1"
    with pytest.raises(SystemExit, match="was run"):
        start("--conf=flowerconfig.py", no_auth=True)


@pytest.mark.parametrize(
    "given",
    [
        {"arguments": ["--address=0.0.0.0"]},
        {"arguments": ["--address="]},
        {"arguments": ["--address=::"]},
        {"arguments": ["--address=192.0.2.7"]},
        {"address": "0.0.0.0"},  # noqa: S104
        {"address": ""},
        {"config": "address = '0.0.0.0'"},
        {"config": "address = '0.0.0.0'", "address": "127.0.0.1"},
        {"arguments": ["--unix_socket=flower.sock"]},
        {"arguments": ["--unix-socket=flower.sock"]},
        {"unix_socket": "flower.sock"},
        {"config": "unix_socket = 'flower.sock'"},
        {"arguments": ["--address=0.0.0.0"], "basic_auth": ""},
    ],
)
@pytest.mark.parametrize("no_auth", [False, True])
def test_it_does_not_open_to_other_machines_or_users_without_a_login(
    given: dict[str, Any], no_auth: bool, start: Prepare
) -> None:
    arguments = given.get("arguments", [])
    variables = {name: value for name, value in given.items() if name != "arguments"}
    with pytest.raises(InvalidInput, match="set FLOWER_BASIC_AUTH=user:password"):
        start(*arguments, no_auth=no_auth, **variables)
    assert start(*arguments, **variables | {"basic_auth": LOGIN})[1] == ""


@pytest.mark.parametrize(
    ("opening", "no_auth", "terminal", "environ", "message"),
    [
        (HERE, False, False, {}, "no terminal to show a password"),
        (HERE, True, True, {"FLOWER_UNAUTHENTICATED_API": "true"}, "every website"),
        (replace(HERE, logins=(LOGIN,)), True, True, {}, "leave --no-auth out"),
        (replace(HERE, logins=("operator",)), False, True, {}, "no password"),
        (replace(HERE, logins=(LOGIN, "other:")), False, True, {}, "no password"),
        (replace(HERE, logins=(":secret",)), False, True, {}, "no user"),
        (replace(HERE, logins=(LOGIN + "\n",)), False, True, {}, "line break"),
        (replace(HERE, address="no-such-host.invalid"), True, True, {}, "cannot be resolved"),
    ],
)
def test_what_else_is_refused(
    opening: FlowerAddress, no_auth: bool, terminal: bool, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        judge(opening, no_auth=no_auth, terminal=terminal, environ=environ)
    assert "secret" not in str(refused.value)


def test_google_and_others_may_say_who_is_let_in(start: Prepare) -> None:
    opening, password, _ = start("--address=0.0.0.0", auth=".*@example.com", oauth2_key="key", oauth2_secret="s")
    assert (opening.asks_who, password) == (True, "")


@pytest.mark.parametrize("argument", ["--basic_auth=a:hidden", "--basic-auth=a:hidden", "--oauth2-secret=hidden"])
def test_a_secret_among_the_arguments_is_refused(argument: str, start: Prepare) -> None:
    with pytest.raises(InvalidInput, match="to everybody who lists processes") as refused:
        start(argument)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [(["--adress=192.0.2.7"], {}), (["192.0.2.7"], {}), (["--port"], {}), (["--port=x"], {}), ([], {"port": "x"})],
)
def test_an_option_that_flower_would_ignore_or_not_understand_is_refused(
    arguments: list[str], given: dict[str, str], start: Prepare
) -> None:
    with pytest.raises(InvalidInput, match="Flower"):
        start(*arguments, **given)
