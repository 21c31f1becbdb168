"""A replaced chunk is found by its old text until its new text is embedded, if the collection is set so."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Chunk, Client, Hits, InvalidInput, NotFound, SearchHit, StoreUnavailable
from chunkmill.cli.__main__ import cli
from chunkmill.db.connect import create_db
from chunkmill.domain.chunks import content_hash
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.store import keywords, outdated
from chunkmill.store import search as searching
from tests.integration.test_search_options import embed, vector, way  # noqa: F401 - a fixture
from tests.support.waiting import Call, until

QUERY = vector(1.0)


@pytest.fixture
def filled(client: Client, db: sa.Engine, way: str) -> Client:  # noqa: F811
    """Two collections with the same chunks and texts, of which ``docs`` is set so and ``others`` is not."""
    return fill(client, db, way)


@pytest.fixture
def plain(client: Client, db: sa.Engine) -> Client:
    """The same without serving indexes."""
    return fill(client, db, "exactly")


def fill(client: Client, db: sa.Engine, way: str) -> Client:  # noqa: F811
    for collection in ("docs", "others"):
        client.enqueue([Chunk(f"c{i}", f"text {i}", {"even": i % 2 == 0}) for i in range(6)], collection=collection)
        if way == "in the tail":
            client.index(collection)
    embed(db, {f"text {i}": (1, i / 10) for i in range(6)})
    for collection in ("docs", "others"):
        if way not in ("exactly", "in the tail"):
            client.index(collection)
    assert client.outdated("docs", serve=True).is_served
    return client


def search(client: Client, collection: str = "docs", *, k: int = 20) -> Hits:
    return client.search(QUERY, collection=collection, k=k)


def ids(hits: Sequence[SearchHit]) -> list[str]:
    return [hit.chunk_id for hit in hits]


def old_ids(hits: Sequence[SearchHit]) -> list[str]:
    return [hit.chunk_id for hit in hits if hit.outdated]


def copies(db: sa.Engine) -> list[str]:
    """The chunks of all collections that have a copy."""
    with db.begin() as conn:
        query = "SELECT chunk_id FROM outdated_chunks ORDER BY collection_id, chunk_id"
        return list(conn.execute(sa.text(query)).scalars())


def tidied(db: sa.Engine, client: Client, settings: Settings) -> list[str]:
    """The copies that a poller leaves."""
    Poller(db, client._broker, settings).round()
    return copies(db)


def test_a_replaced_chunk_is_found_by_its_old_text_until_its_new_one_has_a_vector(
    filled: Client, db: sa.Engine
) -> None:
    before = search(filled)
    filled.enqueue([Chunk("c1", "new 1", {"even": "new"}), ("c3", "new 3")], collection="docs")
    filled.enqueue([("c1", "new 1"), ("c4", "new 4")], collection="others")

    hits = search(filled)
    assert ids(hits) == ids(before) == ["c0", "c1", "c2", "c3", "c4", "c5"]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in before], abs=1e-6)
    assert old_ids(hits) == ["c1", "c3"]
    assert (hits[1].text, dict(hits[1].metadata)) == ("text 1", {"even": "new"})
    assert ids(search(filled, "others")) == ["c0", "c2", "c3", "c5"]
    assert filled.outdated("docs").waiting == 2

    embed(db, {"new 1": (1, 5)})
    hits = search(filled)
    assert ids(hits) == ["c0", "c2", "c3", "c4", "c5", "c1"]
    assert old_ids(hits) == ["c3"]
    assert hits[-1].text == "new 1"
    assert filled.outdated("docs").waiting == 1


def test_a_chunk_that_is_replaced_again_stays_what_it_was_when_it_last_had_a_vector(
    filled: Client, db: sa.Engine
) -> None:
    filled.enqueue([("c1", "second 1"), ("c2", "second 2")], collection="docs")
    embed(db, {"second 2": (1, 0.21)})
    filled.enqueue([("c1", "third 1"), ("c2", "third 2")], collection="docs")
    assert {hit.chunk_id: hit.text for hit in search(filled) if hit.outdated} == {"c1": "text 1", "c2": "second 2"}

    # Back to the text of before, and to one that another chunk has.
    filled.enqueue([("c1", "text 1"), ("c2", "text 5")], collection="docs")
    assert old_ids(search(filled)) == []
    assert len(search(filled)) == 6


def test_other_metadata_alone_make_nothing_outdated(plain: Client, db: sa.Engine) -> None:
    plain.enqueue([Chunk("c1", "text 1", {"even": "other"})], collection="docs")
    plain.update_metadata("docs", {"seen": True}, ids=["c2"])
    assert copies(db) == []


def test_a_deleted_chunk_is_not_found_by_what_it_was(plain: Client, db: sa.Engine) -> None:
    plain.outdated("others", serve=True)
    for collection in ("docs", "others"):
        plain.enqueue([("c1", "new 1"), ("c2", "new 2")], collection=collection)
    plain.delete("docs", ["c1"])
    plain.enqueue([("c1", "newer 1")], collection="docs")

    assert old_ids(search(plain)) == ["c2"]
    assert old_ids(search(plain, "others")) == ["c1", "c2"]


def test_a_dropped_collection_takes_its_copies_along(plain: Client, db: sa.Engine) -> None:
    plain.outdated("others", serve=True)
    for collection in ("docs", "others"):
        plain.enqueue([("c1", "new 1")], collection=collection)
    plain.drop_collection("docs")
    assert copies(db) == ["c1"]
    assert old_ids(search(plain, "others")) == ["c1"]


def test_a_filter_must_pass_what_a_chunk_was_and_what_it_is(filled: Client) -> None:
    """It may say who may see a chunk: neither a looser nor a tighter one shows an old text to anybody new."""
    filled.enqueue(
        [
            Chunk("c1", "new 1", {"even": True}),
            Chunk("c2", "new 2", {"even": False}),
            Chunk("c4", "new 4", {"even": True, "seen": True}),
        ],
        collection="docs",
    )
    hits = filled.search(QUERY, collection="docs", filter={"even": True})
    assert ids(hits) == ["c0", "c4"]
    assert [(hit.outdated, dict(hit.metadata)) for hit in hits] == [
        (False, {"even": True}), (True, {"even": True, "seen": True}),
    ]  # fmt: skip
    assert ids(filled.search(QUERY, collection="docs", filter={"even": False})) == ["c3", "c5"]
    assert ids(filled.search(QUERY, collection="docs", filter={"seen": True})) == []
    assert old_ids(search(filled)) == ["c1", "c2", "c4"]


def test_the_old_text_outlives_the_deletion_of_another_chunk_with_it(plain: Client, db: sa.Engine) -> None:
    plain.enqueue([("c1", "new 1")], collection="docs")
    plain.delete("others", ["c1"])
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT count(*) FROM contents WHERE text = 'text 1'")).scalar_one() == 0
    assert [(hit.chunk_id, hit.text) for hit in search(plain) if hit.outdated] == [("c1", "text 1")]


def test_all_ways_to_ask_find_it(filled: Client) -> None:
    filled.enqueue([("c1", "new 1"), ("c4", "new 4")], collection="docs")
    all_of_them = search(filled)

    pages = [filled.search(QUERY, collection="docs", k=2, offset=offset) for offset in (0, 2, 4)]
    assert [hit.chunk_id for page in pages for hit in page] == ids(all_of_them)
    assert ids(filled.search(QUERY, collection="docs", k=2)) == ["c0", "c1"]
    assert ids(filled.search(QUERY, collection="docs", exact=True)) == ids(all_of_them)
    assert ids(filled.search(QUERY, collection="docs", min_score=all_of_them[1].score)) == ["c0", "c1"]
    both = filled.search(np.stack([QUERY, vector(0, 1)]), collection="docs", k=1)
    assert [ids(hits) for hits in both] == [["c0"], ["c5"]]
    assert ids(filled.search(like="c1", collection="docs", k=2)) == ["c2", "c0"]
    explained = filled.search(QUERY, collection="docs", explain=True).explanation
    assert explained is not None
    assert explained.because.endswith("Chunks that wait for a new vector were compared by the old one.")
    filled.enqueue([("c1", "new 1")], collection="others")
    with pytest.raises(NotFound, match="has no vector"):
        filled.search(like="c1", collection="others")


def test_in_a_hybrid_search_it_has_the_keyword_score_of_its_old_text(client: Client, db: sa.Engine) -> None:
    texts = {"valve": "turn the valve", "pump": "the pump is loud", "door": "close the door"}
    for collection in ("docs", "others"):
        client.enqueue(list(texts.items()), collection=collection)
        client.keywords(collection, language="english")
        client.outdated(collection, serve=True)
    embed(db, {text: (1, i / 10) for i, text in enumerate(texts.values())})
    client.enqueue([("door", "open the hatch")], collection="docs")
    client.enqueue([("valve", "open the hatch")], collection="others")

    with db.begin() as conn:
        [space] = registry.all_spaces(conn)
        row = collections.find(conn, "docs")

    def mixed(word: str) -> list[SearchHit]:
        with db.begin() as conn:
            nearest = searching.search(conn, space, QUERY, collection_id=row.id, k=50)
            index = keywords.require_ready(conn, row)
            return keywords.search_mixed(conn, index, 0.3, space, QUERY, word, nearest, k=3)

    for word, best in (("door", "door"), ("pump", "pump"), ("hatch", "valve")):
        hits = mixed(word)
        assert sorted(ids(hits)) == ["door", "pump", "valve"]
        assert hits[0].chunk_id == best
        [old] = [hit for hit in hits if hit.outdated]
        assert (old.chunk_id, old.text) == ("door", "close the door")
        assert old.mixed is not None
        assert old.keyword is not None
        assert (old.keyword > 0) is (word == "door")


def test_it_is_ended_and_its_copies_are_deleted(plain: Client, db: sa.Engine) -> None:
    plain.outdated("others", serve=True)
    for collection in ("docs", "others"):
        plain.enqueue([("c1", "new 1")], collection=collection)
    assert not plain.outdated("docs", serve=False).is_served
    assert "c1" not in ids(search(plain))
    assert "c1" in ids(search(plain, "others"))
    plain.enqueue([("c2", "new 2")], collection="docs")
    assert copies(db) == ["c1"]


def test_a_poller_deletes_what_no_search_reads(plain: Client, db: sa.Engine, settings: Settings) -> None:
    plain.enqueue([("c1", "new 1"), ("c2", "new 2"), ("c3", "new 3")], collection="docs")
    embed(db, {"new 2": (1, 1)})
    assert tidied(db, plain, settings) == ["c1", "c3"]
    with db.begin() as conn:  # as after a move to another space, which has ended
        conn.execute(sa.text("UPDATE outdated_chunks SET space_id = space_id + 1 WHERE chunk_id = 'c1'"))
    assert old_ids(search(plain)) == ["c3"]
    assert tidied(db, plain, settings) == ["c3"]
    with db.begin() as conn:  # as an enqueue that was under way when it was ended
        conn.execute(sa.text("DELETE FROM outdated_collections"))
    assert old_ids(search(plain)) == []
    assert tidied(db, plain, settings) == []


def test_a_poller_leaves_what_an_enqueue_is_about_to_keep(plain: Client, db: sa.Engine, settings: Settings) -> None:
    """The chunk has its vector, and an enqueue that has not committed yet replaces it again."""
    plain.enqueue([("c1", "new 1"), ("c2", "new 2")], collection="docs")
    embed(db, {"new 1": (1, 0.11), "new 2": (1, 0.22)})
    replace = "UPDATE chunks SET content_hash = :hash WHERE chunk_id = 'c1' AND content_hash = :old"
    with db.begin() as conn:
        insert = "INSERT INTO contents (content_hash, text) VALUES (:hash, 'newer 1')"
        conn.execute(sa.text(insert), {"hash": content_hash("newer 1")})
    with db.connect() as enqueue, enqueue.begin():
        enqueue.execute(sa.text(replace), {"hash": content_hash("newer 1"), "old": content_hash("new 1")})
        assert tidied(db, plain, settings) == ["c1"]
    assert {hit.chunk_id: hit.text for hit in search(plain) if hit.outdated} == {"c1": "new 1"}
    assert tidied(db, plain, settings) == ["c1"]


LOOK = """
    ALTER TABLE vectors_{0} RENAME TO vectors_that_are_there;
    CREATE FUNCTION look() RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            IF current_setting('application_name') = 'chunkmill-poller' THEN
                PERFORM pg_advisory_xact_lock_shared(77);
            END IF;
            RETURN true;
        END
    $$;
    CREATE VIEW vectors_{0} AS SELECT * FROM vectors_that_are_there WHERE look();
