"""The one place where vectors enter a space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import psycopg
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.db.copy import copy_binary, encode_vectors
from chunkmill.domain.vectors import unfit
from chunkmill.errors import EngineError
from chunkmill.spaces.registry import Space


def write_vectors(
    conn: sa.Connection,
    space: Space,
    fingerprint: str,
    hashes: Sequence[bytes],
    n_tokens: NDArray[np.int32],
    truncated: NDArray[np.bool_],
    vectors: NDArray[np.float32],
) -> int:
    """Write ``(n, d)`` vectors under their content hashes. Returns how many were new.

    A hash that has a vector keeps it: the content is the same, so the vector is too. Raises :class:`SpaceMismatch`
    unless ``fingerprint``, which is that of the engine that made the vectors, is the space's own, and
    :class:`EngineError` if the shape is wrong or a vector is not finite. Nothing is written then.
    """
    space.require_fingerprint(fingerprint)
    if vectors.shape != (len(hashes), space.spec.dimensions):
        raise EngineError(
            f"the engine returned vectors of shape {vectors.shape}, and space {space.spec.fingerprint[:12]} takes "
            f"({len(hashes)}, {space.spec.dimensions}). Check the model's dense and pooling modules."
        )
    half = space.is_half
    if unfit(vectors, half=half).any():
        raise EngineError("a vector is not finite or out of range, so none of these vectors was written.")
    if not len(hashes):
        return 0
    # Sorted, so that two writers that share contents take their index entries in the same order.
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    payload = encode_vectors([hashes[i] for i in order], n_tokens[order], truncated[order], vectors[order], half=half)
    try:
        # Nearly always all are new, because `read_work` left out what was known, and COPY into the table itself is
        # 1.5 times as fast as through a staging table.
        with conn.begin_nested():
            copy_binary(conn, space.table_name, payload)
    except sa.exc.IntegrityError as error:
        if not isinstance(error.orig, psycopg.errors.UniqueViolation):
            raise
        return _write_staged(conn, space, payload)
    return len(hashes)


def _write_staged(conn: sa.Connection, space: Space, payload: memoryview) -> int:
    """Write those vectors that are new, after another job wrote some of the contents first. Returns how many."""
    staging = f"staged_{space.table_name}"
    # The storage of the vector table is copied too: a vector of more than 8 kB does not fit a row without TOAST.
    create = f"""
        CREATE TEMP TABLE IF NOT EXISTS {staging} (LIKE {space.table_name} INCLUDING STORAGE) ON COMMIT DROP
    """
    conn.execute(sa.text(create))
    # An earlier write in this transaction may have left its rows.
    conn.execute(sa.text(f"DELETE FROM {staging}"))
    copy_binary(conn, staging, payload)
    insert = f"INSERT INTO {space.table_name} SELECT * FROM {staging} ON CONFLICT DO NOTHING"
    return int(conn.execute(sa.text(insert)).rowcount)


def relax_durability(conn: sa.Connection) -> None:
    """Let this transaction commit without waiting for the disk.

    If Postgres crashes, all commits of the last fraction of a second may be lost: the vectors, and also every later
    state that relies on them, because a later commit never survives an earlier one that is lost. A process that relies
    on the vectors must check whether they are there.
    """
    conn.execute(sa.text("SET LOCAL synchronous_commit = off"))
