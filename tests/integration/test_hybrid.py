"""Keywords beside vectors: what a search finds by words, how both are mixed, and who chooses the mix."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from numpy.typing import NDArray

from chunkmill import Client
from chunkmill.cli.__main__ import cli
from chunkmill.db.locks import DELETE_LOCK, lock_shared
from chunkmill.domain import mixing
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.filters import parse
from chunkmill.domain.golden import GoldenQuery
from chunkmill.domain.results import SearchHit
from chunkmill.errors import InvalidInput
from chunkmill.ledger import dropping
from chunkmill.poller.indexer import Indexer
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.store import keywords
from chunkmill.store import search as searching
from chunkmill.store.write import write_vectors
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner
from tests.support.waiting import PATIENCE, Call, until

DIMENSIONS = 384
PETS = {
    "cat": "The cat sleeps on the warm roof.",
    "cats": "Two cats, two dogs: a quarrel of animals.",
    "dog": "A dog runs after the ball in the park.",
    "fish": "Nobody hears the goldfish. It swims around and around.",
}


def vector_of(text: str) -> NDArray[np.float32]:
    """A vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)


def embed(db: sa.Engine, texts: Iterable[str]) -> None:
    """Give texts their vectors, in the place of a worker."""
    texts = list(texts)
    with db.begin() as conn:
        space = registry.all_spaces(conn)[0]
        write_vectors(
            conn,
            space,
            space.spec.fingerprint,
            [content_hash(text) for text in texts],
            np.full(len(texts), 3, np.int32),
            np.zeros(len(texts), np.bool_),
            np.stack([vector_of(text) for text in texts]),
        )


def fill(client: Client, db: sa.Engine, name: str, chunks: dict[str, str]) -> None:
    client.enqueue(chunks.items(), collection=name)
    embed(db, chunks.values())


def by_words(db: sa.Engine, name: str, query: str, most: int = 10) -> list[str]:
    """The chunks that the words of a query find, best first."""
    with db.begin() as conn:
        row = collections.find(conn, name)
        index = keywords.find(conn, row.id)
        assert index is not None
        terms = keywords.read_terms(conn, index, query)
        return keywords.find_by_keywords(conn, index, registry.get(conn, row.space_id), terms, most=most)


def mixed(
    db: sa.Engine,
    name: str,
    vector: NDArray[np.float32],
    text: str,
    how: mixing.Hybrid,
    k: int = 10,
    where: dict[str, object] | None = None,
) -> list[SearchHit]:
    with db.begin() as conn:
        row = collections.find(conn, name)
        index = keywords.require_ready(conn, row)
        space = registry.get(conn, row.space_id)
    unit = vector / np.linalg.norm(vector)
    passing = parse(where)
    with db.begin() as conn:
        depth = keywords.depth(k, None)
        nearest = searching.search(conn, space, unit, collection_id=row.id, k=depth, where=passing)
        return keywords.search_mixed(conn, index, how, space, unit, text, nearest, k=k, where=passing)


def kept(db: sa.Engine, name: str) -> set[bytes]:
    """The contents that have keywords in a collection."""
    with db.begin() as conn:
        row = collections.find(conn, name)
        return set(conn.execute(sa.text(f"SELECT content_hash FROM keywords_{row.id}")).scalars())


def test_a_chunk_has_its_keywords_in_the_commit_that_writes_it_in_the_language_of_each_collection(
    client: Client, db: sa.Engine
) -> None:
    for name, language in (("docs", "english"), ("others", "simple"), ("plain", None)):
        client.enqueue([("first", "something else")], collection=name)
        if language:
            made = client.keywords(name, language=language)
            assert made is not None
            assert (made.language, made.is_ready) == (f"pg_catalog.{language}", True)
    for name in ("docs", "others", "plain"):
        client.enqueue(PETS.items(), collection=name)
        client.enqueue([("first", "something new")], collection=name)
    embed(db, [*PETS.values(), "something new"])
    assert client.keywords("plain") is None
    assert by_words(db, "docs", "cats") == ["cat", "cats"]
    assert by_words(db, "others", "cats") == ["cats"]
    assert by_words(db, "docs", "else") == []
    assert by_words(db, "docs", "new") == ["first"]


