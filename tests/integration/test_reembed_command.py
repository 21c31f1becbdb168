"""`chunkmill reembed`, as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.integration.test_reembedder import Scene

Command = Callable[..., Result]


@pytest.fixture
def scene(client: Client, hands: Hands, settings: Settings) -> Scene:
    return Scene(client, hands, settings.model_copy(update={"chunk_batch_size": 2, "index_seconds": 0.0}))


@pytest.fixture
def command(settings: Settings, scene: Scene) -> Command:
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    return lambda *arguments: CliRunner().invoke(cli, ["reembed", *arguments], env=env)


@pytest.fixture
def document(command: Command) -> Callable[..., Any]:
    def call(*arguments: str) -> Any:
        done = command(*arguments, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return call


def test_a_collection_is_moved_and_comes_back(
    scene: Scene, command: Command, document: Callable[..., Any], settings: Settings
) -> None:
    asked = ["start", "docs", settings.embedding_model, "--on-long", "split"]
    quote = document(*asked, "--dry-run")
    assert (quote["chunks"], quote["to_embed"]) == (7, 7)
    assert document("list") == []
    off = ["--recall", "off", "--ndcg-loss", "off", "--p95-ratio", "off", "--no-canary"]
    begun = document(*asked, *off, "--ramp", "50", "--price", "0.02", "--keep-days", "3")
    assert (begun["state"], begun["ramp"], begun["limits"]["price"], begun["limits"]["recall"]) == (
        "planned", [50], "0.02", None
    )  # fmt: skip
    number = str(begun["id"])
    assert document("pause", number)["paused_at"] is not None
    # The price of local work is not known here, so that this gate would never be passed.
    assert document("resume", "docs", "--price", "off")["limits"]["price"] is None
    for _ in range(12):
        scene.round()
    assert [(one["id"], one["state"], one["share"]) for one in document("list", "docs")] == [
        (begun["id"], "ramping", 50)
    ]  # fmt: skip
    assert command("show", number, "--wait").exit_code == 3  # it stays at its share
    assert document("flip", number)["state"] == "flipped"
    refused = command("finish", number)
    assert refused.exit_code == 1
    assert "pass --yes" in refused.stderr
    assert document("rollback", "docs")["state"] == "rolled_back"
    assert document("finish", "docs", "--yes")["dropped_at"] is None
    assert "is rolled back, and the collection keeps no previous space" in command("finish", number).stderr
    assert command("cancel", number).exit_code == 1


def test_wrong_shares_and_limits_are_refused(command: Command, settings: Settings) -> None:
    for option, value in (("--ramp", "50,10"), ("--ramp", "many"), ("--recall", "high"), ("--recall", "1.5")):
        refused = command("start", "docs", settings.embedding_model, "--on-long", "split", option, value)
        assert refused.exit_code in (1, 2), refused.output
        assert command("list", "--json").stdout == "[]\n"
    for option, value in (("--ramp", "50,10"), ("--recall", "1.5")):
        asked = ["start", "docs", settings.embedding_model, "--on-long", "split", "--dry-run", option, value]
        assert command(*asked).exit_code == 1
