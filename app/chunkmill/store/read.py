"""Read texts for a worker, and vectors for a caller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chunkmill.db.locks import DELETE_LOCK, lock_shared
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.embedded import EmbeddedText
from chunkmill.domain.spaces import LongText
from chunkmill.spaces.registry import Space, VectorTable
from chunkmill.system.numbers import NDArray, np


@dataclass(frozen=True, slots=True)
class Work:
    """What is left to do of a ChunkBatch: ``(content_hash, text)`` of each content to embed, and counts of the rest.

    ``damaged`` are the hashes of contents whose stored text is another one, which must not be embedded. ``known`` is
    how many contents have a vector by now; those of them whose text was cut are in ``truncated``, as ``(content_hash,
    n_tokens)``. If a hash is in none of these, its content was deleted since the enqueue. ``deletions`` is the count of
    deletions at which the texts were read.
    """

    texts: list[tuple[bytes, str]]
    damaged: list[bytes]
    known: int
    truncated: list[tuple[bytes, int]]
    deletions: int


def read_work(conn: sa.Connection, space: Space, chunk_batch_id: int) -> Work:
    """Read the texts of a ChunkBatch, without the contents that got a vector meanwhile."""
    # The sequence has its new value before the deletion that raised it commits. While the lock is held, no deletion is
    # half done, so texts and count belong together.
    keep_deletions_out(conn)
    deletions = _count_deletions(conn)
    parameters = {"id": chunk_batch_id}
    count_known = f"""
        SELECT count(*)
        FROM {space.table_name}
        WHERE content_hash IN (SELECT unnest(content_hashes) FROM chunk_batches WHERE id = :id)
    """
    known = conn.execute(sa.text(count_known), parameters).scalar_one()
    select_truncated = f"""
        SELECT content_hash, n_tokens
        FROM {space.table_name}
        WHERE truncated
          AND content_hash IN (SELECT unnest(content_hashes) FROM chunk_batches WHERE id = :id)
    """
    truncated = conn.execute(sa.text(select_truncated), parameters).fetchall()
    select_texts = f"""
        SELECT c.content_hash, c.text
        FROM contents c
        WHERE c.content_hash IN (SELECT unnest(content_hashes) FROM chunk_batches WHERE id = :id)
          AND NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = c.content_hash)
    """
    texts, damaged = split_damaged(conn.execute(sa.text(select_texts), parameters).fetchall())
    return Work(
        texts=texts,
        damaged=damaged,
        known=known,
        truncated=[(content_hash, n_tokens) for content_hash, n_tokens in truncated],
        deletions=deletions,
    )


def split_damaged(rows: Iterable[Sequence[Any]]) -> tuple[list[tuple[bytes, str]], list[bytes]]:
    """Split rows of ``(content_hash, text)`` into the right ones and the hashes of those with another text.

    The hash is the key of the vector for every collection, so a text that was damaged on its way into the database, as
    by a session of another encoding, must get no vector under it. SHA-256 costs about a thousandth of embedding a text.
    """
    right: list[tuple[bytes, str]] = []
    damaged: list[bytes] = []
    for stored_as, text in rows:
        if content_hash(text) == stored_as:
            right.append((stored_as, text))
        else:
            damaged.append(stored_as)
    return right, damaged


def count_vectors(conn: sa.Connection, space: Space, hashes: Sequence[bytes]) -> int:
    """How many of these contents have a vector."""
    if not hashes:
        return 0
    query = f"SELECT count(*) FROM {space.table_name} WHERE content_hash = ANY(:hashes)"
    return int(conn.execute(sa.text(query), {"hashes": list(hashes)}).scalar_one())


def still_wanted(conn: sa.Connection, hashes: Sequence[bytes], *, since: int) -> set[bytes] | None:
    """Which contents still exist, so that a vector of theirs is wanted; None for all, if nothing was deleted ``since``.

    This takes the lock that keeps deletions out until the transaction that writes the vectors has ended.
    """
    keep_deletions_out(conn)
    return None if _count_deletions(conn) == since else wanted(conn, hashes)


def wanted(conn: sa.Connection, hashes: Sequence[bytes]) -> set[bytes]:
    """Which contents exist. After ``keep_deletions_out`` they exist until the end of the transaction."""
    query = "SELECT content_hash FROM contents WHERE content_hash = ANY(:hashes)"
    return set(conn.execute(sa.text(query), {"hashes": list(hashes)}).scalars())


def keep_deletions_out(conn: sa.Connection) -> None:
    """Keep deletions of contents out until the end of this transaction."""
    lock_shared(conn, DELETE_LOCK)


def _count_deletions(conn: sa.Connection) -> int:
    """A number that every deletion raises."""
    return int(conn.execute(sa.text("SELECT last_value FROM deletions")).scalar_one())


def read_vectors(
    conn: sa.Connection, space: Space, *, collection_id: int, chunk_ids: Sequence[str] | None
) -> dict[str, NDArray[np.float32]]:
    """``chunk_id → (d,) float32`` of these chunks, or of all if ``chunk_ids`` is None.

    Chunks without a vector are left out.
    """
    if chunk_ids is None:
        query = f"""
            SELECT c.chunk_id, v.embedding::real[] AS embedding
            FROM chunks c
            JOIN {space.table_name} v USING (content_hash)
            WHERE c.collection_id = :collection
            ORDER BY c.chunk_id
        """
    else:
        query = f"""
            SELECT c.chunk_id, v.embedding::real[] AS embedding
            FROM chunks c
            JOIN {space.table_name} v USING (content_hash)
            WHERE c.collection_id = :collection AND c.chunk_id = ANY(:ids)
            ORDER BY c.chunk_id
        """
    rows = conn.execute(sa.text(query), {"collection": collection_id, "ids": list(chunk_ids or ())})
    return {row.chunk_id: np.asarray(row.embedding, dtype=np.float32) for row in rows}


def are_exact(space: Space) -> bool:
    """Whether the stored vectors of a space are those that its workers make, number by number.

    Half precision rounds them, by up to one in two thousand. They are not exact in a space of an earlier version, whose
    long texts were split by another rule, because no worker makes such vectors any more.
    """
    return not space.is_half and space.spec.long_text is not LongText.SPLIT_APART


def read_stored(conn: sa.Connection, space: Space, hashes: Sequence[bytes]) -> list[tuple[bytes, EmbeddedText]]:
    """The contents among ``hashes`` that have a vector, each with it. The kind of the vectors is ``document``.

    There are none if the space was dropped and another one has its id now. If the space was dropped, Postgres says that
    there is no such table.
    """
    query = stored_query(space, ":hashes", ":space", ":fingerprint")
    parameters = {"hashes": list(hashes), "space": space.id, "fingerprint": space.spec.fingerprint}
    return [stored_row((*row,)) for row in conn.execute(sa.text(query), parameters)]


def stored_query(space: Space, hashes: str, space_id: str, fingerprint: str) -> str:
    """The statement of :func:`read_stored`, with these names of its parameters. :func:`stored_row` reads its rows."""
    return f"""
        SELECT v.content_hash, v.n_tokens, v.truncated, vector_send(v.embedding) AS embedding
        FROM {space.table_name} v
        WHERE v.content_hash = ANY({hashes})
          AND EXISTS (SELECT FROM spaces s WHERE s.id = {space_id} AND s.fingerprint = {fingerprint})
    """


def stored_row(row: tuple[bytes, int, bool, bytes]) -> tuple[bytes, EmbeddedText]:
    """A content hash and its vector."""
    content_hash, n_tokens, truncated, embedding = row
    # vector_send writes the dimensions and a zero, of 16 bits each, and then the numbers, all with the high byte first.
    return content_hash, EmbeddedText(np.frombuffer(embedding, ">f4", offset=4), n_tokens, truncated)


def read_rounded(conn: sa.Connection, space: VectorTable, hashes: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
    """Content hash → ``(d,)`` float32 as it is stored, which half precision has rounded, of those with a vector."""
    query = f"""
        SELECT content_hash, vector_send(CAST(embedding AS vector)) AS embedding
        FROM {space.table_name}
        WHERE content_hash = ANY(:hashes)
    """
    rows = conn.execute(sa.text(query), {"hashes": list(hashes)})
    return {row.content_hash: np.frombuffer(row.embedding, ">f4", offset=4).astype(np.float32) for row in rows}


def without_vector(conn: sa.Connection, space: Space, hashes: Sequence[bytes]) -> list[bytes]:
    """Those of the contents that have no vector in the space, in the given order."""
    query = f"SELECT content_hash FROM {space.table_name} WHERE content_hash = ANY(:hashes)"
    known = set(conn.execute(sa.text(query), {"hashes": list(hashes)}).scalars())
    return [content_hash for content_hash in hashes if content_hash not in known]