def test_a_chunk_without_a_vector_is_not_found_by_its_words_either(client: Client, db: sa.Engine) -> None:
    fill(client, db, "docs", PETS)
    client.keywords("docs", language="english")
    client.enqueue([("late", "one more cat")], collection="docs")
    assert by_words(db, "docs", "more cat") == ["cat", "cats"]
    embed(db, ["one more cat"])
    assert by_words(db, "docs", "more cat")[0] == "late"


def test_old_chunks_get_their_keywords_in_windows_that_may_be_interrupted(
    client: Client, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keywords, "WINDOW", 3)
    texts = {f"id-{i:02}": f"text number{i}" for i in range(10)}
    for name in ("docs", "others"):
        fill(client, db, name, texts)
    numbers = {}
    with db.begin() as conn:
        for name in ("docs", "others"):
            numbers[name] = collections.find(conn, name).id
            keywords.create(conn, numbers[name], "english")
    # Who created them died here. For one of them, another dies between two windows.
    with db.begin() as conn:
        conn.execute(sa.text("SELECT begin_filling_keywords(:id)"), {"id": numbers["docs"]})
    with db.begin() as conn:
        conn.execute(sa.text("SELECT fill_keywords(:id, 3)"), {"id": numbers["docs"]})
    assert len(kept(db, "docs")) == 3
    client.enqueue([("id-00b", "text zebra"), ("id-05", "text wren"), ("id-99", "text heron")], collection="docs")
    embed(db, ["text zebra", "text wren", "text heron"])
    assert not client.keywords("docs").is_ready  # type: ignore[union-attr]
    with pytest.raises(InvalidInput, match=r"not all chunks of collection 'docs' .* language='english'\) waits"):
        client.search("a text", collection="docs", hybrid=True)
    Indexer(db, settings).round()
    for name in ("docs", "others"):
        assert client.keywords(name).is_ready  # type: ignore[union-attr]
        for i in range(10):
            wanted = [] if (name, i) == ("docs", 5) else [f"id-{i:02}"]
            assert by_words(db, name, f"number{i}") == wanted
    for word, chunk_id in (("zebra", "id-00b"), ("wren", "id-05"), ("heron", "id-99")):
        assert by_words(db, "docs", word) == [chunk_id]


def test_a_writer_that_began_before_the_keywords_is_waited_for(client: Client, db: sa.Engine) -> None:
    fill(client, db, "docs", PETS)
    client.enqueue([("a", "another")], collection="others")
    client.keywords("others", language="english")  # its triggers are there
    early = "an early writer"
    with db.connect() as writer:
        lock_shared(writer, DELETE_LOCK)
        parameters = {"hash": content_hash(early), "text": early, "id": _id_of(db, "docs")}
        writer.execute(sa.text("INSERT INTO contents (content_hash, text) VALUES (:hash, :text)"), parameters)
        insert = """
            INSERT INTO chunks (collection_id, chunk_id, content_hash, metadata, job_id)
            VALUES (:id, 'aaa', :hash, '{}', 301)
        """
        writer.execute(sa.text(insert), parameters)
        call = Call(lambda: client.keywords("docs", language="english"))
        waits = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        with db.connect() as watcher:
            until(lambda: watcher.execute(waits).scalar_one() == 1)
        writer.commit()
    assert call.result().is_ready
    embed(db, [early])
    assert by_words(db, "docs", "early") == ["aaa"]


def _id_of(db: sa.Engine, name: str) -> int:
    with db.begin() as conn:
        return collections.find(conn, name).id


def test_keywords_go_with_the_text(client: Client, db: sa.Engine) -> None:
    for name in ("docs", "others"):
        fill(client, db, name, PETS)
        client.keywords(name, language="english")
    assert client.delete("docs", ["cat"]) == 1
    assert by_words(db, "docs", "roof") == []
    assert by_words(db, "others", "roof") == ["cat"]
    client.delete("others", ["cat"])
    assert content_hash(PETS["cat"]) not in kept(db, "docs") | kept(db, "others")
    client.enqueue([("dog", "something else")], collection="docs")
    assert by_words(db, "docs", "ball") == []
    client.enqueue([("dog", "something else")], collection="others")
    client.evict(max_bytes=0)
    client.prune(0)
    assert content_hash(PETS["dog"]) not in kept(db, "docs") | kept(db, "others")
    assert content_hash(PETS["fish"]) in kept(db, "docs") & kept(db, "others")


