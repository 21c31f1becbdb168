"""Bridges: queries of a new model answered in an old space, from the first pair to the flip that ends them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from numpy.typing import NDArray

from chunkmill import AccessDenied, AdapterKind, Bridge, BridgeQuote, Client, Spent
from chunkmill.bridge import fitting
from chunkmill.cli.__main__ import cli
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.golden import GoldenQuery
from chunkmill.domain.spaces import OnLong
from chunkmill.errors import InvalidInput, NotFound, StoreUnavailable
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.models.locate import bundled_folder
from chunkmill.settings import Settings
from chunkmill.spaces import bridges, collections, registry, unused
from chunkmill.spaces.registry import Space
from chunkmill.store import golden
from chunkmill.store.write import write_vectors
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.precision import cpu_has_int8
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from tests.support.gateways import KEY, RunningGateway, running_gateway
from tests.support.remotes import remote
from tests.support.waiting import PATIENCE

ANIMALS = ("cat", "dog", "horse", "whale", "sparrow", "beetle", "salmon", "frog")
DEEDS = ("sleeps", "runs", "eats", "hides", "swims", "sings")
PLACES = ("on the roof", "in the river", "near the old mill")
TEXTS = {
    f"{animal}-{i}-{j}": f"The {animal} {deed} {place}. Nobody looks, and it is a quiet morning in spring."
    for animal in ANIMALS
    for i, deed in enumerate(DEEDS)
    for j, place in enumerate(PLACES)
}
"""144 texts."""
QUERIES = [GoldenQuery(f"q{i}", f"{animal} {DEEDS[i % 6]}", {f"{animal}-{i % 6}-0": 1.0}) for i, animal in
           enumerate(ANIMALS)]  # fmt: skip


@pytest.fixture(autouse=True)
def quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in {"EPOCHS": 2, "HIDDEN": 16, "RIDGES": (10.0,), "RANKS": (16,)}.items():
        monkeypatch.setattr(fitting, name, few)


@pytest.fixture(scope="session")
def first_token(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with another pooling, which is another model."""
    bundled = bundled_folder()
    assert bundled is not None
    folder = tmp_path_factory.mktemp("models") / "first-token"
    shutil.copytree(bundled, folder)
    (pooling,) = folder.glob("*_Pooling/config.json")
    known = {name: value for name, value in json.loads(pooling.read_text()).items() if "pooling_mode" not in name}
    pooling.write_text(json.dumps(known | {"pooling_mode_cls_token": True}))
    return str(folder)


@pytest.fixture
def answering(context: WorkerContext) -> Iterator[WorkerContext]:
    responder = EmbedResponder(context)
    responder.start()
    yield context
    responder.stop()


@pytest.fixture(scope="session")
def vectors(first_token: str) -> dict[str, NDArray[np.float32]]:
    """Model → the vectors of all texts, which are made once."""
    made = {}
    for model in ("all-MiniLM-L6-v2", first_token):
        engine = Engine.load(model, device="cpu", dtype="fp32")
        made[model] = np.asarray(engine.embed(list(TEXTS.values())))
        engine.close()
    return made


@pytest.fixture
def filled(client: Client, db: sa.Engine, answering: WorkerContext, vectors: dict[str, NDArray[np.float32]]) -> Client:
    """Two collections in the space of the bundled model, one of them with golden queries."""
    client.enqueue(TEXTS.items(), collection="docs")
    client.enqueue(list(TEXTS.items())[:60], collection="others")
    write(db, client._space(None, OnLong.TRUNCATE), vectors)
    with db.begin() as conn:
        golden.add(conn, collections.find(conn, "docs").id, QUERIES)
    return client


@pytest.fixture
def known(filled: Client, db: sa.Engine, vectors: dict[str, NDArray[np.float32]], first_token: str) -> Client:
    """The same, and all texts have a vector of the other model too."""
    write(db, filled._space(first_token, OnLong.TRUNCATE), vectors)
    return filled


