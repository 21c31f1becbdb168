"""What a search finds exactly, through segments and in the tail, beside a second collection and a second space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import Chunk, Client
from chunkmill.domain import serving
from chunkmill.domain.chunks import content_hash
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store import search as searching
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


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collections of a few chunks get segments, and segments of ten rows get a graph."""
    monkeypatch.setattr("chunkmill.store.indexing.MIN_ROWS", 2)
    monkeypatch.setattr(serving, "MIN_ROWS", 2)
    monkeypatch.setattr(serving, "GRAPH_ROWS", 10)
    monkeypatch.setattr(searching, "MAX_EXACT", 3)


WAYS = ["exactly", "in the tail", "in segments", "in bits"]


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """Graphs are of bits if the test asks for that way."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return settings.model_copy(update={"index_compact": parameters.get("way") == "in bits"})


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tiny: None) -> str:
    """How the search finds it."""
    return str(request.param)


def put(client: Client, db: sa.Engine, way: str, vectors: Mapping[str, Sequence[float]], *collections: str) -> None:
    """Let the collections be searched in that way."""
    if way == "in the tail":
        for name in collections:
            client.index(name)
            assert client.index(name).is_ready
    embed(db, vectors)
    if way in ("in segments", "in bits"):
        for name in collections:
            index = client.index(name)
            assert (index.is_ready, index.tail) == (True, 0)
            assert index.rows


def test_a_hit_is_the_chunk_of_its_own_collection(client: Client, db: sa.Engine, way: str) -> None:
    """The other collection has a chunk of the same id, with the same text and with another one."""
    client.enqueue([Chunk("a", "one", {"of": "docs"}), Chunk("b", "two", {"of": "docs"})], collection="docs")
    client.enqueue([Chunk("a", "one", {"of": "others"}), Chunk("b", "three", {"of": "others"})], collection="others")
    put(client, db, way, {"one": (1, 0), "two": (1, 1), "three": (0, 1)}, "docs", "others")
    for collection, second in (("docs", "two"), ("others", "three")):
        hits = client.search(vector(1), collection=collection, k=2)
        assert [(hit.chunk_id, hit.text) for hit in hits] == [("a", "one"), ("b", second)]
        assert [hit.metadata for hit in hits] == [{"of": collection}] * 2


@pytest.mark.parametrize("few", [True, False])
def test_a_filter_keeps_the_chunks_whose_metadata_contain_it(
    client: Client, db: sa.Engine, way: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "MAX_EXACT", 9 if few else 0)
    metadata = {"more": {"lang": "de", "year": 2024}, "same": {"lang": "de"}, "other": {"lang": "fr"}, "none": {}}
    client.enqueue([Chunk(name, name, given) for name, given in metadata.items()], collection="docs")
    put(client, db, way, {name: (1, i) for i, name in enumerate(metadata)}, "docs")
    hits = client.search(vector(1), collection="docs", k=2, metadata={"lang": "de"})
    assert [hit.chunk_id for hit in hits] == ["more", "same"]


def test_equally_near_chunks_come_in_the_order_of_their_ids(client: Client, db: sa.Engine, way: str) -> None:
    ids = ["c", "a", "e", "b", "d"]
    client.enqueue([(name, f"text {name}") for name in ids], collection="docs")
    put(client, db, way, {f"text {name}": (1, 1) for name in ids}, "docs")
    assert [hit.chunk_id for hit in client.search(vector(1), collection="docs", k=5)] == sorted(ids)


def test_several_chunks_with_one_text_are_all_found(client: Client, db: sa.Engine, way: str) -> None:
    client.enqueue([("a", "same"), ("b", "same"), ("c", "other")], collection="docs")
    put(client, db, way, {"same": (1, 0), "other": (1, 1)}, "docs")
    assert [hit.chunk_id for hit in client.search(vector(1), collection="docs", k=3)] == ["a", "b", "c"]


def test_a_search_for_many_works_through_a_graph(client: Client, db: sa.Engine, tiny: None) -> None:
    """More than pgvector looks through at once."""
    client.enqueue([(f"id-{i:03}", f"text {i}") for i in range(400)], collection="docs")
    put(client, db, "in segments", {f"text {i}": (1, i / 100) for i in range(400)}, "docs")
    assert client.index("docs").graph_rows == 400
    for k in (300, 400):
        hits = client.search(vector(1), collection="docs", k=k)
        assert [hit.chunk_id for hit in hits] == [f"id-{i:03}" for i in range(k)]


@pytest.mark.parametrize("way", ["in segments", "in bits"])
def test_a_graph_finds_the_nearest_of_many(client: Client, db: sa.Engine, tiny: None, way: str) -> None:
    """The nearest forty by their signs alone are the nearest ten in five cases of six."""
    rng = np.random.default_rng(5)
    directions = rng.standard_normal((96, DIMENSIONS))

    def near_topics(count: int) -> NDArray[np.float32]:
        return (rng.standard_normal((count, 96)) @ directions).astype(np.float32)

    chunks = near_topics(1_500)
    client.enqueue([(f"id-{i}", f"text {i}") for i in range(len(chunks))], collection="docs")
    put(client, db, way, {f"text {i}": row for i, row in enumerate(chunks.tolist())}, "docs")
    index = client.index("docs")
    assert index.graph_rows == 1_500
    assert (index.bytes < 1_000 * 1_500) == (way == "in bits")
    shares = []
    for query in near_topics(30):
        right = {hit.chunk_id for hit in client.search(query, collection="docs", k=10, exact=True)}
        shares.append(len(right & {hit.chunk_id for hit in client.search(query, collection="docs", k=10)}) / 10)
    assert np.mean(shares) >= 0.98


@pytest.mark.parametrize(("second", "nearest"), [(0.0, "a"), (9.0, "b")])
def test_what_half_precision_cannot_tell_apart_is_ordered_exactly(
    client: Client, db: sa.Engine, tiny: None, second: float, nearest: str
) -> None:
    """Rounded to half precision both vectors are one, so that whichever a segment gives first is a guess."""
    client.enqueue([(name, f"text {name}") for name in "ab"], collection="docs")
    client.enqueue([("z", "far away")], collection="docs")
    vectors = {f"text {name}": (1, 0.5 + i / 100_000) for i, name in enumerate("ab")} | {"far away": (-1, 0)}
    put(client, db, "in segments", vectors, "docs")
    (hits,) = client.search(vector(1, second), collection="docs", k=1)
    assert hits.chunk_id == nearest


def test_a_small_collection_in_a_large_space_has_its_own_neighbours(client: Client, db: sa.Engine, tiny: None) -> None:
    """All of the large collection is nearer to the query than anything of the small one, and the order of the searches
    on a connection changes nothing."""
    client.enqueue([(f"big-{i}", f"big {i}") for i in range(500)], collection="big")
    client.enqueue([(f"small-{i:02}", f"small {i}") for i in range(20)], collection="small")
    vectors = {f"big {i}": (1, 0.5, i / 2000) for i in range(500)} | {f"small {i}": (1, 9, i) for i in range(20)}
    put(client, db, "in segments", vectors, "big", "small")
    for _ in range(3):
        for _ in range(7):
            assert len(client.search(vector(1), collection="big", k=10)) == 10
        hits = client.search(vector(1), collection="small", k=10)
        assert [hit.chunk_id for hit in hits] == [f"small-{i:02}" for i in range(10)]


def test_the_plan_of_a_search_is_made_for_its_own_collection(client: Client, db: sa.Engine) -> None:
    """The generic plan, which Postgres takes after five searches, would be that of a large collection."""
    client.enqueue([("a", "one")], collection="docs")
    client.enqueue([("a", "one")], collection="others")
    embed(db, {"one": (1, 0)})
    with db.connect() as conn:
        space = registry.all_spaces(conn)[0]
        conn.rollback()
        for collection_id in (1,) * 20 + (2,) * 2:
            with conn.begin():
                searching.search(conn, space, vector(1), collection_id=collection_id, k=1, exact=False)
        query = "SELECT sum(custom_plans), sum(generic_plans) FROM pg_prepared_statements WHERE statement LIKE '%<=>%'"
        custom, generic = conn.execute(sa.text(query)).one()
        assert custom > 5
        assert generic == 0


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
