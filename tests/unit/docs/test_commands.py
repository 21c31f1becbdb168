"""Every `chunkmill` command in the documents, in the comments of the deployment files and in our messages exists, with
the options it is shown with: click is asked."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from celery.bin.worker import worker as celery_worker

from chunkmill.cli.__main__ import COMMANDS, cli

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

COMMENTED = [
    ROOT / "docker-compose.yml",
    ROOT / "Dockerfile",
    *sorted(path for path in (ROOT / "deploy").iterdir() if path.suffix != ".json"),
]
"""Files whose comments show commands, indented by two spaces or more."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = {"console", "sh", "bash"}
CODE = re.compile(r"`([^`]+)`", re.DOTALL)
COMMAND = re.compile(r"(?:^|(?<=\s))chunkmill(?:\s+([^|;&#>)]*)|$)")
"""Up to where another command, a comment or a redirection begins."""

ADVISED = re.compile(rf"(?:: |`)chunkmill ((?:{'|'.join(COMMANDS)})\b[^;,`()\n]*?)(?=\.(?:\s|$)|[;,`()\n]|$)")
"""A command in a message, after a colon or in backticks, up to where the sentence goes on or ends."""


def read_text(path: Path) -> str:
    """The document, or a file's comments as a document, in which commands are shell blocks."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    lines = [match[1] for match in re.finditer(r"^ *(?:#|--)(?: (.*))?$", text, re.MULTILINE)]
    return "".join(
        f"```sh\n{line.strip()}\n```\n" if line and re.match(r"  +(?!aws |gcloud )", line) else f"{line or ''}\n"
        for line in re.sub(r"\\\n\s*", "", "\n".join(line or "" for line in lines)).splitlines()
    )


def commands_in(text: str, *, inline: bool = True) -> list[str]:
    """What follows ``chunkmill`` in shell blocks and, with ``inline``, in inline code that begins with it."""
    written: list[str] = []
    for language, block in FENCE.findall(text):
        if language in SHELL:
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            # In a console block, only what follows a prompt is a command.
            typed = [line[2:] for line in lines if line.startswith("$ ")] if language == "console" else lines
            written += [match.group(1) or "" for line in typed for match in COMMAND.finditer(line.partition("#")[0])]
    for code in CODE.findall(FENCE.sub("", text)) if inline else ():
        if code.startswith("chunkmill "):
            written += [match.group(1) or "" for match in COMMAND.finditer(code)]
    return [command.strip() for command in written]


def problem_with(command: str, *, whole: bool = False) -> str | None:
    """What click says against it. Values are not looked at: ``ID`` stands for a number. With ``whole``, all that the
    command requires must be there; inline code may name a command alone."""
    context = click.Context(cli, info_name="chunkmill")
    command_there: click.Command = cli
    words = shlex.split(command)
    try:
        while isinstance(command_there, click.Group) and words and not words[0].startswith("-"):
            if (below := command_there.get_command(context, words[0])) is None:
                return f"no command {words[0]!r}"
            context = click.Context(below, parent=context, info_name=words.pop(0), **below.context_settings)
            command_there = below
        # `up | down` in the table of a page is cut at the bar; a group alone shows its help.
        values, left, _ = command_there.make_parser(context).parse_args(words)
    except click.UsageError as error:
        return type(error).__name__  # the wording is another in each release of click
    if left and not isinstance(command_there, click.Group):
        return f"too many arguments: {left}"
    is_complete = not whole or "help" in values
    # For an argument that is not there, releases of click put None, an empty list or a mark of their own.
    given = {name for name, value in values.items() if isinstance(value, str | list | tuple) and value}
    missing = [] if is_complete else [p.name for p in command_there.params if p.required and p.name not in given]
    return f"missing: {missing}" if missing else None


def advised_in(code: str) -> list[str]:
    """The commands that the messages of a module advise. What is put into a message when it is shown is an ``X``."""
    tree = ast.parse(code)
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # a docstring

    def messages() -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                yield node.value

    return [match[1] for message in messages() for match in ADVISED.finditer(message)]


@pytest.mark.parametrize("package", ["app", "workers"])
def test_whoever_types_what_a_message_advises_is_understood(package: str) -> None:
    """The resume of a lane alone may lack the lane, which is added where the message is shown."""
    advised = [
        (path.name, command)
        for path in sorted((ROOT / package).rglob("*.py"))
        for command in advised_in(path.read_text())
        if command != "lanes resume"
    ]
    assert len(advised) > 5
    assert [(*shown, problem) for shown in advised if (problem := problem_with(shown[1], whole=True))] == []


def unquoted_in(code: str) -> list[str]:
    """What messages put as it is into commands that they advise, although a shell may take it for several words.

    Numbers, routes and the like need no quotes, and are known by how their expressions end.
    """
    harmless = re.compile(
        r"(id|number|lane|route|OPENAI|asked|target|schema|other|space|setting|port|\(day=1\)|\[:12\])$"
    )
    unquoted: list[str] = []
    for node in ast.walk(ast.parse(code)):
        said = ""
        for part in node.values if isinstance(node, ast.JoinedStr) else []:
            if isinstance(part, ast.FormattedValue):
                put = ast.unparse(part.value)
                is_in_command = re.search(r"\bchunkmill [a-z][^`.,;\n]*$", said)
                if is_in_command and not put.startswith("shlex.quote(") and not harmless.search(put):
                    unquoted.append(put)
                said += "X"
            elif isinstance(part, ast.Constant):
                said += str(part.value)
    return unquoted


@pytest.mark.parametrize("package", ["app", "workers"])
def test_a_name_in_a_command_that_a_message_advises_is_one_word_for_a_shell(package: str) -> None:
    """Names of collections, bridges, models and files may have blanks and quotes."""
    assert unquoted_in('f"or run: chunkmill audit {collection.name}"') == ["collection.name"]
    assert unquoted_in('f"{name!r}: chunkmill audit {shlex.quote(name)}. It has {n}, and chunkmill job {job.id}"') == []
    code = {str(path): path.read_text() for path in sorted((ROOT / package).rglob("*.py"))}
    assert {name: put for name, text in code.items() if (put := unquoted_in(text))} == {}


def test_where_advice_is_found() -> None:
    code = """