"""
"""A poller's look at the vectors takes as long as somebody holds the lock 77."""


def test_a_poller_that_looked_before_a_chunk_was_replaced_leaves_its_copy(
    plain: Client, db: sa.Engine, settings: Settings
) -> None:
    """An enqueue replaces one of two chunks while the poller, which saw both with their vectors, is about to act."""
    plain.enqueue([("c1", "new 1"), ("c2", "new 2")], collection="docs")
    embed(db, {"new 1": (1, 0.11), "new 2": (1, 0.22)})
    with db.begin() as conn:
        conn.exec_driver_sql(LOOK.format(collections.find(conn, "docs").space_id))
    poller = create_db(settings.require_database_url(), role="poller")

    def tidy() -> int:
        with poller.begin() as conn:
            return outdated.tidy(conn)

    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 77 AND NOT granted"
    with db.connect() as held:
        held.execute(sa.text("SELECT pg_advisory_lock(77)"))
        tidying = Call(tidy)
        until(lambda: held.execute(sa.text(waits)).scalar_one())
        plain.enqueue([("c1", "newer 1")], collection="docs")
        held.execute(sa.text("SELECT pg_advisory_unlock(77)"))
        assert tidying.result() == 1
    poller.dispose()
    assert copies(db) == ["c1"]
    assert {hit.chunk_id: hit.text for hit in search(plain) if hit.outdated} == {"c1": "new 1"}


