"""What a search can be asked for: pages, a least score, many queries, the neighbours of a chunk, reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import Chunk, Client, Hits, InvalidInput, NotFound
from chunkmill.domain import serving
from chunkmill.domain.chunks import content_hash
from chunkmill.ledger import embed_requests
from chunkmill.spaces import registry
from chunkmill.store import search as searching
from chunkmill.store.segments import ServingIndex
from chunkmill.store.write import write_vectors
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner

DIMENSIONS = 384
N, MANY = 120, 600
WAYS = ["exactly", "in the tail", "in flat segments", "in a graph"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a search finds its hits. Collections of a few chunks get segments."""
    monkeypatch.setattr("chunkmill.store.indexing.MIN_ROWS", 2)
    monkeypatch.setattr(serving, "MIN_ROWS", 2)
    monkeypatch.setattr(serving, "GRAPH_ROWS", 10 if request.param == "in a graph" else 10_000)
    monkeypatch.setattr(searching, "MAX_EXACT", 3)
    monkeypatch.setattr(searching, "FLAT_ADVANTAGE", N / 3)
    monkeypatch.setattr(searching, "PAGED", 30)
    return str(request.param)


def vector(*first: float) -> NDArray[np.float32]:
    """A vector that begins so and has zeros behind."""
    made = np.zeros(DIMENSIONS, np.float32)
    made[: len(first)] = first
    return made


def embed(db: sa.Engine, vectors: Mapping[str, Sequence[float]], *, truncated: bool = False) -> None:
    """Give each text its vector, by its first numbers, in the place of a worker."""
    with db.begin() as conn:
        space = registry.all_spaces(conn)[0]
        write_vectors(
            conn,
            space,
            space.spec.fingerprint,
            [content_hash(text) for text in vectors],
            np.full(len(vectors), 3, np.int32),
            np.full(len(vectors), truncated, np.bool_),
            np.stack([vector(*first) for first in vectors.values()]),
        )


@pytest.fixture
def filled(client: Client, db: sa.Engine, way: str) -> Client:
    """Two collections. The further a chunk of ``docs`` is from (1, 0), the larger is its number."""
    client.enqueue(
        [Chunk(f"c{i:03}", f"text {i}", {"number": i, "even": i % 2 == 0}) for i in range(N)], collection="docs"
    )
    client.enqueue([(f"c{i:03}", f"other {i}") for i in range(N)], collection="others")
    if way == "in the tail":
        client.index("docs")
    embed(db, {f"text {i}": (1, i / 50) for i in range(N)} | {f"other {i}": (1, -i / 50) for i in range(N)})
    if way not in ("exactly", "in the tail"):
        client.index("docs")
    return client


def numbers(hits: Sequence[Any]) -> list[int]:
    return [int(hit.chunk_id[1:]) for hit in hits]


@pytest.mark.parametrize("metadata", [None, {"number": {"$gte": 0}}, {"number": {"$gte": 118}}])
def test_pages_fit_together_to_one_list(filled: Client, metadata: dict[str, Any] | None) -> None:
    """Also where the hits through the segments end and the exact ones begin, which is at 30."""
    pages = [filled.search(vector(1), collection="docs", k=7, offset=i, metadata=metadata) for i in range(0, N + 7, 7)]
    first = 118 if metadata == {"number": {"$gte": 118}} else 0
    assert [number for page in pages for number in numbers(page)] == list(range(first, N))
    assert pages[-1] == []


