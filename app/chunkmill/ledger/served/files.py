"""Files of the served Batch API. A file is listed only once it is whole, and until it expires."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from chunkmill.domain.served import FileKind
from chunkmill.errors import NotFound

PIECE_BYTES = 1024 * 1024
HALF_SECONDS = 3600
"""How long after its last piece a file that is not whole is kept."""
SLICE = 20
"""Files that one transaction deletes. One has up to 200 pieces."""


@dataclass(frozen=True, slots=True)
class ServedFile:
    """A file that is whole. ``name`` is its id in the API."""

    id: int
    name: str
    tenant: str
    kind: FileKind
    filename: str
    n_bytes: int
    served_batch_id: int | None
    created_at: datetime
    expires_at: datetime | None


def new_name() -> str:
    """A new id of a file."""
    return f"file-{secrets.token_hex(12)}"


def begin(conn: sa.Connection, tenant: str) -> int:
    """Begin an input file that nobody sees yet."""
    insert = """
        INSERT INTO served_files (name, tenant, kind)
        VALUES (:name, :tenant, :kind)
        RETURNING id
    """
    parameters = {"name": new_name(), "tenant": tenant, "kind": FileKind.INPUT}
    return int(conn.execute(sa.text(insert), parameters).scalar_one())


def add_piece(conn: sa.Connection, file_id: int, piece: int, data: bytes) -> None:
    """Add the piece of this number. Raises :class:`NotFound` if a poller has deleted the upload as dead."""
    touch = "UPDATE served_files SET touched_at = now() WHERE id = :id AND NOT is_whole"
    if conn.execute(sa.text(touch), {"id": file_id}).rowcount == 0:
        raise NotFound("the upload took too long, so its file was deleted. Upload it again.")
    insert = "INSERT INTO served_file_pieces (served_file_id, piece, data) VALUES (:id, :piece, :data)"
    conn.execute(sa.text(insert), {"id": file_id, "piece": piece, "data": data})


def finish(conn: sa.Connection, file_id: int, *, filename: str, n_bytes: int, seconds: int) -> ServedFile:
    """Let everybody of its tenant see the file, which expires ``seconds`` after now. Raises :class:`NotFound`."""
    update = """
        UPDATE served_files
        SET filename = :filename, n_bytes = :n_bytes, is_whole = true, created_at = now(),
            expires_at = now() + make_interval(secs => :seconds)
        WHERE id = :id AND NOT is_whole
        RETURNING *
    """
    parameters = {"id": file_id, "filename": filename, "n_bytes": n_bytes, "seconds": seconds}
    row = conn.execute(sa.text(update), parameters).one_or_none()
    if row is None:
        raise NotFound("the upload took too long, so its file was deleted. Upload it again.")
    return _file(row)


def discard(conn: sa.Connection, file_id: int) -> None:
    """Delete an upload that has failed."""
    conn.execute(sa.text("DELETE FROM served_files WHERE id = :id AND NOT is_whole"), {"id": file_id})


def add_result(
    conn: sa.Connection, *, tenant: str, kind: FileKind, served_batch_id: int, filename: str, n_bytes: int, seconds: int
) -> str:
    """Add the output or the error file of a batch that is about to end. Returns its name."""
    insert = """
        INSERT INTO served_files (name, tenant, kind, filename, n_bytes, is_whole, served_batch_id, expires_at)
        VALUES (:name, :tenant, :kind, :filename, :n_bytes, true, :batch, now() + make_interval(secs => :seconds))
    """
    name = new_name()
    parameters = {
        "name": name,
        "tenant": tenant,
        "kind": kind,
        "filename": filename,
        "n_bytes": n_bytes,
        "batch": served_batch_id,
        "seconds": seconds,
    }
    conn.execute(sa.text(insert), parameters)
    return name


def find(conn: sa.Connection, tenant: str, name: str, *, hold: bool = False) -> ServedFile | None:
    """The tenant's file; None if there is none. With ``hold`` nobody deletes it until the end of this transaction."""
    if "\0" in name:
        return None  # no name contains this character, and Postgres would refuse the query
    query = """
        SELECT *
        FROM served_files
        WHERE tenant = :tenant AND name = :name AND is_whole AND (expires_at IS NULL OR expires_at > now())
    """
    if hold:
        query = """
            SELECT *
            FROM served_files
            WHERE tenant = :tenant AND name = :name AND is_whole AND (expires_at IS NULL OR expires_at > now())
            FOR KEY SHARE
        """
    row = conn.execute(sa.text(query), {"tenant": tenant, "name": name}).one_or_none()
    return None if row is None else _file(row)


