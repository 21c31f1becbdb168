"""The README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from app.cli.__main__ import COMMANDS
from app.settings import Settings

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| .* \|$", README, flags=re.MULTILINE))
    expected = {}
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, bool):
            shown = f"`{str(default).lower()}`"
        elif isinstance(default, float):
            shown = f"`{default:g}`"
        else:
            shown = "" if default is None else f"`{default}`"
        expected[name.upper()] = shown
    assert rows == expected


def test_every_command_is_named() -> None:
    table = README[README.index("On the command line") : README.index("## How it works")]
    assert set(re.findall(r"`([a-z]+)`", table)) >= set(COMMANDS)


def test_no_link_inside_the_repository_is_broken() -> None:
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (root / target).exists(), target
