"""A command that waits for workers or a poller says at its beginning which of them is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from chunkmill.cli import lacks
from chunkmill.db.connect import create_db
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


def test_each_model_lacks_the_worker_that_would_embed_with_it(settings: Settings) -> None:
    local, paid = lacks.of_models(DEFAULT_MODEL), lacks.of_models(PAID)
    assert [said.partition(",")[0] for said in (*local, *paid)] == ["No worker is connected"] * 2
    assert ("chunkmill worker." in local[0], "openai" in paid[0]) == (True, True)
    assert lacks.of_models(DEFAULT_MODEL, PAID, None) == [*local, *paid]
    with connected(settings, "worker"):
        assert (lacks.of_models(DEFAULT_MODEL), lacks.of_models(PAID)) == ([], paid)
    with connected(settings, "worker-openai"):
        assert (lacks.of_models(DEFAULT_MODEL), lacks.of_models(f"{PAID}@1")) == (local, [])


def test_a_poller_is_missing_if_none_is_connected(settings: Settings) -> None:
    [said] = lacks.of_a_poller()
    assert said.endswith("To start one: chunkmill poller")
    with connected(settings, "poller"):
        assert lacks.of_a_poller() == []


def test_a_database_that_does_not_answer_is_left_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    assert (lacks.of_models(DEFAULT_MODEL), lacks.of_a_poller()) == ([], [])