def test_what_was_left_when_it_was_ended_is_not_served_when_it_begins_again(plain: Client, db: sa.Engine) -> None:
    plain.outdated("others", serve=True)
    for collection in ("docs", "others"):
        plain.enqueue([("c1", "new 1")], collection=collection)
    with db.begin() as conn:  # the copies stay, as those of an enqueue that was under way
        conn.execute(sa.text("DELETE FROM outdated_collections"))
    embed(db, {"new 1": (1, 1)})
    plain.enqueue([("c1", "newer 1")], collection="docs")
    plain.outdated("docs", serve=True)
    assert old_ids(search(plain)) == []
    assert copies(db) == ["c1"]


def test_to_set_it_again_leaves_the_copies(plain: Client) -> None:
    plain.enqueue([("c1", "new 1")], collection="docs")
    assert plain.outdated("docs", serve=True).waiting == 1


def test_writers_go_on_while_the_table_of_chunks_is_held(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.enqueue([("a", "text")], collection="docs")
    tries: list[float] = []
    monkeypatch.setattr(outdated, "TRIES", 3)
    monkeypatch.setattr("chunkmill.store.outdated.time.sleep", tries.append)
    with db.connect() as vacuum, vacuum.begin():
        vacuum.execute(sa.text("LOCK TABLE chunks IN SHARE UPDATE EXCLUSIVE MODE"))
        with pytest.raises(StoreUnavailable, match=r"held in each of 3 tries.*a VACUUM.*nothing was changed"):
            client.outdated("docs", serve=True)
    assert tries == [outdated.PAUSE_S] * 3
    assert not client.outdated("docs").is_served
    assert client.outdated("docs", serve=True).is_served


def test_what_is_asked_for_is_checked(client: Client) -> None:
    client.enqueue([("a", "text")], collection="docs")
    client.enqueue([("a", "text")], collection="others")
    client.outdated("docs", serve=True)
    with pytest.raises(NotFound):
        client.outdated("nothing", serve=True)
    with pytest.raises(InvalidInput, match="serve is 'yes'; it must be True or False"):
        client.outdated("others", serve="yes")  # type: ignore[arg-type]
    assert not client.outdated("others").is_served
    assert client.outdated("docs").is_served


def test_on_the_schema_of_the_last_release_searches_go_on(client: Client, db: sa.Engine, settings: Settings) -> None:
    client.enqueue([("a", "text")], collection="docs")
    embed(db, {"text": (1,)})
    with db.begin() as conn:
        conn.execute(sa.text("DROP TABLE outdated_chunks, outdated_collections CASCADE"))
    fresh = Client(create_db(settings.require_database_url(), role="fresh"), client._broker, settings)
    assert ids(search(fresh)) == ["a"]
    assert not fresh.outdated("docs").is_served
    with pytest.raises(StoreUnavailable, match="Run: chunkmill migrate"):
        fresh.outdated("docs", serve=True)
    with fresh._db.begin() as conn:
        assert outdated.tidy(conn) == 0
    fresh._db.dispose()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_a_chunk_is_found_once_and_by_its_newest_vector(
    filled: Client, db: sa.Engine, settings: Settings, seed: int
) -> None:
    """Compared with a model in Python: which text of each chunk last had a vector while it was the chunk's text."""
    chance = random.Random(seed)
    now = {f"c{i}": f"text {i}" for i in range(6)}
    shown: dict[str, str] = dict(now)
    for step in range(40):
        what = chance.choice(["replace", "replace", "replace", "embed", "embed", "delete", "tidy", "index"])
        if what == "replace":
            chosen = {f"c{chance.randrange(8)}": f"word {chance.randrange(30)}" for _ in range(2)}
            filled.enqueue(list(chosen.items()), collection="docs")
            now |= chosen
        elif what == "embed" and (waiting := sorted(set(now.values()) - embedded(db))):
            embed(db, {chance.choice(waiting): (1, (step + 7) / 9)})
        elif what == "delete" and now:
            gone = chance.choice(sorted(now))
            filled.delete("docs", [gone])
            del now[gone]
            shown.pop(gone, None)
        elif what == "tidy":
            tidied(db, filled, settings)
        elif what == "index":
            filled.index("docs")
        with_vector = embedded(db)
        shown |= {chunk_id: text for chunk_id, text in now.items() if text in with_vector}
        hits = search(filled)
        assert {hit.chunk_id: hit.text for hit in hits} == shown
        assert len(hits) == len(shown)
        assert set(old_ids(hits)) == {chunk_id for chunk_id in shown if now[chunk_id] not in with_vector}
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)


