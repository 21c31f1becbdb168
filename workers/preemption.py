"""Leaving well: what a worker does between "you will be stopped" and the end."""

from __future__ import annotations

import logging

from workers.context import WorkerContext

logger = logging.getLogger(__name__)


def begin_drain(context: WorkerContext) -> None:
    """Tell the task threads to stop at their next TokenBatch and give their ChunkBatches back, uncharged.

    What they have embedded is committed first, so another worker goes on from there.
    """
    if not context.stopping.is_set():
        logger.info("draining: tasks stop after their TokenBatch and release their leases")
        context.stopping.set()
