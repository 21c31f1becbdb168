"""The provider with its requests counted: how many of each kind, how they ended, and the time they took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import IO, Any

from chunkmill.errors import ProviderBusy, ProviderError, ProviderRefused, ProviderStopped
from chunkmill.openai.http import Provider
from chunkmill.openai.wire.status import RemoteBatch
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS

_RESULTS: dict[type[ProviderError], str] = {
    ProviderBusy: "busy",
    ProviderStopped: "stopped",
    ProviderRefused: "refused",
}


@contextlib.contextmanager
def _counted(operation: str) -> Iterator[None]:
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


class CountedProvider(Provider):
    """A list that is read over several pages counts as one; a download as long as its lines are read."""

    def upload(self, name: str, file: IO[bytes]) -> str:
        with _counted("upload"):
            return super().upload(name, file)

    def create(self, input_file_id: str, token: str) -> RemoteBatch:
        with _counted("create"):
            return super().create(input_file_id, token)

    def retrieve(self, batch_id: str) -> RemoteBatch:
        with _counted("retrieve"):
            return super().retrieve(batch_id)

    def cancel(self, batch_id: str) -> RemoteBatch:
        with _counted("cancel"):
            return super().cancel(batch_id)

    def find(self, input_file_id: str, token: str, *, since: datetime) -> list[RemoteBatch]:
        with _counted("list"):
            return super().find(input_file_id, token, since=since)

    def files_named(self, prefix: str, *, limit: int = 1000) -> list[str]:
        with _counted("list"):
            return super().files_named(prefix, limit=limit)

    @contextlib.contextmanager
    def lines(self, file_id: str) -> Iterator[Iterator[bytes]]:
        with _counted("download"), super().lines(file_id) as lines:
            yield lines

    def delete_file(self, file_id: str) -> None:
        with _counted("delete"):
            super().delete_file(file_id)

    def embed(
        self, model: str, inputs: Sequence[str], *, dimensions: int | None, idempotency_key: str
    ) -> dict[str, Any]:
        with _counted("embed"):
            return super().embed(model, inputs, dimensions=dimensions, idempotency_key=idempotency_key)
