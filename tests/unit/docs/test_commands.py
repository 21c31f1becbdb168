"""Every `chunkmill` command in the documents exists, with the options it is shown with: click is asked."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from celery.bin.worker import worker as celery_worker

from chunkmill.cli.__main__ import cli

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = {"console", "sh", "bash"}
CODE = re.compile(r"`([^`]+)`", re.DOTALL)
COMMAND = re.compile(r"(?:^|(?<=\s))chunkmill(?:\s+([^|;&#>)]*)|$)")
"""Up to where another command, a comment or a redirection begins."""


def commands_in(text: str) -> list[str]:
    """What follows ``chunkmill`` in shell blocks, and in inline code that begins with it."""
    found: list[str] = []
    for language, block in FENCE.findall(text):
        if language in SHELL:
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            # In a console block, only what follows a prompt is a command.
            typed = [line[2:] for line in lines if line.startswith("$ ")] if language == "console" else lines
            found += [match.group(1) or "" for line in typed for match in COMMAND.finditer(line.partition("#")[0])]
    for code in CODE.findall(FENCE.sub("", text)):
        if code.startswith("chunkmill "):
            found += [match.group(1) or "" for match in COMMAND.finditer(code)]
    return [command.strip() for command in found]


def problem_with(command: str) -> str | None:
    """What click says against it. Values are not looked at: ``ID`` stands for a number."""
    context = click.Context(cli, info_name="chunkmill")
    found: click.Command = cli
    words = shlex.split(command)
    try:
        while isinstance(found, click.Group) and words and not words[0].startswith("-"):
            if (below := found.get_command(context, words[0])) is None:
                return f"no command {words[0]!r}"
            context = click.Context(below, parent=context, info_name=words.pop(0), **below.context_settings)
            found = below
        # `up | down` in the table of a page is cut at the bar; a group alone shows its help.
        _, left, _ = found.make_parser(context).parse_args(words)
    except click.UsageError as error:
        return type(error).__name__  # the wording is another in each release of click
    return f"too many arguments: {left}" if left and not isinstance(found, click.Group) else None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_exists(document: Path) -> None:
    text = document.read_text()
    assert [(c, problem) for c in commands_in(text) if (problem := problem_with(c))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_and_celery_worker_exists(document: Path) -> None:
    """Those in shell blocks, and in inline code that begins with them."""
    text = document.read_text()
    blocks = [re.sub(r"\\\n\s*", "", block) for language, block in FENCE.findall(text) if language in SHELL]
    lines = [line.removeprefix("$ ").partition(" #")[0] for block in blocks for line in block.splitlines()]
    typed = [*lines, *CODE.findall(FENCE.sub("", text))]
    made = {match[1] for line in typed if (match := re.match(r"make ([a-z]+)", line))}
    assert made <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in typed:
        if found := re.match(r"(?:\w+=\S+ )*celery -A chunkmill_workers worker\s*(.*?)\s*(?:&|$)", line):
            celery_worker.make_parser(click.Context(celery_worker)).parse_args(shlex.split(found[1]))


def test_the_documents_that_are_about_commands_show_some() -> None:
    assert len(commands_in((ROOT / "README.md").read_text())) > 10
    assert len(commands_in((ROOT / "docs/runbook.md").read_text())) > 25
    assert len(commands_in((ROOT / "docs/spot.md").read_text())) > 3


def test_where_commands_are_found() -> None:
    text = """
See `chunkmill jobs`, and `chunkmill models export MODEL --backend
openvino`; `status` alone is a word.

```console
$ chunkmill audit docs && chunkmill index docs   # chunkmill nothing
chunkmill shows this
```
```sh
sudo -u me chunkmill job 7 --dead | head
docker compose run --rm cli chunkmill status --json
```
```sql
SELECT 'chunkmill none'
```
"""
    assert sorted(commands_in(text)) == [
        "audit docs",
        "index docs",
        "job 7 --dead",
        "jobs",
        "models export MODEL --backend\nopenvino",
        "status --json",
    ]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("jobs -n 5", None),
        ("worker -c 2 --loglevel=DEBUG", None),
        ("models canary --reset SPACE", None),
        ("models", None),
        ("--version", None),
        ("nothing", "no command 'nothing'"),
        ("models nothing", "no command 'nothing'"),
        ("jobs --all", "NoSuchOption"),
        ("job 7 8", "too many arguments: ['8']"),
    ],
)
def test_what_click_says(command: str, problem: str | None) -> None:
    assert problem_with(command) == problem
