"""What the gates of a re-embedding ask for is measured in the database, in both spaces."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Client, Gates
from chunkmill.domain import serving
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.gates import GateResult
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.ledger import judging
from chunkmill.ledger.judging import Judgement, JudgingStopped, judge
from chunkmill.models import DEFAULT_MODEL
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.store import indexing
from chunkmill.store import search as searching
from chunkmill.store.write import write_vectors
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner
from tests.support.waiting import PATIENCE

ANIMALS = ("cat", "dog", "horse", "eagle", "salmon", "wasp", "oak", "rose", "granite", "comet", "piano", "bridge")
CHUNKS = {
    f"{name}-{i}": f"All about the {name}, part {i}.\nThis is what people in town {i} know of a {name} and its kind."
    for name in ANIMALS
    for i in range(3)
}


@pytest.fixture
def vouching(client: Client, settings: Settings) -> Client:
    """A client whose operator says that the bundled model may be cut, which makes a second space of it."""
    cut = settings.model_copy(update={"embedding_matryoshka": frozenset({DEFAULT_MODEL})})
    return Client(client._db, client._broker, cut)


@pytest.fixture
def responder(context: WorkerContext) -> Iterator[EmbedResponder]:
    running = EmbedResponder(context)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def two_spaces(vouching: Client, runner: Runner, db: sa.Engine) -> tuple[registry.Space, registry.Space]:
    """``docs`` is in a space of 384 dimensions, and its texts have vectors of 96 too. ``others`` has other texts."""
    runner.finish(vouching.enqueue(CHUNKS.items(), collection="docs"))
    runner.finish(
        vouching.enqueue([(f"again-{name}", text) for name, text in CHUNKS.items()], collection="cut", dimensions=96)
    )
    runner.finish(vouching.enqueue([("noise", "Another text, in another collection.")], collection="others"))
    with db.begin() as conn:
        old, new = registry.all_spaces(conn)
    return old, new


def judged(db: sa.Engine, settings: Settings, spaces: tuple[registry.Space, registry.Space], gates: Gates) -> Judgement:
    with db.begin() as conn:
        number = collections.find(conn, "docs").id
    return judge(db, settings, number, *spaces, gates, timeout=PATIENCE)


def by_name(judgement: Judgement) -> dict[str, GateResult]:
    return {result.name: result for result in judgement.results}


def load_golden(client: Client, tmp_path: Path) -> None:
    """A query about each animal, which three chunks answer, and one whose chunk is gone."""
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    queries.write_text(
        "".join(json.dumps({"_id": f"q-{name}", "text": f"what is known of the {name}?"}) + "\n" for name in ANIMALS)
        + '{"_id": "gone", "text": "what was here?"}\n'
    )
    qrels.write_text("".join(f"q-{name}\t{name}-{i}\t1\n" for name in ANIMALS for i in range(3)) + "gone\tgone-1\t1\n")
    client.golden("docs").load(queries, qrels)


def test_both_spaces_are_judged_by_the_same_queries_and_the_report_names_no_text(
    vouching: Client, db: sa.Engine, two_spaces: tuple[registry.Space, registry.Space], responder: EmbedResponder,
    tmp_path: Path,
) -> None:  # fmt: skip
    load_golden(vouching, tmp_path)
    gates = Gates(queries=len(ANIMALS), ndcg_loss=0.2, p95_ratio=1000)
    told = judged(db, vouching._settings, two_spaces, gates)
    assert told.passed, told.results
    assert told.changes is not None
    assert told.changes.queries == len(ANIMALS)
    assert told.changes.ndcg.old > 0.8
    # What was judged is what searches find.
    hits = [vouching.search(f"what is known of the {name}?", collection="docs", timeout=PATIENCE) for name in ANIMALS]
    expected = np.mean(
        [
            sum(hit.chunk_id.startswith(f"{name}-") for hit in animal) / 3
            for name, animal in zip(ANIMALS, hits, strict=True)
        ]
    )
    assert told.changes.recall.old == pytest.approx(expected)
    assert 0 < told.changes.overlap < 1
    assert (told.measured.timed, told.measured.recall_queries) == (len(ANIMALS), len(ANIMALS) + len(CHUNKS))
    report = json.dumps(told.report())
    assert "people in town" not in report
    assert "what is known" not in report
    assert json.loads(report)["passed"] is True


def test_titles_are_judged_without_their_titles_in_both_spaces(
    vouching: Client,
    db: sa.Engine,
    two_spaces: tuple[registry.Space, registry.Space],
    responder: EmbedResponder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judging, "TIMED", 3)  # the others are embedded together
    assert vouching.golden("docs").from_titles() == len(CHUNKS)
    told = judged(db, vouching._settings, two_spaces, Gates(queries=2, ndcg_loss=1, p95_ratio=1000))
    assert told.changes is not None
    assert told.changes.queries == told.titles == told.report()["titles"] == len(CHUNKS)
    # With its title each chunk would be first.
    assert told.changes.mrr.old < 1
    assert told.changes.mrr.new < 1


def test_chunks_that_only_the_old_space_has_are_missing_and_dead_ones_are_told_apart(
    vouching: Client, db: sa.Engine, two_spaces: tuple[registry.Space, registry.Space]
) -> None:
    gates = Gates(canary=False, recall=None, ndcg_loss=None, p95_ratio=None)
    assert judged(db, vouching._settings, two_spaces, gates).passed
    gone = [content_hash(text) for name, text in CHUNKS.items() if name.startswith("cat-")]
    with db.begin() as conn:
        conn.execute(sa.text(f"DELETE FROM {two_spaces[1].table_name} WHERE content_hash = ANY(:gone)"), {"gone": gone})
        number = collections.find(conn, "docs").id
        insert = """
            INSERT INTO dead_chunks (job_id, chunk_id, content_hash, code, reason)
            SELECT j.id, 'cat-0', :hash, 'forward_failed', 'a test'
            FROM jobs j
            WHERE j.collection_id = :collection
        """
        # Dead in the old space: that says nothing of the new one.
        conn.execute(sa.text(insert), {"hash": gone[0], "collection": number})
    result = by_name(judged(db, vouching._settings, two_spaces, gates))["coverage"]
    assert (result.passed, result.measured) == (False, 3.0)
    assert (
        "3 of 36 chunks can be searched now and have no vector in the new space; 0 may be missing." in result.sentence
    )
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE jobs SET space_id = :new WHERE collection_id = :collection"),
            {"new": two_spaces[1].id, "collection": number},
        )
    result = by_name(judged(db, vouching._settings, two_spaces, gates))["coverage"]
    assert "1 of them are on its dead list" in result.sentence
    # A chunk that cannot be searched now is not lost by the move.
    with db.begin() as conn:
        conn.execute(sa.text(f"DELETE FROM {two_spaces[0].table_name} WHERE content_hash = ANY(:gone)"), {"gone": gone})
    assert judged(db, vouching._settings, two_spaces, gates).passed


def test_without_a_worker_nothing_is_judged_and_the_gate_says_why_and_the_recall_is_measured(
    vouching: Client, db: sa.Engine, two_spaces: tuple[registry.Space, registry.Space], tmp_path: Path
) -> None:
    load_golden(vouching, tmp_path)
    with db.begin() as conn:
        number = collections.find(conn, "docs").id
    told = judge(db, vouching._settings, number, *two_spaces, Gates(queries=2), timeout=3)
    results = by_name(told)
    assert [name for name, result in results.items() if not result.passed] == ["ndcg", "p95"]
    assert results["ndcg"].sentence.startswith("The golden queries were not embedded and judged in time.")
    assert results["recall"].measured == 1.0
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one() == 0


def test_a_collection_without_golden_queries_is_told_to_get_some(
    vouching: Client, db: sa.Engine, two_spaces: tuple[registry.Space, registry.Space]
) -> None:
    results = by_name(judged(db, vouching._settings, two_spaces, Gates()))
    assert [name for name, result in results.items() if not result.passed] == ["ndcg", "p95"]
    assert "0 golden queries are too few" in results["ndcg"].sentence
    # This gate stays in the way of whoever goes without the other, so it too says what to do.
    assert "`chunkmill golden titles COLLECTION`, or go without this gate: `--p95-ratio off`" in results["p95"].sentence


def test_the_report_about_a_single_query_is_json_that_postgres_takes(
    vouching: Client,
    db: sa.Engine,
    two_spaces: tuple[registry.Space, registry.Space],
    responder: EmbedResponder,
    tmp_path: Path,
) -> None:
    """One query bounds nothing, and infinity is no number of JSON."""
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a cat"}')
    (tmp_path / "qrels.tsv").write_text("q\tcat-0\t1\n")
    vouching.golden("docs").load(tmp_path / "queries.jsonl", tmp_path / "qrels.tsv")
    report = judged(db, vouching._settings, two_spaces, Gates()).report()
    with db.begin() as conn:
        kept = conn.execute(sa.text("SELECT CAST(:report AS jsonb)"), {"report": json.dumps(report)}).scalar_one()
    assert kept["changes"]["queries"] == 1
    assert (kept["changes"]["ndcg"]["low"], kept["changes"]["spread"]) == (None, None)


def test_the_recall_is_that_of_the_serving_index_of_the_new_space(
    client: Client, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that misses half of the nearest is stopped."""
    monkeypatch.setattr(indexing, "MIN_ROWS", 2)
    monkeypatch.setattr(serving, "MIN_ROWS", 2)
    monkeypatch.setattr(searching, "MAX_EXACT", 0)
    texts = {f"c{i}": f"chunk {i}" for i in range(60)}
    for name in ("docs", "others"):
        client.enqueue(texts.items(), collection=name)
    space = client._space(None, OnLong.TRUNCATE)
    vectors = np.random.default_rng(0).standard_normal((60, space.spec.dimensions)).astype(np.float32)
    with db.begin() as conn:
        hashes = [content_hash(text) for text in texts.values()]
        write_vectors(
            conn, space, space.spec.fingerprint, hashes, np.ones(60, np.int32), np.zeros(60, np.bool_), vectors
        )
        number = collections.find(conn, "docs").id
    indexing.build_now(db, space, number, memory_mb=64)
    gates = Gates(canary=False, ndcg_loss=None, p95_ratio=None)
    result = by_name(judge(db, settings, number, space, space, gates))["recall"]
    assert (result.passed, result.measured) == (True, 1.0)
    with db.begin() as conn:
        (segment,) = conn.execute(sa.text("SELECT relname FROM pg_class WHERE relname ~ '^segment_[0-9]+$'")).scalars()
        conn.execute(sa.text(f"DELETE FROM {segment} WHERE content_hash = ANY(:half)"), {"half": hashes[::2]})
    result = by_name(judge(db, settings, number, space, space, gates))["recall"]
    assert not result.passed
    assert result.measured is not None
    assert 0.3 < result.measured < 0.7


