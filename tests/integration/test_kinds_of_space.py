"""Spaces of one model side by side: cut vectors, another precision, split texts; with and without its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Client, InvalidInput, JobState
from chunkmill.domain.spaces import LongText, OnLong, Precision
from chunkmill.errors import ModelLoadError, SpaceMismatch, UnknownModel
from chunkmill.models import DEFAULT_MODEL, DEFAULT_SPEC
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.matryoshka import shorten
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.responder import EmbedResponder
from tests.integration.conftest import Runner
from tests.support.waiting import PATIENCE

CHUNKS = [(f"id-{i}", f"a text about subject {i}") for i in range(30)]
VOUCHED = {"embedding_matryoshka": frozenset({DEFAULT_MODEL})}


@pytest.fixture
def vouching(client: Client, settings: Settings) -> Client:
    """A client whose operator says that the bundled model may be cut."""
    return Client(client._db, client._broker, settings.model_copy(update=VOUCHED))


@pytest.fixture
def responder(context: WorkerContext) -> Iterator[EmbedResponder]:
    running = EmbedResponder(context)
    running.start()
    yield running
    running.stop()


class StandIn(SimpleNamespace):
    """For an engine, which is known by its identity and held by a weak reference too."""

    __hash__ = object.__hash__


def registered(db: sa.Engine) -> list[registry.Space]:
    with db.begin() as conn:
        return registry.all_spaces(conn)


@pytest.mark.parametrize("storage", ["vector", "halfvec"])
def test_cut_vectors_from_enqueue_to_search(
    vouching: Client,
    runner: Runner,
    context: WorkerContext,
    settings: Settings,
    db: sa.Engine,
    responder: EmbedResponder,
    storage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Client(vouching._db, vouching._broker, vouching._settings.model_copy(update={"vector_storage": storage}))
    whole = runner.finish(own.enqueue(CHUNKS, collection="whole"))
    job = runner.finish(own.enqueue(CHUNKS, collection="cut", dimensions=96))

    assert (whole.state, job.state, job.embedded, job.cached) == (JobState.COMPLETED, JobState.COMPLETED, 30, 0)
    assert own.audit("cut").complete
    assert job.space != whole.space
    full, cut = registered(db)
    assert [space.spec.dimensions for space in (full, cut)] == [384, 96]
    assert context.engines.for_space(cut) is context.engines.for_space(full)  # one engine for both
    vectors, expected = own.vectors("cut"), own.vectors("whole")
    tolerance = 1e-5 if storage == "vector" else 1e-3
    for name, _ in CHUNKS:
        short = shorten(expected[name][None], 96, normalize=True)[0]
        np.testing.assert_allclose(vectors[name], short, atol=tolerance)
    with pytest.raises(SpaceMismatch, match="384 dimensions, float, long texts: truncate"):
        own.enqueue(CHUNKS, collection="cut")
    # A query is cut in the same way.
    hits = own.search(CHUNKS[7][1], collection="cut", k=3, timeout=PATIENCE)
    assert hits[0].chunk_id == "id-7"
    assert hits[0].score == pytest.approx(1.0, abs=1e-3)
    monkeypatch.setattr("chunkmill.store.indexing.MIN_ROWS", 10)
    assert own.index("cut").is_ready
    assert own.search(CHUNKS[7][1], collection="cut", k=1, timeout=PATIENCE)[0].chunk_id == "id-7"
    answer = own.embed([CHUNKS[7][1]], dimensions=96, timeout=PATIENCE)
    assert answer.shape == (1, 96)
    np.testing.assert_allclose(answer[0], vectors["id-7"], atol=tolerance)


def test_a_cut_that_the_model_was_not_trained_for_is_refused_before_anything_is_written(
    client: Client, rows: Callable[[str], int]
) -> None:
    for dimensions in (96, 385, 0, -1):
        with pytest.raises(InvalidInput, match="384 dimensions"):
            client.enqueue(CHUNKS, collection="docs", dimensions=dimensions)
    for wrong in ("96", 96.0, True):
        with pytest.raises(InvalidInput, match="whole number"):
            client.enqueue(CHUNKS, collection="docs", dimensions=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="precision is 'int4'"):
        client.enqueue(CHUNKS, collection="docs", precision="int4")
    assert [rows(table) for table in ("spaces", "collections", "jobs", "chunks")] == [0, 0, 0, 0]


def test_the_settings_are_the_default_of_their_own_model(
    vouching: Client, settings: Settings, db: sa.Engine, tmp_path: Any
) -> None:
    changed = settings.model_copy(update=VOUCHED | {"embedding_dimensions": 96, "embedding_precision": Precision.INT8})
    own = Client(vouching._db, vouching._broker, changed)

    own.enqueue(CHUNKS, collection="a")
    own.enqueue(CHUNKS, collection="b", dimensions=384, precision="float")
    own.enqueue(CHUNKS, collection="c", model=f"sentence-transformers/{DEFAULT_MODEL}", precision=Precision.FLOAT)

    specs = [space.spec for space in registered(db)]
    assert [(spec.dimensions, spec.precision) for spec in specs] == [(96, Precision.INT8), (384, Precision.FLOAT)]


def test_a_worker_registers_what_its_settings_say_and_refuses_first(
    settings: Settings, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings.model_copy(update={"embedding_dimensions": 96, "embedding_dtype": "fp32"})
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "load", _refuse)
        with pytest.raises(InvalidInput, match="EMBEDDING_DIMENSIONS"):
            Engines(own, "cpu").load_default(db)
    assert registered(db) == []

    engines = Engines(own.model_copy(update=VOUCHED), "cpu")
    space = engines.load_default(db)

    assert space.spec.dimensions == 96
    assert engines.for_space(space).dimensions == 384


def test_an_engine_is_loaded_in_the_precision_of_its_space(
    client: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = client._space(None, OnLong.TRUNCATE, precision="int8")
    asked: list[Any] = []

    def load(folder: Any, **options: Any) -> Engine:
        asked.append((folder.spec.precision, options["precision"]))
        raise ModelLoadError("this machine cannot")

    monkeypatch.setattr(Engine, "load", load)
    engines = Engines(settings, "cpu")
    with pytest.raises(ModelLoadError):
        engines.for_space(space)
    assert asked == [(Precision.INT8, Precision.INT8)]
    assert list(engines.unserved()) == [space.id]


def test_engines_of_both_precisions_stay_loaded_side_by_side(
    client: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Precision] = []

    def load(folder: Any, **_: Any) -> Any:
        loaded.append(folder.spec.precision)
        return StandIn(spec=folder.spec, dimensions=384, device="cpu", backend="", dtype="float32", batch_tokens=1)

    monkeypatch.setattr(Engine, "load", load)
    engines = Engines(settings, "cpu")
    kinds = [client._space(None, OnLong.TRUNCATE, precision=precision) for precision in Precision]

    for _ in range(2):
        assert [engines.for_space(space).spec.precision for space in kinds] == [*Precision]
    assert loaded == [*Precision]


ELSEWHERE = "org/model@v1"


def register(db: sa.Engine, **fields: Any) -> registry.Space:
    with db.begin() as conn:
        return registry.register(conn, dataclasses.replace(DEFAULT_SPEC, model=ELSEWHERE, **fields))


def test_a_producer_without_the_files_gets_every_space_of_a_registered_model(
    vouching: Client, settings: Settings, db: sa.Engine
) -> None:
    with pytest.raises(UnknownModel):
        vouching._space(ELSEWHERE, OnLong.TRUNCATE)
    full = register(db)

    assert vouching._space(ELSEWHERE, OnLong.REJECT) == full
    split = vouching._space(ELSEWHERE, OnLong.SPLIT, precision="int8").spec
    assert split == dataclasses.replace(full.spec, long_text=LongText.SPLIT, precision=Precision.INT8)
    with pytest.raises(InvalidInput, match="nothing says"):
        vouching._space(ELSEWHERE, OnLong.TRUNCATE, dimensions=96)
    with pytest.raises(InvalidInput, match="from 1 to 384"):
        vouching._space(ELSEWHERE, OnLong.TRUNCATE, dimensions=0)
    trusting = settings.model_copy(update={"embedding_matryoshka": frozenset({ELSEWHERE})})
    cut = Client(vouching._db, vouching._broker, trusting)._space(ELSEWHERE, OnLong.TRUNCATE, dimensions=96)
    assert cut.spec.dimensions == 96
    # Once one with the right to it has registered it, others may use it.
    assert vouching._space(ELSEWHERE, OnLong.TRUNCATE, dimensions=96) == cut
    assert vouching._space(ELSEWHERE, OnLong.TRUNCATE) == full


def test_two_revisions_under_one_name_are_not_guessed_between(client: Client, db: sa.Engine) -> None:
    register(db)
    register(db, revision="sha256:other")

    with pytest.raises(UnknownModel, match="hf download"):
        client._space(ELSEWHERE, OnLong.TRUNCATE)


def test_a_space_of_the_old_windows_stays_readable_and_gets_no_new_vectors(
    client: Client, db: sa.Engine, context: WorkerContext
) -> None:
    with db.begin() as conn:
        old = registry.register(conn, dataclasses.replace(DEFAULT_SPEC, long_text=LongText.SPLIT_APART))
    assert registered(db) == [old]

    assert client._space(None, OnLong.SPLIT).id != old.id
    with pytest.raises(SpaceMismatch):
        context.engines.for_space(old)
    context.engines.left_to_others.clear()


def _refuse(*_: object, **__: object) -> None:
    pytest.fail("the weights were loaded before the refusal")
