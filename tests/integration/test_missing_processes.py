"""A command that waits for workers or a poller says at its beginning which of them is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from chunkmill.cli import lacks
from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.states import Route
from chunkmill.models import DEFAULT_MODEL
from chunkmill.settings import Settings

PAID = "text-embedding-3-small"


@pytest.fixture(autouse=True)
def env(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())


@contextmanager
def connected(settings: Settings, role: str) -> Iterator[None]:
    db = create_db(settings.require_database_url(), role=role)
    with db.connect():
        yield
    db.dispose()


def test_each_model_lacks_the_worker_that_would_embed_with_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, paid = lacks.of_models(DEFAULT_MODEL), lacks.of_models(PAID)
    assert [said.partition(",")[0] for said in (*local, *paid)] == ["No worker is connected"] * 2
    assert ("chunkmill worker." in local[0], "openai" in paid[0]) == (True, True)
    assert lacks.of_models(DEFAULT_MODEL, PAID, None) == [*local, *paid]
    with connected(settings, "worker"):
        assert lacks.of_models(DEFAULT_MODEL) == []
        [said] = lacks.of_models(PAID)
        assert "No worker for the paid routes is connected" in said
        assert lacks.of_any_worker() is None
    with connected(settings, "worker-openai"):
        assert (lacks.of_models(DEFAULT_MODEL), lacks.of_models(PAID)) == (local, [])
        assert lacks.of_any_worker() is None
    assert "No worker is connected" in str(lacks.of_any_worker())
    monkeypatch.setenv("EMBEDDING_PROVIDER", "local")
    assert lacks.of_models(PAID) == local


def test_a_model_that_either_kind_serves_lacks_only_both(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"hosted": {"same_as": DEFAULT_MODEL, "dimensions": 384, "max_tokens": 256, "tokenizer": "cl100k"}}
    monkeypatch.setenv("OPENAI_MODELS", json.dumps(described))
    assert len(lacks.of_models("hosted")) == 1
    for role in ("worker", "worker-openai"):
        with connected(settings, role):
            assert lacks.of_models("hosted") == []
            _, *workers = lacks.of_reembedding(Route.AUTO, "hosted")  # the first is the poller
            assert workers == []
    with connected(settings, "worker"), connected(settings, "poller"):
        [said] = lacks.of_reembedding(Route.OPENAI, "hosted")
        assert "No worker for the paid routes is connected" in said
        assert lacks.of_reembedding(Route.OPENAI, None) == lacks.of_reembedding(Route.LOCAL, "hosted") == []


def test_a_poller_is_missing_if_none_is_connected(settings: Settings) -> None:
    assert str(lacks.of_a_poller()).endswith("To start one: chunkmill poller.")
    with connected(settings, "poller"):
        assert lacks.of_a_poller() is None


def test_the_commands_say_it_before_they_wait(settings: Settings, client: Client) -> None:
    def said(*arguments: str) -> str:
        return " ".join(CliRunner().invoke(cli, [*arguments]).stderr.split())

    client.enqueue([("a", "a text")], collection="docs")
    client.enqueue([("a", "a text")], collection="notes")
    for command in (["compare", "docs", PAID], ["bridge", "learn", "docs", PAID]):
        assert "No worker is connected, so nothing is embedded" in said(*command)
        with connected(settings, "worker-openai"):
            assert "No worker" not in said(*command)
    assert "No worker is connected" in said("compare", "docs", DEFAULT_MODEL, "--against", PAID, "--precision", "int8")
    assert "No poller is connected" in said("reembed", "start", "docs", DEFAULT_MODEL, "--precision", "int8")
    with connected(settings, "poller"):
        begun = said("reembed", "start", "notes", DEFAULT_MODEL, "--precision", "int8")
        assert ("No poller" in begun, "No worker is connected" in begun) == (False, True)
        shown = said("reembed", "show", "notes")
        assert ("No poller" in shown, "No worker is connected" in shown) == (False, True)
        with connected(settings, "worker"):
            again = said("reembed", "start", "notes", DEFAULT_MODEL, "--precision", "int8")
            assert "It is under way since " in again
            assert "A poller does the rest." in again
            assert "is connected" not in said("reembed", "show", "notes")
    assert "under way" not in begun
    assert "No poller is connected" in said("reembed", "show", "docs")
    client.pause_reembedding("docs")
    assert "is connected" not in said("reembed", "show", "docs")
    assert "No poller is connected" in said("reembed", "show", "docs", "--wait")
    with connected(settings, "poller"):
        assert "No poller" not in said("reembed", "show", "docs", "--wait")
