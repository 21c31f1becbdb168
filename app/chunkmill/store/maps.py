"""Read what a map of a collection is drawn from: a sample of its vectors, each with the id of one of its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.spaces.registry import VectorTable
from chunkmill.system.numbers import NDArray, np

STEP = 1_000
"""How many vectors one statement reads."""
VALUE_LETTERS = 100
"""How much of a value is read. What is longer cannot be shown in a legend."""
TEXT_LETTERS = 300


@dataclass(frozen=True, slots=True)
class SampledContent:
    """One content of the sample. ``kind`` is that of the field's JSON value, or None if the chunk has no such field."""

    content_hash: bytes
    chunk_id: str
    kind: str | None
    value: str | None
    text: str | None
    vector: NDArray[np.float32]


def read(
    conn: sa.Connection,
    space: VectorTable,
    collection_id: int,
    *,
    field: str | None,
    with_text: bool,
    after: bytes,
    most: int,
) -> list[SampledContent]:
    """Up to ``most`` contents behind ``after`` that have a vector, in the order of their hashes.

    A content hash is as good as a random number, so the first ones in order are a sample by chance. A content that
    several chunks share stands under the smallest of their ids. ``field`` is a key of the metadata; if there is no such
    key, its parts between dots lead through objects.
    """
    query = f"""
        SELECT
            picked.content_hash,
            picked.chunk_id,
            jsonb_typeof(f.value) AS kind,
            left(f.value #>> '{{}}', :value_letters) AS value,
            left(t.text, :text_letters) AS text,
            vector_send(CAST(v.embedding AS vector)) AS embedding
        FROM (
            SELECT DISTINCT ON (c.content_hash) c.content_hash, c.chunk_id
            FROM chunks c
            WHERE c.collection_id = :collection
              AND c.content_hash > :after
              AND EXISTS (SELECT FROM {space.table_name} e WHERE e.content_hash = c.content_hash)
            ORDER BY c.content_hash, c.chunk_id
            LIMIT :most
        ) AS picked
        JOIN chunks c ON c.collection_id = :collection AND c.chunk_id = picked.chunk_id
        JOIN {space.table_name} v ON v.content_hash = picked.content_hash
        LEFT JOIN contents t ON CAST(:with_text AS boolean) AND t.content_hash = picked.content_hash
        CROSS JOIN LATERAL (
            SELECT coalesce(
                c.metadata -> CAST(:field AS text), c.metadata #> string_to_array(CAST(:field AS text), '.')
            ) AS value
        ) AS f
        ORDER BY picked.content_hash
    """
    parameters = {
        "collection": collection_id,
        "after": after,
        "most": most,
        "field": field,
        "with_text": with_text,
        "value_letters": VALUE_LETTERS,
        "text_letters": TEXT_LETTERS,
    }
    return [
        # vector_send writes the dimensions and a zero, of 16 bits each, and then the numbers, the high byte first.
        SampledContent(
            bytes(row.content_hash), row.chunk_id, row.kind, row.value, row.text,
            np.frombuffer(row.embedding, ">f4", offset=4).astype(np.float32),
        )
        for row in conn.execute(sa.text(query), parameters)
    ]  # fmt: skip


def steps(most: int) -> Iterator[int]:
    """How many contents each statement of a sample reads."""
    for start in range(0, most, STEP):
        yield min(STEP, most - start)
