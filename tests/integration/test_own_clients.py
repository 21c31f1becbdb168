"""Clients that are made with addresses and settings, and clients that are closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chunkmill import AsyncClient, Client, ClientClosed, InvalidSetting
from chunkmill.embedded import StackStatus
from chunkmill.embedded.environment import Environment
from chunkmill.settings import Settings
from tests.conftest import fresh_settings
from tests.integration.test_async_client import run
from tests.support.waiting import Call, until


@pytest.fixture
def other_settings(stack: StackStatus) -> Iterator[Settings]:
    with fresh_settings(stack) as made:
        yield made


def addresses(settings: Settings) -> dict[str, str]:
    return {"database_url": settings.require_database_url(), "redis_url": settings.require_redis_url()}


def test_clients_of_two_installations_live_in_one_process(
    settings: Settings, other_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own settings too, and the environment counts only for what is not given."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("ENQUEUE_WINDOW", "7")
    with (
        Client(**addresses(settings), chunk_batch_size=2) as here,
        Client(**addresses(other_settings), vector_storage="halfvec", enqueue_window=9) as there,
    ):
        here.enqueue([(number, f"text {number}") for number in range(4)], collection="docs")
        there.enqueue([(1, "another text")], collection="notes")
        assert [info.name for info in here.collections()] == ["docs"]
        assert [info.name for info in there.collections()] == ["notes"]
        assert (here._settings.chunk_batch_size, there._settings.chunk_batch_size) == (2, 512)
        assert (here._settings.enqueue_window, there._settings.enqueue_window) == (7, 9)
        assert {repr(here), repr(there)} == {
            f"Client(database={one.database_url!r}, redis={one.redis_url!r})" for one in (settings, other_settings)
        }


def test_an_async_client_is_made_with_addresses_too(settings: Settings, other_settings: Settings) -> None:
    async def story() -> list[str]:
        async with (
            await AsyncClient.connect(**addresses(settings)) as here,
            await AsyncClient.connect(**addresses(other_settings)) as there,
        ):
            await here.enqueue([(1, "a text")], collection="docs")
            assert await there.collections() == []
            return [info.name for info in await here.collections()]

    assert run(story()) == ["docs"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"database_url": "postgresql://me@/db"}, "redis_url is not given. Give database_url and redis_url"),
        ({"redis_url": "redis://127.0.0.1/0"}, "database_url is not given"),
        (
            {"database_url": "mysql://s3cret@db", "redis_url": "redis://r/0"},
            r"database_url \(DATABASE_URL\): it must be a URL",
        ),
        ({"embeding_model": "a"}, "no setting 'embeding_model'. Did you mean embedding_model"),
        ({"EMBEDDING_MODEL": "a"}, "no setting 'EMBEDDING_MODEL'. Did you mean embedding_model"),
        (
            {"chunk_batch_size": 0},
            r"chunk_batch_size \(CHUNK_BATCH_SIZE\): .* or equal to 1. Fix the argument",
        ),
        ({"chunkmill_home": "/nowhere/at/all"}, "no embedded stack runs in /nowhere/at/all"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_given(
    given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    """An address is never joined to the other one of the environment: they would be those of two installations."""
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    with pytest.raises(InvalidSetting, match=says) as caught:
        Client(**given)
    assert "s3cret" not in str(caught.value)


def test_a_home_means_the_stack_in_it_whatever_the_environment_says(
    stack: StackStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    environment = Environment.load(chunkmill_home=stack.home)
    assert environment.is_embedded
    assert environment.settings.redis_url == stack.redis_url
    assert not Environment.load().is_embedded


def test_a_method_of_a_closed_client_raises_client_closed(client: Client, tmp_path: Path) -> None:
    client.enqueue([("a", "a text")], collection="docs")
    golden, items = client.golden("docs"), client.chunks("docs")
    client.close()
    client.close()
    calls: list[Callable[[], Any]] = [
        client.jobs,
        client.collections,
        lambda: client.enqueue([("b", "b")], collection="docs"),
        lambda: client.search("a", collection="docs", timeout=0.1),
        lambda: client.wait(301),
        lambda: client.batcher("docs"),
        lambda: client.export("docs", tmp_path / "docs.jsonl"),
        lambda: list(items),
        golden.count,
        client.__enter__,
    ]
    for call in calls:
        with pytest.raises(ClientClosed, match="the client is closed"):
            call()
    assert client._db.pool.checkedin() == 0  # type: ignore[attr-defined]
    with pytest.raises(ClientClosed):
        run(AsyncClient(client).jobs())


def test_a_call_of_another_thread_ends_when_the_client_is_closed(client: Client, settings: Settings) -> None:
    """A wait that nobody answers, and an enqueue whose source goes on for ever."""
    job = client.enqueue([("a", "a text")], collection="docs")
    looks, items = threading.Event(), threading.Event()

    def endless() -> Iterator[tuple[int, str]]:
        number = 0
        while True:
            number += 1
            if number > 100:
                items.set()
            yield number, "a text"

    waiting = Call(lambda: client.wait(job.id, on_progress=lambda _: looks.set()))
    enqueueing = Call(lambda: client.enqueue(endless(), collection="docs", on_invalid="skip"))
    until(lambda: looks.is_set() and items.is_set())
    client.close()
    for call in (waiting, enqueueing):
        with pytest.raises(ClientClosed):
            call.result()
    with Client(**addresses(settings)) as other:
        assert other.job(job.id).state == "running"
