"""Who is missing for a command that waits for workers or a poller. It is said at the beginning; nothing is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from chunkmill.cli.late import Environment, read_database
from chunkmill.domain.states import Route
from chunkmill.errors import ChunkmillError

if TYPE_CHECKING:
    from chunkmill.monitor.present import Presence
    from chunkmill.settings import Settings


def of_models(*models: str | None) -> list[str]:
    """A sentence for each kind of worker that is not there and would have to embed with one of these models."""
    said: dict[str, None] = {}
    for settings, present in _present():
        for model in filter(None, models):
            is_paid = model.partition("@")[0] in settings.provider_models
            if lack := present.lack(Route.OPENAI if is_paid else Route.LOCAL):
                said[f"{lack}."] = None
    return list(said)


def of_a_poller() -> list[str]:
    """A sentence if no poller is connected."""
    return [
        "No poller is connected, and one has to do the rest. To start one: chunkmill poller"
        for _, present in _present()
        if not present.connections.pollers
    ]


def _present() -> Iterator[tuple[Settings, Presence]]:
    """The settings, and who is there; nothing if the database cannot say it, which the command itself will tell."""
    with suppress(ChunkmillError):
        settings = Environment.load().settings
        yield settings, read_database(settings).present