def write(db: sa.Engine, space: Space, vectors: dict[str, NDArray[np.float32]]) -> None:
    """Give all texts their vectors in a space, in the place of a worker."""
    n, of_model = len(TEXTS), vectors[space.spec.model]
    with db.begin() as conn:
        hashes = [content_hash(text) for text in TEXTS.values()]
        tokens, truncated = np.full(n, 9, np.int32), np.zeros(n, np.bool_)
        write_vectors(conn, space, space.spec.fingerprint, hashes, tokens, truncated, of_model)


def space_of(db: sa.Engine, fingerprint: str) -> Space:
    with db.begin() as conn:
        return registry.find_by_prefix(conn, fingerprint)


def move(db: sa.Engine, collection: str, fingerprint: str) -> None:
    """What a flip does, or its rollback."""
    with db.begin() as conn:
        space = registry.find_by_prefix(conn, fingerprint)
        update = "UPDATE collections SET space_id = :space WHERE name = :name"
        conn.execute(sa.text(update), {"space": space.id, "name": collection})


def test_a_bridge_from_learning_to_the_flip_that_ends_it(
    filled: Client, db: sa.Engine, first_token: str, vectors: dict[str, NDArray[np.float32]]
) -> None:
    before = filled.search("a cat that sleeps", collection="docs", k=3, timeout=PATIENCE)

    bridge = filled.bridge("docs", first_token, sample=60, compare_old=True, timeout=PATIENCE)

    assert (bridge.collection, bridge.name, bridge.queries, bridge.queries_from) == ("docs", first_token, 8, "golden")
    assert [trial.kind for trial in bridge.trials] == list(AdapterKind)
    assert 52 <= bridge.pairs <= 60
    assert bridge.embedded == bridge.ranked >= bridge.pairs + 8 - 1
    assert bridge.loss == pytest.approx(bridge.full_ndcg - bridge.ndcg)
    assert bridge.old_ndcg is not None
    assert bridge.old_ndcg > 0.5
    assert bridge.created_at is not None
    assert filled.bridges("docs") == filled.bridges() == [bridge]
    assert filled.bridges("others") == []

    hits = filled.search("a cat that sleeps", collection="docs", k=3, bridge=first_token, timeout=PATIENCE)
    assert {hit.bridge for hit in hits} == {first_token}
    assert all(hit.chunk_id.startswith("cat") for hit in hits)
    # Nobody else goes through it.
    assert filled.search("a cat that sleeps", collection="docs", k=3, timeout=PATIENCE) == before
    assert {hit.bridge for hit in before} == {None}

    write(db, space_of(db, bridge.query_space), vectors)
    direct = filled.embed(["a cat that sleeps"], model=first_token, kind="query", timeout=PATIENCE)[0]
    by_vector = filled.search(direct, collection="docs", k=3, bridge=first_token)
    assert [hit.chunk_id for hit in by_vector] == [hit.chunk_id for hit in hits]

    move(db, "docs", bridge.query_space)

    assert filled.bridges("docs") == []
    after = filled.search("a cat that sleeps", collection="docs", k=3, bridge=first_token, timeout=PATIENCE)
    assert {hit.bridge for hit in after} == {None}
    assert after == filled.search(direct, collection="docs", k=3)

    move(db, "docs", bridge.space)

    with pytest.raises(NotFound, match="has no bridge"):
        filled.search("a cat", collection="docs", bridge=first_token)


def kept(client: Client, db: sa.Engine, collection: str, query_space: Space) -> Bridge:
    """A bridge that nobody learnt, from ``query_space`` into the space of a collection."""
    random = np.random.default_rng(1)
    pairs = fitting.Pairs.of(*(random.standard_normal((40, 384)).astype(np.float32) for _ in range(2)))
    adapter = fitting.fit_rotation(pairs)
    counts = dict.fromkeys(("pairs", "embedded", "ranked", "queries"), 40)
    shares = dict.fromkeys(("full_ndcg", "ndcg", "loss", "low", "high", "full_recall", "recall", "same_hits"), 0.5)
    with db.begin() as conn:
        row = collections.find(conn, collection)
        into, of = registry.get(conn, row.space_id).spec, query_space.spec
        bridge = Bridge(
            collection, of.model, of.fingerprint, into.fingerprint, adapter.kind, **counts, **shares,
            queries_from="golden", old_ndcg=None, trials=(), because="It was not judged.",
        )  # fmt: skip
        assert bridges.keep(conn, bridge, adapter, row, query_space)
    (stored,) = client.bridges(collection)
    return stored


