"""A Redis that takes a connection and never answers hangs nobody: frozen, or behind a network that is gone."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from chunkmill.broker import Broker, Doorbell, publish_errors
from chunkmill.settings import Settings
from tests.support.waiting import Call


@pytest.fixture
def silent(settings: Settings) -> Iterator[Broker]:
    """A broker whose patience is a tenth and a hundredth of what it is in the field."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # its backlog takes the connections
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        broker = Broker.connect(settings.model_copy(update={"redis_url": url}))
        for options, part in (
            (broker.celery.conf.broker_transport_options, 100),
            (broker.client.connection_pool.connection_kwargs, 10),
        ):
            # Who has no patience stated waits for ever, and here too.
            if options.get("socket_timeout") is not None:
                options["socket_timeout"] /= part
        yield broker
        broker.close()


@pytest.mark.parametrize(
    "use",
    [lambda broker: broker.queued_doorbells(), lambda broker: broker.ring([Doorbell(1, 0)])],
    ids=["look", "ring"],
)
def test_it_is_given_up(silent: Broker, use: Callable[[Broker], object]) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            use(silent)
        except publish_errors() as error:
            raised.append(error)

    Call(run).result()
    assert raised
