"""What a search finds through an index and without one, beside a second collection and a second space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import Chunk, Client
from chunkmill.domain.chunks import content_hash
from chunkmill.spaces import registry
from chunkmill.store.search import build_index, find_index
from chunkmill.store.write import write_vectors

DIMENSIONS = 384


def vector(*first: float) -> NDArray[np.float32]:
    """A vector that begins so and has zeros behind."""
    made = np.zeros(DIMENSIONS, np.float32)
    made[: len(first)] = first
    return made


def embed(db: sa.Engine, vectors: Mapping[str, Sequence[float]]) -> registry.Space:
    """Give each text its vector, by its first numbers, in the place of a worker."""
    with db.begin() as conn:
        space = registry.all_spaces(conn)[0]
        write_vectors(
            conn,
            space,
            space.spec.fingerprint,
            [content_hash(text) for text in vectors],
            np.full(len(vectors), 3, np.int32),
            np.zeros(len(vectors), np.bool_),
            np.stack([vector(*first) for first in vectors.values()]),
        )
    return space


def test_a_hit_is_the_chunk_of_its_own_collection(client: Client, db: sa.Engine) -> None:
    """The other collection has a chunk of the same id, with the same text and with another one."""
    client.enqueue([Chunk("a", "one", {"of": "docs"}), Chunk("b", "two", {"of": "docs"})], collection="docs")
    client.enqueue([Chunk("a", "one", {"of": "others"}), Chunk("b", "three", {"of": "others"})], collection="others")
    embed(db, {"one": (1, 0), "two": (1, 1), "three": (0, 1)})
    for k in (5, 2):
        if k == 2:  # the index gives as many, so that no exact search follows
            client.index("docs")
        for collection, second in (("docs", "two"), ("others", "three")):
            hits = client.search(vector(1), collection=collection, k=k)
            assert [(hit.chunk_id, hit.text) for hit in hits] == [("a", "one"), ("b", second)]
            assert [hit.metadata for hit in hits] == [{"of": collection}] * 2


def test_a_filter_keeps_the_chunks_whose_metadata_contain_it(client: Client, db: sa.Engine) -> None:
    metadata = {"more": {"lang": "de", "year": 2024}, "same": {"lang": "de"}, "other": {"lang": "fr"}, "none": {}}
    client.enqueue([Chunk(name, name, given) for name, given in metadata.items()], collection="docs")
    embed(db, {name: (1, i) for i, name in enumerate(metadata)})
    for indexed in (False, True):
        if indexed:
            client.index("docs")
        found = client.search(vector(1), collection="docs", k=10, metadata={"lang": "de"})
        assert [hit.chunk_id for hit in found] == ["more", "same"]


def test_equally_near_chunks_come_in_the_order_of_their_ids(client: Client, db: sa.Engine) -> None:
    ids = ["c", "a", "e", "b", "d"]
    client.enqueue([(name, f"text {name}") for name in ids], collection="docs")
    embed(db, {f"text {name}": (1, 1) for name in ids})
    assert [hit.chunk_id for hit in client.search(vector(1), collection="docs", k=9)] == sorted(ids)


@pytest.mark.parametrize("near", [0, 3])
def test_what_the_index_does_not_give_is_looked_for_exactly(client: Client, db: sa.Engine, near: int) -> None:
    """A small collection in a large space: all of the large one, except for ``near`` chunks, is nearer to the query."""
    client.enqueue([(f"big-{i}", f"big {i}") for i in range(2000)], collection="big")
    client.enqueue([(f"small-{i:02}", f"small {i}") for i in range(20)], collection="small")
    embed(db, {f"big {i}": (1, 0.5, i / 2000) for i in range(2000)})
    embed(db, {f"small {i}": (1, 0, 0) if i < near else (1, 9, i) for i in range(20)})
    assert client.index("big").valid
    with db.begin() as conn:
        # Few rows for the planner, which would not look at the index by itself, and many for the index.
        for setting in (
            "hnsw.max_scan_tuples = 100",
            "enable_seqscan = off",
            "enable_bitmapscan = off",
            "enable_sort = off",
        ):
            conn.execute(sa.text(f"ALTER DATABASE {db.url.database} SET {setting}"))
    client._db.dispose()
    found = client.search(vector(1), collection="small", k=10)
    assert [hit.chunk_id for hit in found] == [f"small-{i:02}" for i in range(10)]


def test_a_search_for_many_works_through_an_index(client: Client, db: sa.Engine) -> None:
    """More than pgvector looks through at once."""
    client.enqueue([(f"id-{i:03}", f"text {i}") for i in range(400)], collection="docs")
    embed(db, {f"text {i}": (1, i / 100) for i in range(400)})
    assert client.index("docs").valid
    found = client.search(vector(1), collection="docs", k=300)
    assert [hit.chunk_id for hit in found] == [f"id-{i:03}" for i in range(300)]


@pytest.mark.parametrize(("second", "nearest"), [(0.0, "a"), (9.0, "d")])
def test_what_a_halfvec_cannot_tell_apart_is_ordered_exactly(
    client: Client, db: sa.Engine, second: float, nearest: str
) -> None:
    """Rounded to half precision all four vectors are one, so that whichever the index gives first is a guess."""
    client.enqueue([(name, f"text {name}") for name in "abcd"], collection="docs")
    client.enqueue([("z", "far away")], collection="docs")
    embed(db, {f"text {name}": (1, 0.5 + i / 100_000) for i, name in enumerate("abcd")} | {"far away": (-1, 0)})
    assert client.index("docs", halfvec=True).on == "halfvec"
    (found,) = client.search(vector(1, second), collection="docs", k=1)
    assert found.chunk_id == nearest


def test_an_index_of_one_space_leaves_that_of_another(client: Client, db: sa.Engine) -> None:
    client.enqueue([("a", "one")], collection="docs")
    client.enqueue([("a", "one")], collection="others", on_long="split")
    with db.begin() as conn:
        first, second = registry.all_spaces(conn)
        assert find_index(conn, first) is None
    of_first = build_index(db, first)
    with db.begin() as conn:
        assert find_index(conn, second) is None
    of_second = build_index(db, second, halfvec=True)
    with db.begin() as conn:
        assert [find_index(conn, space) for space in (first, second)] == [of_first, of_second]
    assert [of_first.on, of_second.on] == ["vector", "halfvec"]


def test_a_broken_index_on_metadata_is_built_again(client: Client, db: sa.Engine) -> None:
    def valid() -> bool:
        with db.begin() as conn:
            query = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_chunks_metadata'::regclass"
            return bool(conn.execute(sa.text(query)).scalar_one())

    client.enqueue([("a", "one")], collection="docs")
    client.index("docs")
    assert valid()
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_chunks_metadata'::regclass")
        )
    client.index("docs")
    assert valid()
