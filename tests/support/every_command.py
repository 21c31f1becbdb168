"""Every command that the parser knows, with arguments to run it: a new command is in each test of all of them.

``python -m tests.support.every_command COMMANDS`` runs a JSON list of them in one process, one after the other, as they
are typed, and prints a line with the exit code after each.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping

import click

from chunkmill.cli.__main__ import cli

Words = tuple[str, ...]
"""The words of a command: ``("models", "export")``."""

GIVEN: dict[Words, list[str]] = {
    ("bench",): ["--list"],
    ("cache", "evict"): ["--older-than=30d"],
    ("chunks", "update"): ['--set={"a": 1}'],
    ("cost", "correct"): ["--yes", "--month=2026-11"],
    ("dead", "drop"): ["--yes"],
    ("demo",): ["--limit=2"],
    ("flower",): ["--no-auth", "--port=0"],
    ("gateway",): ["--port=0"],
    ("models", "check"): ["--files-only"],
    ("search",): ["--timeout=0.1"],
    ("tune",): ["--dry-run", "--texts=texts.jsonl", "--backend=native", "--dtype=fp32", "--budget=256", "--threads=1",
                "--seconds=0.1"],
}  # fmt: skip
"""What a command needs beside the arguments that it requires, to come far and to end soon."""

OWN_PROCESS: dict[Words, str | None] = {
    ("bench",): None,
    ("demo",): None,
    ("flower",): "Connected to",
    ("gateway",): "the gateway takes requests",
    ("models", "export"): None,
    ("poller",): "poller: keeps at most",
    ("tune",): None,
    ("worker",): "ready.",
}
"""The commands that become other processes or run until they are stopped, and what those say once they have started."""

END = "exit code of"


def commands(
    values: Mapping[str, str], command: click.Command = cli, path: Words = ()
) -> Iterator[tuple[Words, list[str]]]:
    """Each command's words, and the same with a value for each argument and each required option.

    ``values`` are by the names of parameters.
    """
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(values, below, (*path, name))
    if not isinstance(command, click.Group) or command.invoke_without_command:
        options, arguments = [*GIVEN.get(path, [])], []
        for parameter in command.params:
            if isinstance(parameter, click.Argument) and parameter.type is not click.UNPROCESSED:
                arguments.append(_value(parameter, values))
            elif parameter.required:
                options += [parameter.opts[-1], _value(parameter, values)]
        yield path, [*path, *options, *(["--", *arguments] if arguments else [])]


def _value(parameter: click.Parameter, values: Mapping[str, str]) -> str:
    if parameter.name in values:
        return values[parameter.name]
    if parameter.name == "usd":
        return "1"
    if isinstance(parameter.type, click.Choice):
        return str(parameter.type.choices[0])
    return "1" if isinstance(parameter.type, click.IntRange) else "docs"


def run(given: list[list[str]]) -> None:
    for arguments in given:
        code: object = 0
        try:
            cli.main(arguments, prog_name="chunkmill", standalone_mode=True)
        except SystemExit as end:
            code = end.code
        with contextlib.suppress(BrokenPipeError):
            print(f"\n{END} {' '.join(arguments)!a}: {code}", flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
