"""What the command prints: no password, nothing that steers a terminal, and one form for each number."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable

import click
import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from rich.console import Console

from chunkmill.cli import late
from chunkmill.cli.__main__ import COMMANDS, cli
from chunkmill.cli.arguments import BYTES, DAYS, Quantity
from chunkmill.cli.output import Screen, beginning, duration
from chunkmill.domain.shown import shown, shown_json
from chunkmill.settings import Settings
from tests.support.every_command import commands

SIZES = BYTES | {"b": 1.0}


def test_what_could_steer_a_terminal_is_replaced() -> None:
    assert shown("a\x1b[2Jb\u202ec\x07") == "a\ufffd[2Jb\ufffdc\ufffd"
    assert shown("naïve 文字 [bold]x[/bold]") == "naïve 文字 [bold]x[/bold]"


def test_what_spells_a_word_is_left_in() -> None:
    for text in ("\u0645\u06cc\u200c\u062e", "👩\u200d👩\u200d👧\u200d👦", "क्\u200dष"):
        assert shown(text) == text
    assert shown("a\tb\u00a0c\u3000d") == "a b c d"


@pytest.mark.parametrize("between", ["\n", "\r", "\r\n", "\x85", "\u2028", "\x1e", "\v"])
def test_a_name_draws_no_line_of_its_own(between: str) -> None:
    assert shown(f"a{between}b") == "a⏎b"
    assert shown(f"a{between}b", lines=True) == "a\nb"


def test_the_beginning_is_the_first_paragraph_on_one_line() -> None:
    assert beginning("\n  One\n  two.\n\nThree.", 50) == "One two."
    assert beginning("=====\nTitle\n=====\nText === here --- goes on.", 50) == "Title Text === here --- goes on."
    assert beginning("word " * 100, 20) == "word word word word…"
    assert beginning("字" * 50, 10) == "字字字字 …"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (5, "5 s"),
        (9.96, "10.0 s"),
        (42, "42 s"),
        (119.6, "2:00"),
        (187, "3:07"),
        (3599.7, "1:00:00"),
        (7500.0, "2:05:00"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_is_in_the_help_and_takes_json(name: str) -> None:
    command = getattr(importlib.import_module(f"chunkmill.cli.{COMMANDS[name][0]}"), name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert any("--json" in parameter.opts for parameter in command.params)
    assert COMMANDS[name][1] in CliRunner().invoke(cli, ["--help"]).output


def every_path() -> list[tuple[str, ...]]:
    return [("",), *{path[:n] for path, _ in commands({}) for n in range(1, len(path) + 1)}]


@pytest.mark.parametrize("width", [70, 80])
def test_the_help_of_every_command_fits_and_breaks_no_word(width: int) -> None:
    """The commands below others too; and none leaves the end of a sentence out."""
    for path in every_path():
        given = [*filter(None, path), "--help"]
        wide, done = (CliRunner().invoke(cli, given, terminal_width=n, max_content_width=n) for n in (500, width))
        assert done.exit_code == wide.exit_code == 0
        assert [line for line in done.output.splitlines() if len(line) > width] == [], path
        assert not re.search(r"--[\w-]*-$", done.output, re.MULTILINE), path
        shown = re.sub(r"(?<=\w-)\n\s+(?=\w)", "", done.output)  # a word may be broken at its own hyphen
        assert set(shown.split()) <= set(wide.output.split()), path
        assert not re.search(r"[a-z,]\.\.\.", shown), path  # after a word in capitals it says that there may be more


def test_every_command_below_another_takes_json_too() -> None:
    for path in every_path()[1:]:
        command: click.Command | None = cli
        for name in path:
            assert isinstance(command, click.Group)
            command = command.get_command(click.Context(command), name)
        assert command is not None
        assert any("--json" in parameter.opts for parameter in command.params), path


ROWS = [
    ["guides/install.md", "model_load", "the model's files cannot be read on this machine: check it", 12, "100 %"],
    ["guides/of/a/name-that-is-long.md", "worker_error", "it failed", 123_456, "3 %"],
]  # fmt: skip


def on_a_terminal(width: int, show: Callable[[Screen], None]) -> list[str]:
    screen = Screen(as_json=False)
    file = io.StringIO()
    screen.out = screen.err = Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False)
    show(screen)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 70, 80, 200])
def test_a_table_breaks_no_word_on_any_screen(width: int) -> None:
    heads = ["dead chunk", "code", "open ProviderBatches", "texts", "done"]
    lines = on_a_terminal(width, lambda screen: screen.table(heads, ROWS))
    cells = [f"{cell:,}" if isinstance(cell, int) else str(cell) for row in ROWS for cell in row]
    words = {word for text in [*heads, *cells] for word in text.split()}
    assert {word for line in lines for word in line.split()} == words
    assert max(map(len, lines)) <= width
    assert ("100 %" in "\n".join(lines)) and ("3 %" in "\n".join(lines))
    assert (len(lines) > 10) is (width < 80)  # a list of fields


def test_a_sentence_is_broken_between_words_and_never_in_a_command() -> None:
    url, said = (
        "https://host/" + "x" * 60,
        "No worker is connected, so nothing is embedded. To start one: chunkmill worker",
    )

    def show(screen: Screen) -> None:
        screen.fields({"why": said, "DATABASE_URL": url})
        screen.error("code", said)
        screen.say("short: `chunkmill job 3 --dead`")

    lines = on_a_terminal(46, show)
    assert lines == [
        "why           No worker is connected, so",
        "              nothing is embedded. To start",
        "              one: chunkmill worker",
        "DATABASE_URL",
        f"              {url}",
        "error: No worker is connected, so nothing is",
        "embedded. To start one: chunkmill worker",
        "short: `chunkmill job 3 --dead`",
    ]
    assert on_a_terminal(33, lambda screen: screen.hint("Its error is long: `chunkmill job 3`")) == [
        "Its error is long:", "`chunkmill job 3`",
    ]  # fmt: skip


def test_usage_errors_are_json_too() -> None:
    done = CliRunner().invoke(cli, ["jobs", "--limit", "none", "--json"])
    assert done.exit_code == 2
    assert done.stderr.startswith('{"error": "usage", "message": "Invalid value')


def test_after_two_hyphens_an_argument_may_look_like_an_option() -> None:
    """A text to search for may be ``--json``: the error about it is then for a person."""
    done = CliRunner().invoke(cli, ["job", "--", "--json"])
    assert done.exit_code == 2
    assert done.stderr.startswith("Usage:")
    assert "'--json' is not a valid integer" in done.stderr


def test_what_postgres_quotes_of_a_row_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    quoted = psycopg.errors.CheckViolation("new row violates check\nDETAIL:  Failing row contains (1, ZEBRA).")

    def refuse() -> None:
        raise sa.exc.IntegrityError("INSERT", {}, quoted, hide_parameters=True)

    monkeypatch.setattr("chunkmill.client.Client.from_env", refuse)
    for arguments in (["jobs"], ["jobs", "--json"]):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 1
        assert "Postgres refused (CheckViolation): new row violates check." in done.stderr
        assert "ZEBRA" not in done.output


@pytest.mark.parametrize(
    ("units", "unit", "given", "expected"),
    [
        (DAYS, "d", "30d", 30),
        (DAYS, "d", "12h", 0.5),
        (DAYS, "d", "90min", 0.0625),
        (DAYS, "d", "43200 s", 0.5),
        (DAYS, "d", "2w", 14),
        (DAYS, "d", "1y", 365),
        (SIZES, "b", "50GB", 50_000_000_000),
        (SIZES, "b", "1.5 GiB", 1_610_612_736),
        (SIZES, "b", "7b", 7),
    ],
)
def test_ages_are_in_days_and_sizes_in_bytes(units: dict[str, float], unit: str, given: str, expected: float) -> None:
    """A unit that is mistaken deletes what should have stayed."""
    assert Quantity("amount", units, unit, "30d").convert(given, None, None) == pytest.approx(expected)


def test_json_steers_no_terminal_and_reads_back_as_it_was() -> None:
    data = {"a\x9b2J\u202e": ["b\x1b\x7f\u2028\n", "naïve 文字 👩\u200d👩", "\U000e0041"]}
    for ascii_only in (False, True):
        written = shown_json(data, indent=2, ascii_only=ascii_only, default=str)
        assert json.loads(written) == data
        assert [c for c in written if not c.isprintable() and c not in "\n\u200d"] == []


def test_help_and_what_asks_no_server_import_no_library_of_the_servers() -> None:
    """They take a second to import. One process runs the help of every command and of every command below it."""
    script = textwrap.dedent("""
        import contextlib, io, sys, click
        from chunkmill.cli.__main__ import cli

        def run(words):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                cli(words, prog_name="chunkmill")
            heavy = {"sqlalchemy", "alembic", "psycopg", "celery", "kombu", "redis", "numpy", "torch", "httpx",
                     "httpx2", "matplotlib"} & sys.modules.keys()
            assert not heavy, (words, heavy)
            assert "pydantic" not in sys.modules or words == ["models", "list"], words  # which needs the settings

        def help_of(command, words):
            run([*words, "--help"])
            if isinstance(command, click.Group):
                context = click.Context(command)
                for name in command.list_commands(context):
                    help_of(command.get_command(context, name), [*words, name])

        run(["--version"])
        help_of(cli, [])
        run(["no-such-command"])
        run(["models", "list"])
    """)
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_imported_late_is_what_the_type_checker_sees() -> None:
    tree = ast.parse(inspect.getsource(late))
    (choice,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in choice.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: (node.module, alias.name) for node in imports for alias in node.names}
    homes |= {"redis": ("redis", ""), "sa": ("sqlalchemy", "")}
    assert homes.keys() == set(late.__all__)
    for name, home in homes.items():
        stands_in = getattr(late, name)
        assert (stands_in._module, stands_in._name) == home
        assert stands_in._real() is not None
    assert late.keys.create is importlib.import_module("chunkmill.ledger.access.keys").create
    assert isinstance(Settings.from_env(), late.Settings)


@pytest.mark.parametrize("name", ["dead", "chunks"])
def test_a_command_that_lacks_the_command_below_it_shows_its_help(name: str) -> None:
    ended = CliRunner().invoke(cli, [name])
    assert ended.exit_code == 2
    assert ended.output.startswith(f"Usage: cli {name} [OPTIONS] COMMAND [ARGS]...\n\n  ") and "⏎" not in ended.output


@pytest.mark.parametrize(("width", "heads", "left_out"), [(60, 4, ""), (26, 3, "size"), (20, 2, "size, created")])
def test_a_table_leaves_out_optional_columns_for_want_of_room_and_names_them(
    width: int, heads: int, left_out: str
) -> None:
    screen, written = Screen(as_json=False), io.StringIO()
    screen.out = Console(width=width, file=written, force_terminal=True, color_system=None)
    screen.table(["name", "size", "created", "last"], [("docs", 12, "2026-11-29", "now")], ["size", "created"])
    lines = written.getvalue().splitlines()
    assert len(lines[0].split()) == heads and lines[1].split()[0] == "docs"
    assert (f"also shows: {left_out}. --json has all." in " ".join(written.getvalue().split())) is bool(left_out)
