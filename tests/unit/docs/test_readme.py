"""The README and the page of the settings say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from chunkmill.cli.__main__ import COMMANDS
from chunkmill.settings import Settings

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs/settings.md").read_text()


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| .* \|$", SETTINGS, flags=re.MULTILINE))
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


def test_every_setting_is_described_in_a_sentence() -> None:
    for name, field in Settings.model_fields.items():
        row = f"| `{name.upper()}` | "
        (line,) = [line for line in SETTINGS.splitlines() if line.startswith(row)]
        assert field.description is not None
        assert line.endswith(f" | {field.description} |")
        assert field.description.endswith("."), name
        assert field.description[0].isupper(), name
        assert "|" not in field.description, name


def test_the_readme_leads_to_the_settings() -> None:
    assert "](docs/settings.md)" in README


def test_every_command_is_named() -> None:
    table = README[README.index("On the command line") : README.index("## How it works")]
    assert set(re.findall(r"`([a-z]+)`", table)) >= set(COMMANDS)


def test_no_link_inside_the_repository_is_broken() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