@pytest.mark.parametrize("way", ["in a graph"], indirect=True)
def test_pages_fit_together_even_if_the_segments_miss_a_near_chunk(
    filled: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph may miss one. It then comes later, and not never, and the hits before it do not come twice."""
    whole = searching._through_segments
    monkeypatch.setattr(
        searching,
        "_through_segments",
        lambda space, live, filtered, **how: whole(space, live, f"{filtered} AND c.chunk_id <> 'c005'", **how),
    )
    pages = [filled.search(vector(1), collection="docs", k=8, offset=i) for i in range(0, N, 8)]
    order = [number for page in pages for number in numbers(page)]
    assert order == [*range(5), *range(6, 31), 5, *range(31, N)]


def test_no_hit_is_below_the_least_score(filled: Client) -> None:
    scores = [hit.score for hit in filled.search(vector(1), collection="docs", k=20)]
    assert scores == sorted(scores, reverse=True)
    hits = filled.search(vector(1), collection="docs", k=20, min_score=scores[4])
    assert numbers(hits) == [0, 1, 2, 3, 4]
    assert filled.search(vector(-1), collection="docs", min_score=0.5) == []


def test_many_queries_give_a_list_of_hit_lists(filled: Client) -> None:
    queries = np.stack([vector(1), vector(1, 1), vector(1, 9)])
    several = filled.search(queries, collection="docs", k=3, metadata={"even": True})
    assert [numbers(hits) for hits in several] == [[0, 2, 4], [50, 52, 48], [118, 116, 114]]
    assert several == [filled.search(query, collection="docs", k=3, metadata={"even": True}) for query in queries]
    assert filled.search([], collection="docs") == []
    assert len(filled.search(queries[:1], collection="docs", k=3)) == 1


def test_more_like_a_chunk_are_its_neighbours_without_itself(filled: Client) -> None:
    assert numbers(filled.search(like="c000", collection="docs", k=3)) == [1, 2, 3]
    hits = filled.search(like="c119", collection="docs", k=2, metadata={"number": {"$lt": 50}})
    assert numbers(hits) == [49, 48]
    pages = [filled.search(like="c000", collection="docs", k=9, offset=i) for i in range(0, N, 9)]
    assert [number for page in pages for number in numbers(page)] == list(range(1, N))
    assert filled.search(like="c001", collection="others", k=1)[0].text in ("other 0", "other 2")


def test_the_result_says_how_it_was_found(filled: Client, way: str) -> None:
    def explained(**options: Any) -> searching.SearchPlan:
        hits = filled.search(vector(1, 0.2), collection="docs", k=5, explain=True, **options)
        assert hits.explanation
        assert hits == filled.search(vector(1, 0.2), collection="docs", k=5, **options)
        return hits.explanation

    assert filled.search(vector(1), collection="docs").explanation is None
    plain, filtered = explained(), explained(metadata={"even": True})
    narrow = explained(metadata={"number": {"$in": [7, 90]}})
    asked = explained(exact=True, metadata={"even": True})
    assert (asked.is_exact, asked.candidates, asked.because) == (True, N // 2, "An exact search was asked for.")
    assert (narrow.is_exact, narrow.candidates) == (True, 2)
    if way == "exactly":
        assert (plain.is_exact, plain.candidates, plain.segments, plain.tail, plain.beam) == (True, N, 0, 0, None)
        assert "no serving index" in plain.because
        return
    assert (plain.is_exact, filtered.is_exact) == (False, False)
    assert 5 <= plain.candidates < N
    assert "no filter is given" in plain.because
    assert "pass the filter" in filtered.because
    in_tail, in_graph = way == "in the tail", way == "in a graph"
    few = (None, "The segments gave 2 of 5 hits") if in_tail else (2, "Only 2 chunks pass the filter.")
    assert (narrow.passing, narrow.because[: len(few[1])]) == few
    assert plain.tail == (N if in_tail else 0)
    assert (plain.segments, plain.graphs) == (1, 1 if in_graph else 0)
    assert plain.beam == (searching.BEAM if in_graph else None)


@pytest.mark.parametrize("metadata", [None, {"even": True}], ids=["all", "a filter"])
def test_a_query_beside_all_that_a_graph_gives_is_compared_with_all_rows(
    filled: Client, way: str, metadata: dict[str, Any] | None
) -> None:
    """A graph is then stuck near its start. Among the chunks of the collection a query is believed."""
    beside = filled.search(vector(-1, -1), collection="docs", k=5, metadata=metadata, explain=True)
    exact = filled.search(vector(-1, -1), collection="docs", k=5, metadata=metadata, exact=True)
    among = filled.search(vector(1, 1), collection="docs", k=5, metadata=metadata, explain=True)
    assert beside.explanation
    assert among.explanation
    in_graph = way == "in a graph"
    assert [numbers(beside), "beside" in beside.explanation.because] == [numbers(exact), in_graph]
    assert "beside" not in among.explanation.because
    beams = [None, searching.BEAM] if in_graph else [None, None]
    assert [beside.explanation.beam, among.explanation.beam] == beams


@pytest.mark.parametrize("k", [5, 40])
def test_whether_a_query_is_beside_a_graph_is_told_without_the_filter(filled: Client, way: str, k: int) -> None:
    """What passes is far from the query and close together. The graph gave its nearest all the same.

    For five hits it is read with the beam by which that is told, and for forty with a wider one.
    """
    least = 90 if k == 5 else 60
    wanted = {"number": {"$gte": least}}
    among = filled.search(vector(1, 0.5), collection="docs", k=k, metadata=wanted, explain=True)
    assert numbers(among) == list(range(least, least + k))
    assert among.explanation
    assert "beside" not in among.explanation.because
    beam = searching.BEAM if k == 5 else 3 * k
    assert among.explanation.beam == (beam if way == "in a graph" else None)


@pytest.mark.parametrize("way", ["in a graph"], indirect=True)
def test_whether_a_query_is_beside_is_told_without_the_filter_if_a_graph_is_read_at_once(
    filled: Client, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the chunks pass, those on one side of the query, and enough of them are among the rows that are read."""
    monkeypatch.setattr(searching._CallContext, "_nearest_in_turn", None)
    among = filled.search(vector(1, 1), collection="docs", k=5, metadata={"number": {"$gte": 60}}, explain=True)
    assert numbers(among) == [60, 61, 62, 63, 64]
    assert among.explanation
    assert "beside" not in among.explanation.because
    assert among.explanation.beam == searching.BEAM


@pytest.fixture
def random_rows(client: Client, db: sa.Engine, way: str) -> Client:
    """Two collections of vectors in random directions, of which a narrow beam misses some."""
    rng = np.random.default_rng(5)
    for name in ("docs", "others"):
        chunks = [Chunk(f"c{i:03}", f"{name} {i}", {"number": i}) for i in range(MANY)]
        client.enqueue(chunks, collection=name)
        if way == "in the tail":
            client.index(name)
        embed(db, {chunk.text: rng.standard_normal(DIMENSIONS).tolist() for chunk in chunks})
        if way not in ("exactly", "in the tail"):
            client.index(name)
    return client


@pytest.mark.parametrize("way", ["in a graph"], indirect=True)
@pytest.mark.parametrize("metadata", [None, {"number": {"$lt": 500}}], ids=["all", "a filter"])
@pytest.mark.parametrize("k", [1, 10])
def test_a_doubtful_search_is_made_again_with_a_wider_beam(
    random_rows: Client, way: str, k: int, metadata: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that finds other hits, the search is stuck. For one hit the graph is read at once, and for ten in turn."""
    for name, value in (("BEAM", 2), ("JUDGED", 2), ("MORE_CANDIDATES", 0), ("MORE_THROUGH_A_FILTER", 0)):
        monkeypatch.setattr(searching, name, value)
    monkeypatch.setattr(searching, "WIDEST_BEAM", 400)
    monkeypatch.setattr(searching, "_candidates", lambda k, more=0: k)
    monkeypatch.setattr(searching, "LEAST_SPREAD", 0)
    queries = np.random.default_rng(6).standard_normal((20, DIMENSIONS)).astype(np.float32)

    def hits_of_all(**how: Any) -> list[Hits]:
        return random_rows.search(queries, collection="docs", k=k, metadata=metadata, **how)

    right = hits_of_all(exact=True)
    monkeypatch.setattr(searching, "DOUBTFUL_SPREAD", 0)
    assert hits_of_all() != right  # so narrow is the beam
    monkeypatch.setattr(searching, "DOUBTFUL_SPREAD", 1_000)
    monkeypatch.setattr(searching, "WIDER", 200)
    hits = hits_of_all(explain=True)
    assert hits == right
    because = [one.explanation.because for one in hits if one.explanation]
    assert any("beside" in reason for reason in because)
    if k == 1:
        assert not all("beside" in reason for reason in because)
    beams = {one.explanation.beam for one in hits if one.explanation}
    assert beams <= {None, 400}, "a beam is said by which the hits were not found"


@pytest.mark.parametrize("way", ["in a graph"], indirect=True)
def test_a_search_that_had_the_widest_beam_is_not_made_again(
    random_rows: Client, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would find the same."""
    for name, value in (("LEAST_SPREAD", 0), ("DOUBTFUL_SPREAD", 1_000)):
        monkeypatch.setattr(searching, name, value)
    asked: list[str] = []

    def note(conn: object, cursor: object, statement: str, *_: object) -> None:
        asked.extend(["a graph"] if "<=>" in statement else [])

    sa.event.listen(random_rows._db, "before_cursor_execute", note)
    counts = []
    for widest in (searching.WIDEST_BEAM, searching.BEAM):
        monkeypatch.setattr(searching, "WIDEST_BEAM", widest)
        asked.clear()
        random_rows.search(np.ones(DIMENSIONS, np.float32), collection="docs", k=3)
        counts.append(len(asked))
    assert counts[0] > counts[1] == 1


def test_a_larger_graph_is_searched_with_a_wider_beam() -> None:
    def beam(*parts: tuple[serving.SegmentKind, int]) -> int:
        live = tuple(serving.Segment(i, kind, rows) for i, (kind, rows) in enumerate(parts))
        return searching._beam(ServingIndex(True, live))

    flat, hnsw, bits = serving.SegmentKind
    assert [beam((hnsw, rows), (hnsw, 20_000), (flat, 10**7)) for rows in (20_000, 100_000)] == [100, 100]
    assert [beam((hnsw, 20_000), (hnsw, rows)) for rows in (10**6, 10**7, 10**9)] == [252, 631, 1_000]
    assert beam((bits, 10**6), (bits, 10**7)) == searching.BEAM  # which tells where the query lies


@pytest.mark.parametrize("metadata", [None, {"number": {"$lt": 500}}], ids=["all", "a filter"])
@pytest.mark.parametrize("k", [5, 60])
def test_a_score_is_that_of_the_whole_vectors(
    random_rows: Client, way: str, k: int, metadata: dict[str, Any] | None
) -> None:
    """Segments hold vectors in half precision, and order them by that of the query. No score may come from there."""
    queries = np.random.default_rng(6).standard_normal((3, DIMENSIONS)).astype(np.float32)
    right = random_rows.search(queries, collection="docs", k=500, metadata=metadata, exact=True)
    for hits, every in zip(random_rows.search(queries, collection="docs", k=k, metadata=metadata), right, strict=True):
        scores = {hit.chunk_id: hit.score for hit in every}
        assert len(hits) == k
        assert [hit.score for hit in hits] == [scores[hit.chunk_id] for hit in hits]


def test_rows_that_do_not_give_enough_hits_are_not_believed(filled: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows pass the filter among all than among the nearest, so that too few of them were compared."""
    monkeypatch.setattr(searching._CallContext, "_estimate_share", lambda asked, index: 1.0)
    wanted = {"number": {"$lt": 20}}
    hits = filled.search(vector(1, 10), collection="docs", k=5, metadata=wanted)
    assert numbers(hits) == [19, 18, 17, 16, 15]


@pytest.mark.parametrize("way", ["in a graph"], indirect=True)
def test_the_share_that_passes_is_remembered_for_each_filter_and_graph(
    client: Client, db: sa.Engine, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for long, because metadata change."""
    for name, odd in (("docs", 1), ("others", N)):
        chunks = [Chunk(f"c{i:03}", f"{name} {i}", {"kind": "odd" if i < odd else "even"}) for i in range(N)]
        client.enqueue(chunks, collection=name)
        embed(db, {f"{name} {i}": (1, i / 50) for i in range(N)})
        client.index(name)
    samples: list[str] = []

    def note(conn: object, cursor: object, statement: str, *_: object) -> None:
        samples.extend(["sample"] if "TABLESAMPLE" in statement else [])

    sa.event.listen(client._db, "before_cursor_execute", note)

    def passing(collection: str, kind: str) -> int | None:
        hits = client.search(vector(1), collection=collection, k=1, metadata={"kind": kind}, explain=True)
        assert hits.explanation
        return hits.explanation.passing

    questions = [("docs", "even"), ("docs", "odd"), ("others", "even"), ("others", "odd")]
    assert [passing(*question) for question in questions] == [None, 1, 0, None]
    n_samples = len(samples)
    assert n_samples >= len(questions)
    assert [passing(*question) for question in questions] == [None, 1, 0, None]
    client.update_metadata("docs", {"kind": "odd"}, filter={"kind": "even"})
    # Many are expected to pass. That none do is seen, and the next search looks again.
    assert client.search(vector(1), collection="docs", k=1, metadata={"kind": "even"}) == []
    assert len(samples) == n_samples
    assert passing("docs", "even") == 0
    assert len(samples) == n_samples + 1
    assert passing("others", "odd") is None
    n_samples = len(samples)
    monkeypatch.setattr(searching, "SHARE_SECONDS", 0.0)
    searching._SHARES.clear()
    assert [passing("docs", "even") for _ in range(2)] == [0, 0]
    assert len(samples) == n_samples + 2


def test_the_spread_of_candidates_is_their_mean_distance_to_each_other_by_that_to_the_query() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((7, 5)) + 1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = rng.standard_normal(5)
    cosines = vectors @ query / np.linalg.norm(query)
    pairs = [1 - vectors[i] @ vectors[j] for i in range(7) for j in range(7) if i != j]
    length = float(np.linalg.norm(vectors.mean(axis=0)))
    assert searching._spread(7, float(cosines.mean()), length) == pytest.approx(np.mean(pairs) / np.mean(1 - cosines))
    assert searching._spread(1, 0.5, 1.0) == searching._spread(2, 1.0, 1.0) == float("inf")
    assert searching._spread(0, None, None) == float("inf")


def test_a_search_beyond_what_segments_give_is_exact_and_says_so(
    filled: Client, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "MAX_K_THROUGH_SEGMENTS", 50)
    hits = filled.search(vector(1), collection="docs", k=60, explain=True)
    assert numbers(hits) == list(range(60))
    assert hits.explanation
    assert hits.explanation.because == "A search for more than 50 hits is exact."
    paged = filled.search(vector(1), collection="docs", k=60, offset=10, explain=True)
    assert numbers(paged) == list(range(10, 70))
    assert paged.explanation
    assert paged.explanation.is_exact == (way == "exactly")


def test_an_unindexed_filter_that_nothing_passes_finds_nothing(filled: Client) -> None:
    hits = filled.search(vector(1), collection="docs", metadata={"number": {"$gt": N}}, explain=True)
    assert hits == []
    assert hits.explanation
    assert hits.explanation.candidates == 0


def test_texts_are_embedded_in_one_request(
    client: Client, runner: Runner, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["How to rotate a certificate", "How to bake bread", "The tides of the sea"]
    runner.finish(client.enqueue([(f"c{i}", text) for i, text in enumerate(texts)], collection="docs"))
    asked = []
    ask = embed_requests.ask_all
    monkeypatch.setattr(
        embed_requests, "ask_all", lambda conn, **given: (asked.extend(given["parts"]), ask(conn, **given))[1]
    )
    responder = EmbedResponder(context)
    responder.start()
    try:
        answers = client.search(texts, collection="docs", k=1)
    finally:
        responder.stop()
    assert [hits[0].text for hits in answers] == texts
    assert asked == [texts]


def test_a_hit_whose_text_was_cut_says_so(client: Client, db: sa.Engine) -> None:
    client.enqueue([("a", "long"), ("b", "short")], collection="docs")
    embed(db, {"long": (1, 0)}, truncated=True)
    embed(db, {"short": (1, 1)})
    hits = client.search(vector(1), collection="docs")
    assert [(hit.chunk_id, hit.truncated) for hit in hits] == [("a", True), ("b", False)]
    assert isinstance(hits, Hits)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({}, InvalidInput, "give either a query, or with like= the id of a chunk"),
        ({"query": "q", "like": "a"}, InvalidInput, "give either a query"),
        ({"like": "nothing"}, NotFound, "there is no chunk 'nothing' in collection 'docs'"),
        ({"like": "b"}, NotFound, "chunk 'b' of collection 'docs' has no vector"),
        ({"like": "a\x00"}, InvalidInput, "like contains a NUL"),
        ({"query": ["a", "b\x00"]}, InvalidInput, r"query\[1\] contains a NUL"),
        ({"query": ["a", 1]}, InvalidInput, "query is of type list"),
        ({"query": np.ones((2, 2, 384))}, InvalidInput, r"query has shape \(2, 2, 384\)"),
        ({"query": np.ones((2, 3))}, InvalidInput, r"has shape \(3,\)"),
        ({"query": np.ones((2, 384)), "k": 600_000}, InvalidInput, "2 queries for 600,000 hits are too many"),
        ({"query": np.ones(384), "min_score": 2}, InvalidInput, "min_score is 2; it must be a cosine"),
        ({"query": np.ones(384), "min_score": float("nan")}, InvalidInput, "min_score is nan"),
        ({"query": np.ones(384), "offset": -1}, InvalidInput, "offset is -1; it must be at least 0"),
        ({"query": np.ones(384), "metadata": {"a": {"$gt": None}}}, InvalidInput, "metadata at a.[$]gt: it is null"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_reason(
    client: Client, db: sa.Engine, given: dict[str, Any], kind: type[Exception], said: str
) -> None:
    client.enqueue([("a", "one"), ("b", "two")], collection="docs")
    embed(db, {"one": (1, 0)})
    with pytest.raises(kind, match=said):
        client.search(**given, collection="docs")


def test_a_filter_may_be_given_by_its_older_name_but_not_by_both(filled: Client) -> None:
    chosen = {"number": {"$gte": 90}}
    by_name = filled.search(vector(1), collection="docs", filter=chosen)
    assert [hit.chunk_id for hit in by_name] == [
        hit.chunk_id for hit in filled.search(vector(1), collection="docs", metadata=chosen)
    ]
    assert all(hit.metadata["number"] >= 90 for hit in by_name)
    for name in ("filter", "metadata"):
        with pytest.raises(InvalidInput, match=rf"^{name} at number"):
            filled.search(vector(1), collection="docs", **{name: {"number": {"$odd": 1}}})  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="two names of one argument"):
        filled.search(vector(1), collection="docs", filter=chosen, metadata=chosen)
