"""The Celery tasks. The story is in ``chunkmill_workers.local.pipeline``."""

from __future__ import annotations

from celery import Celery

from chunkmill.broker import ADVANCE_TASK, EMBED_TASK, NEXT_NAMES, REQUEST_TASK


def register(app: Celery) -> None:
    """Register the tasks. They are few, because whoever can write to Redis can call each of them."""
    for name, task in (
        (EMBED_TASK, embed_chunk_batch),
        (REQUEST_TASK, request_chunk_batch),
        (ADVANCE_TASK, advance_provider_batch),
    ):
        app.task(name=name)(task)
        app.task(name=NEXT_NAMES[name])(task)


def embed_chunk_batch(chunk_batch_id: int) -> None:
    # Imported here because Flower and the poller load this module on machines without torch.
    from chunkmill_workers.local.context import WorkerContext
    from chunkmill_workers.local.pipeline import run_chunk_batch

    run_chunk_batch(WorkerContext.current(), int(chunk_batch_id))


def request_chunk_batch(chunk_batch_id: int) -> None:
    from chunkmill_workers.provider.context import ProviderContext
    from chunkmill_workers.provider.plain import request_chunk_batch

    request_chunk_batch(ProviderContext.current(), int(chunk_batch_id))


def advance_provider_batch(provider_batch_id: int) -> None:
    from chunkmill_workers.provider.context import ProviderContext
    from chunkmill_workers.provider.steps import advance_provider_batch

    advance_provider_batch(ProviderContext.current(), int(provider_batch_id))
