"""The stored vectors of a sample of a collection's contents, from which a bridge is learnt."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.spaces.registry import VectorTable
from chunkmill.store import read
from chunkmill.system.numbers import NDArray, np

STEP = 1_000
"""How many vectors one statement reads."""


def sample(conn: sa.Connection, space: VectorTable, collection_id: int, most: int) -> list[bytes]:
    """The hashes of up to ``most`` contents of a collection that have a vector in a space.

    A content hash is as good as a random number, so the first ones in order are a sample by chance.
    """
    query = f"""
        SELECT DISTINCT c.content_hash
        FROM chunks c
        WHERE c.collection_id = :collection
          AND EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = c.content_hash)
        ORDER BY c.content_hash
        LIMIT :most
    """
    return list(conn.execute(sa.text(query), {"collection": collection_id, "most": most}).scalars())


def hashes(conn: sa.Connection, space: VectorTable, collection_id: int, chunk_ids: Sequence[str]) -> dict[str, bytes]:
    """Chunk id → content hash of those of the chunks that the collection has, with a vector in the space."""
    query = f"""
        SELECT c.chunk_id, c.content_hash
        FROM unnest(CAST(:ids AS text[])) AS i(id)
        JOIN chunks c ON c.collection_id = :collection AND c.chunk_id = i.id
        WHERE EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = c.content_hash)
    """
    known: dict[str, bytes] = {}
    for start in range(0, len(chunk_ids), STEP):
        parameters = {"collection": collection_id, "ids": list(chunk_ids[start : start + STEP])}
        known.update((row.chunk_id, row.content_hash) for row in conn.execute(sa.text(query), parameters))
    return known


def vectors(conn: sa.Connection, space: VectorTable, wanted: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
    """Content hash → ``(d,)`` float32 of those of the contents that have a vector in the space."""
    known: dict[bytes, NDArray[np.float32]] = {}
    for start in range(0, len(wanted), STEP):
        known |= read.read_rounded(conn, space, wanted[start : start + STEP])
    return known