def refuse(name):
    '''Run: chunkmill nothing'''
    raise ValueError(
        f"{name!r} has none. Call keywords(), or run: "
        f"chunkmill keywords {name} --drop. `chunkmill audit` and chunkmill jobs say more: chunkmill job 7; or not"
    )
"""
    assert advised_in(code) == ["keywords X --drop", "audit", "job 7"]


@pytest.mark.parametrize("document", [*DOCUMENTS, *COMMENTED], ids=lambda path: path.name)
def test_every_command_exists(document: Path) -> None:
    text = read_text(document)
    assert [(c, problem) for c in commands_in(text) if (problem := problem_with(c))] == []
    typed = commands_in(text, inline=False)
    assert [(c, problem) for c in typed if (problem := problem_with(c, whole=True))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_installed_from_a_public_index_by_our_name(document: Path) -> None:
    """It is on none, and one day it may be somebody else's. Our messages may say it: there, we are installed."""
    assert re.findall(r"pip install '?chunkmill.*", document.read_text()) == []


def test_the_deployment_files_show_commands() -> None:
    assert len(commands_in(read_text(ROOT / "docker-compose.yml"), inline=False)) == 3
    assert sum(len(commands_in(read_text(path))) for path in COMMENTED) > 8


@pytest.mark.parametrize("document", [*DOCUMENTS, *COMMENTED], ids=lambda path: path.name)
def test_every_script_and_compose_service_exists(document: Path) -> None:
    """And nobody is told to give a profile to one command, because the next one would forget it."""
    text = read_text(document)
    assert [path for path in re.findall(r"deploy/[\w@.-]*\w", text) if not (ROOT / path).exists()] == []
    assert "--profile" not in text
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    pattern = r"docker compose (?:run --rm(?: -\S+ \S+)*|exec|logs(?: -f)?|restart) (?=[a-z])([\w-]+)"
    assert set(re.findall(pattern, text)) <= set(services)


@pytest.mark.parametrize("document", [*DOCUMENTS, *COMMENTED], ids=lambda path: path.name)
def test_every_make_target_and_celery_worker_exists(document: Path) -> None:
    """Those in shell blocks, and in inline code that begins with them."""
    text = read_text(document)
    blocks = [re.sub(r"\\\n\s*", "", block) for language, block in FENCE.findall(text) if language in SHELL]
    lines = [line.removeprefix("$ ").partition(" #")[0] for block in blocks for line in block.splitlines()]
    typed = [*lines, *CODE.findall(FENCE.sub("", text))]
    made = {match[1] for line in typed if (match := re.match(r"make ([a-z]+)", line))}
    assert made <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in typed:
        if worker_command := re.match(r"(?:\w+=\S+ )*celery -A chunkmill_workers worker\s*(.*?)\s*(?:&|$)", line):
            celery_worker.make_parser(click.Context(celery_worker)).parse_args(shlex.split(worker_command[1]))


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


def test_comments_are_a_document(tmp_path: Path) -> None:
    file = tmp_path / "x.conf"
    file.write_text("""
# Run `chunkmill nothing`:
#
#   chunkmill jobs \\
#       -n 5
key: chunkmill none  # chunkmill no comment of its own
    #   chunkmill enqueue /data/chunks.jsonl
""")
    assert sorted(commands_in(read_text(file))) == ["enqueue /data/chunks.jsonl", "jobs -n 5", "nothing"]
    assert sorted(commands_in(read_text(file), inline=False)) == ["enqueue /data/chunks.jsonl", "jobs -n 5"]
    assert problem_with("enqueue /data/chunks.jsonl", whole=True) == "missing: ['collection']"
    assert problem_with("keywords --drop", whole=True) == "missing: ['collection']"
    assert problem_with("bridge learn docs", whole=True) == "missing: ['model']"


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
