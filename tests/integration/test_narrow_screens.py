"""Every command that shows what there is fits a narrow terminal with long names in what it shows, and prints JSON if it
is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from chunkmill.cli.__main__ import cli
from chunkmill.cli.output import Screen
from chunkmill.client import Client
from chunkmill.settings import Settings
from tests.conftest import FIRST_IDS
from tests.integration.hands import Hands
from tests.unit.chunkmill.cli.test_output import every_path

ROOT = Path(__file__).parents[2]
NAME = "letters-of-the-mill-from-1881"
SCREENS = {
    "audit": "",
    "bridge": "",
    "cache": "",
    "chunks count": NAME,
    "chunks get": f"{NAME} guides/of/a/1",
    "chunks list": NAME,
    "collections": "",
    "collections outdated": NAME,
    "cost": "--by job",
    "cost adjustments": "",
    "dead list": "",
    "dead show": str(FIRST_IDS["dead_chunks"]),
    "doctor": "",
    "golden": "",
    "golden list": NAME,
    "job": f"{FIRST_IDS['jobs']} --dead --attempts",
    "jobs": "",
    "keys list": "",
    "keywords": NAME,
    "lanes": "",
    "models": "",
    "models choose": "",
    "models list": "",
    "prune": "--dry-run",
    "reembed list": "",
    "status": "",
}
"""The commands that show what is in the database, and with what they are called."""
FOUND = {"audit": {3}, "doctor": {0, 1}, "job": {4}}
"""Exit codes that say that something is not as it should be. Any other command that ends with one showed an error."""
ACTS = {
    "backup", "bench", "bridge drop", "bridge learn", "cache evict", "cancel", "collections alias", "collections drop",
    "collections rename", "collections unalias", "compare", "cost correct", "dead drop", "dead retry", "delete", "demo",
    "down", "enqueue", "export", "flower", "gateway", "golden clear", "golden load", "golden titles", "golden tune",
    "index", "keys create", "keys revoke", "lanes abandon", "lanes resume", "map", "migrate", "models canary",
    "models check", "models drop", "models export", "poller", "restore", "retry", "search", "tune", "up", "worker",
    "chunks update", *(f"reembed {verb}" for verb in ("cancel", "finish", "flip", "judge", "pause", "resume",
    "rollback", "show", "start")),
}  # fmt: skip
"""The other commands."""
CLOCK = {"ahead", "of", "behind"}
"""How `doctor` compares two clocks that differ by less than a millisecond, which is another word in each call."""
GROUPS = {"", "chunks", "dead", "keys", "reembed"}


def test_every_command_is_in_one_of_the_lists() -> None:
    assert {" ".join(path) for path in every_path()} == SCREENS.keys() | ACTS | GROUPS


@pytest.fixture
def filled(settings: Settings, client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NAME, "other"):
        text = "{} has the title {}\n\nThe mill grinds slowly, and what it grinds is fine and white."
        chunks = [(f"guides/of/a/{i}", text.format(name, i), {"n": i}) for i in range(3)]
        client.enqueue([*chunks, ("dead", f"{name} kills workers", {})], collection=name)
        hands.work(dead={f"{name} kills workers": "kills_workers"})
        client.golden(name).from_titles(5)
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())


@pytest.fixture
def shown(filled: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    init = Screen.__init__

    def on_a_terminal(columns: int, command: str) -> str:
        def made(screen: Screen, *, as_json: bool, json_in_pipes: bool) -> None:
            init(screen, as_json=as_json)
            plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "color_system": None}
            screen.out = Console(width=columns, force_terminal=True, **plain)
            screen.err = Console(width=columns, force_terminal=True, stderr=True, **plain)

        monkeypatch.setattr(Screen, "__init__", made)
        result = CliRunner().invoke(cli, [*command.split(), *SCREENS[command].split()])
        assert result.exception is None or isinstance(result.exception, SystemExit), command
        assert result.exit_code in FOUND.get(command, {0}), (command, result.output)
        return result.output

    return on_a_terminal


@pytest.mark.parametrize("columns", [70, 80])
def test_what_commands_show_fits_and_breaks_no_word(shown: Any, columns: int) -> None:
    wrong = {}
    for command in SCREENS:
        wide, narrow = shown(400, command), shown(columns, command)
        kept = [line for line in narrow.splitlines() if "wider terminal" not in line and "has all." not in line]
        too_long = [line for line in narrow.splitlines() if len(line.rstrip()) > columns and " " in line.strip()]
        # What was measured is another number in each call, and a text is cut where the line ends.
        new = {word for line in kept for word in line.split()} - set(wide.split()) - CLOCK
        broken = {word for word in new if "…" not in word and not any(letter.isdigit() for letter in word)}
        if too_long or broken:
            wrong[command] = (too_long, broken)
    assert wrong == {}


# In a pipe


def is_json(output: str) -> bool:
    try:
        json.loads(output)
    except ValueError:
        return False
    return True


def test_a_pipe_gets_json_from_every_command_unless_it_is_to_get_tables(filled: None) -> None:
    wrong = {}
    for command in SCREENS:
        given = [*command.split(), *SCREENS[command].split()]
        told = [
            CliRunner().invoke(cli, [*given, *asked], env={"CHUNKMILL_OUTPUT": output}).stdout
            for asked, output in ((["--json"], "table"), ([], "auto"), ([], ""), ([], "table"))
        ]
        if not all(map(is_json, told[:3])) or told[3] in told[:3]:
            wrong[command] = [one[:200] for one in told]
    assert wrong == {}


def test_errors_and_hints_are_for_people_unless_json_is_asked_for(filled: None) -> None:
    pipe = {"CHUNKMILL_OUTPUT": "auto"}
    refused = CliRunner().invoke(cli, ["job", "999999"], env=pipe)
    assert (refused.stdout, refused.stderr.startswith("error: ")) == ("", True)
    asked = CliRunner().invoke(cli, ["job", "999999", "--json"], env=pipe)
    assert json.loads(asked.stderr)["error"] == "not_found"


def test_an_unknown_output_is_refused() -> None:
    refused = CliRunner().invoke(cli, ["jobs"], env={"CHUNKMILL_OUTPUT": "yaml"})
    assert (refused.exit_code, "CHUNKMILL_OUTPUT is 'yaml'" in refused.stderr) == (2, True)