def test_keywords_and_golden_queries_go_with_their_collection(
    client: Client, db: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text('{"_id": "q", "text": "a cat"}')
    qrels.write_text("q\tcat\t1")
    for name in ("docs", "others"):
        fill(client, db, name, PETS)
        client.keywords(name, language="english")
        client.golden(name).load(queries, qrels)
    number, other = _id_of(db, "docs"), _id_of(db, "others")
    with db.begin() as conn:
        for statement in (
            "DELETE FROM chunk_batches WHERE job_id IN (SELECT id FROM jobs WHERE collection_id = :id)",
            "DELETE FROM job_streams WHERE job_id IN (SELECT id FROM jobs WHERE collection_id = :id)",
            "DELETE FROM jobs WHERE collection_id = :id",
            "DELETE FROM chunks WHERE collection_id = :id",
            "DELETE FROM collections WHERE id = :id",
        ):
            conn.execute(sa.text(statement), {"id": number})
    Indexer(db, settings).round()
    with db.begin() as conn:
        tables = conn.execute(sa.text("SELECT relname FROM pg_class WHERE relname ~ '^keywords_[0-9]+$'")).scalars()
        assert list(tables) == [f"keywords_{other}"]
        assert conn.execute(sa.text("SELECT collection_id FROM golden_queries")).scalars().all() == [other]
    assert by_words(db, "others", "cat") == ["cat", "cats"]


@pytest.mark.parametrize("by_poller", [False, True], ids=["by the client", "by a poller"])
def test_a_drop_takes_keywords_and_golden_queries_along(
    client: Client, db: sa.Engine, settings: Settings, tmp_path: Path, by_poller: bool
) -> None:
    """Also while the row of the collection stays, because its jobs do."""
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text('{"_id": "q", "text": "a cat"}')
    qrels.write_text("q\tcat\t1")
    for name in ("docs", "others"):
        fill(client, db, name, PETS)
        client.keywords(name, language="english")
        client.golden(name).load(queries, qrels)
    other = _id_of(db, "others")
    client.drop_collection("docs", wait=not by_poller)
    if by_poller:
        with db.begin() as conn:
            (left,) = dropping.left_behind(conn)
        dropping.go_on(db, left)
    with db.begin() as conn:
        tables = conn.execute(sa.text("SELECT relname FROM pg_class WHERE relname ~ '^keywords_[0-9]+$'")).scalars()
        assert list(tables) == [f"keywords_{other}"]
        assert conn.execute(sa.text("SELECT collection_id FROM golden_queries")).scalars().all() == [other]
        assert dropping.left_behind(conn) == []
    fill(client, db, "docs", PETS)
    assert client.keywords("docs") is None
    assert client.golden("docs").count() == 0
    assert by_words(db, "others", "cat") == ["cat", "cats"]


def test_a_wrong_file_of_golden_queries_is_named_and_changes_nothing(client: Client, tmp_path: Path) -> None:
    client.enqueue(PETS.items(), collection="docs")
    golden = client.golden("docs")
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    with pytest.raises(InvalidInput, match=r"queries is '.*queries.jsonl', which cannot be read: No such file"):
        golden.load(queries, qrels)
    queries.write_text('{"_id": "q1", "text": "good"}\n{"_id": "q2"}\n')
    qrels.write_text("q1\tcat\t1\n")
    with pytest.raises(InvalidInput, match=r"queries.jsonl, line 2: text must be"):
        golden.load(queries, qrels)
    qrels.write_bytes(b"\xff\xfe\x00")
    queries.write_text('{"_id": "q1", "text": "good"}\n')
    with pytest.raises(InvalidInput, match=r"qrels.tsv', which is not a file of UTF-8"):
        golden.load(str(queries), str(qrels))
    assert golden.count() == 0
    with pytest.raises(InvalidInput, match="no chunk of collection 'docs' has a title"):
        golden.from_titles()


def test_a_text_that_was_damaged_and_comes_again_has_its_own_keywords(client: Client, db: sa.Engine) -> None:
    client.enqueue(PETS.items(), collection="docs")
    client.keywords("docs", language="english")
    with db.begin() as conn:
        damage = "UPDATE contents SET text = 'nonsense' WHERE content_hash = :hash"
        conn.execute(sa.text(damage), {"hash": content_hash(PETS["cat"])})
    client.enqueue([("copy", PETS["cat"])], collection="docs")
    embed(db, PETS.values())
    assert by_words(db, "docs", "nonsense") == []
    assert by_words(db, "docs", "roof") == ["cat", "copy"]


def test_keywords_may_be_dropped_and_made_in_another_language_while_producers_write(
    client: Client, db: sa.Engine
) -> None:
    client.enqueue([("first", "one cat")], collection="docs")
    client.enqueue([("first", "one cat")], collection="others")
    client.keywords("others", language="english")
    stop = threading.Event()

    def produce() -> int:
        n = 0
        while not stop.is_set():
            client.enqueue([(f"c{n}", f"{n} cats")], collection="docs")
            n += 1
        return n

    producing = Call(produce)
    for language in ("english", "simple", "english", "simple"):
        made = client.keywords("docs", language=language)
        assert made is not None
        assert made.is_ready
        with pytest.raises(InvalidInput, match=r"has keywords in pg_catalog\.\w+ already.*--drop"):
            client.keywords("docs", language="german")
        if language == "simple":
            break
        assert client.drop_keywords("docs")
    stop.set()
    n = producing.result()
    embed(db, ["one cat", *(f"{i} cats" for i in range(n))])
    assert len(kept(db, "docs")) == n + 1
    assert by_words(db, "docs", "cat") == ["first"]
    assert client.drop_keywords("docs")
    assert not client.drop_keywords("docs")
    assert by_words(db, "others", "cats") == ["first"]


def test_every_text_is_a_query(client: Client, db: sa.Engine) -> None:
    fill(client, db, "docs", PETS)
    client.keywords("docs", language="english")
    odd = ["", " ", '"', '""', "*", "a*", "'", "\\", "cat & ! |", "(cat", "cat:*", "cat:AB", "<->", "the", '"the"',
           "'cat", "cat\\", '"cat', "''' or \\'", "%s :name", "cat <2> dog", "x" * 3_000, "1e400", "-cat",
           "\u202ecat", "ca\u0301t", "\U0001f600 *", "a/b@c.d/e?f=g", "''::tsquery"]  # fmt: skip
    for text in odd:
        assert len(by_words(db, "docs", text)) <= len(PETS)
    assert by_words(db, "docs", "'cat") == by_words(db, "docs", "cat & ! |") == ["cat", "cats"]
    assert by_words(db, "docs", "the") == []


def test_any_of_the_words_is_enough_and_a_rarer_word_says_more(client: Client, db: sa.Engine) -> None:
    fill(client, db, "docs", {f"b{i}": f"bird number {i} of many" for i in range(20)} | {"z": "one zebra of all"})
    fill(client, db, "others", {f"z{i}": f"zebra {i}" for i in range(30)})
    for name in ("docs", "others"):
        client.keywords(name, language="english")
    ids = by_words(db, "docs", "which bird meets the zebra", most=30)
    assert ids[0] == "z"
    assert len(ids) == 21


def test_a_phrase_and_a_prefix_find_what_they_say(client: Client, db: sa.Engine) -> None:
    texts = {"near": "the red fox sleeps", "far": "a fox is red", "foxes": "foxglove in the wood", "none": "a bear"}
    fill(client, db, "docs", texts)
    client.keywords("docs", language="english")
    assert by_words(db, "docs", '"red fox"') == ["near"]
    assert set(by_words(db, "docs", "red fox")) == {"near", "far"}
    assert set(by_words(db, "docs", "foxg* bear")) == {"foxes", "none"}
    assert set(by_words(db, "docs", "fox*")) == {"near", "far", "foxes"}


def test_a_common_word_is_not_looked_up_beside_a_rare_one_but_counts(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a search costs the same in a large collection."""
    texts = {f"b{i}": f"bird {i}" for i in range(20)} | {"rare": "a wren of sorts", "both": "the wren is a bird"}
    fill(client, db, "docs", texts)
    client.keywords("docs", language="english")
    monkeypatch.setattr(keywords, "MAX_MATCHES", 5)
    assert by_words(db, "docs", "wren bird") == ["both", "rare"]
    assert len(by_words(db, "docs", "bird")) == 5
    assert len(by_words(db, "docs", '"a bird"')) <= 5
    hit = next(hit for hit in mixed(db, "docs", vector_of("bird 3"), "wren bird", 0.5) if hit.chunk_id == "b3")
    assert hit.keyword is not None
    assert hit.keyword > 0


def test_common_words_are_known_from_the_statistics_of_the_collection(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {f"b{i}": f"bird's nest it's {i}" for i in range(40)} | {f"w{i}": f"wren {i} of sorts" for i in range(3)}
    fill(client, db, "docs", texts)
    client.keywords("docs", language="simple")
    counted = _terms(db, "bird wren it's bird's")
    with db.begin() as conn:
        conn.execute(sa.text(f"ANALYZE keywords_{_id_of(db, 'docs')}"))
    monkeypatch.setattr(keywords, "MAX_MATCHES", 1)  # counting would end at 2
    assert {term.query: term.matches for term in _terms(db, "bird wren it's bird's")} == {
        term.query: term.matches for term in counted
    }


def _terms(db: sa.Engine, text: str) -> list[keywords.Term]:
    with db.begin() as conn:
        index = keywords.find(conn, collections.find(conn, "docs").id)
        assert index is not None
        return keywords.read_terms(conn, index, text)


def test_both_scores_of_every_candidate_are_its_own(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what only the other search has returned."""
    monkeypatch.setattr(mixing, "DEPTH", 1)
    for name in ("docs", "others"):
        fill(client, db, name, PETS)
        client.keywords(name, language="english")
    hits = mixed(db, "docs", vector_of(PETS["dog"]), "goldfish swim dog", 0.5, k=1)
    assert [hit.chunk_id for hit in hits] == ["dog"]
    assert hits[0].score == pytest.approx(1)
    with db.begin() as conn:
        row = collections.find(conn, "docs")
        index, space = keywords.require_ready(conn, row), registry.get(conn, row.space_id)
    unit = vector_of(PETS["dog"]) / np.linalg.norm(vector_of(PETS["dog"]))
    with db.begin() as conn:
        nearest = searching.search(conn, space, unit, collection_id=row.id, k=1)
        candidates = keywords.candidates(conn, index, space, unit, "goldfish swim dog", nearest, most=1)
    of_fish = vector_of(PETS["fish"]) / np.linalg.norm(vector_of(PETS["fish"]))
    scores = {one.chunk_id: one for one in candidates}
    assert scores.keys() == {"dog", "fish"}
    assert scores["fish"].cosine == pytest.approx(float(unit @ of_fish), abs=1e-6)
    assert 0 < scores["dog"].keyword < scores["fish"].keyword


def test_the_weight_decides_between_vectors_and_words(client: Client, db: sa.Engine) -> None:
    fill(client, db, "docs", PETS)
    client.keywords("docs", language="english")
    towards_dog = vector_of(PETS["dog"])
    assert [hit.chunk_id for hit in mixed(db, "docs", towards_dog, "goldfish", 1.0, k=1)] == ["dog"]
    assert [hit.chunk_id for hit in mixed(db, "docs", towards_dog, "goldfish", 0.0, k=1)] == ["fish"]
    fused = mixed(db, "docs", towards_dog, "dog", "rrf", k=4)
    assert fused[0].mixed == pytest.approx(2 / 61)
    alone = client.search(towards_dog, collection="docs", k=4)
    assert [hit.chunk_id for hit in mixed(db, "docs", towards_dog, "", 0.3, k=4)] == [hit.chunk_id for hit in alone]
    assert [hit.chunk_id for hit in mixed(db, "docs", towards_dog, "goldfish", 1.0, k=4)] == [
        hit.chunk_id for hit in alone
    ]
    assert {hit.mixed for hit in alone} == {None}


def test_a_filter_holds_for_what_the_words_find(client: Client, db: sa.Engine) -> None:
    from chunkmill import Chunk

    chunks = [Chunk(name, text, {"fur": name != "fish"}) for name, text in PETS.items()]
    client.enqueue(chunks, collection="docs")
    embed(db, PETS.values())
    client.keywords("docs", language="english")
    hits = mixed(db, "docs", vector_of("x"), "goldfish cat", 0.1, where={"fur": {"$ne": False}})
    assert sorted(hit.chunk_id for hit in hits) == ["cat", "cats", "dog"]
    assert hits[0].metadata == {"fur": True}


@pytest.fixture
def worker(context: WorkerContext) -> Iterator[None]:
    """A worker that answers queries."""
    responder = EmbedResponder(context)
    responder.start()
    yield
    responder.stop()


@pytest.mark.usefixtures("worker")
def test_a_search_says_how_it_is_to_be_mixed_and_what_it_lacks(client: Client, runner: Runner) -> None:
    for name in ("docs", "others"):
        runner.finish(client.enqueue(PETS.items(), collection=name))
    with pytest.raises(InvalidInput, match=r"'docs' has no keywords\. Call client\.keywords\('docs'"):
        client.search("cat", collection="docs", hybrid=True)
    client.keywords("docs", language="english")
    alone = client.search("two animals quarrel", collection="docs", timeout=PATIENCE)
    assert {hit.mixed for hit in alone} == {None}
    for how in (True, 0.8):
        hits = client.search("two animals quarrel", collection="docs", hybrid=how, timeout=PATIENCE)
        assert [hit.score for hit in hits] == pytest.approx(
            [next(other.score for other in alone if other.chunk_id == hit.chunk_id) for hit in hits]
        )
        assert [hit.mixed for hit in hits] == sorted((hit.mixed for hit in hits if hit.mixed is not None), reverse=True)
    assert client.search("goldfish", collection="docs", hybrid="rrf", k=1, timeout=PATIENCE)[0].chunk_id == "fish"
    for wrong, says in (
        (1.1, "hybrid is 1.1"),
        ("best", "'rrf' or a number from 0 to 1"),
    ):
        with pytest.raises(InvalidInput, match=says):
            client.search("cat", collection="docs", hybrid=wrong)
    with pytest.raises(InvalidInput, match="not a vector or a chunk"):
        client.search(np.ones(DIMENSIONS), collection="docs", hybrid=0.5)
    with pytest.raises(InvalidInput, match=r"at most 1,000 hits"):
        client.search("cat", collection="docs", hybrid=0.5, k=1_001)
    pages = [
        client.search("two animals", collection="docs", hybrid=0.5, k=2, offset=offset, timeout=PATIENCE)
        for offset in (0, 2)
    ]
    whole = client.search(["nothing", "two animals"], collection="docs", hybrid=0.5, explain=True, timeout=PATIENCE)[1]
    assert [hit.chunk_id for page in pages for hit in page] == [hit.chunk_id for hit in whole]
    assert whole.explanation is not None
    assert whole.explanation.because.endswith("Keywords added 0 chunks to the 4 nearest.")
    with pytest.raises(InvalidInput, match=r"offset \+ k is 201; the pages of a hybrid search reach 200"):
        client.search("cat", collection="docs", hybrid=0.5, offset=191)
    with pytest.raises(InvalidInput, match="a chunk"):
        client.search(like="cat", collection="docs", hybrid=0.5)
    with pytest.raises(InvalidInput, match=r"language is 'klingon'; it must be one of: .*english"):
        client.keywords("docs", language="klingon")


@pytest.mark.usefixtures("worker")
def test_golden_queries_switch_the_mix_on_only_if_it_wins_and_searches_follow(
    client: Client, db: sa.Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: Settings
) -> None:
    """The vectors of texts mean nothing here, and so words win. Elsewhere they are as good, and nothing changes."""
    caplog.set_level(logging.DEBUG)
    texts = {f"c{i}": f"secretword{i} and some words around" for i in range(60)}
    for name in ("docs", "others"):
        fill(client, db, name, texts)
        client.keywords(name, language="english")
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text("".join(json.dumps({"_id": f"q{i}", "text": f"secretword{i}"}) + "\n" for i in range(61)))
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\tc{i}\t1\n" for i in range(60)) + "q0\tgone\t2\n")
    loaded = client.golden("docs").load(queries, qrels)
    assert (loaded.queries, loaded.judgements, loaded.without_judgement, loaded.unknown_chunks) == (60, 61, 1, 1)
    client.golden("others").load(queries, qrels)
    few = [query for query in client.golden("others").list() if query.id in ("q1", "q2", "q3")]
    assert few[0] == GoldenQuery("q1", "secretword1", {"c1": 1})
    tuning = client.tune_search("docs", timeout=PATIENCE)
    assert (tuning.n, tuning.left_out) == (60, 0)
    assert tuning.keyword == pytest.approx(1.0)
    assert tuning.dense < 0.5
    assert tuning.alpha is not None
    assert tuning.low > 0
    assert tuning.because.startswith("Vectors with weight")
    hit = client.search("secretword7", collection="docs", k=1, timeout=PATIENCE)[0]
    assert (hit.chunk_id, hit.mixed is not None) == ("c7", True)
    assert client.search("secretword7", collection="docs", k=1, hybrid=False, timeout=PATIENCE)[0].mixed is None
    assert client.search("secretword7", collection="others", k=1, timeout=PATIENCE)[0].mixed is None
    assert client.golden("others").clear() == 60
    with pytest.raises(InvalidInput, match=r"'others' has no golden queries.*golden titles COLLECTION"):
        client.tune_search("others")
    assert len(client.golden("docs").list()) == 60
    client.drop_keywords("docs")
    assert client.search("secretword7", collection="docs", k=1, timeout=PATIENCE)[0].mixed is None
    client.keywords("docs", language="english")
    assert client.search("secretword7", collection="docs", k=1, timeout=PATIENCE)[0].mixed is None
    assert "secretword" not in caplog.text


@pytest.mark.usefixtures("worker")
def test_a_title_is_cut_off_its_chunk_when_it_is_judged(client: Client, runner: Runner) -> None:
    """Else every title would find its own words, and keywords would always win."""
    subjects = ["heron", "otter", "lynx", "badger", "marten", "weasel", "polecat", "stoat"]
    chunks = {
        name: f"All about the {name}\n\nIt lives by the river and it sleeps for most of the day, number {i}."
        for i, name in enumerate(subjects)
    }
    for name in ("docs", "others"):
        runner.finish(client.enqueue(chunks.items(), collection=name))
        client.keywords(name, language="english")
    golden = client.golden("docs")
    assert golden.from_titles(100) == 8
    assert golden.from_titles(5) == 5
    assert {query.text for query in golden.list()} <= {f"All about the {name}" for name in subjects}
    assert all(query.is_title and list(query.relevant) == [query.text.split()[-1]] for query in golden.list())
    assert client.golden("others").list() == []
    tuning = client.tune_search("docs", timeout=PATIENCE)
    assert tuning.n == 5
    assert tuning.keyword < 0.5
    assert tuning.alpha is None
    assert tuning.because.startswith("5 queries are too few")
    changed = golden.list()[0]
    client.enqueue([(next(iter(changed.relevant)), "Another title now\n\n" + "with other words below. " * 9)],
                   collection="docs")  # fmt: skip
    assert client.tune_search("docs", timeout=PATIENCE).left_out == 1


@pytest.mark.usefixtures("worker")
def test_the_commands_do_what_the_client_does(
    client: Client, db: sa.Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    texts = {f"c{i}": f"secretword{i} and some words around" for i in range(60)}
    fill(client, db, "docs", texts)
    fill(client, db, "others", texts)
    assert "'docs' has no keywords" in run("keywords", "docs")
    assert "(english) are ready" in run("keywords", "docs", "--language", "english")
    assert json.loads(run("keywords", "docs", "--json"))["language"] == "pg_catalog.english"
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text(
        "".join(json.dumps({"_id": name, "text": text.split()[0]}) + "\n" for name, text in texts.items())
    )
    qrels.write_text("".join(f"{name}\t{name}\t1\n" for name in texts))
    assert "Stored 60 queries with 60 judgements" in run("golden", "load", "docs", str(queries), str(qrels))
    assert json.loads(run("golden", "--json")) == [
        {"collection": "docs", "queries": 60},
        {"collection": "others", "queries": 0},
    ]
    assert len(json.loads(run("golden", "list", "docs", "--json"))) == 60
    said = run("golden", "tune", "docs")
    assert "60 queries were judged." in said
    assert "Searches are mixed from now on" in said
    assert json.loads(run("golden", "tune", "docs", "--json"))["alpha"] is not None
    assert "mixed" in run("search", "secretword7", "-c", "docs")
    assert "mixed" not in run("search", "secretword7", "-c", "docs", "--hybrid", "off")
    hits = json.loads(run("search", "secretword7", "-c", "docs", "--hybrid", "0", "-k", "1", "--json"))
    assert [hit["chunk_id"] for hit in hits] == ["c7"]
    assert CliRunner().invoke(cli, ["search", "a", "-c", "docs", "--hybrid", "2"]).exit_code == 2
    assert "Deleted 60 golden queries" in run("golden", "clear", "docs")
    assert "Dropped the keywords" in run("keywords", "docs", "--drop")