def page(
    conn: sa.Connection, tenant: str, *, kinds: Sequence[FileKind], after: int | None, limit: int, is_ascending: bool
) -> list[ServedFile]:
    """The first ``limit`` of the tenant's files behind the one with the id ``after``, the newest first or last."""
    if is_ascending:
        query = """
            SELECT *
            FROM served_files
            WHERE tenant = :tenant AND kind = ANY(:kinds) AND is_whole AND (expires_at IS NULL OR expires_at > now())
              AND (CAST(:after AS bigint) IS NULL OR id > CAST(:after AS bigint))
            ORDER BY id
            LIMIT :limit
        """
    else:
        query = """
            SELECT *
            FROM served_files
            WHERE tenant = :tenant AND kind = ANY(:kinds) AND is_whole AND (expires_at IS NULL OR expires_at > now())
              AND (CAST(:after AS bigint) IS NULL OR id < CAST(:after AS bigint))
            ORDER BY id DESC
            LIMIT :limit
        """
    parameters = {"tenant": tenant, "kinds": [str(kind) for kind in kinds], "after": after, "limit": limit}
    return [_file(row) for row in conn.execute(sa.text(query), parameters)]


def delete(conn: sa.Connection, file_id: int) -> bool:
    """Delete a file. A trigger deletes the texts of its batch, if it is an output file. False if it was gone."""
    return conn.execute(sa.text("DELETE FROM served_files WHERE id = :id"), {"id": file_id}).rowcount == 1


def read_pieces(db: sa.Engine, file_id: int, *, first: int = 0) -> Iterator[bytes]:
    """The pieces of a file from number ``first`` on, each read in a transaction of its own.

    Raises :class:`NotFound` if the file is deleted meanwhile.
    """
    count = """
        SELECT count(p.piece)
        FROM served_files f
        LEFT JOIN served_file_pieces p ON p.served_file_id = f.id
        WHERE f.id = :id
        GROUP BY f.id
    """
    read = "SELECT data FROM served_file_pieces WHERE served_file_id = :id AND piece = :piece"
    with db.begin() as conn:
        n_pieces = conn.execute(sa.text(count), {"id": file_id}).scalar_one_or_none()
    if n_pieces is None:
        raise NotFound("the file was deleted while it was read.")
    for piece in range(first, n_pieces):
        with db.begin() as conn:
            data = conn.execute(sa.text(read), {"id": file_id, "piece": piece}).scalar_one_or_none()
        if data is None:
            raise NotFound("the file was deleted while it was read.")
        yield data


def are_kept(conn: sa.Connection) -> bool:
    """Whether the schema has served files. False on that of the last release."""
    return bool(conn.execute(sa.text("SELECT to_regclass('served_files') IS NOT NULL")).scalar_one())


def delete_expired(conn: sa.Connection) -> int:
    """Delete a few files that have expired, and uploads that ended halfway. Returns how many, 0 at the end."""
    delete = """
        DELETE FROM served_files
        WHERE id IN (
            SELECT id
            FROM served_files
            WHERE expires_at < now() OR NOT is_whole AND touched_at < now() - make_interval(secs => :half)
            ORDER BY id
            LIMIT :most)
    """
    return conn.execute(sa.text(delete), {"half": float(HALF_SECONDS), "most": SLICE}).rowcount


def _file(row: sa.Row[tuple[object, ...]]) -> ServedFile:
    return ServedFile(
        row.id,
        row.name,
        row.tenant,
        FileKind(row.kind),
        row.filename,
        row.n_bytes,
        row.served_batch_id,
        row.created_at,
        row.expires_at,
    )
