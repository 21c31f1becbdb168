"""`chunkmill chunks`, `delete` and `export`, as they are typed."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from chunkmill import Client
from chunkmill.cli.__main__ import cli
from chunkmill.settings import Settings
from tests.integration.test_chunks import fill

Command = Callable[..., Result]


@pytest.fixture
def env(settings: Settings, client: Client, db: sa.Engine) -> dict[str, str]:
    fill(client, db)
    return {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}


@pytest.fixture
def command(env: dict[str, str]) -> Command:
    return lambda *arguments: CliRunner().invoke(cli, list(arguments), env=env)


@pytest.fixture
def document(command: Command) -> Callable[..., Any]:
    def call(*arguments: str) -> Any:
        done = command(*arguments, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return call


def test_a_list_goes_on_behind_its_last_id(command: Command, document: Callable[..., Any]) -> None:
    first = document("chunks", "list", "docs", "-n", "3", "--where", '{"half": 1}')
    assert ([chunk["id"] for chunk in first["chunks"]], first["after"]) == (["c1", "c3", "c5"], "c5")
    assert first["chunks"][0].keys() == {"id", "metadata", "state", "truncated", "content_hash", "job_id", "text"}
    rest = document("chunks", "list", "docs", "-n", "3", "--where", '{"half": 1}', "--after", first["after"])
    assert ([chunk["id"] for chunk in rest["chunks"]], rest["after"]) == (["c7", "c9"], None)
    shown = command("chunks", "list", "docs", "--limit=2")
    assert "docs text 1" in shown.output
    assert "docs text 2" not in shown.output
    assert "--after with the last id, c1" in shown.stderr
    assert command("chunks", "list", "docs", "--after=z").output == "There is no such chunk.\n"


def test_get_shows_chunks_and_names_those_that_are_not_there(command: Command, document: Callable[..., Any]) -> None:
    assert [chunk["text"] for chunk in document("chunks", "get", "docs", "c2", "c1")] == ["docs text 2", "docs text 1"]
    done = command("chunks", "get", "docs", "c2", "nothing")
    assert ("docs text 2" in done.output, done.exit_code) == (True, 1)
    assert "collection 'docs' has no chunk 'nothing'" in done.stderr


def test_count_and_update(command: Command, document: Callable[..., Any], client: Client) -> None:
    assert command("chunks", "count", "docs").output == "10\n"
    half = ["--where", '{"half": 1}']
    assert document("chunks", "count", "docs", *half) == {"collection": "docs", "chunks": 5}
    done = command("chunks", "update", "docs", *half, "--set", '{"seen": true}', "--remove=n", "--remove=in")
    assert done.output == "Updated the metadata of 5 chunks of 'docs'.\n"
    assert client.get("docs", ["c1"])["c1"].metadata == {"half": 1, "seen": True}
    assert document("chunks", "update", "docs", "c1", "c2", "--set", "{}", "--replace")["updated"] == 2
    assert client.get("docs", ["c2"])["c2"].metadata == {}
    assert client.count("others", filter={"half": 1}) == 5


@pytest.mark.parametrize(
    "choice", [[], ["c1", "--all"], ["c1", "--where", '{"a": 1}'], ["--where", '{"a": 1}', "--all"]], ids=str
)
def test_a_change_or_a_deletion_says_what_it_means(command: Command, client: Client, choice: list[str]) -> None:
    for verb in (["delete", "docs", "--yes"], ["chunks", "update", "docs", "--set", '{"a": 1}']):
        done = command(*verb, *choice)
        assert (done.exit_code, "pass --all" in done.stderr) == (2, True), done.output
    empty = command("delete", "docs", "--yes", "--where", "{}")
    assert (empty.exit_code, "every chunk passes this filter" in empty.stderr) == (1, True), empty.output
    assert "--all on the command line" in empty.stderr
    assert command("delete", "docs", "--yes", "--where", "[]").exit_code == 2
    assert client.count("docs") == 10


def test_a_deletion_by_filter_asks_and_says_how_many(env: dict[str, str], command: Command, client: Client) -> None:
    assert "pass --yes" in command("delete", "docs", "--where", '{"half": 1}').stderr
    program = [sys.executable, "-P", "-m", "chunkmill.cli", "delete", "docs", "--where", '{"half": 1}']
    for answer, left in ((b"n\n", 10), (b"y\n", 5)):
        mine, its = pty.openpty()
        os.write(mine, answer)
        done = subprocess.run(program, stdin=its, capture_output=True, text=True, env=os.environ | env, check=False)
        os.close(mine)
        os.close(its)
        assert "Delete 5 chunks of 'docs' and their vectors?" in done.stderr
        assert (done.returncode == 0, client.count("docs"), client.count("others")) == (left == 5, left, 10)