def test_a_flip_ends_the_bridges_of_its_collection_alone(client: Client, db: sa.Engine, first_token: str) -> None:
    for name in ("docs", "others"):
        client.enqueue([(name, f"a text of {name}")], collection=name)
    new = client._space(first_token, OnLong.TRUNCATE)
    of_docs, of_others = (kept(client, db, name, new) for name in ("docs", "others"))
    assert client.bridges() == [of_docs, of_others]

    with db.begin() as conn:
        conn.execute(sa.text("UPDATE collections SET space_id = space_id, name = name"))
    assert client.bridges() == [of_docs, of_others]
    move(db, "docs", new.spec.fingerprint)

    assert client.bridges() == [of_others]
    move(db, "docs", of_docs.space)
    assert client.bridges() == [of_others]


def test_stored_vectors_are_not_embedded_again(known: Client, first_token: str) -> None:
    bridge = known.bridge("docs", first_token, timeout=PATIENCE)

    assert (bridge.embedded, bridge.ranked, bridge.pairs) == (0, 144, 136)


def test_titles_judge_if_there_are_no_golden_queries(known: Client, first_token: str) -> None:
    known.golden("docs").clear()

    bridge = known.bridge("docs", first_token, queries=20, timeout=PATIENCE)

    assert (bridge.queries_from, bridge.queries, bridge.pairs) == ("titles", 20, 124)
    assert "too few" in bridge.because


def test_what_cannot_be_learnt_is_refused_and_nothing_is_stored(known: Client, first_token: str) -> None:
    with pytest.raises(InvalidInput, match="needs no bridge"):
        known.bridge("docs", "all-MiniLM-L6-v2")
    known.enqueue(list(TEXTS.items())[:3], collection="few")
    known.enqueue(list(TEXTS.items())[:36], collection="short")
    with pytest.raises(InvalidInput, match="queries to judge"):
        known.bridge("few", first_token)
    with pytest.raises(InvalidInput, match="sample is 31"):
        known.bridge("docs", first_token, sample=31)
    with pytest.raises(InvalidInput, match="is learnt from at least 32"):
        known.bridge("short", first_token, timeout=PATIENCE)
    with pytest.raises(NotFound):
        known.bridge("nobody", first_token)
    with pytest.raises(NotFound, match="It has none"):
        known.search("a cat", collection="docs", bridge=first_token)
    with pytest.raises(InvalidInput, match="like"):
        known.search(like="cat-0-0", collection="docs", bridge=first_token)
    assert known.bridges() == []


