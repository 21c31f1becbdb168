"""Counts the requests to the provider: how many of each kind there were, how they ended, and how long they took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from chunkmill.errors import ProviderBusy, ProviderError, ProviderRefused, ProviderStopped
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS

_RESULTS: dict[type[ProviderError], str] = {
    ProviderBusy: "busy",
    ProviderStopped: "stopped",
    ProviderRefused: "refused",
}


@contextlib.contextmanager
def counted(operation: str) -> Iterator[None]:
    """Counts one request and its time, around a block or as the decorator of a method."""
    started = time.perf_counter()
    result = "ok"
    try:
        yield
    except ProviderError as error:
        result = _RESULTS.get(type(error), "silent")
        raise
    finally:
        COUNTS.add(m.PROVIDER_REQUESTS, 1, operation, result)
        COUNTS.add(m.PROVIDER_SECONDS, time.perf_counter() - started, operation)
