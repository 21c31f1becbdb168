"""Who is missing for a command that waits for workers or a poller. It is said at the beginning; nothing is refused."""

from __future__ import annotations

from chunkmill.cli.late import Environment, Settings, provider_model, read_database
from chunkmill.domain.states import Route

NO_POLLER = "No poller is connected, and one has to do the rest. To start one: chunkmill poller."


def of_models(*names: str | None) -> list[str]:
    """A sentence for each kind of worker that is not there and would have to embed with one of these models."""
    settings = Environment.load().settings
    routes = dict.fromkeys(_route(settings, name) for name in names if name is not None)
    present = read_database(settings).present
    return [f"{lack}." for route in routes if (lack := present.lack(route))]


def of_any_worker() -> str | None:
    """A sentence if no worker is there, of whichever kind."""
    lack = read_database(Environment.load().settings).present.lack(Route.AUTO)
    return f"{lack}." if lack else None


def of_a_poller() -> str | None:
    """A sentence if no poller is connected."""
    return None if read_database(Environment.load().settings).present.connections.pollers else NO_POLLER


def of_reembedding(route: Route, model: str | None) -> list[str]:
    """A sentence for a missing poller and, if a ``model`` is to embed now, for missing workers of the ``route``."""
    settings = Environment.load().settings
    present = read_database(settings).present
    lacking = [] if present.connections.pollers else [NO_POLLER]
    if model is not None and (lack := present.lack(_route(settings, model) if route is Route.AUTO else route)):
        lacking.append(f"{lack}.")
    return lacking


def _route(settings: Settings, name: str) -> Route:
    """Which workers embed with a model: those of the provider, local ones, or either of them."""
    model = provider_model(settings, name)
    if model is None:
        return Route.LOCAL
    return Route.OPENAI if model.same_as is None else Route.AUTO