def test_a_collection_that_moves_while_a_bridge_is_learnt_gets_none(
    known: Client, db: sa.Engine, first_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = known._space("all-MiniLM-L6-v2", OnLong.SPLIT)

    def fit_and_move(pairs: fitting.Pairs) -> Iterator[object]:
        move(db, "docs", other.spec.fingerprint)
        yield fitting.fit_rotation(pairs)

    monkeypatch.setattr("chunkmill.client.bridges.fitting.fit_all", fit_and_move)

    with pytest.raises(InvalidInput, match="left its space"):
        known.bridge("docs", first_token, timeout=PATIENCE)
    assert known.bridges() == []


def test_a_bridge_keeps_its_spaces_and_goes_with_its_collection(
    known: Client, db: sa.Engine, first_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = known.bridge("docs", first_token, timeout=PATIENCE)
    new = space_of(db, bridge.query_space)

    with db.begin() as conn, pytest.raises(InvalidInput, match="a bridge of collection 'docs' uses it"):
        unused.drop(conn, new)
    known.drop_collection("docs")
    assert known.bridges() == []
    with db.begin() as conn:
        conn.execute(sa.text("DELETE FROM embed_requests"))
        unused.drop(conn, new)


def test_a_bridge_that_is_learnt_anew_is_used_at_once(known: Client, db: sa.Engine, first_token: str) -> None:
    first = known.bridge("docs", first_token, sample=100, timeout=PATIENCE)
    known.search("a cat", collection="docs", bridge=first_token, timeout=PATIENCE)
    second = known.bridge("docs", first_token, sample=150, timeout=PATIENCE)

    assert known.bridges() == [second]
    assert second.pairs > first.pairs
    with db.begin() as conn:
        row = collections.find(conn, "docs")
        kept = bridges.find(conn, row, first_token)
        stored = conn.execute(sa.text("SELECT arrays FROM bridges")).scalar_one()
    assert kept is not None
    assert kept.adapter.to_bytes() == bytes(stored)
    with known._db.begin() as conn:
        used = bridges.find(conn, row, first_token)
    assert used is not None
    assert used.adapter.to_bytes() == bytes(stored)
    assert known.drop_bridge("docs", first_token) is True
    assert known.drop_bridge("docs", first_token) is False
    with pytest.raises(NotFound):
        known.search("a cat", collection="docs", bridge=first_token)


def test_a_damaged_bridge_is_refused_with_a_sentence(known: Client, db: sa.Engine, first_token: str) -> None:
    known.bridge("docs", first_token, timeout=PATIENCE)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE bridges SET arrays = substring(arrays FOR 100)"))

    with pytest.raises(StoreUnavailable, match="Learn it anew"):
        known.search("a cat", collection="docs", bridge=first_token)


def test_an_older_schema_has_no_bridges_and_says_so(known: Client, db: sa.Engine, first_token: str) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("DROP FUNCTION end_bridges CASCADE"))
        conn.execute(sa.text("DROP TABLE bridges"))

    assert known.bridges() == []
    assert known.search("a cat", collection="docs", timeout=PATIENCE)
    for call in (
        lambda: known.bridge("docs", first_token),
        lambda: known.search("a cat", collection="docs", bridge=first_token),
        lambda: known.drop_bridge("docs", first_token),
    ):
        with pytest.raises(StoreUnavailable, match="chunkmill migrate"):
            call()


def test_the_command_learns_lists_searches_and_drops(
    known: Client, settings: Settings, first_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())

    def run(*words: str) -> str:
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output
        return result.output

    assert "no bridges" in run("bridge")
    quoted = run("bridge", "learn", "docs", first_token, "--sample", "100", "--dry-run")
    assert "texts to embed" in quoted
    assert "Nothing was sent" in quoted
    asked = json.loads(run("bridge", "learn", "docs", first_token, "--sample", "100", "--dry-run", "--json"))
    quote = known.quote_bridge("docs", first_token, sample=100)
    assert (asked["texts"], asked["tokens"], asked["queries"]) == (quote.texts, quote.tokens, 8)
    assert known.bridges() == []
    said = run("bridge", "learn", "docs", first_token, "--sample", "100", "--compare-old")
    assert "full re-embedding" in said
    assert "8 golden queries" in said
    assert "docs" in run("bridge")
    assert "It replaces" not in said
    if cpu_has_int8():  # else no worker here can learn it
        said = run("bridge", "learn", "docs", first_token, "--sample", "100", "--precision", "int8")
        replaced = f"It replaces the collection's bridge of the same model in another space, {quote.query_space[:12]}"
        assert replaced in said
    (listed,) = json.loads(run("bridge", "--json"))
    assert listed["query_space"][:12] in run("bridge")
    assert (listed["query_space"] != quote.query_space) == cpu_has_int8()
    assert (listed["name"], listed["queries"]) == (first_token, 8)
    assert "through the bridge" in run("search", "a cat", "-c", "docs", "--bridge", first_token)
    assert json.loads(run("bridge", "drop", "docs", first_token, "--json"))["dropped"] is True


SEEN = {
    "cmk_docs": Caller(1, "docs", "one", frozenset({Scope.ADMIN}), collections=frozenset({"docs"})),
    "cmk_others": Caller(2, "others", "two", frozenset({Scope.ADMIN}), collections=frozenset({"others"})),
    "cmk_search": Caller(3, "search", "one", frozenset({Scope.SEARCH})),
    "cmk_of_model": Caller(4, "model", "one", frozenset({Scope.ADMIN}), models=frozenset({"all-MiniLM-L6-v2"})),
    KEY: Caller(None, "everything", "one", frozenset(Scope)),
}


class Ring:
    async def caller(self, key: str) -> Caller | None:
        return SEEN.get(key)

    async def close(self) -> None:
        """It holds nothing."""


@pytest.fixture
def running(known: Client) -> Iterator[RunningGateway]:
    with running_gateway(known._settings, keys=Ring()) as made:
        yield made


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_bridge_over_http_is_that_of_a_client(
    known: Client, running: RunningGateway, first_token: str, kind: str
) -> None:
    asked: dict[str, Any] = {"sample": 100, "queries": 6, "compare_old": True}
    with remote(kind, running.url, running.key) as client:
        quote = client.quote_bridge("docs", first_token, **asked)
        assert quote == known.quote_bridge("docs", first_token, **asked)
        assert isinstance(quote, BridgeQuote)
        assert (quote.queries, quote.to_embed, quote.usd, client.bridges()) == (6, 0, 0, [])
        assert quote.tokens > 6

        made = client.bridge("docs", first_token, max_usd="0.5", timeout=PATIENCE, **asked)

        assert [made] == known.bridges() == client.bridges() == client.bridges("docs")
        assert (made.collection, made.queries, made.embedded, made.old_ndcg is None) == ("docs", 6, 0, False)
        assert replace(known.bridge("docs", first_token, timeout=PATIENCE, **asked), created_at=made.created_at) == made
        of_others = known.bridge("others", first_token, queries=4, timeout=PATIENCE)
        assert [one.collection for one in client.bridges()] == ["docs", "others"]
        assert client.bridges("others") == [of_others]

        through: dict[str, Any] = {"collection": "docs", "k": 3, "bridge": first_token, "timeout": PATIENCE}
        hits = client.search("a cat that sleeps", **through)
        assert hits == known.search("a cat that sleeps", **through)
        assert {hit.bridge for hit in hits} == {first_token}
        assert hits != client.search("a cat that sleeps", collection="docs", k=3, timeout=PATIENCE)

        assert client.drop_bridge("docs", first_token) is True
        assert client.drop_bridge("docs", first_token) is False
        assert known.bridges() == client.bridges() == [of_others]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_a_client_refuses_is_refused_over_http_with_the_same_error(
    known: Client, running: RunningGateway, first_token: str, kind: str
) -> None:
    refused: list[tuple[type[Exception], str, Callable[[Any], Any]]] = [
        (InvalidInput, "needs no bridge", lambda one: one.bridge("docs", "all-MiniLM-L6-v2", timeout=PATIENCE)),
        (InvalidInput, "needs no bridge", lambda one: one.quote_bridge("docs", "all-MiniLM-L6-v2")),
        (InvalidInput, "sample is 31", lambda one: one.bridge("docs", first_token, sample=31, timeout=PATIENCE)),
        (InvalidInput, "queries is 1", lambda one: one.quote_bridge("docs", first_token, queries=1)),
        (InvalidInput, "max_usd", lambda one: one.bridge("docs", first_token, max_usd="a lot", timeout=PATIENCE)),
        (InvalidInput, "session", lambda one: one.search("x", collection="docs", bridge="b", session="s")),
        (InvalidInput, "like", lambda one: one.search(like="cat-0-0", collection="docs", bridge=first_token)),
        (NotFound, "absent", lambda one: one.bridge("absent", first_token, timeout=PATIENCE)),
        (NotFound, "absent", lambda one: one.quote_bridge("absent", first_token)),
        (NotFound, "absent", lambda one: one.bridges("absent")),
        (NotFound, "absent", lambda one: one.drop_bridge("absent", first_token)),
        (NotFound, "has no bridge", lambda one: one.search("x", collection="docs", bridge=first_token)),
    ]
    with remote(kind, running.url, running.key) as client:
        for error, words, call in refused:
            for one in (known, client):
                with pytest.raises(error, match=words):
                    call(one)
    for body in ({"sample_size": 99}, {"model": None}, {"dry_run": "yes"}, {"compare_old": "no"}, {"timeout_s": -1}):
        answer = running.http.post("/v1/collections/docs/bridges", json={"model": first_token, **body})
        assert (answer.status_code, next(iter(body)) in answer.text) == (400, True)
    assert running.http.post("/v1/collections/docs/bridges").status_code == 400
    assert running.http.delete("/v1/collections/docs/bridges").status_code == 400
    assert running.http.post("/v1/collections/docs/search", json={"query": "x", "bridge": 1}).status_code == 400
    assert known.bridges() == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_key_learns_lists_and_drops_bridges_only_of_what_it_may_see_and_use(
    known: Client, running: RunningGateway, first_token: str, kind: str
) -> None:
    of_docs = known.bridge("docs", first_token, timeout=PATIENCE)
    of_others = known.bridge("others", first_token, queries=4, timeout=PATIENCE)
    mine = {"cmk_docs": ("docs", of_docs), "cmk_others": ("others", of_others)}
    for key, (name, bridge) in mine.items():
        hidden = "others" if name == "docs" else "docs"
        with remote(kind, running.url, key) as client:
            assert client.bridges() == client.bridges(name) == [bridge]
            assert client.quote_bridge(name, first_token).collection == name
            for verb in ("bridges", "quote_bridge", "bridge", "drop_bridge"):
                given = () if verb == "bridges" else (first_token,)
                with pytest.raises(NotFound, match=f"no collection '{hidden}'"):
                    getattr(client, verb)(hidden, *given)
            with pytest.raises(NotFound, match=f"no collection '{hidden}'"):
                client.search("x", collection=hidden, bridge=first_token)
    with remote(kind, running.url, "cmk_search") as client:
        assert client.bridges() == [of_docs, of_others]
        for verb in ("quote_bridge", "bridge", "drop_bridge"):
            with pytest.raises(AccessDenied):
                getattr(client, verb)("docs", first_token)
    with remote(kind, running.url, "cmk_of_model") as client:
        assert client.search("x", collection="docs", k=1, timeout=PATIENCE)
        for verb in ("quote_bridge", "bridge"):
            with pytest.raises(AccessDenied):
                getattr(client, verb)("docs", first_token)
        with pytest.raises(AccessDenied):
            client.search("x", collection="docs", bridge=first_token, timeout=PATIENCE)
    assert known.bridges() == [of_docs, of_others]


def test_queries_with_the_same_text_are_embedded_and_counted_once(
    known: Client, db: sa.Engine, first_token: str
) -> None:
    with db.begin() as conn:
        again = [GoldenQuery(f"again-{query.id}", query.text, query.relevant) for query in QUERIES]
        once = known.quote_bridge("docs", first_token, compare_old=True)
        golden.add(conn, collections.find(conn, "docs").id, again)
    told: list[Spent] = []

    bridge = known.bridge("docs", first_token, compare_old=True, on_progress=told.append, timeout=PATIENCE)

    quote = known.quote_bridge("docs", first_token, compare_old=True)
    assert (once.queries, quote.queries, bridge.queries) == (8, 16, 16)
    assert once.tokens == quote.tokens
    assert [spent.texts for spent in told] == [8, 8, 16, 16]
    assert told[0].tokens == quote.tokens / 2
    assert {spent.usd for spent in told} == {0}
