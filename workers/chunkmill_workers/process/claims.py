"""Claims a ChunkBatch for the task of a doorbell, in turns over the jobs, also if the answer to the commit is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sqlalchemy as sa

from chunkmill.domain.states import Route
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill_workers.process.context import QueueContext


def claim(
    context: QueueContext,
    chunk_batch_id: int,
    *,
    route: Route,
    not_spaces: Sequence[int],
    unless: Callable[[sa.Connection], bool] = lambda conn: False,
    in_turn: bool = True,
) -> Lease | None:
    """Lease a ChunkBatch if it is due, and not if ``unless`` is true of the moment.

    If it is another job's turn (``chunk_batches.turn_of``), a ChunkBatch of that job is leased instead. Without
    ``in_turn`` it is this ChunkBatch or none.

    A connection may break after Postgres has committed. Then this runs again, and finds the claim that it has made. If
    it did not, nobody would work on the ChunkBatch until its lease ran out, and that would count as a death.
    """
    made: Lease | None = None

    def run(conn: sa.Connection) -> Lease | None:
        nonlocal made
        lease_seconds = context.settings.lease_seconds
        made = made and chunk_batches.take_up_if_held(conn, made, lease_seconds=lease_seconds)
        if made is None and not unless(conn):
            turn = chunk_batch_id
            if in_turn:
                served = context.leases.served()
                turn = chunk_batches.turn_of(conn, turn, served=served, route=route, not_spaces=not_spaces)
            made = chunk_batches.claim_if_due(
                conn,
                turn,
                owner=context.name,
                lease_seconds=lease_seconds,
                route=route,
                not_spaces=not_spaces,
            )
        return made

    return context.transact(run, "claim", give_up=True)
