"""Celery's consumer without what lets others steer a worker."""

from __future__ import annotations

from typing import Any

from celery.worker import consumer as celerys
from celery.worker import control

from chunkmill.messages.door import READS, SIGNALS


class Consumer(celerys.Consumer):  # type: ignore[misc]
    """Celery's consumer without gossip and mingle, whatever the command line says, and with few remote commands.

    Gossip and mingle connect workers with one another, which ours do not need: whoever can publish to Redis could end
    all of them, or fill their memory. Of the remote control, only what Flower reads is left.
    """

    def __init__(self, *arguments: Any, worker_options: dict[str, Any] | None = None, **options: Any) -> None:
        for name in control.Panel.data.keys() - READS - SIGNALS:
            del control.Panel.data[name]
        alone = {"without_gossip": True, "without_mingle": True}
        super().__init__(*arguments, worker_options={**(worker_options or {}), **alone}, **options)
