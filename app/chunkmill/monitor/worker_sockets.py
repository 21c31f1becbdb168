"""Where workers listen for callers on the same machine: one row for each worker, with the token that callers need.

Whoever may read a token may ask that worker. Of the roles of deploy/postgres-role.sql, those of clients and workers
may, and that of pollers may not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

import sqlalchemy as sa

from chunkmill.monitor.reports import FORGET_SECONDS, SILENT_SECONDS
from chunkmill.telemetry import tracing


@dataclass(frozen=True, slots=True)
class WorkerSocket:
    name: str
    """The worker's name in its leases."""
    address: str
    """``unix:/path`` or ``tcp:127.0.0.1:1234``, on the machine of the worker."""
    token: bytes = field(repr=False)
    spaces: frozenset[int]
    """The ids of the spaces that it answers at once, because their models are loaded."""
    takes_traces: bool = False
    """It continues the trace of a request. One that does not ends the connection at a request that has one."""


def exist(conn: sa.Connection) -> bool:
    """Whether the schema has the table: this code also runs on the schema of the release before it."""
    return bool(conn.execute(sa.text("SELECT to_regclass('worker_sockets') IS NOT NULL")).scalar_one())


def _know_traces(conn: sa.Connection) -> bool:
    """Whether the table has the column ``traces_for``."""
    query = """
        SELECT FROM pg_attribute
        WHERE attrelid = to_regclass('worker_sockets') AND attname = 'traces_for' AND NOT attisdropped
    """
    return conn.execute(sa.text(query)).one_or_none() is not None


_WRITE = """
    INSERT INTO worker_sockets (name, machine, address, token, spaces, seen_at{column})
    VALUES (:name, :machine, :address, :token, :spaces, now(){value})
    ON CONFLICT (name) DO UPDATE SET
        machine = excluded.machine,
        address = excluded.address,
        token = excluded.token,
        spaces = excluded.spaces,
        seen_at = excluded.seen_at{update}
"""
_WRITE_OLD = sa.text(_WRITE.format(column="", value="", update=""))
_WRITE_NEW = sa.text(
    _WRITE.format(column=", traces_for", value=", :traces_for", update=", traces_for = excluded.traces_for")
)


def write(
    conn: sa.Connection,
    machine: str,
    name: str,
    address: str,
    token: bytes,
    spaces: Collection[int],
    *,
    takes_traces: bool = False,
) -> None:
    """Write the worker's row, or replace the one that it wrote before."""
    row = {"name": name, "machine": machine, "address": address, "token": token, "spaces": sorted(spaces)}
    if _know_traces(conn):
        # A worker of an older release that gets the same name writes its token, and leaves this column as it is.
        conn.execute(_WRITE_NEW, row | {"traces_for": _digest(token) if takes_traces else None})
    else:
        conn.execute(_WRITE_OLD, row)


def _digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


def remove(conn: sa.Connection, name: str) -> None:
    """Delete the row of a worker that listens no longer."""
    conn.execute(sa.text("DELETE FROM worker_sockets WHERE name = :name"), {"name": name})


def delete_old(conn: sa.Connection) -> None:
    """Delete the rows of workers that ended without removing them. The poller calls this."""
    if exist(conn):
        conn.execute(
            sa.text("DELETE FROM worker_sockets WHERE seen_at < now() - make_interval(secs => :age)"),
            {"age": FORGET_SECONDS},
        )


_READ = """
    SELECT name, address, token, spaces, {traces_for} AS traces_for
    FROM worker_sockets
    WHERE machine = :machine AND seen_at > now() - make_interval(secs => :age)
    ORDER BY name
"""
_READ_OLD, _READ_NEW = (sa.text(_READ.format(traces_for=column)) for column in ("NULL", "traces_for"))


def read(conn: sa.Connection, machine: str) -> list[WorkerSocket]:
    """The sockets on this machine of the workers that have written lately. Empty if the schema has none."""
    if not exist(conn):
        return []
    # Only who sends traces asks who takes them.
    statement = _READ_NEW if tracing.is_on() and _know_traces(conn) else _READ_OLD
    return [
        WorkerSocket(
            row.name,
            row.address,
            token := bytes(row.token),
            frozenset(row.spaces),
            takes_traces=row.traces_for is not None and row.traces_for == _digest(token),
        )
        for row in conn.execute(statement, {"machine": machine, "age": SILENT_SECONDS})
    ]
