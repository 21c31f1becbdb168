"""The end of a job by the client that enqueued it or took it up again."""

from __future__ import annotations

import logging

import sqlalchemy as sa

from chunkmill.db.connect import limit_error, limit_of
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.spaces.registry import VectorTable

logger = logging.getLogger(__name__)


def end_or_leave(conn: sa.Connection, job_id: int, space: VectorTable) -> None:
    """End the job in a transaction of its own if nothing of it is left to do.

    If a setting of Postgres, such as ``statement_timeout``, ends the anti-join, the job is left to the poller: what the
    caller asked for is committed.
    """
    try:
        with conn.begin():
            finish_if_done(conn, job_id, space)
    except sa.exc.DBAPIError as error:
        if limit_of(error) is None:
            raise
        limit = limit_error(f"the end of job {job_id}", error)
        logger.warning("the poller will try to end the job, because this client could not: %s", limit)