def test_who_pays_is_told_of_every_text_and_its_tokens(
    vouching: Client, db: sa.Engine, two_spaces: tuple[registry.Space, registry.Space], responder: EmbedResponder
) -> None:
    vouching.golden("docs").from_titles(7)
    told: dict[str, dict[str, int]] = {space.spec.fingerprint: {} for space in two_spaces}

    def count(spec: SpaceSpec, texts: Sequence[str], ask: Callable[[], EmbeddedTexts]) -> EmbeddedTexts:
        embedded = ask()
        told[spec.fingerprint] |= zip(texts, embedded.tokens.tolist(), strict=True)
        return embedded

    with db.begin() as conn:
        number = collections.find(conn, "docs").id
    judge(db, vouching._settings, number, *two_spaces, Gates(queries=7), timeout=PATIENCE, count=count)

    first, second = told.values()
    assert len(first) == 14  # titles, and the texts under them
    assert {part for text in first for part in text.split("\n")} <= {
        p for text in CHUNKS.values() for p in text.split("\n")
    }
    assert (
        first == second == dict(zip(first, vouching.embed_texts(first, timeout=PATIENCE).tokens.tolist(), strict=True))
    )


def test_who_is_stopped_takes_the_texts_back(
    vouching: Client, db: sa.Engine, two_spaces: tuple[registry.Space, registry.Space], tmp_path: Path
) -> None:
    load_golden(vouching, tmp_path)

    def is_asked() -> bool:
        with db.begin() as conn:
            return bool(conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one())

    with db.begin() as conn:
        number = collections.find(conn, "docs").id
    with pytest.raises(JudgingStopped):
        judge(db, vouching._settings, number, *two_spaces, Gates(), timeout=PATIENCE, is_stopping=is_asked)
    assert not is_asked()


def test_the_parts_of_many_texts_come_back_in_their_order(
    vouching: Client, db: sa.Engine, two_spaces: tuple[registry.Space, registry.Space], responder: EmbedResponder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(judging, "PART_TEXTS", 2)
    monkeypatch.setattr(judging, "OPEN_PARTS", 3)
    measuring = judging._Measuring(db, vouching._settings, 0, two_spaces, time.monotonic() + PATIENCE, lambda: False)
    texts = list(CHUNKS.values())[:9]
    made = measuring._embed(two_spaces[0], texts, "document")
    assert np.allclose(made, vouching.embed(texts, timeout=PATIENCE), atol=1e-5)
