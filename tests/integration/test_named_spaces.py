"""Spaces whose model's name says more than which model it is: prompts, and another model for queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Client, JobState
from chunkmill.domain.spaces import Pooling, pooling_of
from chunkmill.errors import NewerSpace
from chunkmill.models import DEFAULT_MODEL, DEFAULT_SPEC
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner

TEXTS = [f"a text about subject {number}" for number in range(12)]
CHUNKS = [(f"id-{number}", text) for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def engines() -> Engines:
    """Engines of this file alone: those that it loads would drop the one that all other tests share."""
    return Engines(Settings.from_env(embedding_dtype="fp32", embedding_engines=4), "cpu")


@pytest.fixture(scope="module")
def minilm() -> Engine:
    return Engine.load(DEFAULT_MODEL, device="cpu", dtype="fp32")


@pytest.fixture
def responder(context: WorkerContext) -> Iterator[EmbedResponder]:
    running = EmbedResponder(context)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def static_folder(tmp_path: Path) -> Path:
    """A static model of as many dimensions as the default model has, which sentence-transformers could read."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys(["[UNK]", *" ".join(TEXTS).split()])
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    save_file({"embedding.weight": torch.randn(len(words), 384)}, str(tmp_path / "model.safetensors"))
    (tmp_path / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.StaticEmbedding", "path": ""},'
        ' {"type": "sentence_transformers.models.Normalize", "path": "1_Normalize"}]'
    )
    return tmp_path


def test_prompts_of_the_name_reach_documents_and_queries(
    client: Client, runner: Runner, responder: EmbedResponder, minilm: Engine
) -> None:
    name = f"{DEFAULT_MODEL}?prompts=e5"
    plain = runner.finish(client.enqueue(CHUNKS, collection="plain"))
    job = runner.finish(client.enqueue(CHUNKS, collection="prompted", model=name))

    assert (plain.state, job.state, job.embedded, job.cached) == (JobState.COMPLETED, JobState.COMPLETED, 12, 0)
    assert job.space != plain.space
    vectors = client.vectors("prompted")
    wanted = minilm.embed([f"passage: {text}" for text in TEXTS]).vectors
    for (chunk_id, _), vector in zip(CHUNKS, wanted, strict=True):
        np.testing.assert_allclose(vectors[chunk_id], vector, atol=1e-5)
    query = np.asarray(client.embed([TEXTS[0]], kind="query", model=name))
    np.testing.assert_allclose(query[0], minilm.embed([f"query: {TEXTS[0]}"]).vectors[0], atol=1e-5)


def test_queries_are_answered_by_the_query_model(
    client: Client, runner: Runner, responder: EmbedResponder, minilm: Engine, static_folder: Path
) -> None:
    name = f"{DEFAULT_MODEL}?query_model={quote(str(static_folder))}"

    job = runner.finish(client.enqueue(CHUNKS, collection="docs", model=name))

    assert (job.state, job.embedded) == (JobState.COMPLETED, 12)
    static = Engine.load(str(static_folder), device="cpu")
    documents, queries = minilm.embed(TEXTS).vectors, static.embed(TEXTS, "query").vectors
    np.testing.assert_allclose(np.asarray(client.embed(TEXTS, kind="query", model=name)), queries, atol=1e-5)
    np.testing.assert_allclose(np.asarray(client.embed(TEXTS, model=name)), documents, atol=1e-5)
    nearest = [hit.chunk_id for hit in client.search(TEXTS[3], collection="docs", k=3)]
    assert nearest == [CHUNKS[at][0] for at in np.argsort(-(documents @ queries[3]))[:3]]


@pytest.mark.parametrize(
    "change",
    [
        {"pooling": pooling_of("cls+mean"), "dimensions": 768},
        {"pooling": Pooling.WEIGHTED_MEAN},
        {"task": "retrieval.passage", "query_task": "retrieval.query"},
        {"query_model": "0" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_registered_space_is_read_as_it_was_written(db: sa.Engine, change: dict[str, Any]) -> None:
    spec = replace(DEFAULT_SPEC, **change)

    with db.begin() as conn:
        written = registry.register(conn, spec)
    with db.begin() as conn:
        read = registry.get(conn, written.id)

    assert read == written
    assert read.spec.pooling.modes == spec.pooling.modes
    assert read.spec.fingerprint == spec.fingerprint


def test_a_space_with_a_task_is_left_alone_by_a_release_that_knows_none(
    db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release before reads only its own fields: those of a space without a task, and not those of one with it."""
    with db.begin() as conn:
        plain = registry.register(conn, DEFAULT_SPEC)
        tasked = registry.register(conn, replace(DEFAULT_SPEC, task="retrieval"))
    monkeypatch.setattr(registry, "_FIELDS", registry._FIELDS - {"task", "query_task", "query_model"})

    with db.begin() as conn:
        assert registry.get(conn, plain.id) == plain
        with pytest.raises(NewerSpace, match="task"):
            registry.get(conn, tasked.id)