def embedded(db: sa.Engine) -> set[str]:
    """The texts that have a vector. One that no chunk has any more is deleted with it."""
    with db.begin() as conn:
        [space] = registry.all_spaces(conn)
        query = f"SELECT t.text FROM contents t JOIN {space.table_name} v USING (content_hash)"
        return set(conn.execute(sa.text(query)).scalars())


def test_the_command_does_the_same_and_a_search_says_what_is_old(
    plain: Client, db: sa.Engine, settings: Settings
) -> None:
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}

    def run(*arguments: str) -> str:
        said = CliRunner().invoke(cli, list(arguments), env=env)
        assert said.exit_code == 0, said.output
        return said.output

    assert "do not find a replaced chunk" in run("collections", "outdated", "others")
    assert "0 chunks are found so now" in run("collections", "outdated", "others", "--serve")
    for collection in ("docs", "others"):
        plain.enqueue([("c1", "new 1")], collection=collection)
    assert "1 chunk is found so now" in run("collections", "outdated", "others")
    shown = run("search", "--like", "c0", "-c", "others", "-k", "1")
    assert "c1  (old text)" in shown
    assert "text 1" in shown
    assert "(old text): the chunk was replaced, and its new text is not embedded yet." in shown
    assert json.loads(run("search", "--like", "c0", "-c", "docs", "-k", "1", "--json"))[0]["outdated"] is True
    assert json.loads(run("collections", "outdated", "others", "--hide", "--json")) == {
        "collection": "others", "is_served": False, "waiting": 0,
    }  # fmt: skip
    assert plain.outdated("docs").waiting == 1
    assert "old text" not in run("search", "--like", "c0", "-c", "others", "-k", "1")
