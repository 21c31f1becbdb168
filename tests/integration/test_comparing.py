"""Two models are judged on a sample of a collection, and the answer is that of a whole search, says what it cost, and
stores nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Client
from chunkmill.cli.__main__ import cli
from chunkmill.client import comparing
from chunkmill.domain.comparing import Comparison, unit
from chunkmill.domain.ranking import mrr_at, ndcg_at
from chunkmill.errors import BudgetExceeded, EngineError, InvalidInput, NotFound, WaitTimeout
from chunkmill.gateway import lasting
from chunkmill.models import DEFAULT_MODEL
from chunkmill.remote import RemoteClient, compare_searches
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from chunkmill_workers.provider.responder import ProviderResponder
from tests.integration.conftest import Runner
from tests.openai_server import OpenAIServer
from tests.support.corridor import Corridor, corridor
from tests.support.gateways import running_gateway
from tests.support.remotes import remote
from tests.support.waiting import PATIENCE

ANIMALS = ("cat", "dog", "horse", "eagle", "salmon", "wasp", "oak", "rose")
CHUNKS = {
    f"{name}-{i}": f"All about the {name}, part {i}.\nThis is what people in town {i} know of a {name} and its kind."
    for name in ANIMALS
    for i in range(3)
}
QUERIES = {f"q-{name}": f"what do they know of the {name}?" for name in ANIMALS}


@pytest.fixture
def vouching(client: Client, settings: Settings) -> Client:
    """A client whose operator says that the bundled model may be cut, which makes a second space of it."""
    cut = settings.model_copy(update={"embedding_matryoshka": frozenset({DEFAULT_MODEL})})
    return Client(client._db, client._broker, cut)


@pytest.fixture
def docs(vouching: Client, runner: Runner, context: WorkerContext) -> Iterator[Client]:
    """``docs`` is embedded in 384 dimensions, ``others`` has other texts, and a worker answers."""
    runner.finish(vouching.enqueue(CHUNKS.items(), collection="docs"))
    runner.finish(vouching.enqueue([("x", "Another text of another collection.")], collection="others"))
    responder = EmbedResponder(context)
    responder.start()
    yield vouching
    responder.stop()


def load_golden(client: Client, tmp_path: Path, collection: str = "docs") -> None:
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text("".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in QUERIES.items()))
    qrels.write_text("".join(f"q-{name}\t{name}-{i}\t{i + 1}\n" for name in ANIMALS for i in range(3)))
    client.golden(collection).load(queries, qrels)


def exact(client: Client, dimensions: int) -> list[list[str]]:
    """The ranking of all chunks for each query, by the vectors that workers make."""

    def embedded(texts: Sequence[str], kind: str) -> np.ndarray:  # type: ignore[type-arg]
        return unit(client.embed(texts, kind=kind, dimensions=dimensions, timeout=PATIENCE))  # type: ignore[arg-type]

    documents, queries = embedded(list(CHUNKS.values()), "document"), embedded(list(QUERIES.values()), "query")
    names = list(CHUNKS)
    return [[names[i] for i in np.argsort(-row)] for row in queries @ documents.T]


def test_the_answer_is_that_of_searches_of_the_whole_collection_and_nothing_is_stored(
    docs: Client, db: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_golden(docs, tmp_path)
    load_golden(docs, tmp_path, "others")  # its chunks are not there
    monkeypatch.setattr(comparing, "WINDOW", 7)
    monkeypatch.setattr(comparing, "TIMED", 2)
    seen: list[int] = []
    with caplog.at_level(logging.DEBUG):
        told = docs.compare("docs", DEFAULT_MODEL, dimensions=96, timeout=PATIENCE, on_progress=seen.append)
    grades = [{f"{name}-{i}": i + 1.0 for i in range(3)} for name in ANIMALS]
    for measured, dimensions in ((lambda change: change.old, 384), (lambda change: change.new, 96)):
        rankings = exact(docs, dimensions)
        expected = np.mean([ndcg_at(10, ranked, of) for ranked, of in zip(rankings, grades, strict=True)])
        assert measured(told.changes.ndcg) == pytest.approx(expected, abs=1e-6)
        expected = np.mean([mrr_at(10, ranked, of) for ranked, of in zip(rankings, grades, strict=True)])
        assert measured(told.changes.mrr) == pytest.approx(expected, abs=1e-6)
    assert (told.sample, told.contents, told.changes.queries, told.left_out) == (24, 24, 8, 0)
    assert seen == [0, 7, 14, 21, 24]
    assert not told.made_of_titles
    assert (told.old.from_store, told.old.embedded, told.new.from_store, told.new.embedded) == (24, 0, 0, 24)
    assert (told.old.vector_bytes, told.new.vector_bytes, told.new.collection_bytes) == (1536, 384, 384 * 24)
    assert told.new.tokens > told.old.tokens > 0
    assert told.new.query_p95_ms is not None
    assert (told.quote.new_to_embed, told.quote.old_to_embed, told.quote.usd) == (24, 0, Decimal(0))
    with db.begin() as conn:
        [new] = [space for space in registry.all_spaces(conn) if space.spec.dimensions == 96]
        assert conn.execute(sa.text(f"SELECT count(*) FROM {new.table_name}")).scalar_one() == 0
        assert conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one() == 0
    for text in (json.dumps(asdict(told), default=str), caplog.text):
        assert "people in town" not in text
        assert "what do they know" not in text
    with pytest.raises(InvalidInput, match="collection 'others' has nothing to judge a model by"):
        docs.compare("others", DEFAULT_MODEL, dimensions=96)


def test_without_golden_queries_titles_ask_for_the_rest_of_their_chunks(docs: Client) -> None:
    told = docs.compare("docs", DEFAULT_MODEL, dimensions=96, timeout=PATIENCE)
    assert told.made_of_titles
    assert told.changes.queries == len(CHUNKS)
    assert told.changes.mrr.old < 1  # with its title, each chunk would be the first
    assert docs.golden("docs").count() == 0


def test_the_command_prints_what_the_client_measured_and_writes_a_picture(
    docs: Client, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_golden(docs, tmp_path)
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    monkeypatch.setenv("EMBEDDING_MATRYOSHKA", DEFAULT_MODEL)
    file = tmp_path / "told.svg"
    given = ["compare", "docs", DEFAULT_MODEL, "--dimensions", "96", "--timeout", str(PATIENCE)]
    ran = CliRunner().invoke(cli, [*given, "--json", "--picture", str(file)], catch_exceptions=False)
    told = json.loads(ran.stdout)
    assert (told["changes"]["queries"], told["sample"]) == (8, 24)
    assert ElementTree.fromstring(file.read_text()).tag.endswith("svg")  # noqa: S314 - our own
    ran = CliRunner().invoke(cli, [*given, "--dry-run"], catch_exceptions=False)
    assert "8 queries would be asked in a sample of 24 texts, in both models, about " in ran.stdout
    assert CliRunner().invoke(cli, [*given, "--max-usd", "much"]).exit_code == 2


def test_a_smaller_sample_has_all_that_is_relevant(docs: Client, tmp_path: Path) -> None:
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text('{"_id": "a", "text": "a cat"}\n{"_id": "b", "text": "a rose"}\n')
    qrels.write_text("a\tcat-1\t1\nb\trose-2\t1\nb\trose-0\t0\n")
    docs.golden("docs").load(queries, qrels)
    told = docs.compare("docs", DEFAULT_MODEL, dimensions=96, sample=5, timeout=PATIENCE)
    assert (told.sample, told.changes.queries) == (5, 2)
    assert told.changes.deep_recall.old == told.changes.deep_recall.new == 1
    told = docs.compare("docs", DEFAULT_MODEL, dimensions=96, sample=1, timeout=PATIENCE)
    assert told.sample == 3


def test_a_text_that_one_model_cannot_embed_is_left_out_of_both(
    docs: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_golden(docs, tmp_path)
    whole = comparing.Comparisons._embed_now

    def refuse_wasps(self, one, texts, kind, deadline):  # type: ignore[no-untyped-def]
        if kind == "document" and any("the wasp" in text for text in texts):
            raise EngineError("the worker could not embed: a test")
        return whole(self, one, texts, kind, deadline)

    monkeypatch.setattr(comparing.Comparisons, "_embed_now", refuse_wasps)
    told = docs.compare("docs", DEFAULT_MODEL, dimensions=96, timeout=PATIENCE)
    assert (told.sample, told.changes.queries, told.left_out) == (21, 7, 4)
    assert "q-wasp" not in {one.id for one in told.changes.worst}


def test_what_cannot_be_compared_is_refused_with_a_reason(docs: Client) -> None:
    with pytest.raises(NotFound, match="there is no collection 'nothing'"):
        docs.compare("nothing", DEFAULT_MODEL)
    with pytest.raises(InvalidInput, match=r"would be compared with itself: both are space [0-9a-f]{12}"):
        docs.compare("docs", DEFAULT_MODEL)
    with pytest.raises(InvalidInput, match="sample is 0"):
        docs.compare("docs", DEFAULT_MODEL, dimensions=96, sample=0)
    with pytest.raises(InvalidInput, match="queries is 1"):
        docs.compare("docs", DEFAULT_MODEL, dimensions=96, queries=1)


def test_without_a_worker_it_ends_in_time_and_takes_its_texts_back(
    vouching: Client, runner: Runner, db: sa.Engine
) -> None:
    runner.finish(vouching.enqueue(CHUNKS.items(), collection="docs"))
    with pytest.raises(WaitTimeout):
        vouching.compare("docs", DEFAULT_MODEL, dimensions=96, timeout=0.5)
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one() == 0


def test_two_gateways_are_compared_by_what_they_return(
    docs: Client, runner: Runner, settings: Settings, tmp_path: Path
) -> None:
    """One of them serves the same chunks from a collection of cut vectors."""
    runner.finish(docs.enqueue(CHUNKS.items(), collection="cut", dimensions=96))
    load_golden(docs, tmp_path)
    queries = docs.golden("docs").list()
    with (
        running_gateway(settings) as one,
        running_gateway(settings) as other,
        RemoteClient(one.url, one.key, timeout=PATIENCE) as old,
        RemoteClient(other.url, other.key, timeout=PATIENCE) as new,
    ):
        same = compare_searches(old, new, queries, collection="docs", timeout=PATIENCE)
        cut = compare_searches(old, new, queries, collection="docs", new_collection="cut", timeout=PATIENCE)
    assert (same.queries, same.ndcg.difference, same.overlap, same.worst) == (8, 0.0, 1.0, ())
    told = docs.compare("docs", DEFAULT_MODEL, dimensions=96, timeout=PATIENCE).changes
    for one_way, other_way in ((cut.ndcg, told.ndcg), (cut.recall, told.recall), (cut.mrr, told.mrr)):
        assert (one_way.old, one_way.new) == (pytest.approx(other_way.old), pytest.approx(other_way.new))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_comparison_over_http_says_what_that_of_a_client_says(
    docs: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """But for the speeds that were measured. Blank lines come before the answer."""
    monkeypatch.setattr(lasting, "HEARTBEAT_SECONDS", 1e-3)
    load_golden(docs, tmp_path)
    load_golden(docs, tmp_path, "others")
    asked = {"dimensions": 96, "sample": 20, "queries": 7}
    with running_gateway(docs._settings) as gateway, remote(kind, gateway.url, gateway.key) as client:
        assert client.quote_comparison("docs", DEFAULT_MODEL, **asked) == docs.quote_comparison(
            "docs", DEFAULT_MODEL, **asked
        )
        over_http = client.compare("docs", DEFAULT_MODEL, max_usd="0.5", timeout=PATIENCE, **asked)
        told = docs.compare("docs", DEFAULT_MODEL, timeout=PATIENCE, **asked)
        for one in (client, docs):
            with pytest.raises(InvalidInput, match="nothing to judge a model by"):
                one.compare("others", DEFAULT_MODEL, timeout=PATIENCE, **asked)
            with pytest.raises(NotFound):
                one.compare("absent", DEFAULT_MODEL, timeout=PATIENCE)
            with pytest.raises(InvalidInput, match="sample"):
                one.compare("docs", DEFAULT_MODEL, sample=0)
    assert _unmeasured(over_http) == _unmeasured(told)


def _unmeasured(told: Comparison) -> Comparison:
    measured = dict.fromkeys(("tokens_per_second", "query_p50_ms", "query_p95_ms", "usd_per_million", "collection_usd"))
    return replace(told, old=replace(told.old, **measured), new=replace(told.new, **measured))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_searches_are_tuned_over_http_as_by_a_client(docs: Client, tmp_path: Path, kind: str) -> None:
    load_golden(docs, tmp_path)
    docs.keywords("docs", language="english")
    with running_gateway(docs._settings) as gateway, remote(kind, gateway.url, gateway.key) as client:
        tuned = client.tune_search("docs", timeout=PATIENCE)
        assert tuned == docs.tune_search("docs", timeout=PATIENCE)
        assert tuned == client.tune_search("docs", timeout=PATIENCE, space="active")
        for one in (client, docs):
            with pytest.raises(InvalidInput, match="keywords"):
                one.tune_search("others", timeout=PATIENCE)
            with pytest.raises(NotFound):
                one.tune_search("docs", timeout=PATIENCE, space="previous")
    assert (tuned.n, tuned.collection) == (8, "docs")


@pytest.fixture
def paid(settings: Settings, server: OpenAIServer) -> Iterator[Corridor]:
    server.calm()
    with corridor(settings, server) as made:
        answering = ProviderResponder(made.context)
        answering.start()
        yield made
        answering.stop()


def test_a_paid_model_is_quoted_to_the_token_and_is_not_asked_above_the_limit(
    paid: Corridor, context: WorkerContext, runner: Runner, tmp_path: Path
) -> None:
    """Against the local model of the collection."""
    local, model = paid.client, paid.settings.embedding_model
    runner.finish(local.enqueue(CHUNKS.items(), collection="docs", model=DEFAULT_MODEL))
    load_golden(local, tmp_path)
    quote = local.quote_comparison("docs", model)
    assert (quote.queries, quote.contents, quote.new_to_embed, quote.old_to_embed) == (8, 24, 24, 0)
    assert quote.old_usd == 0
    assert quote.usd is not None
    assert quote.usd > 0
    with pytest.raises(
        BudgetExceeded,
        match=r"the comparison would cost about 0\.0000\d* USD, and the most that it may cost \(max_usd\) is 0\.0000",
    ):
        local.compare("docs", model, max_usd=quote.usd - Decimal("1e-10"), timeout=1)
    assert paid.one("SELECT count(*) FROM charges") == 0
    responder = EmbedResponder(context)
    responder.start()
    told = local.compare("docs", model, max_usd=quote.usd, timeout=PATIENCE)
    responder.stop()
    assert paid.one("SELECT sum(usd) FROM charges") == quote.usd
    assert paid.one("SELECT sum(contents) FROM charges") == 24 + 8
    assert told.new.usd_per_million == Decimal("0.02")
    assert told.new.collection_usd is not None
    # The server's vectors say nothing of a text's meaning.
    assert told.changes.ndcg.difference < 0
    assert told.changes.worst


def test_a_month_that_has_not_enough_left_pays_for_no_comparison(
    settings: Settings, server: OpenAIServer, runner: Runner, tmp_path: Path
) -> None:
    server.calm()
    with corridor(settings, server, openai_monthly_budget_usd=Decimal("0.000001")) as made:
        runner.finish(made.client.enqueue(CHUNKS.items(), collection="docs", model=DEFAULT_MODEL))
        load_golden(made.client, tmp_path)
        with pytest.raises(
            BudgetExceeded, match=r"what OPENAI_MONTHLY_BUDGET_USD has left this month is 0\.0000010 USD"
        ):
            made.client.compare("docs", made.settings.embedding_model)
        assert made.one("SELECT count(*) FROM embed_requests") == 0
