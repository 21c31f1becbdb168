"""The Celery tasks. The story is in ``workers.pipeline``."""

from __future__ import annotations

from celery import Celery

from app.broker import EMBED_TASK


def register(app: Celery) -> None:
    """Register few tasks: whoever can write to Redis can call each of them."""

    @app.task(name=EMBED_TASK)  # type: ignore[untyped-decorator]
    def embed_chunk_batch(chunk_batch_id: int) -> None:
        # Imported here because Flower and the poller load this module on machines without torch.
        from workers.context import WorkerContext
        from workers.pipeline import run_chunk_batch

        run_chunk_batch(WorkerContext.current(), int(chunk_batch_id))
