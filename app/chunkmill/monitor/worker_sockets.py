"""Where workers listen for callers on the same machine: one row for each worker, with the token that callers need.

Whoever may read a token may ask that worker. Of the roles of deploy/postgres-role.sql, those of clients and workers
may, and that of pollers may not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import sqlalchemy as sa

from chunkmill.monitor.reports import FORGET_SECONDS, SILENT_SECONDS


@dataclass(frozen=True, slots=True)
class WorkerSocket:
    name: str
    """The worker's name in its leases."""
    address: str
    """``unix:/path`` or ``tcp:127.0.0.1:1234``, on the machine of the worker."""
    token: bytes = field(repr=False)
    spaces: frozenset[int]
    """The ids of the spaces that it answers at once, because their models are loaded."""


def exist(conn: sa.Connection) -> bool:
    """Whether the schema has the table: this code also runs on the schema of the release before it."""
    return bool(conn.execute(sa.text("SELECT to_regclass('worker_sockets') IS NOT NULL")).scalar_one())


_WRITE = sa.text(
    """
    INSERT INTO worker_sockets (name, machine, address, token, spaces, seen_at)
    VALUES (:name, :machine, :address, :token, :spaces, now())
    ON CONFLICT (name) DO UPDATE SET
        machine = excluded.machine,
        address = excluded.address,
        token = excluded.token,
        spaces = excluded.spaces,
        seen_at = excluded.seen_at
    """
)


def write(conn: sa.Connection, machine: str, name: str, address: str, token: bytes, spaces: Collection[int]) -> None:
    """Write the worker's row, or replace the one that it wrote before."""
    row = {"name": name, "machine": machine, "address": address, "token": token, "spaces": sorted(spaces)}
    conn.execute(_WRITE, row)


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


_READ = sa.text(
    """
    SELECT name, address, token, spaces
    FROM worker_sockets
    WHERE machine = :machine AND seen_at > now() - make_interval(secs => :age)
    ORDER BY name
    """
)


def read(conn: sa.Connection, machine: str) -> list[WorkerSocket]:
    """The sockets on this machine of the workers that have written lately. Empty if the schema has none."""
    if not exist(conn):
        return []
    rows = conn.execute(_READ, {"machine": machine, "age": SILENT_SECONDS})
    return [WorkerSocket(row.name, row.address, bytes(row.token), frozenset(row.spaces)) for row in rows]
